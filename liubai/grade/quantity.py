r"""Numbers as mathematical answers write them: fractions in LaTeX, mixed numbers, units, money, percent.

Exact and bounded. Reads texts that :func:`liubai.grade.mathtext.tidy` has put into one spelling.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from liubai.grade.verifiers import parse_number

MAX_DIGITS = 60  #: of one number

_PART = r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
_FRACTION = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<whole>[0-9]+) ?)?\\frac\{{(?P<up>-?(?:{_PART}))\}}\{{(?P<down>-?(?:{_PART}))\}}"
)
_MIXED = re.compile(r"(?P<sign>[-+]?)(?P<whole>[0-9]+) (?P<up>[0-9]+)/(?P<down>[0-9]+)")
_REPEATING = re.compile(
    r"(?P<sign>[-+]?)(?P<whole>[0-9]*)\.(?P<once>[0-9]*)\\(?:overline|bar) ?\{(?P<again>[0-9]+)\}"
)
_SCIENTIFIC = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<factor>{_PART}) ?(?:\\times|\\cdot|\*|x) ?)?"
    r"10(?:\^|\*\*)\{?(?P<power>-?[0-9]{1,3})\}?"
)
_UNIT = re.compile(
    r"(?P<number>.*?[0-9}.%]) ?"
    r"(?:(?P<degree>\\degree)|\\text ?\{(?P<text>[^{}]*)\}|(?P<bare>[A-Za-z][A-Za-z ./]*))"
    r"(?:\^ ?\{?(?P<power>[1-4])\}?)?"
)
_TEXT_UNIT = re.compile(
    r"(?P<number>.*[^ ]) ?(?P<degree>(?!))?\\text ?\{(?P<text>[A-Za-z /]*)\}(?:\^ ?\{?(?P<power>[1-4])\}?)?"
)
_MONEY = re.compile(r"([-+]?) ?\\?([$€£¥]) ?([-+]?[0-9.].*)")
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "sterling", "¥": "yen"}

#: Spellings of one unit. Bare words after a number are taken for a unit only when they stand here and have
#: two letters or more: 5m may be five times m.
UNITS: dict[str, str] = {
    word: words[0]
    for words in (
        ["degree", "degrees", "deg"],
        ["inch", "inches", "in"],
        ["foot", "feet", "ft"],
        ["yard", "yards", "yd"],
        ["mile", "miles", "mi"],
        ["millimeter", "millimeters", "mm"],
        ["centimeter", "centimeters", "centimetres", "cm"],
        ["meter", "meters", "metres", "m"],
        ["kilometer", "kilometers", "kilometres", "km"],
        ["gram", "grams", "g"],
        ["kilogram", "kilograms", "kg"],
        ["pound", "pounds", "lb", "lbs"],
        ["second", "seconds", "sec", "s"],
        ["minute", "minutes", "min"],
        ["hour", "hours", "hr", "h"],
        ["day", "days"],
        ["week", "weeks"],
        ["month", "months"],
        ["year", "years", "years old", "years of age"],
        ["cent", "cents"],
        ["dollar", "dollars"],
        ["euro", "euros"],
        ["liter", "liters", "litres", "l"],
        ["unit", "units"],
        ["mph", "miles per hour", "mi/h"],
        ["m/s", "meters per second", "metres per second"],
        ["km/h", "kilometers per hour", "kilometres per hour"],
        ["ft/s", "feet per second"],
    )
    for word in words
}
_DIMENSION = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
#: Words behind a number that are no unit: they change its meaning.
_NO_UNIT = re.compile(
    r"\b(?:or|and|not?|none|never|more|less|than|least|most|about|approximately|nearly|over|under|to|between|"
    r"thousand|million|billion|trillion|hundred|dozen|percent|per|half|plus|minus|times|if|when|where|i|"
    r"squared|cubed|factorial|divided|multiplied|thirds|quarters|[a-z]*(?:[dhxr]th|[vnl]enth|ionth)s?)\b"
)
#: The same in an answer, which has less to say than a gold.
_NO_ANSWER = re.compile(
    r"\b(?:[a-z]*(?:thousand|million|billion|trillion|hundred)s|dozens|scores|percents|halves|pairs|"
    r"ones|twos|threes|fours|fives|sixes|sevens|eights|nines|tens|"
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)(?:ties|teens)|[a-z]*th(?:ird)?s?|"
    r"is|are|was|be|by|in|base|squares|cubes|roots?|powers?|raised|factorials|mod|modulo|remainders?|"
    r"negatives?|inverses?|reciprocals?|radians?|right|wrong|false|true|correct|incorrect)\b"
)
_MAX_UNIT_WORDS = 4
_PLURALS = re.compile(r"(?:[a-z]+ )?(?:[a-z]+[a-rt-z]s|[a-z]*(?:people|children|men|women))")


@dataclass(frozen=True, slots=True)
class Quantity:
    """A written number. ``places``: decimals behind the point, ``None`` for integers and fractions."""

    value: Fraction
    percent: bool = False
    unit: str | None = None
    places: int | None = None


def read_number(text: str, trusted: bool = False) -> Quantity | None:
    """The number that ``text`` (tidied) is, or ``None``: ``\\frac{9}{7}``, ``1\\frac{4}{5}``,
    ``\\$32,348``, ``5.4\\text{ cents}``, ``30\\degree``, ``28%``, ``1.2\\times10^{-3}``, ``\\text{13}``.

    Nothing is computed but what the notation of one number asks for: ``2+2`` is no number. Of an answer,
    an unknown unit has to be a plural of one or two words ("students"); ``trusted`` (a gold) has any.
    """
    text = text.strip()
    unit: str | None = None
    inside = re.fullmatch(r"\\text ?\{([^{}]*)\}", text)
    text = inside[1].strip() if inside else text
    money = _MONEY.fullmatch(text)
    if money is not None:
        unit, text = _CURRENCIES[money[2]], money[1] + money[3]
    percent = re.fullmatch(r"(.*[0-9}.]) ?(?:%|\\text\{ ?percent ?\}|percent|percentage|pct)", text)
    if percent is not None:
        text = percent[1]
    else:
        found = _UNIT.fullmatch(text)
        if found is not None:
            named = _unit(found, trusted)
            if named is None:
                return None
            text, unit = found["number"], named
    value = _value(text.strip())
    if value is None:
        return None
    point = text.rfind(".")
    places = (
        len(text) - point - 1 if point >= 0 and "frac" not in text and text[point + 1 :].isdigit() else None
    )
    if percent is not None:
        return Quantity(value / 100, True, unit, places)
    return Quantity(value, False, unit, places)


def _unit(found: re.Match[str], trusted: bool) -> str | None:
    """The canonical unit, ``centimeter^2``, unknown ``?students^1``; ``None`` for words that are none."""
    if found["degree"]:
        return "degree"
    words = (found["text"] if found["text"] is not None else found["bare"]).replace(".", " ").lower().split()
    power = int(found["power"] or 1)
    if not words:
        return "" if power == 1 else None
    while words and words[0] in _DIMENSION:
        power = _DIMENSION[words.pop(0)]
    name = " ".join(words)
    known = UNITS.get(name)
    if found["text"] is None and len(name) < 2:
        return None
    if known is None:
        if found["text"] is None or len(words) > _MAX_UNIT_WORDS or _NO_UNIT.search(name):
            return None
        if not re.fullmatch(r"[a-z ]+", name) or found["power"]:  # 5\text{ apples}^2 is who knows what
            return None
        if not trusted and (_NO_ANSWER.search(name) or not _PLURALS.fullmatch(name)):
            return None
    return f"{known or '?' + name}^{power}"


def split_unit(text: str, trusted: bool = False) -> tuple[str, str | None]:
    """A formula and the unit that is written as text behind it: ``8\\pi\\text{ cm}^2`` → ``8\\pi``."""
    found = _TEXT_UNIT.fullmatch(text)
    unit = _unit(found, trusted) if found else None
    return (found["number"], unit) if found and unit is not None else (text, None)


def _value(text: str) -> Fraction | None:
    if re.match(r"[-+]?0,", text):
        return None  # 0,111 is a decimal comma, not thousands
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1]
    plain = parse_number(text)
    if plain is not None:
        return plain if "e" not in text.lower() else None  # 2e3 may be 2·e·3
    match = _FRACTION.fullmatch(text) or _MIXED.fullmatch(text)
    if match is not None:
        if any(len(match[group]) > MAX_DIGITS for group in ("up", "down")):
            return None
        up, down = Fraction(match["up"]), Fraction(match["down"])
        if down == 0 or (match["whole"] is not None and (up < 0 or down < 0 or "." in match["up"])):
            return None
        value = Fraction(int(match["whole"] or 0)) + up / down
        return -value if match["sign"] == "-" else value
    match = _REPEATING.fullmatch(text)
    if match is not None and len(text) <= MAX_DIGITS:
        once, again = match["once"], match["again"]
        cycle = Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(once))
        value = Fraction(int(match["whole"] + once or "0"), 10 ** len(once)) + cycle
        return -value if match["sign"] == "-" else value
    match = _SCIENTIFIC.fullmatch(text)
    if match is not None and len(text) <= MAX_DIGITS:
        value = Fraction(match["factor"] or 1) * Fraction(10) ** int(match["power"])
        return -value if match["sign"] == "-" else value
    return None


MIN_ROUNDED = 6  #: digits of a decimal from which on it may stand for a fraction that never ends


def same_number(gold: Quantity, given: Quantity, tolerance: Fraction = Fraction(0)) -> bool:
    """Equal in value and, where both name a unit that we know, in unit.

    A percent sign may be missing where gold has it (28 for 28%: the question has asked for a percentage). A
    decimal of six digits or more may stand for a fraction that never ends, correctly rounded or cut off.
    """
    if not units_agree(gold.unit, given.unit):
        return False
    if _close(gold, given, tolerance):
        return True
    if given.percent or not gold.percent:
        return False
    return abs(given.value / 100 - gold.value) <= tolerance * abs(gold.value)


def units_agree(gold: str | None, given: str | None) -> bool:
    """May be missing. Cents are not dollars, cm² are not cm³, apples are not cm.

    Two names that we do not know, such as "students" and "children", are taken for the same.
    """
    if not gold or not given:
        return True
    (a, m), (b, n) = (f"{unit}^1".split("^")[:2] for unit in (gold, given))
    if a.startswith("?"):  # "feet tall" are feet
        return b.startswith("?") or b in [UNITS.get(word) for word in a[1:].split()]
    return a == b and m == n


def _close(gold: Quantity, given: Quantity, tolerance: Fraction) -> bool:
    difference = abs(gold.value - given.value)
    if difference <= tolerance * abs(gold.value):
        return True
    for exact, rounded in ((gold, given), (given, gold)):
        if rounded.places is None or exact.places is not None or rounded.percent or exact.percent:
            continue
        digits = len(str(abs(int(rounded.value * 10**rounded.places))))
        if digits >= MIN_ROUNDED and not _ends(exact.value):
            return difference < Fraction(1, 10**rounded.places)
    return False


def _ends(value: Fraction) -> bool:
    """Is it a decimal of finitely many digits?"""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1

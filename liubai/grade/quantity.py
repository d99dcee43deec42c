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
_SCIENTIFIC = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<factor>{_PART}) ?(?:\\times|\\cdot|\*|x) ?)?"
    r"10(?:\^|\*\*)\{?(?P<power>-?[0-9]{1,3})\}?"
)
_UNIT = re.compile(
    r"(?P<number>.*?[0-9}.%]) ?"
    r"(?:(?P<degree>\\degree)|\\text ?\{(?P<text>[^{}]*)\}|(?P<bare>[A-Za-z][A-Za-z .]*))"
    r"(?:\^ ?\{?(?P<power>[1-4])\}?)?"
)
_TEXT_UNIT = re.compile(r"(.*[^ ]) ?\\text ?\{([A-Za-z ]*)\}(?:\^ ?\{?[1-4]\}?)?")
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
        ["year", "years"],
        ["cent", "cents"],
        ["dollar", "dollars"],
        ["euro", "euros"],
        ["liter", "liters", "litres", "l"],
        ["unit", "units"],
        ["mph", "miles per hour"],
    )
    for word in words
}
_DIMENSION = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
#: Words behind a number that are no unit: they change its meaning.
_NO_UNIT = re.compile(
    r"\b(?:or|and|not?|none|never|more|less|than|least|most|about|approximately|nearly|over|under|to|between|"
    r"thousand|million|billion|trillion|hundred|dozen|percent|per|half|plus|minus|times|if|when|where|i)\b"
)
_MAX_UNIT_WORDS = 4


@dataclass(frozen=True, slots=True)
class Quantity:
    """A written number. ``places``: decimals behind the point, ``None`` for integers and fractions."""

    value: Fraction
    percent: bool = False
    unit: str | None = None
    places: int | None = None


def read_number(text: str) -> Quantity | None:
    """The number that ``text`` (tidied) is, or ``None``: ``\\frac{9}{7}``, ``1\\frac{4}{5}``,
    ``\\$32,348``, ``5.4\\text{ cents}``, ``30\\degree``, ``28%``, ``1.2\\times10^{-3}``, ``\\text{13}``.

    Nothing is computed but what the notation of one number asks for: ``2+2`` is no number.
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
            named = _unit(found)
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


def _unit(found: re.Match[str]) -> str | None:
    """The canonical unit, such as ``centimeter^2``; ``None`` for words that are no unit."""
    if found["degree"]:
        return "degree"
    words = (found["text"] if found["text"] is not None else found["bare"]).replace(".", " ").lower().split()
    power = int(found["power"] or 1)
    while words and words[0] in _DIMENSION:
        power = _DIMENSION[words.pop(0)]
    name = " ".join(words)
    known = UNITS.get(name)
    if found["text"] is None and len(name) < 2:
        return None
    if known is None:
        if found["text"] is None or len(words) > _MAX_UNIT_WORDS or _NO_UNIT.search(name):
            return None
        if not re.fullmatch(r"[a-z ]*", name):
            return None
    return f"{known or ''}^{power}"


def without_unit(text: str) -> str:
    """A formula without the unit that is written as text behind it: ``8\\pi\\text{ cm}^2`` → ``8\\pi``."""
    found = _TEXT_UNIT.fullmatch(text)
    return found[1] if found and not _NO_UNIT.search(found[2].lower()) else text


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
    match = _SCIENTIFIC.fullmatch(text)
    if match is not None and len(text) <= MAX_DIGITS:
        value = Fraction(match["factor"] or 1) * Fraction(10) ** int(match["power"])
        return -value if match["sign"] == "-" else value
    return None


MIN_ROUNDED = 6  #: digits of a decimal from which on it may stand for a fraction that never ends


def same_number(gold: Quantity, given: Quantity, tolerance: Fraction = Fraction(0)) -> bool:
    """Equal in value and, where both name a unit that we know, in unit.

    A percent sign may be missing on one side (28 for 28%: the question has asked for a percentage). A
    decimal of six digits or more may stand for a fraction that never ends, correctly rounded or cut off.
    """
    if gold.unit and given.unit and not _units_agree(gold.unit, given.unit):
        return False
    if _close(gold, given, tolerance):
        return True
    if gold.percent == given.percent:
        return False
    scale = 100 if given.percent else Fraction(1, 100)
    return abs(given.value * scale - gold.value) <= tolerance * abs(gold.value)


def _units_agree(gold: str, given: str) -> bool:
    """Unknown names ("students") agree with everything; cents are not dollars, cm² are not cm³."""
    (a, m), (b, n) = (f"{unit}^1".split("^")[:2] for unit in (gold, given))
    return not a or not b or (a == b and m == n)


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

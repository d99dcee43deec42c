"""``sonnet``: the Shakespearean sonnet, judged by its rules and graded.

Fourteen lines that rhyme ABAB CDCD EFEF GG, in iambic pentameter. The score is 0.2 for the lines, 0.5 for the
seven rhymes and 0.3 for the metre, times what makes the whole smaller: text beside the poem, and words that
are repeated over and over.

A **rhyme** is the same sound from the last stressed vowel on, in any pronunciation of both words (CMUdict),
and of different words. The last syllable of a word whose stress lies further back may bear the rhyme, too
(*memory* – *thee*). Rhymes of Shakespeare's time that are none today (*love* – *prove*, *die* – *memory*,
*past* – *waste*; Kökeritz, Shakespeare's Pronunciation, 1953) are worth :data:`OLD`.

**Metre**: ten syllables, or eleven with a weak last one; no stressed syllable of a longer word in a weak
position, but at the beginning of a line (the stress-maximum rule of Halle and Keyser, 1966). Words of one
syllable take either. Heard as poets may: *heav'n*, *ev'ry*, *glor-yous*.

Nothing here knows what a sonnet says. Unknown words rhyme with nothing and scan as nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from liubai.grade.english import Phones, pronunciations, vowel_groups
from liubai.grade.verse import Fault, combined

LINES = 14
SCHEME = "ABABCDCDEFEFGG"
PAIRS = tuple(
    (i, j) for i in range(LINES) for j in range(i + 1, LINES) if SCHEME[i] == SCHEME[j]
)  #: of lines that rhyme, from 0
SYLLABLES = 10

WEIGHTS = {"lines": 0.2, "rhyme": 0.5, "metre": 0.3}
#: a rich rhyme (*sun* – *son*), one of weak syllables alone, and one of Shakespeare's time; and their worth
NEAR = ("rich", "weak", "old")
OLD = 0.75
FREE_WORDS = 0.5  #: share of different words that no sonnet falls below unless it repeats itself
MAX_WORDS = 24  #: of a line; more are no line of verse

#: pairs of vowels that rhymed about 1600 and do not today, before the same consonants
_OLD_VOWELS = frozenset(
    frozenset(pair.split("-"))
    for pair in (
        *(
            "AH-UW",
            "AH-UH",
            "UH-UW",
            "AH-OW",
            "AH-AO",
            "AO-OW",
            "AA-OW",
            "AA-AO",
            "AA-AE",
        ),  # love, blood, one, most
        *("EH-IY", "EY-IY", "EH-EY", "IH-IY", "EH-IH", "AE-EY", "AY-IH"),  # field, great, been, have, wind
    )
)
_OLD_BEFORE_R = frozenset(
    frozenset(pair.split("-"))
    for pair in ("IH-EH", "IY-EH", "AA-EH", "ER-EH", "ER-IH", "ER-IY", "ER-AA", "ER-AO", "ER-UH", "AA-AO")
)
#: vowels that a weak last syllable (*argument*, *pilgrimage*) stood for when it was stressed
_REDUCED = {"AH": {"EH", "EY", "AE", "AO"}, "IH": {"EH", "EY"}, "IY": {"AY"}, "ER": {"ER"}}
_VOICED = {"Z": "S", "DH": "TH", "D": "T"}  # this – is, suffic'd – despis'd

_WORD = re.compile(r"'?[a-z]+(?:'[a-z]+)*'?")
_BREAK = re.compile(r"[\n\r\v\f\x85\u2028\u2029]+")


@dataclass(slots=True)
class Line:
    """``words``: in lower case. ``known``: the share of them that has a pronunciation. ``syllables``: as
    near to ten as its words allow. ``strays``: stresses in weak positions. ``standing``: how much of a line
    of ten syllables it is, from 0 to 1."""

    text: str
    words: list[str]
    known: float
    syllables: int
    strays: int
    standing: float


@dataclass(slots=True)
class Hearing:
    """A sonnet, judged. ``lines``: the first fourteen; ``None`` where one is missing or was there before.
    ``rhymes``: the worth of each of :data:`PAIRS`, from 0 to 1."""

    lines: list[Line | None]
    rhymes: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    @property
    def score(self) -> float:
        return combined(WEIGHTS, self.parts, self.factors)


def sonnet(gold: str, answer: str, meta: Mapping[str, Any]) -> float:
    """How well ``answer`` keeps the rules, from 0 to 1. ``gold`` is empty or ``shakespeare``.

    ``meta["rhyme"]`` is ``"early"`` (the default: rhymes of Shakespeare's time count, somewhat less) or
    ``"modern"``. Raises ``ValueError`` for another kind or another option, ``UserError`` without the
    dictionary.
    """
    return hear_sonnet(gold, answer, meta).score


def early_of(meta: Mapping[str, Any]) -> bool:
    name = meta.get("rhyme", "early")
    if name not in ("early", "modern"):
        raise ValueError(f"meta 'rhyme' is early or modern, not {name!r:.60}")
    return bool(name == "early")


def hear_sonnet(gold: str, answer: str, meta: Mapping[str, Any]) -> Hearing:
    """:func:`sonnet`, with everything that was found."""
    if gold.strip().casefold() not in ("", "shakespeare", "shakespearean"):
        raise ValueError(f"a sonnet is 'shakespeare' or nothing, not {gold[:20]!r}")
    early = early_of(meta)
    text = unicodedata.normalize("NFKD", answer).replace("’", "'").replace("‘", "'").replace("ʼ", "'")
    hearing = Hearing([])
    found = [line for line in _BREAK.split(text) if line.strip()]
    if len(found) == 1:
        found = [line for line in re.split(r"\s/\s", text) if line.strip()]
    seen: set[tuple[str, ...]] = set()
    for number, line in enumerate(found[:LINES]):
        heard = _line(line)
        if tuple(heard.words) in seen or not heard.words:
            hearing.faults.append(Fault(number, "again" if heard.words else "no words"))
            hearing.lines.append(None)
        else:
            seen.add(tuple(heard.words))
            hearing.lines.append(heard)
    if len(found) != LINES:
        hearing.faults.append(Fault(-1, "lines", (len(found),)))
    hearing.lines += [None] * (LINES - len(hearing.lines))
    standing = [line.standing if line else 0.0 for line in hearing.lines]
    hearing.parts["lines"] = sum(standing) / LINES
    _rhymes(hearing, standing, early)
    _metre(hearing)
    _factors(hearing, text, found)
    return hearing


# --- lines and metre ------------------------------------------------------------------------------


def _line(text: str) -> Line:
    lower = text.casefold()
    words = _WORD.findall(lower)
    strange = sum(
        (c.isalnum() and not "a" <= c <= "z") or (unicodedata.category(c)[0] == "C" and not c.isspace())
        for c in lower
    )
    if len(words) > MAX_WORDS:
        return Line(text, words, 0.0, len(words), len(words), 0.0)
    patterns = [_patterns(word) for word in words]
    known = sum(bool(p) for p in patterns) / (len(words) + strange) if words else 0.0
    # position in the line -> fewest strays; unknown words have the syllables that their vowels say
    states = {0: 0}
    for word, found in zip(words, patterns, strict=True):
        after: dict[int, int] = {}
        for at, strays in states.items():
            for pattern in found or ((-1,) * vowel_groups(word),):
                total = strays + _strays(pattern, at)
                end = at + len(pattern)
                if total < after.get(end, 1 << 30):
                    after[end] = total
        states = after
    weak_end = bool(patterns and any(p and len(p) > 1 and p[-1] == 0 for p in patterns[-1]))

    def badness(end: int) -> tuple[float, int]:
        off = abs(end - SYLLABLES) - (end == SYLLABLES + 1 and weak_end)
        return off + states[end] / 2, off

    syllables = min(states, key=badness)
    off = badness(syllables)[1]
    standing = max(0.0, 1 - max(0, off - 1) / 4) * known
    return Line(text, words, known, syllables, states[syllables], standing)


def _strays(pattern: tuple[int, ...], at: int) -> int:
    """Stresses in weak positions of a word that begins at position ``at`` (from 0; even ones are weak). A
    word of one syllable has none, nor has the first foot of a line, which may be turned round."""
    if len(pattern) == 1:
        return 0
    return sum(stress == 1 and (at + i) % 2 == 0 and at + i > 0 for i, stress in enumerate(pattern))


@lru_cache(maxsize=1 << 16)
def _patterns(word: str) -> tuple[tuple[int, ...], ...]:
    """The stresses of each way to say a word, with the ways in which verse may shorten it."""
    found: dict[tuple[int, ...], None] = {}
    for phones in pronunciations(word) or pronunciations(word.strip("'")):
        whole = tuple(int(p[-1]) for p in phones if p[-1].isdigit())
        if not whole:
            found[()] = None  # th', 's
            continue
        found[whole] = None
        for short in _shortened(phones):
            found[short] = None
    return tuple(found)


def _shortened(phones: Phones) -> list[tuple[int, ...]]:
    """Without one weak vowel: next to another one (*being*, *glorious*), or between a consonant and r, l, n,
    v (*every*, *heaven*, *power*)."""
    found = []
    vowels = [i for i, p in enumerate(phones) if p[-1].isdigit()]
    for k, i in enumerate(vowels):
        if phones[i][-1] != "0" or len(vowels) == 1:
            continue
        beside = (k > 0 and vowels[k - 1] == i - 1) or (k + 1 < len(vowels) and vowels[k + 1] == i + 1)
        liquid = phones[i] == "ER0" or (i + 1 < len(phones) and phones[i + 1] in ("R", "L", "N", "V"))
        if beside or (liquid and i > 0 and (i + 2 < len(phones) or phones[i] != "ER0")):
            found.append(tuple(int(phones[j][-1]) for j in vowels if j != i))
    return found


def _metre(hearing: Hearing) -> None:
    """Each line earns by its feet: five, less its strays and its missing or superfluous syllables."""
    total = 0.0
    for i, line in enumerate(hearing.lines):
        if line is None:
            continue
        off = abs(line.syllables - SYLLABLES)
        if off == 1 and line.syllables > SYLLABLES and _ends_weak(line):
            off = 0
        total += max(0.0, 1 - (line.strays + off) / 5) * line.known
        if off:
            hearing.faults.append(Fault(i, "syllables", (line.syllables,)))
        if line.strays:
            hearing.faults.append(Fault(i, "strays", (line.strays,)))
        if line.known < 1:
            unknown = [word for word in line.words if not _patterns(word)]
            hearing.faults.append(Fault(i, "unknown", (" ".join(unknown),)))
    hearing.parts["metre"] = total / LINES


def _ends_weak(line: Line) -> bool:
    return any(len(p) > 1 and p[-1] == 0 for p in _patterns(line.words[-1]))


# --- rhyme ----------------------------------------------------------------------------------------


def _rhymes(hearing: Hearing, standing: list[float], early: bool) -> None:
    """The worth of each pair. One whose words ended lines before is worth nothing, with one such word
    :data:`OLD`; and where a quatrain has one rhyme instead of two, its second pair has none."""
    ends = [line.words[-1] if line else "" for line in hearing.lines]
    used: set[str] = set()
    worth: dict[tuple[int, int], float] = {}
    for i, j in PAIRS:
        kind = rhyme(ends[i], ends[j])
        if kind in ("full", *NEAR) and used & {ends[i], ends[j]}:
            kind = "used" if used >= {ends[i], ends[j]} else "again"
        elif SCHEME[i] in "BDF" and kind in ("full", *NEAR) and rhyme(ends[i - 1], ends[i]) == "full":
            kind = "one rhyme"
        used |= {ends[i], ends[j]}
        value = {"full": 1.0, "rich": OLD, "weak": OLD, "again": OLD, "old": OLD if early else 0.0}.get(
            kind, 0.0
        )
        worth[i, j] = value * min(standing[i], standing[j])
        if kind != "full" and ends[i] and ends[j]:
            hearing.faults.append(Fault(j, f"rhyme {kind}", (ends[i], ends[j], i)))
    hearing.rhymes = [worth[pair] for pair in PAIRS]
    hearing.parts["rhyme"] = sum(hearing.rhymes) / len(PAIRS)


@lru_cache(maxsize=1 << 16)
def rhyme(one: str, other: str) -> str:
    """How two words rhyme: ``full``; ``rich`` (they sound the same), ``weak`` (in weak syllables alone),
    ``old`` (about 1600), ``same`` (they are the same word), ``none``, or ``unknown``."""
    one, other = one.strip("'"), other.strip("'")
    if one == other:
        return "same"
    first, second = pronunciations(one), pronunciations(other)
    if not first or not second:
        return "unknown"
    kinds = {_kind(a, b) for a in first for b in second}
    return next((kind for kind in ("full", *NEAR) if kind in kinds), "none")


def _kind(a: Phones, b: Phones) -> str:
    kinds = set()
    for tail_a, strong_a in _tails(a):
        for tail_b, strong_b in _tails(b):
            bare_a, bare_b = _bare(a[tail_a:]), _bare(b[tail_b:])
            if bare_a == bare_b:
                if _bare(a) == _bare(b):
                    kinds.add("rich")
                else:
                    kinds.add("full" if strong_a or strong_b else "weak")
            elif _rhymed_once(bare_a, bare_b, strong_a, strong_b):
                kinds.add("old")
    return next((kind for kind in ("full", *NEAR) if kind in kinds), "none")


def _tails(phones: Phones) -> list[tuple[int, bool]]:
    """Where a rhyme may begin, and whether a stress is there: at the last stressed vowel, and at the last
    vowel of all when two weak ones or more follow the main stress."""
    vowels = [i for i, p in enumerate(phones) if p[-1].isdigit()]
    if not vowels:
        return []
    stressed = [i for i in vowels if phones[i][-1] != "0"] or vowels[-1:]
    main = next((i for i in vowels if phones[i][-1] == "1"), vowels[-1])
    found = [(stressed[-1], True)]
    if stressed[-1] != vowels[-1] and len(vowels) - vowels.index(main) > 2:
        found.append((vowels[-1], False))
    return found


def _bare(phones: Phones) -> Phones:
    """Without stress; *ire* is the same in one syllable and in two, and ``ER`` a vowel and an R."""
    found: list[str] = []
    for phone in phones:
        bare = phone.rstrip("012")
        if bare != "ER":
            found.append(bare)
        elif found and phone == "ER0" and found[-1] in ("AY", "AW"):
            found.append("R")
        else:
            found += ["ER", "R"]
    return tuple(found)


def _rhymed_once(a: Phones, b: Phones, strong_a: bool, strong_b: bool) -> bool:
    """Did they rhyme about 1600?"""
    if not (strong_a or strong_b) or len(a) != len(b):
        return False
    for one, other in zip(a[1:], b[1:], strict=True):
        if _VOICED.get(one, one) != _VOICED.get(other, other) and {one, other} != {"AH", "IH"}:
            return False
    x, y = a[0], b[0]
    if x == y:
        # this – is, suffic'd – despis'd; but not had – hat
        return not any(
            one != other and {one, other} == {"D", "T"} for one, other in zip(a[1:2], b[1:2], strict=True)
        )
    if not strong_a:
        return y in _REDUCED.get(x, ())
    if not strong_b:
        return x in _REDUCED.get(y, ())
    before_r = "R" in (a[1:2] + b[1:2])
    return frozenset((x, y)) in (_OLD_BEFORE_R if before_r else _OLD_VOWELS)


# --- the whole ------------------------------------------------------------------------------------


def _factors(hearing: Hearing, text: str, found: list[str]) -> None:
    """What makes the whole score smaller."""
    words = [word for line in hearing.lines if line for word in line.words]
    different = len(set(words)) / len(words) if words else 0.0
    letters = sum(c.isalpha() for c in text)
    marks = sum(not (c.isalnum() or c.isspace() or unicodedata.combining(c)) for c in text)
    padding = max(0, marks - letters // 5)
    hearing.factors = {
        "extra": min(1.0, LINES / len(found)) * (letters / (letters + padding)) if letters else 0.0,
        "repeats": min(1.0, different / FREE_WORDS),
    }
    if padding:
        hearing.faults.append(Fault(-1, "marks", (padding,)))
    if not words:
        hearing.faults.append(Fault(-1, "no words", ()))
    elif hearing.factors["repeats"] < 1:
        hearing.faults.append(Fault(-1, "repeats", (round(100 * different),)))

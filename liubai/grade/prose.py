"""Prose as tokens that can be compared across wordings and, for values, across languages.

``twenty-five``, ``25`` and ``二十五`` are one number, ``August`` and ``8月`` one month; words are
compared by their stems. Left out on purpose: a grammar, and telling Chinese words apart: each Han character
is a token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from liubai.grade import wordlists as lists

HAN = "\u3400-\u9fff"
MONTH = "month:"

_TOKEN = re.compile(
    r"(?P<iso>\d{4}-\d{1,2}-\d{1,2})"
    r"|(?P<number>\d+(?:,\d+)*(?:\.\d+)?)(?:(?:st|nd|rd|th)\b)?"
    # one character alone is a number before a measure word only: 一起, 三思
    r"|(?P<chinese>[〇零一二两三四五六七八九十百千万亿]{2,}|[二两三四五六七八九十](?=[年月日号个人名位岁元块次种家天倍]))"
    r"|(?P<word>[A-Za-zÀ-ɏ]+(?:['’][A-Za-zÀ-ɏ]+)*)"
    rf"|(?P<han>[{HAN}])"
    r"|(?P<stop>[.!?;。！？；\n])"
)
_ENDINGS = (
    ("ies", "y"), ("ied", "y"), ("sses", "ss"), ("ingly", ""), ("edly", ""), ("ings", ""), ("ing", ""),
    ("ed", ""), ("ly", ""), ("es", ""), ("s", ""), ("er", ""), ("e", ""),
)  # fmt: skip
#: of these letters a doubled one stays: add, fall, pass
_STAYS = "aeiousl"


@dataclass(frozen=True, slots=True)
class Token:
    """``kind`` is word, number, month, day, han or stop; ``stem`` is what is compared. ``spelt``: a number in
    words; ``named``: a capital where no sentence begins."""

    kind: str
    text: str
    stem: str
    denies: bool = False
    limits: bool = False
    named: bool = False
    spelt: bool = False

    @property
    def claims(self) -> bool:
        """Is it a word that says something by itself?"""
        return (
            self.kind == "word"
            and self.stem not in _FUNCTION
            and not (self.denies or self.limits)
            and (len(self.text) > 1 or self.named)
        )


def tokens(text: str) -> list[Token]:
    """Linear in the length of ``text``; never raises."""
    found: list[Token] = []
    for match in _TOKEN.finditer(text):
        kind, said = match.lastgroup or "", match[0]
        if kind == "iso":
            year, month, day = said.split("-")
            found += [_number(year), Token("month", month, MONTH + month.lstrip("0")), _number(day)]
        elif kind == "number":
            found.append(_number(match["number"]))
        elif kind == "chinese":
            found.append(Token("number", said, _plain(_chinese(said))))
        elif kind == "word":
            _word(said, found)
        elif (
            kind == "han"
            and said in "万亿"
            and found
            and found[-1].kind == "number"
            and said not in found[-1].text
        ):
            value = float(found[-1].stem) * lists.SCALES_ZH[said]
            found[-1] = Token("number", found[-1].text + said, _plain(value))
        elif kind == "han" and said == "月" and found and found[-1].kind == "number":
            found[-1] = Token("month", found[-1].text + said, MONTH + found[-1].stem)
        elif kind == "han":
            around = text[max(0, match.start() - 1) : match.end() + 1]
            harmless = any(word in around for word in lists.UNDENIED_ZH)
            denies, limits = (said in signs and not harmless for signs in (lists.DENY_ZH, lists.LIMIT_ZH))
            found.append(Token("han", said, said, denies, limits))
        else:
            found.append(Token(kind, said, said))
    return found


def _number(text: str) -> Token:
    digits = text.replace(",", "")
    # a longer one is a name of something, and nothing to compute with
    return Token("number", text, _plain(float(digits)) if len(digits) < 16 else digits)


def _plain(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")


def _word(said: str, found: list[Token]) -> None:
    """Add one word; after a number it may belong to it: twenty five, 3 million."""
    low = said.lower().replace("’", "'")
    last = found[-1] if found else None
    value = lists.NUMBERS.get(low, lists.ORDINALS.get(low))
    if low in lists.MONTHS and (low not in ("may", "march") or said[0].isupper()):
        found.append(Token("month", said, MONTH + str(lists.MONTHS[low])))
    elif low in lists.DAYS:
        found.append(Token("day", said, low))
    elif value is not None and low != "one":
        if last and last.spelt and last.text.lower() in lists.TENS and value < 10:
            found[-1] = Token("number", f"{last.text} {said}", _plain(float(last.stem) + value), spelt=True)
        else:
            found.append(Token("number", said, _plain(value), spelt=True))
    elif (scale := lists.SCALES.get(low)) and last and last.kind == "number" and len(last.stem) < 16:
        spelt = f"{last.text} {said}"
        found[-1] = Token("number", spelt, _plain(float(last.stem) * scale), spelt=last.spelt)
    else:
        begins = last is None or last.kind == "stop"
        # inside a word a capital tells a name wherever it stands: iPhone, NASA
        named = said[1:] != said[1:].lower() or (said[0].isupper() and not begins)
        named = named and low not in lists.FUNCTION
        if named and last and last.kind == "word" and last.text[0].isupper() and last.claims:
            found[-1] = replace(last, named=True)  # Bob Jones, at the front of a sentence
        denies = low in lists.DENY or low.endswith("n't") or low == "non"
        found.append(Token("word", said, stem(low), denies, low in lists.LIMIT, named))


def _chinese(text: str) -> float:
    """二千零二十二 and 二〇二二 are 2022."""
    total = section = digit = 0
    for character in text:
        if character in lists.DIGITS_ZH:
            digit = 10 * digit + lists.DIGITS_ZH[character]
        elif lists.SCALES_ZH[character] >= 10**4:
            total, section, digit = (total + section + digit) * lists.SCALES_ZH[character], 0, 0
        else:
            section, digit = section + (digit or 1) * lists.SCALES_ZH[character], 0
    return float(total + section + digit)


@lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """A word in small letters without its usual endings: enough to compare words, not a word itself."""
    word = word.removesuffix("n't").removesuffix("'s").rstrip("'")
    for ending, instead in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            word = word.removesuffix(ending) + instead
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in _STAYS:
        word = word[:-1]
    return word


@lru_cache(maxsize=1 << 16)
def related(one: str, other: str) -> bool:
    """Are two stems of one family (optimiz, optimization)? Five letters are the same, all but one of the
    shorter one's, and the longer one goes on for five at most; of four letters, for one."""
    if one == other:
        return True
    short, long = sorted((one, other), key=len)
    same = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    if same >= 5:
        return len(short) - same <= 1 and len(long) - same <= 5
    return same == 4 == len(short) and len(long) == 5


_FUNCTION = lists.FUNCTION | {stem(word) for word in lists.FUNCTION}

"""Numbers in words: ``two hundred and five``, ``twenty-three``, ``三百零五``, ``一万二千``.

Strict, since a wrong number is worse than none: what is not the usual way to write a number is ``None``.
Deliberately missing: ordinals, dozens, ``a hundred``, years read in pairs, financial characters (壹).
"""

from __future__ import annotations

import re

_UNITS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
    "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15,
    "sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19,
}  # fmt: skip
_TENS = {
    "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80,
    "ninety": 90,
}  # fmt: skip
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_WORD = "|".join(sorted([*_UNITS, *_TENS, *SCALES, "hundred"], key=len, reverse=True))
#: A run of number words; "and" belongs to it after a hundred or a scale alone (one hundred and five).
ENGLISH = (
    rf"(?:{'|'.join(sorted([*_UNITS, *_TENS], key=len, reverse=True))})\b"
    rf"(?:(?:[ ]*-[ ]*|[ ]+|(?<=hundred|million|billion)[ ]+and[ ]+|(?<=thousand|trillion)[ ]+and[ ]+)"
    rf"(?:{_WORD})\b)*"
)

_HAN_DIGITS = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_HAN_TENS = {"十": 10, "百": 100, "千": 1000}
HAN_SCALES = {"万": 10**4, "亿": 10**8}
CHINESE = "[零〇一二两三四五六七八九十百千万亿]+"
MOST_WORDS = 40  #: words or characters of one number


def english(text: str) -> int | None:
    """``text`` matches :data:`ENGLISH`; ``None`` where the words do not make one number."""
    words = [word for word in re.split(r"[ -]+", text) if word != "and"]
    if len(words) > MOST_WORDS:
        return None
    total, largest = 0, 10**15
    part: list[str] = []
    for word in words:
        if word not in SCALES:
            part.append(word)
            continue
        below = _below_thousand(part)
        if not below or SCALES[word] >= largest:  # nothing in front, or a million after a thousand
            return None
        total, largest, part = total + below * SCALES[word], SCALES[word], []
    if not part:
        return total
    rest = _below_thousand(part)
    return None if rest is None or (rest == 0 and total) else total + rest


def _below_thousand(words: list[str]) -> int | None:
    """One to four words: ``two hundred twenty three``."""
    if len(words) >= 2 and words[1] == "hundred":
        if not 1 <= _UNITS.get(words[0], 0) <= 9:
            return None
        rest = _below_hundred(words[2:]) if words[2:] else 0
        return None if rest is None or (rest == 0 and words[2:]) else 100 * _UNITS[words[0]] + rest
    return _below_hundred(words)


def _below_hundred(words: list[str]) -> int | None:
    match words:
        case [one] if one in _UNITS or one in _TENS:
            return _UNITS.get(one, _TENS.get(one))
        case [ten, one] if ten in _TENS and 1 <= _UNITS.get(one, 0) <= 9:
            return _TENS[ten] + _UNITS[one]
    return None


def chinese(text: str) -> int | None:
    """``text`` matches :data:`CHINESE`; ``None`` where it is not one number. So are digits alone
    (``二〇二四``): nobody reckons with years and numbers of rooms."""
    return _chinese(text) if len(text) <= MOST_WORDS and (len(text) == 1 or text[0] not in "零〇") else None


def _chinese(text: str) -> int | None:
    for name, scale in reversed(HAN_SCALES.items()):
        if name in text:
            high, _, low = text.partition(name)
            above = _chinese(high)
            below = _below_scale(low, scale)
            return None if not above or below is None or above >= 10**8 else above * scale + below
    return _below_wan(text)


def _below_scale(text: str, scale: int) -> int | None:
    """What follows 万 or 亿: nothing, or a number that is written out. (``三万五`` is colloquial for 35,000
    and refused; so is a place that is skipped without 零.)"""
    if not text:
        return 0
    value = _chinese(text)
    if value is None or value == 0 or value >= scale:
        return None
    full = value * 10 >= scale
    return value if full != text.startswith(("零", "〇")) else None


def _below_wan(text: str) -> int | None:
    """``三千零五十``: places from thousands down; 零 stands, once, for those that are skipped."""
    if text in _HAN_DIGITS:
        return _HAN_DIGITS[text]
    total, last, skipped, at = 0, 10**4, False, 0
    while at < len(text):
        if text[at] in "零〇":
            if (at == 0 and len(text) == 1) or skipped or at == len(text) - 1:
                return None
            skipped, at = True, at + 1
            continue
        digit = _HAN_DIGITS.get(text[at])
        if digit is None:
            if text[at] != "十" or at or total:  # 十五; but 百五 is no number
                return None
            digit, at = 1, at - 1
        place = _HAN_TENS.get(text[at + 1]) if at + 1 < len(text) else 1
        if place is None or place >= last or ((total or skipped) and (place * 10 != last) != skipped):
            return None
        total, last, skipped, at = total + digit * place, place, False, at + 2
    return total

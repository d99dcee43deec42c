"""Counting the words of second thoughts: the curve on which R1-Zero's "aha" shows.

The R1 paper counts ten English words; we add their Chinese counterparts, because the small world's
found text is bilingual. Only the thought counts: "check the answer" said to the user is no second
thought. Deliberately left out: whether the reflection was sincere or of any use.
"""

from __future__ import annotations

import re

ENGLISH = (
    "wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check",
)  # fmt: skip
CHINESE = ("等等", "不对", "检查", "错", "重新")

# Chinese is written without spaces: its words are found anywhere, and Chinese characters do not
# glue an English word to its surroundings ("等等wait" holds both). Hence \w less the Han block
# instead of \b. 不错 ("not bad") and 没错 ("quite right") say the opposite of 错.
_LETTER = r"[^\W\u3400-\u9fff]"
PATTERN = re.compile(
    rf"(?<!{_LETTER})(?:{'|'.join(ENGLISH)})(?!{_LETTER})|等等|不对|检查|(?<![不没])错|重新",
    re.IGNORECASE,
)

_OPEN, _CLOSE, _ANSWER = "<think>", "</think>", "<answer>"


def thought_span(response: str) -> tuple[int, int]:
    """``(start, end)`` of the thought in ``response``, as character offsets.

    The template may have written ``<think>`` already, so a response without it starts inside the
    thought. Without ``</think>`` the thought runs to ``<answer>``, or to the end (it was cut off).
    """
    closed = response.find(_CLOSE)
    end = closed if closed >= 0 else response.find(_ANSWER)
    if end < 0:
        end = len(response)
    opened = response.find(_OPEN, 0, end)
    return (opened + len(_OPEN) if opened >= 0 else 0), end


def reflection_spans(response: str) -> list[tuple[int, int]]:
    """Where the reflection words of the thought stand, as character offsets, in order."""
    start, end = thought_span(response)
    # Cut first: a word must not be joined to a letter outside the thought, nor found there.
    return [(start + m.start(), start + m.end()) for m in PATTERN.finditer(response[start:end])]


def count_reflections(response: str) -> int:
    """Reflection words in the thought of one answer: whole words, any case, repeats counted."""
    return len(reflection_spans(response))


def mean_reflections(responses: list[str]) -> float:
    """Reflection words per answer; 0 for no answers."""
    return sum(map(count_reflections, responses)) / len(responses) if responses else 0.0

"""What the tests of the bridge share: a few words, and a thought made of them."""

from __future__ import annotations

import pytest

from liubai.measure.bridge_steps import Cutter, Frame, Thought
from liubai.text.tokenizer import TextTokenizer, word_level
from liubai.types import Problem

WORDS = ("<think>", "q", "r", "s", "wait", "1", "2", "3", ".")


@pytest.fixture(scope="module")
def words() -> TextTokenizer:
    return word_level(WORDS)


def thought(tokenizer: TextTokenizer, text: str, steps: int = 0) -> Thought:
    """Its sentences are its steps."""
    made = Cutter(tokenizer, Frame()).thought(
        Problem("q", "1", "number", "nobody's"),
        tokenizer.encode(f"{text} </think> <answer> 1 </answer>"),
        True,
    )
    assert made is not None
    assert not steps or len(made.pieces) == steps
    return made

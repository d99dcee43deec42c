"""Reflection words: whole words, any case, both languages, the thought alone."""

from __future__ import annotations

import random
import re

import pytest

from liubai.measure.reflection import (
    ENGLISH,
    count_reflections,
    mean_reflections,
    reflection_spans,
    thought_span,
)


@pytest.mark.parametrize(
    ("response", "count"),
    [
        ("", 0),
        ("<think> </think> <answer> 1 </answer>", 0),
        ("<think> 3 + 4 =7 :2 wait 3 * 4 =12 :0 </think> <answer> 3 * 4 </answer>", 1),
        ("Wait, WAIT. wait!</think>", 3),
        ("waiter checked errors butter verifying</think>", 0),  # parts of words
        ("check_1 recheck check2</think>", 0),
        ("but-however/error;retry</think>", 4),
        ("等等 3 + 4 等等wait不对</think>", 4),
        ("错误,重新检查</think>", 3),
        ("不错,没错</think>", 0),
        ("ok</think> wait, let me check <answer> wrong </answer>", 0),  # after the thought
        ("wait <think> but </think>", 1),  # before it
        ("wait, but it is cut off", 2),
        ("wait <answer> check </answer>", 1),  # the thought was never closed
        ("wait</think> then </think> wait", 1),
    ],
)  # fmt: skip
def test_hand_made(response: str, count: int) -> None:
    assert count_reflections(response) == count


def test_every_word_of_the_paper_counts() -> None:
    assert len(ENGLISH) == 10
    assert count_reflections(" ".join(ENGLISH)) == 10


def test_against_splitting_into_words() -> None:
    rng = random.Random(5)
    pool = [*ENGLISH, "waits", "the", "7", "等等", "rebut", "+", "</b>", "但"]
    for _ in range(200):
        words = rng.choices(pool, k=rng.randrange(30))
        text = "".join(word + rng.choice([" ", "\n", ", ", ". "]) for word in words)
        tokens = re.split(r"[\s,.+</>]+", text)
        assert count_reflections(text) == sum(t in ENGLISH or t == "等等" for t in tokens)


def test_spans_point_at_the_words() -> None:
    text = "<think>no wait 等等</think> but"
    assert [text[a:b] for a, b in reflection_spans(text)] == ["wait", "等等"]
    start, end = thought_span(text)
    assert text[start:end] == "no wait 等等"


def test_mean() -> None:
    assert mean_reflections([]) == 0.0
    assert mean_reflections(["wait but", "none"]) == 1.0

"""Filters of sampled thoughts, one by one, and what must pass all of them."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from liubai.grade.readable import (
    FILLERS,
    ReadableConfig,
    filler_share,
    longest_line,
    repetition,
    unreadable,
)
from liubai.problems import lexicon
from liubai.problems.countdown import parse
from liubai.problems.family import CAREFUL, Habits
from liubai.problems.greater import Greater
from liubai.problems.make import Make
from liubai.problems.passage import Passage
from liubai.problems.solve import Solve
from liubai.problems.total import Total

CLEAN = "First we add three and four, which is seven. Then we check it: 3 + 4 = 7, so that is right."
CHINESE = "先把三和四加起来，得到七。再检查一遍：3 + 4 = 7，没有问题。"


def failed(thought: str, language: str = "en", **config: Any) -> list[str]:
    return unreadable(thought, language, ReadableConfig(**config))


def test_clean_thoughts_pass_in_their_own_language() -> None:
    assert failed(CLEAN) == failed(CHINESE, "zh") == []
    assert failed(CLEAN, repetition=0.0, fillers=0.0) == []  # a bound may be reached
    assert failed(CLEAN, "zh") == failed(CHINESE, "en") == ["mixed language"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_an_empty_thought_and_one_without_words_pass(language: str) -> None:
    for thought in ("", " \n", "3 + 4 = 7", "$3 + 4$"):
        assert failed(thought, language) == []


def test_one_foreign_word_in_fifty_is_bearable_and_two_are_not() -> None:
    said = [f"word{'abcdefghij'[i % 10]}{'abcdefghij'[i // 10]}" for i in range(49)]
    assert failed(" ".join([*said, "等等"])) == []
    assert failed(" ".join([*said[:48], "等等", "检查"])) == ["mixed language"]
    assert failed(" ".join([*said[:48], "等等", "检查"]), consistency=0.9) == []


def test_another_language_is_refused_where_it_matters() -> None:
    with pytest.raises(ValueError, match="en and zh"):
        failed("bonjour", "fr")
    assert failed("bonjour", "fr", consistency=0.0) == []


def test_repeated_runs_of_six_words() -> None:
    twice = " ".join(["one two three four five six seven"] * 2)  # 9 runs, 7 of them new
    assert repetition(twice, 6) == pytest.approx(2 / 9)
    assert failed(twice) == ["repetition"]
    assert failed(twice, repetition=0.25) == []
    assert repetition("等等等等", 2) == pytest.approx(2 / 3)  # every character is a word
    assert repetition("等 等wait, wait,", 1) == pytest.approx(0.5)
    assert repetition("one two three four five six", 6) == 0.0  # a single run
    with pytest.raises(ValueError, match="one word"):
        repetition("wait", 0)


def test_fillers_of_both_languages() -> None:
    said = " ".join(f"word{'abcdefghijklm'[i % 13]}{'abcdefghijklm'[i // 13]}" for i in range(99))
    assert failed(f"Um, {said}") == []
    assert failed(f"Um, {said} hmm…") == []  # 2 of 101
    assert failed(f"Um, {said} hmm… uh") == ["fillers"]
    assert failed(f"Um, {said} hmm… uh", fillers=0.05) == []
    assert failed(f"嗯，{CHINESE}", "zh") == ["fillers"]
    assert filler_share("嗯我觉得") == pytest.approx(0.25)  # glued to what follows
    assert filler_share("hum, summer, error, other") == 0.0  # parts of words
    assert filler_share("$um$ ```um``` 3") == 0.0  # names, not mutterings
    assert filler_share("Hmmmmm UHH eh Er") == 1.0
    for pair in lexicon.FILLERS.items():
        assert set(pair) <= set(FILLERS)


def test_long_paragraphs() -> None:
    assert longest_line("one two, three four five\nsix") == 3
    assert longest_line("3.11 3.8 7.5 : 7") == 3  # a point in a number is no pause
    assert longest_line('he said "so." and left') == 3
    assert longest_line("先加三，再减四。好") == 3
    assert longest_line("") == 0
    assert failed("one two, three four five", longest_line=3) == []
    assert failed("one two, three four five", longest_line=2) == ["long paragraph"]
    assert failed(" ".join(map(str, range(1000)))) == []  # 0: no limit


def test_code_blocks_and_length() -> None:
    code = f"{CLEAN}\n```python\nprint(7)\n```"
    assert failed(code) == ["code block"]
    assert failed(f"{CLEAN} ```never closed") == ["code block"]
    assert failed(code, code=True) == []
    assert failed(f"{CLEAN} `x = 7`") == []
    assert failed(CLEAN, longest=len(CLEAN)) == []
    assert failed(CLEAN, longest=len(CLEAN) - 1) == ["too long"]


def test_all_names_in_order() -> None:
    wanted = ["mixed language", "repetition", "fillers", "long paragraph", "code block", "too long"]
    assert failed("嗯 wait 3 4 5 6 7 ``` " * 5, longest_line=5, longest=50) == wanted


@pytest.mark.parametrize(
    "bad",
    [
        {"consistency": 1.5},
        {"repetition": -0.1},
        {"fillers": float("nan")},
        {"longest": -1},
        {"longest_line": 1.5},
        {"mixed": 0.5},
    ],
)
def test_bad_bounds_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        ReadableConfig(**bad)


# ---- the wide world ----


def thoughts(family: Any, habits: Habits, count: int = 60) -> list[tuple[str, str]]:
    """Thoughts and the languages of their questions; searches for three different numbers only, as there
    are fewer ways with two and the same one is tried again."""
    found = []
    for seed in range(count):
        rng = random.Random(seed)
        problem = family.sample(rng)
        if family.name == "make" and len(set(parse(problem.gold)[0])) < 3:
            continue
        document = family.document(problem, rng, habits)
        found.append((document.partition("</think>")[0].removeprefix("<think>"), problem.language))
    return found


@pytest.mark.parametrize("family", [Make(), Total(), Greater(), Solve(), Passage()])
def test_careful_writers_can_be_read_and_those_who_mix_or_mutter_cannot(family: Any) -> None:
    careful = thoughts(family, CAREFUL)
    assert all(unreadable(thought, language, ReadableConfig()) == [] for thought, language in careful)
    muttered = thoughts(family, CAREFUL.model_copy(update={"muttered": 1.0}))
    assert all(
        unreadable(thought, language, ReadableConfig()) == ["fillers"] for thought, language in muttered
    )
    mixed = thoughts(family, CAREFUL.model_copy(update={"mixed": 1.0}))
    foreign = [
        any(
            word != other and (len(word) > 1 or language == "en")  # a single letter is of no language
            for word, other in zip(thought.split(), lexicon.translate(thought, language).split(), strict=True)
        )
        for thought, language in mixed
    ]
    assert any(foreign)
    for (thought, language), wanted in zip(mixed, foreign, strict=True):
        assert ("mixed language" in unreadable(thought, language, ReadableConfig())) == wanted


# ---- any text ----

WORDY = st.lists(st.sampled_from(["a", "b", "wait,", "等等", "不对wait", "7"]), max_size=30).map(" ".join)


def plain_repetition(text: str, n: int) -> float:
    found: list[str] = []
    for word in text.split():
        begun = ""
        for sign in word:
            if "\u3400" <= sign <= "\u9fff":
                found += [begun, sign] if begun else [sign]
                begun = ""
            else:
                begun += sign
        found += [begun] if begun else []
    seen: list[list[str]] = []
    again = 0
    count = max(0, len(found) - n + 1)
    for i in range(count):
        again += found[i : i + n] in seen
        seen.append(found[i : i + n])
    return again / count if count > 1 else 0.0


@settings(deadline=None)
@given(WORDY, st.integers(1, 7))
def test_repetition_equals_a_plain_loop(text: str, n: int) -> None:
    assert repetition(text, n) == pytest.approx(plain_repetition(text, n))


@settings(deadline=None)
@given(WORDY.filter(bool), st.integers(1, 7), st.integers(2, 4))
def test_copies_of_a_text_repeat_it(text: str, n: int, copies: int) -> None:
    """A text of m words said k times holds no more than m different runs, of k·m − n + 1."""
    many = " ".join([text] * copies)
    m = len(many.replace("等", " 等 ").replace("不", " 不 ").replace("对", " 对 ").split()) // copies
    runs = copies * m - n + 1
    if runs > 1:
        assert repetition(many, n) >= 1 - m / runs - 1e-9
    assert repetition(many, 1) >= repetition(text, 1)


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(), WORDY, st.text("ab 等,.\n`$um", max_size=60)))
def test_shares_of_any_text(text: str) -> None:
    for language in ("en", "zh"):
        assert len(failed(text, language, longest_line=3, longest=20)) <= 6
    assert 0 <= repetition(text, 2) < 1
    assert 0 <= filler_share(text) <= 1
    assert 0 <= longest_line(text) <= len(text)


@pytest.mark.parametrize(
    "piece", ["a", "等", "ж", "a ", "等 ", "um ", "嗯", "'", "a'", ".", ". ", "\n", "`", "$", "\\(", "3"]
)
def test_a_hundred_thousand_of_anything(piece: str) -> None:
    """Were a pattern quadratic, this would take minutes."""
    text = piece * (100_000 // len(piece))
    assert "too long" in failed(text, longest=10_000, longest_line=10)

"""A thought and its answer, as they grow in the terminal."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liubai.chat import show, split_thought


@pytest.mark.parametrize(
    ("text", "prefilled", "complete", "expected"),
    [
        ("try 3 </think> <answer> 7", "<think>", False, ("try 3 ", "<answer> 7")),
        ("try 3", "<think>", False, ("try 3", "")),
        ("try 3 </thi", "<think>", False, ("try 3 ", "")),
        ("try 3 </thi", "<think>", True, ("try 3 </thi", "")),
        ("<think> a </think> b", "", True, ("a ", "b")),
        ("<thin", "", False, ("", "")),
        ("7 < 8", "", False, ("", "7 < 8")),
        ("7 <", "", True, ("", "7 <")),
        ("b", "<think> </think>", True, ("", "b")),
        ("half a charact\ufffd", "<think>", False, ("half a charact", "")),
    ],
)
def test_a_thought_and_its_answer(
    text: str, prefilled: str, complete: bool, expected: tuple[str, str]
) -> None:
    assert split_thought(text, prefilled, complete) == expected


pieces = st.lists(st.sampled_from([*"<thinkab /> 留\ufffd", "<think>", "</think>"]), max_size=12)


@given(pieces, st.sampled_from(["", "<think>", "<think> </think>"]), st.booleans())
def test_what_is_shown_is_never_taken_back(pieces: list[str], prefilled: str, complete: bool) -> None:
    """Shown token by token or all at once, the same text stands on the screen."""
    text = "".join(pieces).rstrip()
    thought, answer = "", ""
    for end in range(len(text)):
        new = split_thought(text[:end], prefilled, False)
        thought, answer = max(thought, new[0], key=len), max(answer, new[1], key=len)
    final = split_thought(text, prefilled, True)
    assert final[0].startswith(thought.rstrip("\ufffd "))
    assert final[1].startswith(answer.rstrip("\ufffd "))


def test_a_thought_is_dimmed_or_hidden(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["try", " 3", " </think>", " <answer>", " 7"]
    texts = [("".join(words[: i + 1]), i == len(words) - 1) for i in range(len(words))]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    show(texts, "<think>", show_thinking=True)
    assert capsys.readouterr().out == ("\x1b[2mtry\x1b[0m\x1b[2m 3\x1b[0m\x1b[2m \x1b[0m\n<answer> 7\n")
    show(texts, "<think>", show_thinking=False)
    assert capsys.readouterr().out == "\x1b[2mthinking…\x1b[0m\n<answer> 7\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    show(texts, "<think>", show_thinking=False)
    assert capsys.readouterr().out == "<answer> 7\n"

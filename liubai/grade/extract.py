"""What of a response counts as the answer. The rules, all of them:

1. Only the text after the **last** ``</think>`` counts. A thought that is opened (by the response or
   by the template) and never closed gives no answer; a response without any thought is all answer.
2. The last ``<answer>…</answer>`` there is the answer. Answer tags must pair up: a nested, unclosed or
   stray one gives no answer at all, for it is unclear what was meant. Several blocks: the last one
   counts, even when it is empty (and the format grader refuses the response).
3. Without answer tags, the last ``\\boxed{…}`` with balanced braces is the answer. An unbalanced last
   box gives no answer: going back to an earlier one would grade an intermediate result.
4. Inside an answer block a ``\\boxed{…}`` is unwrapped; two different boxes in one block are a list of
   alternatives and give no answer.
5. A blank answer, one longer than ``MAX_ANSWER`` or a response longer than ``MAX_RESPONSE`` characters
   gives no answer.

Nothing is ever searched for in free text: "the result is 12" is no answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# The same strings as in liubai.text.tokenizer. Repeated, so that grader processes start without
# importing a tokenizer library; a test keeps them equal.
THINK, END_THINK, ANSWER, END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"
TAGS = (THINK, END_THINK, ANSWER, END_ANSWER)

MAX_RESPONSE = 1_000_000  #: characters
MAX_ANSWER = 2_000  #: characters
MAX_PROGRAM = 100_000  #: characters

BOX = "\\boxed{"
_ANSWER_TAG = re.compile(f"{ANSWER}|{END_ANSWER}")
_FENCE = re.compile(r"^[ \t]*```([^\n`]*)$", re.MULTILINE)
_PYTHON: tuple[list[str], ...] = ([], ["python"], ["py"], ["python3"])  #: words behind a fence
_BRACE = re.compile(r"\\[{}]|[{}]")  # an escaped brace is consumed whole and does not count


@dataclass(frozen=True, slots=True)
class Extracted:
    """``answer`` is stripped and never blank; ``why`` says where it was, or why there is none."""

    answer: str | None
    why: str


def extract(response: str, prefilled: str = "", longest: int = MAX_ANSWER) -> Extracted:
    """The answer in ``response``; ``prefilled`` is the template's beginning of the assistant's turn."""
    said = _said(response, prefilled)
    if said.answer is None:
        return said
    if _ANSWER_TAG.search(said.answer):
        return _from_tags(said.answer, longest)
    return _from_box(said.answer, longest)


def extract_code(response: str, prefilled: str = "") -> Extracted:
    """The last fenced block after the thought that says ``python``, ``py``, ``python3`` or nothing; where
    there is none, the last in any other language. In the answer tags where there are some.

    A block of output may follow the program. A fence that never closes is no program."""
    said = _said(response, prefilled)
    if said.answer is None:
        return said
    text = said.answer
    if _ANSWER_TAG.search(text):
        tagged = _from_tags(text, MAX_PROGRAM)
        if tagged.answer is None:
            return tagged
        text = tagged.answer
    last, begin, python, found = None, None, False, False
    for fence in _FENCE.finditer(text):
        if begin is None:
            begin = fence.end() + 1
            python = fence[1].lower().split()[:1] in _PYTHON
        elif not fence[1].strip():  # with a word it would open another one: it belongs to the program
            if python or not found:
                last, found = text[begin : fence.start()], found or python
            begin = None
    if last is None or begin is not None:
        return Extracted(None, "no closed fence after the thought, or the last one is never closed")
    if not last.strip():
        return Extracted(None, "the last fence is empty")
    if len(last) > MAX_PROGRAM:
        return Extracted(None, f"the program is longer than {MAX_PROGRAM} characters")
    return Extracted(last, "last fence")  # indentation and all


def _said(response: str, prefilled: str) -> Extracted:
    """What comes after the thought."""
    if len(response) > MAX_RESPONSE:
        return Extracted(None, f"the response is longer than {MAX_RESPONSE} characters")
    turn = prefilled + response
    closed = turn.rfind(END_THINK)
    if turn.rfind(THINK) > closed:
        return Extracted(None, "the thought is never closed")
    return Extracted(turn[closed + len(END_THINK) :] if closed >= 0 else turn, "after the thought")


def _from_tags(said: str, longest: int) -> Extracted:
    begin: int | None = None
    inner = ""
    for tag in _ANSWER_TAG.finditer(said):
        if tag[0] == ANSWER:
            if begin is not None:
                return Extracted(None, "an answer tag inside an answer")
            begin = tag.end()
        elif begin is None:
            return Extracted(None, "an answer is closed that was never opened")
        else:
            inner = said[begin : tag.start()]
            begin = None
    if begin is not None:
        return Extracted(None, "the answer is never closed")
    if BOX not in inner:
        return _checked(inner, "answer tag", longest)
    contents = boxes(inner)
    if contents is None:
        return Extracted(None, "a box in the answer is never closed")
    if len({" ".join(content.split()) for content in contents}) > 1:
        return Extracted(None, "different boxes in one answer")
    return _checked(contents[-1], "box in the answer tag", longest)


def _from_box(said: str, longest: int) -> Extracted:
    if BOX not in said:
        return Extracted(None, "no answer tag and no box after the thought")
    contents = boxes(said)
    if contents is None:
        return Extracted(None, "the last box is never closed")
    return _checked(contents[-1], "last box", longest)


def _checked(answer: str, where: str, longest: int) -> Extracted:
    answer = answer.strip()
    if not answer:
        return Extracted(None, f"the answer is empty ({where})")
    if len(answer) > longest:
        return Extracted(None, f"the answer is longer than {longest} characters")
    return Extracted(answer, where)


def boxes(text: str) -> list[str] | None:
    """Contents of all outermost ``\\boxed{…}``, in order; ``None`` when one of them never closes.

    One pass over the text: a thousand unclosed boxes must not cost a thousand scans.
    """
    found: list[str] = []
    at = text.find(BOX)
    while at >= 0:
        begin = at + len(BOX)
        depth = 1
        end = -1
        for brace in _BRACE.finditer(text, begin):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                end = brace.start()
                break
        if end < 0:
            return None
        found.append(text[begin:end])
        at = text.find(BOX, end)
    return found

"""What counts as the answer: one line per rule."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liubai.grade import extract as extract_function
from liubai.grade.extract import MAX_ANSWER, MAX_RESPONSE, TAGS, boxes, extract, extract_code
from liubai.text import tokenizer

FOUND = [
    ("<think> 1 + 1 </think> <answer> 2 </answer>", "2"),
    ("<answer>2</answer>", "2"),
    ("<think> <answer> 3 </answer> </think> <answer> 2 </answer>", "2"),
    ("<think> a </think> b </think> <answer> 2 </answer>", "2"),
    (" so </think> <answer> 2 </answer>", "2"),
    ("</think> <answer> 1 </answer> no: <answer> 2 </answer>", "2"),
    ("<think></think> so \\boxed{2}", "2"),
    ("<think></think> \\boxed{1} and then \\boxed{2}", "2"),
    ("<think></think> \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("<think></think> \\boxed{ \\{ 2 }", "\\{ 2"),
    ("<think></think> <answer> \\boxed{2} </answer>", "2"),
    ("<think></think> <answer> \\boxed{ 2} that is \\boxed{2 } </answer>", "2"),
    ("<think></think> \\boxed{1} <answer> 2 </answer>", "2"),
    ("<think></think> <answer> 2 </answer> \\boxed{1}", "2"),
]

NOT_FOUND = [
    "",
    "2",
    "<think></think>2",
    "<think></think> the answer is 2",
    "<think> <answer> 2 </answer>",
    "<think> \\boxed{2}",
    "<think> a </think> <think> <answer> 2 </answer>",
    "<think> <answer> 2 </answer> </think>",
    "<think> \\boxed{2} </think> so",
    "<think> a </think> <answer> 2 </answer> </think>",
    "<think> a </think> \\boxed{2} </think> so",
    "<think></think> <answer></answer>",
    "<think></think> <answer> \n </answer>",
    "<think></think> <answer> 2 </answer> <answer> </answer>",
    "<think></think> <answer> 2",
    "<think></think> 2 </answer>",
    "<think></think> <answer> 2 </answer> </answer>",
    "<think></think> <answer> 1 <answer> 2 </answer> </answer>",
    "<think></think> <answer> <answer> 2 </answer>",
    "<answer> <think></think> 2 </answer>",
    "<think></think> <answer> 1 </answer> <answer> 2",
    "<think></think> \\boxed{2",
    "<think></think> \\boxed{1} \\boxed{2",
    "<think></think> \\boxed{}",
    "<think></think> <answer> \\boxed{1} or \\boxed{2} </answer>",
    "<think></think> <answer> \\boxed{1 </answer>",
    "<think></think> <ANSWER> 2 </ANSWER>",
    f"<think></think> <answer> {'2' * (MAX_ANSWER + 1)} </answer>",
    "<answer> 2 </answer>" + " " * MAX_RESPONSE,
]


@pytest.mark.parametrize(("response", "answer"), FOUND)
def test_found(response: str, answer: str) -> None:
    assert extract(response).answer == answer


@pytest.mark.parametrize("response", NOT_FOUND, ids=range(len(NOT_FOUND)))
def test_not_found_and_says_why(response: str) -> None:
    found = extract(response)
    assert found.answer is None
    assert found.why


@pytest.mark.parametrize(
    ("fences", "program"),
    [
        ([("python", "a"), ("text", "4")], "a"),
        ([("", "a"), ("output", "4")], "a"),
        ([("Python title=x.py", "a"), ("console", "4"), ("json", "5")], "a"),
        ([("py", "a"), ("text", "4"), ("python3", "b")], "b"),
        ([("python", "a"), ("", "b")], "b"),
        ([("text", "a"), ("java", "b")], "b"),
    ],
)
def test_the_last_fence_of_python_is_the_program(fences: list[tuple[str, str]], program: str) -> None:
    said = "\nprints\n".join(f"```{word}\n{inside}\n```" for word, inside in fences)
    assert extract_code(said).answer == f"{program}\n"
    assert extract_code(f"{said}\n```python\nb").answer is None


def test_prefilled_think_must_be_closed() -> None:
    assert extract("<answer> 2 </answer>", prefilled="<think>\n").answer is None
    assert extract("a </think> <answer> 2 </answer>", prefilled="<think>\n").answer == "2"
    assert extract(" <answer> 2 </answer>", prefilled="<think> </think>").answer == "2"


def test_tags_are_those_of_the_tokenizer() -> None:
    assert tokenizer.TAGS == TAGS
    assert extract_function is extract


@given(st.text(max_size=300))
def test_boxes_survive_any_text(text: str) -> None:
    boxes(text)
    extract(text)


@given(st.lists(st.sampled_from([*TAGS, "\\boxed{", "}", "{", "2", " ", "\\"]), max_size=30))
def test_an_answer_is_never_blank_and_never_from_the_thought(pieces: list[str]) -> None:
    answer = extract("<think>7" + "".join(pieces)).answer
    if answer is not None:
        assert answer.strip() == answer != ""
        assert "7" not in answer


def test_extraction_time_is_linear() -> None:
    started = time.perf_counter()
    for piece in ("\\boxed{", "<answer>", "</think>", "<think>", "{", "\\boxed{1}"):
        extract(piece * (MAX_RESPONSE // len(piece)))
    assert time.perf_counter() - started < 5

"""The format grader judges the whole turn: what the template prefilled, then what the model wrote."""

import pytest

from liubai.grade import GradeItem, check_format, grade

GOOD = "<think> 1 + 1 </think> <answer> 2 </answer>"


@pytest.mark.parametrize(
    "response",
    [
        GOOD,
        "<think></think><answer>2</answer>",
        "\n<think>\na\nb\n</think>\n\n<answer>\n2\n</answer>\n",
        "<think> a < b > c </think> <answer> two words </answer>",
    ],
)
def test_well_formed(response: str) -> None:
    assert check_format(response, "")


@pytest.mark.parametrize(
    "response",
    [
        "",
        "2",
        "<think> </think>",
        "<answer> 2 </answer>",
        "<think></think>a",
        "<think></think> <answer></answer>",
        "<think></think> <answer>  </answer>",
        "so <think></think> <answer> 2 </answer>",
        "<think></think> so <answer> 2 </answer>",
        "<think></think> <answer> 2 </answer> and",
        "<think></think> <answer> 1 </answer> <answer> 2 </answer>",
        "<think></think> <think></think> <answer> 2 </answer>",
        "<think><think></think></think> <answer> 2 </answer>",
        "<think></think> <answer><answer> 2 </answer></answer>",
        "<think> <answer> 2 </answer> </think>",
        "<answer> 2 </answer> <think> </think>",
        "<think> <answer> </think> 2 </answer>",
        "<think></think> <answer> 2",
        "<think> <answer> 2 </answer>",
        "</think> <think> <answer> 2 </answer>",
        "<THINK></THINK> <ANSWER> 2 </ANSWER>",
        GOOD + " " * 1_000_000,
    ],
)
def test_malformed(response: str) -> None:
    assert not check_format(response, "")


def test_format_reward_with_prefilled_think() -> None:
    rest = " 1 + 1 </think> <answer> 2 </answer>"
    for prefilled in ("<think>", "<think>\n"):
        assert check_format(rest, prefilled)
        assert not check_format("<think>" + rest, prefilled), "the model repeats the tag"
        item = GradeItem("number", "2", rest, {"prefilled": prefilled})
        assert grade(item).parts == {"correct": 1.0, "format": 1.0}
    assert check_format(" <answer> 2 </answer>", "<think> </think>")
    assert not check_format(rest, "<think> </think>")
    assert not check_format(rest, "")


def test_a_lone_closing_tag_tells_of_a_prefilled_think_unless_the_template_speaks() -> None:
    rest = " 1 + 1 </think> <answer> 2 </answer>"
    assert grade(GradeItem("number", "2", rest)).parts["format"] == 1.0
    assert grade(GradeItem("number", "2", rest, {"prefilled": ""})).parts["format"] == 0.0
    assert grade(GradeItem("number", "2", GOOD)).parts["format"] == 1.0

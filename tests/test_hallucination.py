"""Who answered, and how many of those said too much: by hand; a checkpoint from end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import Silent
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from liubai.commands.hallucination import hallucination
from liubai.errors import UserError
from liubai.grade.faithful import Finding
from liubai.measure.faithful import Rules, Score
from liubai.measure.hallucination import (
    Document,
    Summary,
    compare,
    figures,
    of_file,
    of_problems,
    said_in,
    wilson,
)
from liubai.problems import family
from liubai.problems.family import distinct_problems
from liubai.stages import hallucination as stage
from liubai.stages import pretrain
from liubai.stages.context import Context

PROSE = "The storm closed the harbour for two days and the ferries stayed in port until Monday."
FACTS = "anna has 3 red cups . ben has 5 blue hats . summarise"


@pytest.mark.parametrize(
    ("response", "prefilled", "said"),
    [
        ("it closed the harbour for days", "", "it closed the harbour for days"),
        ("hm </think> it closed the harbour for days", "<think>", "it closed the harbour for days"),
        (
            "hm </think><answer> it closed the harbour for days </answer>",
            "<think>",
            "it closed the harbour for days",
        ),
        ("it closed the harbour for days, I think", "<think>", None),  # the thought never ends
        ("<think>a</think><answer>it closed the harbour for days", "", None),  # nor the answer
        ("I'm sorry, I cannot summarise this passage for you.", "", None),
        ("抱歉，我无法概括这段文字的内容。", "", None),
        ("harbour closed", "", None),  # no summary
        ("风暴关闭了港口", "", "风暴关闭了港口"),  # characters are words
        ("</think>  ", "<think>", None),
    ],
)
def test_what_counts_as_an_answer(response: str, prefilled: str, said: str | None) -> None:
    assert said_in(response, PROSE, prefilled) == said


def test_a_list_of_facts_may_be_told_in_a_word() -> None:
    assert said_in("hm </think> <answer> anna 3 cups </answer>", FACTS, "<think>") == "anna 3 cups"
    assert said_in("<think> </think> <answer> cups </answer>", FACTS) == "cups"


def summary(said: str | None, supported: bool | None, told: float = 0.5, **more: Any) -> Summary:
    score = None if supported is None else Score(float(supported), supported, told=told, **more)
    return Summary(Document(PROSE, PROSE), said, score, tokens=10)


def test_only_what_was_answered_counts_and_both_rates_are_told() -> None:
    """Ten documents: six answered, of which one could not be judged, and two of five say too much."""
    found = [
        summary("the ferries stayed in port until Monday", True),  # a copy
        summary("one two three four", True),
        summary("a b", True),
        summary(
            "x y z", False, findings=(Finding("number", "7"), Finding("number", "8"), Finding("name", "Q"))
        ),
        summary("x y z", False, findings=(Finding("number", "9"),)),
        summary("no verdict", False, error="timeout"),
        *[summary(None, None)] * 4,
    ]
    told = figures(found)
    assert (told["documents"], told["answered"], told["answer_rate"]) == (10, 6, 0.6)
    assert told["rate"] == pytest.approx(2 / 5)
    assert told["rate_all"] == pytest.approx(2 / 10)
    assert told["interval"] == pytest.approx(wilson(2, 5))
    assert told["words"] == pytest.approx((7 + 4 + 2 + 3 + 3 + 2) / 6)
    assert told["copied"] == pytest.approx(1 / 6)
    assert told["errors"] == 1
    assert told["kinds"] == {"number": 2, "name": 1}  # summaries, not findings
    assert told["told"] == 0.5
    assert told["tokens"] == 10
    nothing = figures([summary(None, None)])
    assert (nothing["rate"], nothing["interval"], nothing["rate_all"]) == (None, None, 0)


def test_kinds_found_as_often_come_by_name() -> None:
    """In whatever order a set has them this time."""
    names = ("word", "date", "name", "count", "limit", "number", "negation", "opposite")
    found = figures([summary("x y z", False, findings=tuple(Finding(name, "x") for name in names))] * 2)
    assert list(found["kinds"]) == sorted(names)


@given(n=st.integers(1, 500), data=st.data())
def test_wilsons_interval_solves_its_equation(n: int, data: st.DataObject) -> None:
    """Its ends are the shares from which the observed one is z standard errors away."""
    count = data.draw(st.integers(0, n))
    low, high = wilson(count, n)
    assert 0 <= low <= count / n <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(count / n - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), abs=1e-6)


def test_two_checkpoints_are_compared_where_both_answered() -> None:
    ours = [True, True, False, None, True, False]
    theirs = [False, True, False, True, None, True]
    found = compare(ours, theirs)
    assert found["documents"] == 4
    assert (found["rate"], found["other"], found["worse"]) == (0.5, 0.5, 0.0)
    low, high = found["interval"]
    assert low < 0 < high
    assert compare([None], [True])["worse"] is None
    same = compare([True, False] * 20, [True, False] * 20)
    assert same["interval"] == [0, 0]  # paired: what is common to both is no noise
    with pytest.raises(UserError, match="only the same documents"):
        compare([True], [True, False])


def test_a_file_of_passages(tmp_path: Path) -> None:
    rows = [
        {"passage": PROSE},
        {"passage": "风暴关闭了港口两天。", "summary": "s"},
        {"passage": "p", "prompt": "go"},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    english, chinese, own = of_file(str(path))
    assert english.prompt.endswith(PROSE)
    assert "Summarise" in english.prompt
    assert (chinese.language, chinese.summary) == ("zh", "s")
    assert "概括" in chinese.prompt
    assert own.prompt == "go"
    assert len(of_file(str(path), 2)) == 2


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"text": "x"}, "p.jsonl:1: needs a 'passage' to be summarised; it has text"),
        ({"passage": " "}, "needs a 'passage'"),
        ({"passage": 5}, "needs a 'passage'"),
        ({"passage": "x", "summary": 3}, "'summary' must be text"),
        ({"passage": "x" * 200_001}, "at most 200,000 characters"),
    ],
)
def test_a_wrong_file_gets_a_sentence(tmp_path: Path, row: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=sentence):
        of_file(str(path))


def test_other_families_have_no_passages() -> None:
    assert len(of_problems(distinct_problems(family("passage"), "eval", 0, 3))) == 3
    with pytest.raises(UserError, match="measured on passages"):
        of_problems(distinct_problems(family("countdown"), "eval", 0, 3))


# --- from end to end ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seconds of reading passages: its summaries are mostly wrong, and in the form of summaries."""
    folder = tmp_path_factory.mktemp("model") / "1-base"
    shape = pretrain.ModelShape(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    config = pretrain.Config(steps=60, tokens_per_step=1024, model=shape, families={"passage": 1.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)
        pretrain.run(config, Context(folder, 0, {}, Silent()))
    return folder / "checkpoint"


def test_a_checkpoint_is_asked_and_judged_and_the_same_again(model: Path) -> None:
    asked = stage.documents("passage", 30, 0)
    found = stage.summarised(model, asked, Rules(), 48, 0)
    again = stage.summarised(model, asked, Rules(), 48, 1)
    assert [s.said for s in found] == [s.said for s in again], "temperature 0 has no seed"
    told = figures(found)
    assert told["answered"] > 0
    assert told["rate"] is not None
    for s in found:
        assert (s.score is None) == (s.said is None)
    silent = stage.summarised(model, asked, Rules(), 48, 0, thinking=False)
    assert sum(s.tokens for s in silent) != sum(s.tokens for s in found)


def test_the_command_tells_people_and_programs(model: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(hallucination)
    out = tmp_path / "out.jsonl"
    arguments = [str(model), str(model), "--limit", "10", "--max-tokens", "48"]
    told = json.loads(CliRunner().invoke(app, [*arguments, "--json", "--out", str(out)]).stdout)
    assert len(told["results"]) == 2
    assert told["results"][1]["compared"]["worse"] in (0.0, None)
    assert len(out.read_text().splitlines()) == 20
    assert (
        "of the answered" in CliRunner().invoke(app, arguments).stdout or not told["results"][0]["answered"]
    )
    rows = [{"passage": FACTS, "summary": s} for s in ("anna 3 cups", "anna 4 cups", "")]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "tokens" not in CliRunner().invoke(app, ["--problems", str(file)]).stdout
    blunt = CliRunner().invoke(app, [str(model), *arguments[2:], "--no-thinking"]).stdout
    assert "tokens" in blunt
    assert "with the thought" not in blunt
    told = json.loads(CliRunner().invoke(app, ["--problems", str(file), "--json"]).stdout)
    assert (told["answered"], told["rate"], told["kinds"]) == (2, 0.5, {"number": 1})
    for wrong, sentence in (
        ([], "name a checkpoint"),
        (["--problems", str(file), "--scorer", "hhem"], "--hhem DIR"),
        ([str(tmp_path)], "is not a checkpoint"),
    ):
        error = CliRunner().invoke(app, wrong).exception
        assert isinstance(error, UserError)
        assert sentence in str(error)

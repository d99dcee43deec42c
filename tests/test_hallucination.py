"""Who answered, how many of those said too much, and who may not pass: by hand; a stage from end to end."""

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
from liubai.report.hallucination import section
from liubai.report.read import read_run
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


# --- the gate -------------------------------------------------------------------------------------


def told_of(rate: float | None, worse: float | None = None, answer_rate: float = 1.0) -> dict[str, Any]:
    told: dict[str, Any] = {"rate": rate, "interval": [0.1, 0.3], "answer_rate": answer_rate}
    if worse is not None:
        against = {"label": "Base", "documents": 50, "rate": rate, "other": 0.1, "interval": [0.0, 0.1]}
        told["compared"] = against | {"worse": worse}
    return told


@pytest.mark.parametrize(
    ("config", "told", "sentence"),
    [
        ({}, told_of(0.9), ""),
        ({"at_most": 0.2}, told_of(0.2), ""),
        ({"at_most": 0.2}, told_of(0.21), "21.0% of the summaries"),
        ({"at_most": 0.2}, told_of(None), "nothing shows that it passes"),
        ({"worse_by": 0.05}, told_of(0.2, 0.05), ""),
        ({"worse_by": 0.05}, told_of(0.2, 0.06), "6.0 points more"),
        ({"answered": 0.9, "at_most": 1.0}, told_of(0.0, answer_rate=0.5), "50.0% of the documents"),
    ],
)
def test_who_may_not_pass(config: dict[str, Any], told: dict[str, Any], sentence: str) -> None:
    said = stage.gate(stage.Config(**config), told)
    assert (sentence in said) if sentence else said == ""


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"problems": "countdown"}, "has no passages"),
        ({"scorer": "hhem"}, "hhem = "),
        ({"at_most": 1.5}, "less than or equal to 1"),
        ({"questions": {"path": "q.jsonl"}}, "no questions"),
    ],
)
def test_settings_that_make_no_sense(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        stage.Config(**config)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Checkpoint folder → the share of its summaries that say too much; the first ones do."""
    shares: dict[str, float] = {}

    def summarised(path: Path, asked: list[Document], judge: Rules, *_: Any, **__: Any) -> list[Summary]:
        wrong = round(shares[path.parent.name] * len(asked))
        said = [Summary(d, "nobody 0 cups" if i < wrong else _true(d)) for i, d in enumerate(asked)]
        return stage.judged(said, judge)

    monkeypatch.setattr(stage, "summarised", summarised)
    return shares


def _true(document: Document) -> str:
    name, _, number, colour, thing = document.passage.split()[:5]
    return f"{name} {number} {colour} {thing}"


def made(folder: Path, name: str) -> Path:
    (folder / name / "checkpoint").mkdir(parents=True)
    return folder / name


@pytest.mark.usefixtures("quiet")
def test_a_gate_stops_the_run_and_keeps_what_it_measured(tmp_path: Path, scripted: dict[str, float]) -> None:
    scripted |= {"base": 0.1, "zero": 0.3, "tidy": 0.12}
    models = {name: made(tmp_path, name) for name in scripted}
    first = Context(tmp_path / "4-before", 0, {"base": models["base"]}, Silent())
    stage.run(stage.Config(limit=100), first)
    told = json.loads((first.folder / stage.RESULT).read_text())
    assert (told["rate"], told["gate"], told["label"]) == (0.1, "", "base")
    inputs = {"zero": models["zero"], "before": first.folder}
    worse = Context(tmp_path / "5-after", 0, inputs, Silent(), stage="after")
    with pytest.raises(UserError, match=r"stage 'after': .*20.0 points more.*worse_by is 5.0%.*5-after"):
        stage.run(stage.Config(limit=100, worse_by=0.05), worse)
    kept = json.loads((worse.folder / stage.RESULT).read_text())
    assert kept["compared"]["worse"] == pytest.approx(0.2)
    assert kept["gate"]
    assert len((worse.folder / "samples.jsonl").read_text().splitlines()) == 100
    assert (worse.folder / "metrics.jsonl").exists()
    inputs = {"tidy": models["tidy"], "before": first.folder}
    stage.run(stage.Config(limit=100, worse_by=0.05), Context(tmp_path / "6-tidy", 0, inputs, Silent()))
    alone = {"tidy": models["tidy"]}
    inputs["tidy"] = models["zero"]  # without a gate the two are compared all the same, and nothing stops
    open_ = Context(tmp_path / "6-open", 0, inputs, Silent())
    stage.run(stage.Config(limit=100), open_)
    told = json.loads((open_.folder / stage.RESULT).read_text())
    assert told["compared"]["worse"] == pytest.approx(0.2)
    assert told["gate"] == ""
    inputs["tidy"] = models["tidy"]
    for config, parents, sentence in (
        (stage.Config(limit=100, at_most=0.1), alone, "at_most is 10.0%"),
        (stage.Config(limit=50, worse_by=0.05), inputs, "judged other documents"),
        (stage.Config(worse_by=0.05), alone, "needs a hallucination stage to compare with"),
    ):
        context = Context(tmp_path / "7-x", 0, parents, Silent())
        with pytest.raises(UserError, match=sentence):
            stage.run(config, context)


@pytest.mark.usefixtures("quiet")
def test_the_report_shows_what_was_found(tmp_path: Path, scripted: dict[str, float]) -> None:
    scripted |= {"base": 0.5, "zero": 0.25}
    recipe = 'name = "r"\n'
    for place, name in enumerate(scripted, 1):
        context = Context(tmp_path / f"{place}-look-{name}", 0, {name: made(tmp_path, name)}, Silent())
        stage.run(stage.Config(limit=20, label=f"<{name}>"), context)
        recipe += f'[stages.look-{name}]\nkind = "hallucination"\n'
    (tmp_path / "recipe.toml").write_text(recipe)
    part = section(read_run(tmp_path))
    assert part is not None
    assert (
        part.finding
        == "25.0% of <zero>'s summaries say what the passage does not, fewer than <base>'s 50.0%."
    )
    assert "&lt;base&gt;" in part.body
    assert "<base>" not in part.body
    assert "nobody 0 cups" in part.body
    rates = part.charts[0].lines[0]
    assert rates.curve.ys == (0.5, 0.25)
    assert len(part.charts[0].lines) == 1, "all were answered: one line says it"
    assert "<svg" in part.charts[0].svg
    (tmp_path / "recipe.toml").write_text('[stages.x]\nkind = "eval"\n')
    assert section(read_run(tmp_path)) is None


def told_by(
    label: str, rate: float, thinking: bool = True, over: tuple[str, float, float] | None = None
) -> dict[str, Any]:
    """A checkpoint's figures; ``over``: with whom it is compared, and the ends of the interval."""
    told: dict[str, Any] = {
        "label": label,
        "rate": rate,
        "rate_all": rate,
        "thinking": thinking,
        "words": 9.0,
    }
    told["interval"] = [rate - 0.02, rate + 0.02]
    if over:
        name, low, high = over
        told["compared"] = {"label": name, "worse": (low + high) / 2, "interval": [low, high]}
    return told


def test_the_report_tells_steps_beyond_chance_and_what_a_thought_did(tmp_path: Path) -> None:
    """Without a thought is another line over the same checkpoints, and no step of the story."""
    told = [
        told_by("Base", 0.2),
        told_by("Zero", 0.24, over=("Base", 0.01, 0.07)),
        told_by("Dev2", 0.23, over=("Zero", -0.03, 0.01)),
        told_by("R1", 0.05, over=("Dev2", -0.21, -0.15)),
        told_by("Base", 0.21, thinking=False, over=("Base", -0.05, -0.01)),
        told_by("R1", 0.03, thinking=False),
    ]
    recipe = ""
    for place, each in enumerate(told):
        folder = tmp_path / f"{place}-look{place}"
        folder.mkdir()
        (folder / "DONE").write_text("{}")
        (folder / stage.RESULT).write_text(json.dumps(each))
        recipe += f'[stages.look{place}]\nkind = "hallucination"\n'
    (tmp_path / "recipe.toml").write_text(recipe)
    part = section(read_run(tmp_path))
    assert part is not None
    assert part.finding == (
        "5.0% of R1's summaries say what the passage does not, fewer than Base's 20.0%. "
        "Beyond chance it rose with Zero (over Base, +4.0 pt) and it fell with R1 (over Dev2, −18.0 pt). "
        "Without a thought R1 does so in 3.0%, with one in 5.0%."
    )
    chart = part.charts[0]
    assert chart.x_names == ["Base", "Zero", "Dev2", "R1"]
    thinking, without = chart.lines
    assert thinking.curve.ys == (0.2, 0.24, 0.23, 0.05)
    assert without.curve.ys == (0.21, None, None, 0.03)
    assert "NaN" not in str(chart.svg)
    assert "nan" not in str(chart.svg)


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

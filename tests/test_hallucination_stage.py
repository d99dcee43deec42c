"""Who may not pass the gate, what a stage keeps, and what the report shows of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import Silent

from liubai.errors import UserError
from liubai.measure.faithful import Rules, Score
from liubai.measure.hallucination import Document, Summary, wilson
from liubai.report.bridge_draw import Spread, Spreads
from liubai.report.hallucination import section
from liubai.report.read import read_run
from liubai.report.section import Section
from liubai.stages import hallucination as stage
from liubai.stages.context import Context

PROSE = "The storm closed the harbour for two days and the ferries stayed in port until Monday."
FACTS = "anna has 3 red cups . ben has 5 blue hats . summarise"


def told_of(
    rate: float | None,
    worse: float | None = None,
    answer_rate: float = 1.0,
    errors: int = 0,
    their_judged: float = 1.0,
) -> dict[str, Any]:
    """Of 200 documents, ``errors`` of whose summaries have no verdict."""
    told: dict[str, Any] = {"rate": rate, "interval": [0.1, 0.3], "answer_rate": answer_rate}
    told |= {"answered": round(200 * answer_rate), "errors": errors}
    if worse is not None:
        against = {"label": "Base", "documents": 50, "rate": rate, "other": 0.1, "interval": [0.0, 0.1]}
        told["compared"] = against | {"worse": worse, "judged": their_judged}
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
        # an endpoint that died after three: none of them says too much, and nobody knows of the others
        ({"at_most": 0.2}, told_of(0.0, errors=197), "197 of 200 summaries have no verdict"),
        ({"worse_by": 0.05}, told_of(0.0, 0.0, errors=197), "197 of 200 summaries have no verdict"),
        ({"worse_by": 0.05}, told_of(0.0, 0.0, their_judged=0.1), "10.0% of Base's summaries have a verdict"),
        ({"at_most": 0.2}, told_of(0.1, errors=20), ""),
        ({"at_most": 0.2, "answered": 0.95}, told_of(0.1, errors=20), "95.0% have to have one"),
        ({}, told_of(0.0, errors=197), ""),
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
        (stage.Config(limit=100, temperature=1.0), inputs, "wrote at another temperature"),
        (stage.Config(worse_by=0.05), alone, "needs a hallucination stage to compare with"),
    ):
        context = Context(tmp_path / "7-x", 0, parents, Silent())
        with pytest.raises(UserError, match=sentence):
            stage.run(config, context)


@pytest.mark.usefixtures("quiet")
def test_a_judge_that_dies_on_the_way_lets_nobody_pass(
    tmp_path: Path, scripted: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three verdicts, all of them good, and then the endpoint is gone."""
    scripted["base"] = 0.0
    inputs = {"base": made(tmp_path, "base")}

    class Dying(Rules):
        def __call__(self, pairs: Any, progress: Any = None) -> list[Score]:
            scores = super().__call__(pairs, progress)
            return scores[:3] + [Score(0.0, False, error="no answer") for _ in scores[3:]]

    monkeypatch.setattr(stage, "scorer", lambda *_, **__: Dying())
    context = Context(tmp_path / "2-look", 0, inputs, Silent(), stage="look")
    with pytest.raises(UserError, match=r"stage 'look': 97 of 100 summaries have no verdict"):
        stage.run(stage.Config(limit=100, at_most=0.1), context)
    told = json.loads((context.folder / stage.RESULT).read_text())
    assert (told["rate"], told["errors"]) == (0.0, 97)


def test_what_was_asked_is_a_part_of_the_digest() -> None:
    """The same passage with another question is another task; a passage of the world asks for itself."""
    own = Document(FACTS, FACTS)
    assert stage.documents_digest([own]) == hashlib.sha256(FACTS.encode()).hexdigest()
    digests = {
        stage.documents_digest([Document(PROSE, prompt)]) for prompt in ("one word", "at length", PROSE)
    }
    assert len(digests) == 3


def looked_at(run: Path, models: Iterable[str]) -> Section | None:
    """The report's part on a run that has looked at each of ``models`` with 20 summaries."""
    recipe = 'name = "r"\n'
    for place, name in enumerate(models, 1):
        context = Context(run / f"{place}-look-{name}", 0, {name: made(run, name)}, Silent())
        stage.run(stage.Config(limit=20, label=f"<{name}>"), context)
        recipe += f'[stages.look-{name}]\nkind = "hallucination"\n'
    (run / "recipe.toml").write_text(recipe)
    return section(read_run(run))


@pytest.mark.usefixtures("quiet")
def test_the_report_shows_what_was_found(tmp_path: Path, scripted: dict[str, float]) -> None:
    scripted |= {"base": 0.5, "zero": 0.25}
    part = looked_at(tmp_path, scripted)
    assert part is not None
    assert (
        part.finding
        == "25.0 % of <zero>'s summaries say what the passage does not, fewer than <base>'s 50.0 % "
        "(on the same documents −25.0 pt, −45.0 pt to −5.0 pt)."
    )
    assert "&lt;base&gt;" in part.body
    assert "<base>" not in part.body
    assert "nobody 0 cups" in part.body
    chart = part.charts[0]
    assert isinstance(chart, Spreads)
    (rates,) = chart.series  # all were answered: one row of dots says it
    assert rates.points == [Spread(0.5, *wilson(10, 20)), Spread(0.25, *wilson(5, 20))]
    assert "<svg" in chart.svg
    assert ".whisker {" in part.body
    (tmp_path / "recipe.toml").write_text('[stages.x]\nkind = "eval"\n')
    assert section(read_run(tmp_path)) is None


@pytest.mark.usefixtures("quiet")
def test_a_model_of_the_users_is_called_as_its_stage(tmp_path: Path, scripted: dict[str, float]) -> None:
    scripted["theirs"] = 0.5
    brought = stage.Config(limit=20, model=str(made(tmp_path, "theirs") / "checkpoint"))
    stage.run(brought, context := Context(tmp_path / "1-look", 0, {}, Silent(), stage="look"))
    assert json.loads((context.folder / stage.RESULT).read_text())["label"] == "look"


@pytest.mark.usefixtures("quiet")
def test_the_bars_are_the_interval_itself(tmp_path: Path, scripted: dict[str, float]) -> None:
    """Of 0 of n it is all above the rate, and half of its length on either side would be another one."""
    scripted |= {"base": 0.5, "zero": 0.0}
    part = looked_at(tmp_path, scripted)
    assert part is not None
    svg = str(part.charts[0].svg)
    dots = [float(y) for y in re.findall(r'<circle[^>]* cy="([\d.]+)"', svg)]
    bars = [tuple(map(float, ends)) for ends in re.findall(r'd="M[\d.]+ ([\d.]+)V([\d.]+)"', svg)]
    unit = (dots[1] - dots[0]) / 0.5  # a share of 1, in the chart's units
    for dot, bar, count in zip(dots, bars, (10, 0), strict=True):
        wanted = [dot + unit * (count / 20 - end) for end in wilson(count, 20)]
        assert bar == pytest.approx(tuple(wanted), abs=0.2)
    assert bars[1][0] == dots[1]


@pytest.mark.usefixtures("quiet")
def test_the_report_claims_no_difference_that_the_pairs_do_not_bear(
    tmp_path: Path, scripted: dict[str, float]
) -> None:
    """Two summaries of 20 fewer are chance; of the same documents five fewer are not, though the two rates'
    intervals meet."""
    scripted |= {"base": 0.5, "zero": 0.4}
    part = looked_at(tmp_path / "few", scripted)
    assert part is not None
    assert part.finding == (
        "40.0 % of <zero>'s summaries say what the passage does not, within the noise of <base>'s 50.0 % "
        "(on the same documents −10.0 pt, −25.0 pt to +0.0 pt)."
    )
    scripted["zero"] = 0.25
    part = looked_at(tmp_path / "more", scripted)
    assert part is not None
    assert "fewer than <base>'s 50.0 % (on the same" in part.finding
    assert wilson(10, 20)[0] < wilson(5, 20)[1]
    for path in sorted((tmp_path / "more").glob("*look*/hallucination.json")):  # as others may have kept it
        told = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in told.items() if k != "verdicts"}))
    part = section(read_run(tmp_path / "more"))
    assert part is not None
    assert "within the noise" in part.finding


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
        "5.0 % of R1's summaries say what the passage does not, fewer than Base's 20.0 %. "
        "Beyond chance it rose with Zero (over Base, +4.0 pt) and it fell with R1 (over Dev2, −18.0 pt). "
        "Without a thought R1 does so in 3.0 %, with one in 5.0 %."
    )
    chart = part.charts[0]
    assert chart.x_names == ["Base", "Zero", "Dev2", "R1"]
    assert isinstance(chart, Spreads)
    thinking, without = ([p and p.mean for p in row.points] for row in chart.series)
    assert thinking == [0.2, 0.24, 0.23, 0.05]
    assert without == [0.21, None, None, 0.03]
    assert "NaN" not in str(chart.svg)
    assert "nan" not in str(chart.svg)

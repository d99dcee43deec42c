"""Points are read from files and run folders as they are counted by hand; the command, and the report."""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from conftest import Silent
from typer.testing import CliRunner

from liubai.commands.scaling import scaling
from liubai.errors import UserError
from liubai.measure.scaling import FORMS, Point, curve
from liubai.measure.scaling_points import averaged, of_file, of_runs, parameters
from liubai.report.read import read_run
from liubai.report.scaling import section
from liubai.stages import distill
from liubai.stages.context import Context


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_file_of_points(tmp_path: Path) -> None:
    rows = [
        {"x": 10, "y": 0.5, "series": "a", "axis": "tokens"},
        {"n": 100, "d": 1000, "y": 3.5},
        {"x": 2, "scores": [1, 0, 0, 1]},
        {"x": 3, "y": 0.2, "share": True},
    ]
    points = of_file(written(tmp_path / "p.jsonl", rows))
    assert points[0] == Point(10.0, 0.5, "a", axis="tokens")
    assert (points[1].x, points[1].n, points[1].d) == (600_000, 100, 1000)
    assert points[2].y == 0.5
    assert [point.share for point in points] == [None, None, None, True]
    (tmp_path / "p.csv").write_text("x,y,share\n1,0.5,false\n2,0.4,\n")
    assert [point.share for point in of_file(str(tmp_path / "p.csv"))] == [False, None]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"x": 1}, "p.jsonl:1: 'y' must be a number, not null"),
        ({"x": "many", "y": 1}, "'x' must be a number"),
        ({"x": 0, "y": 1}, "x, n and d must be above 0"),
        ({"x": 1, "y": 1, "n": 5}, "n and d come together"),
        ({"x": 1, "y": True}, "'y' must be a number"),
        ({"x": 1, "y": 1, "why": 2}, "'why' is none of"),
        ({"x": 1, "scores": ["a"]}, "'scores' is a list of numbers"),
        ({"x": 1, "y": 1, "share": 1}, "'share' is true"),
    ],
)
def test_a_wrong_file_gets_a_sentence(tmp_path: Path, row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        of_file(written(tmp_path / "p.jsonl", [row]))


def test_nothing_is_no_curve(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no points"):
        of_file(written(tmp_path / "p.jsonl", []))
    with pytest.raises(UserError, match="no run folder"):
        of_runs([tmp_path])
    (tmp_path / "recipe.toml").write_text('[stages.x]\nkind = "sft"\n')
    with pytest.raises(UserError, match="no stage with a curve"):
        of_runs([tmp_path])


# --- run folders ----------------------------------------------------------------------------------


def weights(folder: Path, *shapes: tuple[int, ...]) -> None:
    """A safetensors file with nothing but its header."""
    folder.mkdir(parents=True)
    header = {
        f"w{i}": {"dtype": "F32", "shape": list(s), "data_offsets": [0, 0]} for i, s in enumerate(shapes)
    }
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A base of 100 parameters, RL on it with an evaluation each second step, and three ways of answering."""
    out = tmp_path / "run"
    stages = [
        ("base", "pretrain", ""),
        ("zero", "rl", "base"),
        *((f"vote{k}", "eval", "zero") for k in (1, 2, 4)),
    ]
    recipe = 'name = "r"\n' + "".join(
        f'[stages.{name}]\nkind = "{kind}"\n' + (f'from = ["{origin}"]\n' if origin else "")
        for name, kind, origin in stages
    )
    weights(out / "1-base" / "checkpoint", (10, 8), (20,))
    weights(out / "2-zero" / "checkpoint", (100,))
    (out / "recipe.toml").write_text(recipe)
    rows = [{"step": i, "loss": 3.0 / i, "tokens": 50 * i} for i in range(1, 41)]
    written(out / "1-base" / "metrics.jsonl", rows)
    rl: list[dict[str, Any]] = [
        {"step": i, "accuracy": 0.1 * i, "step_tokens": 10.0, "update_tokens": 4.0}
        | ({"eval/pass@1": 0.1 * i + 0.01} if i % 2 == 0 else {})
        for i in range(1, 9)
    ]
    written(out / "2-zero" / "metrics.jsonl", rl)
    for place, k in enumerate((1, 2, 4), 3):
        folder = out / f"{place}-vote{k}"
        folder.mkdir()
        told = {"label": "Zero", "pass@1": 0.5, "mean_tokens": 30.0, "way": {"kind": "vote", "number": k}}
        told |= {"tokens_spent": 30.0 * k, "tokens_judged": 5.0}
        (folder / "eval.json").write_text(json.dumps(told))
        (folder / "scores.json").write_text(json.dumps({"scores": [["p", [1.0, 0.0]], ["q", [0.5, 0.5]]]}))
    return out


def test_compute_is_counted_as_by_hand(run: Path) -> None:
    assert parameters(run / "1-base" / "checkpoint") == 100
    points = of_runs([run])
    loss = [p for p in points if p.series == "base: loss"]
    # the first 3 % are warm-up, and the rest is averaged in stretches
    assert 10 < len(loss) <= 16
    assert all(a.x < b.x and a.y > b.y for a, b in pairwise(loss))
    assert loss[0].x > 0.03 * 6 * 100 * 2000
    assert loss[-1].x <= 6 * 100 * 2000
    practised = [p for p in points if p.series == "zero: accuracy of rollouts"]
    # the answers of step i are those of the weights after i − 1 steps; the first were free
    assert [p.x for p in practised] == [100 * (2 * 10 + 6 * 4) * (i - 1) for i in range(2, 9)]
    assert [p.y for p in practised] == pytest.approx([0.1 * i for i in range(2, 9)])
    held = [p for p in points if p.series == "zero: held-out accuracy"]
    assert [p.x for p in held] == [4400 * i for i in (2, 4, 6, 8)]
    votes = [p for p in points if p.series == "zero: vote"]
    assert [p.x for p in votes] == [35.0, 65.0, 125.0]
    assert votes[0].scores == (0.5, 0.5)
    assert votes[0].axis == "tokens an answer"
    assert all(p.share is (p.series != "base: loss") for p in points)


def test_answers_without_paths_give_pass_at_k(run: Path) -> None:
    folder = run / "3-vote1"
    (folder / "eval.json").write_text(json.dumps({"label": "Zero", "pass@1": 0.25, "mean_tokens": 20.0}))
    scores = [["p", [1.0, 0.0, 0.0, 0.0]], ["q", [0.0, 1.0, 0.9, 0.0]]]
    (folder / "scores.json").write_text(json.dumps({"scores": scores}))
    found = [p for p in of_runs([run]) if p.series.startswith("Zero: best of k")]
    assert [(p.x, pytest.approx(p.y)) for p in found] == [(20.0, 0.25), (40.0, 0.5), (80.0, 1.0)]


def test_several_runs_show_what_one_cannot(run: Path, tmp_path: Path) -> None:
    (run / "3-vote1" / "eval.json").write_text(
        json.dumps({"label": "Zero", "pass@1": 0.25, "mean_tokens": 20.0})
    )
    found = of_runs([run, run])
    last = next(p for p in found if p.series == "base: last loss")
    assert (last.n, last.d, last.x) == (100, 2000, 6 * 100 * 2000)
    assert last.y == pytest.approx((3 / 39 + 3 / 40) / 2)
    spent = next(p for p in found if p.series == "Zero: accuracy")
    assert spent.x == 6 * 100 * 2000 + 8 * 4400
    assert any(p.series == "run · zero: vote" for p in found)


def test_all_that_has_learned_is_counted(run: Path) -> None:
    """Behind the evaluation: distillation from zero into the base, then DPO with a reward model's pairs."""
    recipe = (run / "recipe.toml").read_text()
    told = {
        "small": ("distill", ["base", "zero"]),
        "liked": ("reward_model", ["small"]),
        "checked": ("process", ["small"]),
        "polite": ("dpo", ["small", "liked", "checked"]),
        "last": ("eval", ["polite"]),
    }
    for place, (name, (kind, origin)) in enumerate(told.items(), 6):
        recipe += f'[stages.{name}]\nkind = "{kind}"\nfrom = {json.dumps(origin)}\n'
        leaves = {"reward_model": "reward_model", "process": "process_model"}.get(kind, "checkpoint")
        weights(run / f"{place}-{name}" / leaves, (100,))
        rows: list[dict[str, Any]] = [{"step": i, "loss": 1.0, "tokens": 30 * i} for i in range(1, 6)]
        if kind == "distill":
            rows = [{"step": 0, "eval/pass@1": 0.2}]
            rows += [{"step": i, "tokens": 7 * i, "step_tokens": 7, "update_tokens": 7} for i in (1, 2)]
        written(run / f"{place}-{name}" / "metrics.jsonl", rows)
    (run / "recipe.toml").write_text(recipe)
    last = {"label": "Polite", "pass@1": 0.25, "mean_tokens": 20.0}
    (run / "10-last" / "eval.json").write_text(json.dumps(last))
    spent = next(p for p in of_runs([run, run]) if p.series == "Polite: accuracy")
    base, zero = 6 * 100 * 2000, 8 * 4400
    assert spent.x == base + zero + 2 * 100 * (2 * 7 + 6 * 7) + 3 * 6 * 100 * 150


@pytest.mark.usefixtures("quiet")
def test_distillation_says_what_it_learns_from(base: Path, tmp_path: Path) -> None:
    """From its own answers, every token of them."""
    shape = {"steps": 1, "groups": 2, "samples": 2, "max_tokens": 12, "eval_problems": 1, "eval_samples": 2}
    folder = tmp_path / "2-small"
    distill.run(distill.Config.model_validate(shape), Context(folder, 0, {"a": base, "b": base}, Silent()))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["update_tokens"] == rows[-1]["step_tokens"] > 0


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)


def test_stretches_keep_the_mean() -> None:
    pairs = [(float(x), 2.0) for x in range(1, 200)]
    found = averaged(pairs)
    assert len(found) <= 16
    assert all(y == 2.0 for _, y in found)
    assert averaged(pairs[:5]) == pairs[:5]


def test_the_command_writes_what_the_report_shows(run: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(scaling)
    x_N = np.geomspace(1e12, 1e15, 10)
    y_N = curve("sigmoid", {"R": 0.1, "A": 0.7, "M": 3e13, "B": 0.9}, x_N[:, None])
    y_N += np.random.default_rng(0).normal(0, 0.01, 10)
    rows = [{"x": x, "y": y, "series": "a <b>"} for x, y in zip(x_N.tolist(), y_N.tolist(), strict=True)]
    file = written(tmp_path / "p.jsonl", rows)
    result = CliRunner().invoke(app, [file, "--draws", "20", "--json"])
    told = json.loads(result.stdout)["series"][0]
    assert {found["form"] for found in told["fits"]} == set(FORMS) - {"chinchilla"}
    assert len(told["fits"][0]["curve"]) == 4
    for _, y, low, high in zip(*told["fits"][0]["curve"], strict=True):
        assert low - 0.05 <= y <= high + 0.05
    # the run has too few points for some of its series, and enough for others
    kept = CliRunner().invoke(app, [str(run), "--draws", "20", "--keep"])
    assert kept.exit_code == 0, kept.output
    assert "Not fitted, for there are points at only 3 different x:" in kept.stdout
    part = section(read_run(run))
    assert part is not None
    assert any("zero: accuracy of rollouts" in chart.title for chart in part.charts)
    for chart in part.charts:
        assert "<svg" in chart.svg
    (run / "scaling.json").write_text(json.dumps({"series": [told]}))
    shown = section(read_run(run))
    assert shown is not None
    assert "<b>a &lt;b&gt;</b>" in shown.body


def test_a_wrong_argument_gets_a_sentence(run: Path) -> None:
    app = typer.Typer()
    app.command()(scaling)
    for arguments, said in (
        ([f"{run}/nope"], f"there is no '{run}/nope'"),
        ([f"{run}/2-zero"], f"did you mean '{run}'?"),
        ([str(run), "--after", "1e30"], "--after 1e+30 leaves no point: the largest x is "),
    ):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, UserError)
        assert said in str(result.exception)


def test_what_cannot_be_read_is_named_before_no_series_is_found(run: Path) -> None:
    """Points that are not there for damage are otherwise as if the stage had never been."""
    app = typer.Typer()
    app.command()(scaling)
    for folder in run.glob("*-*"):
        (folder / "DONE").write_text("{}")
    assert CliRunner().invoke(app, [str(run), "--draws", "20"]).stderr == ""
    (run / "3-vote1" / "eval.json").write_text("{oops")
    (run / "4-vote2" / "eval.json").write_text("{}")
    (run / "5-vote4" / "eval.json").unlink()
    metrics = run / "2-zero" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step":\n')
    (run / "1-base" / "metrics.jsonl").write_text("oops")
    result = CliRunner().invoke(app, [str(run), "--series", "vote"])
    assert isinstance(result.exception, UserError)
    notes = [note.removeprefix("liubai: note: ") for note in result.stderr.splitlines()]
    assert notes == [
        f"'{run}/1-base/metrics.jsonl' has no readable line",
        f"'{metrics}' has 1 unreadable line, left out",
        notes[2],
        f"'{run}/4-vote2/eval.json' is empty",
        f"'{run}/5-vote4/eval.json' is missing",
    ]
    assert notes[2].startswith(f"cannot read '{run}/3-vote1/eval.json': ")


def test_a_run_without_fits_has_no_part_in_the_report(run: Path) -> None:
    assert section(read_run(run)) is None

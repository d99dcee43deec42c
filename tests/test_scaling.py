"""Planted curves are recovered within their intervals; what data cannot say is said so; points are read from
files and run folders as they are counted by hand."""

from __future__ import annotations

import json
import math
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from liubai.commands.scaling import scaling
from liubai.errors import UserError
from liubai.measure.scaling import (
    FORMS,
    LEAST_POINTS,
    Data,
    Fit,
    Point,
    _solve,
    aicc,
    curve,
    data_of,
    fit,
    resampled,
    with_intervals,
)
from liubai.measure.scaling_points import averaged, of_file, of_runs, parameters
from liubai.measure.scaling_verdict import analyse, as_json, held_out
from liubai.report.read import read_run
from liubai.report.scaling import section
from liubai.report.svg import log_ticks

SIGMOID = {"R": 0.1, "A": 0.7, "M": 3e13, "B": 0.9}
SATURATING = {"A": 0.8, "c": -0.6 * 1e12**0.3, "b": 0.3}
LOSS = {"A": 1.7, "c": 40.0, "b": 0.12}


def planted(form: str, params: dict[str, float], n: int, noise: float = 0.0, seed: int = 0) -> list[Point]:
    x_N = np.geomspace(1e12, 1e15, n)
    y_N = curve(form, params, x_N[:, None]) + np.random.default_rng(seed).normal(0, noise, n)
    return [Point(float(x), float(y)) for x, y in zip(x_N, y_N, strict=True)]


def chinchilla(noise: float = 0.0, seed: int = 0) -> list[Point]:
    rng = np.random.default_rng(seed)
    return [
        Point(
            6 * n * d, (1.69 + 406.4 / n**0.34 + 410.7 / d**0.28) * math.exp(rng.normal(0, noise)), "", n, d
        )
        for n in np.geomspace(1e6, 1e9, 5).tolist()
        for d in np.geomspace(1e8, 1e11, 5).tolist()
    ]


def test_the_forms_are_their_formulas() -> None:
    xs = [3.0, 50.0, 7e3]
    for x, (sigmoid, saturating, power) in zip(
        xs,
        zip(
            *(
                curve(form, params, np.array(xs)[:, None]).tolist()
                for form, params in (
                    ("sigmoid", {"R": 0.1, "A": 0.9, "M": 40.0, "B": 1.3}),
                    ("saturating", {"A": 0.9, "c": -0.5, "b": 0.4}),
                    ("power", {"c": 0.2, "b": -0.3}),
                )
            ),
            strict=True,
        ),
        strict=True,
    ):
        assert sigmoid == pytest.approx(0.1 + (0.9 - 0.1) / (1 + (40.0 / x) ** 1.3))
        assert saturating == pytest.approx(0.9 - 0.5 * x**-0.4)
        assert power == pytest.approx(0.2 * x**-0.3)


@pytest.mark.parametrize(
    ("form", "params"), [("sigmoid", SIGMOID), ("saturating", SATURATING), ("saturating", LOSS)]
)
def test_a_curve_without_noise_is_found_exactly(form: str, params: dict[str, float]) -> None:
    points = planted(form, params, 12)
    data = data_of(points)
    found = fit(form, data)
    assert found.error < 1e-6
    assert np.abs(found.predict(data.x_NK) - data.y_N).max() < 1e-3
    for name in params:
        assert found.params[name] == pytest.approx(params[name], rel=0.05), name


def test_chinchillas_numbers_are_found_again() -> None:
    found = fit("chinchilla", data_of(chinchilla()))
    for name, value in {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}.items():
        assert found.params[name] == pytest.approx(value, rel=0.05), name


def test_the_box_is_kept_and_nothing_inside_is_better() -> None:
    """Against a fine grid of coefficients, on problems whose free optimum is outside of the box."""
    rng = np.random.default_rng(0)
    bounds = [(0.0, 1.0), (-math.inf, 0.5)]
    basis_GNm, y_GN = rng.normal(size=(40, 7, 2)), rng.normal(size=(40, 7))
    found, error = _solve(basis_GNm, y_GN, bounds)
    grid_C2 = np.array([(a, b) for a in np.linspace(0, 1, 51) for b in np.linspace(-3, 0.5, 176)])
    outside = 0
    for basis, y, best, cost in zip(basis_GNm, y_GN, found, error, strict=True):
        assert 0 <= best[0] <= 1
        assert best[1] <= 0.5
        assert cost == pytest.approx(((basis @ best - y) ** 2).sum())
        assert cost <= ((grid_C2 @ basis.T - y) ** 2).sum(1).min() + 1e-9
        free = np.linalg.lstsq(basis, y, rcond=None)[0]
        outside += not (0 <= free[0] <= 1 and free[1] <= 0.5)
    assert outside > 10


def test_a_share_never_has_an_asymptote_above_one() -> None:
    points = [
        Point(x, y) for x, y in zip(np.geomspace(1, 1e3, 10).tolist(), np.linspace(0.1, 0.9, 10), strict=True)
    ]
    found = with_intervals(data_of(points), fit("sigmoid", data_of(points)), [], 40, 0)
    assert 0 <= found.params["R"] <= found.params["A"] <= 1
    assert found.intervals["A"][1] <= 1


@pytest.mark.parametrize(
    ("form", "truth", "n", "repeats"), [("saturating", SATURATING, 12, 40), ("sigmoid", SIGMOID, 12, 12)]
)
def test_intervals_hold_the_planted_values_about_as_often_as_they_say(
    form: str, truth: dict[str, float], n: int, repeats: int
) -> None:
    """A small Monte Carlo. 95 % of 40 is 38; fewer than 32 would be an interval that is far too short."""
    hits = dict.fromkeys(truth, 0)
    for seed in range(repeats):
        data = data_of(planted(form, truth, n, noise=0.01, seed=seed))
        found = with_intervals(data, fit(form, data), [], 60, seed)
        for name, value in truth.items():
            low, high = found.intervals[name]
            hits[name] += low <= value <= high
    assert min(hits.values()) >= 0.75 * repeats, hits
    # and no interval is so long that it holds everything
    low, high = found.intervals["A"]
    assert high - low < 0.35


def test_the_same_seed_gives_the_same_intervals() -> None:
    data = data_of(planted("saturating", SATURATING, 10, 0.01))
    first, again, other = (with_intervals(data, fit("saturating", data), [], 30, s) for s in (1, 1, 2))
    assert first.intervals == again.intervals != other.intervals


def test_aicc_by_hand() -> None:
    n, k = 12, 5  # four parameters, and the noise's
    assert aicc(0.3, 12, 4) == pytest.approx(n * math.log(0.3 / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1))
    assert aicc(0.3, 6, 4) == math.inf


# --- what the data can and cannot say --------------------------------------------------------------


def test_an_early_piece_of_a_curve_cannot_tell_the_forms_apart() -> None:
    rng = np.random.default_rng(3)
    xs = np.geomspace(1, 20, 9)
    points = [Point(float(x), float(0.05 * x**0.4 + rng.normal(0, 0.004))) for x in xs]
    (series,) = analyse(points, draws=60)
    assert series.fits[0].form == "power"
    said = " ".join(series.words)
    assert "cannot tell the power from the sigmoid form" in said
    assert "not pinned down" in said
    assert set(as_json(series)["alike"]) >= {"sigmoid"}


def test_a_whole_s_curve_is_told_from_a_power_law() -> None:
    (series,) = analyse(planted("sigmoid", SIGMOID | {"B": 1.6}, 16, 0.008), draws=60)
    assert series.fits[0].form == "sigmoid"
    assert "the data tell it from" in series.words[0]
    assert "power" in series.words[0]
    assert "power" not in as_json(series)["alike"]
    assert series.fits[0].params["A"] == pytest.approx(0.7, abs=0.02)


def test_too_few_points_are_refused() -> None:
    points = planted("sigmoid", SIGMOID, LEAST_POINTS - 1)
    with pytest.raises(
        UserError, match=f"needs {LEAST_POINTS} points at different x.*has {LEAST_POINTS - 1}"
    ):
        analyse(points)
    with pytest.raises(UserError, match="needs 7 points"):
        fit("sigmoid", data_of(planted("sigmoid", SIGMOID, 6)))
    with pytest.raises(UserError, match="has 1"):  # many points at one place are one
        analyse([Point(5.0, 0.1 + 0.01 * i) for i in range(20)])


def test_six_points_have_the_forms_that_six_points_bear() -> None:
    (series,) = analyse(planted("saturating", SATURATING, 6, 0.005), draws=30)
    assert {found.form for found in series.fits} == {"saturating", "power"}
    assert list(series.refused) == ["sigmoid"]
    assert any("sigmoid 7" in words for words in series.words)


def test_how_well_the_top_is_foretold() -> None:
    points = planted("power", {"c": 1e-4, "b": 0.25}, 10)
    data = data_of(points)
    held = held_out("power", data)
    assert held is not None
    assert (held.fitted, held.predicted) == (7, 3)
    assert held.error < 1e-6
    assert held.flat == pytest.approx(sum(abs(points[6].y - p.y) for p in points[7:]) / 3)
    # a curve that goes flat after the part that was fitted: the power law says too much, by this much
    flat = [Point(p.x, min(p.y, points[6].y)) for p in points]
    bent = held_out("power", data_of(flat))
    assert bent is not None
    assert bent.bias == pytest.approx(sum(p.y - points[6].y for p in points[7:]) / 3, rel=1e-3)
    assert bent.error == pytest.approx(bent.bias)
    assert bent.flat == 0
    assert held_out("sigmoid", data_of(points[:7])) is None


def test_problems_are_resampled_together() -> None:
    """What the points share cancels: with the same problems, all go up or down at once."""
    rng = np.random.default_rng(0)
    hard_P = rng.random(50)
    points = [
        Point(float(x), float(row.mean()), "s", scores=tuple(row.tolist()))
        for x, row in ((x, np.clip(hard_P + 0.02 * x, 0, 1)) for x in range(1, 9))
    ]
    data, scores = data_of(points), [p.scores for p in points]
    flat = Fit("power", {"c": 0.5, "b": 0.0}, 0.0, 0.0)
    y_SN = resampled(data, flat, scores, 400, 1)
    expected = np.array(scores[0]).std() / math.sqrt(50)
    assert y_SN[:, 0].std() == pytest.approx(expected, rel=0.15)
    assert np.corrcoef(y_SN[:, 0], y_SN[:, 5])[0, 1] > 0.95
    (series,) = analyse(points, draws=30)
    assert series.by_problem
    assert as_json(series)["bootstrap"] == "problems"


def test_residuals_are_relative_for_losses_and_absolute_for_shares() -> None:
    assert data_of(planted("sigmoid", SIGMOID, 8)).weight_N.tolist() == [1.0] * 8
    loss = data_of([Point(float(i), 4.0 / i) for i in range(1, 9)])
    assert loss.weight_N.tolist() == pytest.approx([i / 4.0 for i in range(1, 9)])
    assert not loss.share


@pytest.mark.parametrize(
    ("points", "sentence"),
    [
        ([Point(0.0, 0.5)], "above 0"),
        ([Point(1.0, math.nan)], "finite"),
        ([Point(1.0, 2.0), Point(2.0, -1.0)], "losses must be above 0"),
    ],
)
def test_values_that_no_fit_can_take(points: list[Point], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        data_of(points)


def test_a_part_of_the_data_keeps_its_rows() -> None:
    data = data_of([Point(float(i), 4.0 / i) for i in range(1, 9)])
    part = data.part([5, 2])
    assert isinstance(part, Data)
    assert part.y_N.tolist() == [4.0 / 6, 4.0 / 3]


# --- files ----------------------------------------------------------------------------------------


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_file_of_points(tmp_path: Path) -> None:
    rows = [
        {"x": 10, "y": 0.5, "series": "a", "axis": "tokens"},
        {"n": 100, "d": 1000, "y": 3.5},
        {"x": 2, "scores": [1, 0, 0, 1]},
    ]
    points = of_file(written(tmp_path / "p.jsonl", rows))
    assert points[0] == Point(10.0, 0.5, "a", axis="tokens")
    assert (points[1].x, points[1].n, points[1].d) == (600_000, 100, 1000)
    assert points[2].y == 0.5


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
    assert [p.x for p in practised] == [100 * (2 * 10 + 6 * 4) * i for i in range(1, 9)]
    assert [p.y for p in practised] == pytest.approx([0.1 * i for i in range(1, 9)])
    held = [p for p in points if p.series == "zero: held-out accuracy"]
    assert [p.x for p in held] == [4400 * i for i in (2, 4, 6, 8)]
    votes = [p for p in points if p.series == "zero: vote"]
    assert [p.x for p in votes] == [35.0, 65.0, 125.0]
    assert votes[0].scores == (0.5, 0.5)
    assert votes[0].axis == "tokens an answer"


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


def test_stretches_keep_the_mean() -> None:
    pairs = [(float(x), 2.0) for x in range(1, 200)]
    found = averaged(pairs)
    assert len(found) <= 16
    assert all(y == 2.0 for _, y in found)
    assert averaged(pairs[:5]) == pairs[:5]


def test_the_command_writes_what_the_report_shows(run: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(scaling)
    points = planted("sigmoid", SIGMOID, 10, 0.01)
    file = written(tmp_path / "p.jsonl", [{"x": p.x, "y": p.y, "series": "a <b>"} for p in points])
    result = CliRunner().invoke(app, [file, "--draws", "20", "--json"])
    told = json.loads(result.stdout)["series"][0]
    assert {found["form"] for found in told["fits"]} == set(FORMS) - {"chinchilla"}
    assert len(told["fits"][0]["curve"]) == 4
    for _, y, low, high in zip(*told["fits"][0]["curve"], strict=True):
        assert low - 0.05 <= y <= high + 0.05
    # the run has too few points for some of its series, and enough for others
    kept = CliRunner().invoke(app, [str(run), "--draws", "20", "--keep"])
    assert kept.exit_code == 0, kept.output
    assert "Not fitted, for there are points at 3 different x alone" in kept.stdout
    part = section(read_run(run))
    assert part is not None
    assert any("zero: accuracy of rollouts" in chart.title for chart in part.charts)
    for chart in part.charts:
        assert "<svg" in chart.svg
    (run / "scaling.json").write_text(json.dumps({"series": [told]}))
    shown = section(read_run(run))
    assert shown is not None
    assert "<b>a &lt;b&gt;</b>" in shown.body


def test_a_run_without_fits_has_no_part_in_the_report(run: Path) -> None:
    assert section(read_run(run)) is None


def test_ticks_of_a_logarithmic_axis() -> None:
    assert log_ticks(1, 128) == [2.0**i for i in range(8)]
    assert log_ticks(30, 40_000) == [100.0, 1000.0, 10_000.0]
    assert log_ticks(3, 3.5) == [3]

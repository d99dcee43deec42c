"""Planted curves are recovered within their intervals; what data cannot say is said so."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

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
from liubai.measure.scaling_verdict import analyse, as_json, held_out
from liubai.report.svg import log_tick_text, log_ticks

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
        ([Point(1.0, 2.0, share=True)], "shares must be from 0 to 1"),
        ([Point(1.0, 0.5, share=True), Point(2.0, 0.5, share=False)], "some of its points say"),
    ],
)
def test_values_that_no_fit_can_take(points: list[Point], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        data_of(points)


def falling(share: bool | None) -> list[Point]:
    """An accuracy that training ruins: ten points from 0.9 down to nothing."""
    xs = np.geomspace(1, 1e3, 10).tolist()
    return [Point(x, 0.9 - 0.1 * i, "ruined", share=share) for i, x in enumerate(xs)]


def test_a_share_is_what_is_called_one() -> None:
    """A falling accuracy is a share, and a rising loss below 1 is none; of what nobody called anything the
    slope decides."""
    down, rising = falling(True), [Point(p.x, 1 - p.y) for p in falling(None)]
    assert data_of(down).share
    assert not data_of([replace(p, y=p.y + 0.05, share=None) for p in down]).share
    assert data_of(rising).share
    called = data_of([replace(p, share=False) for p in rising])
    assert not called.share
    assert called.weight_N.tolist() == pytest.approx([1 / p.y for p in rising])


def test_a_falling_accuracy_that_ends_at_0_stands_beside_a_good_loss() -> None:
    loss = [Point(p.x, p.y, "loss", share=False) for p in planted("saturating", LOSS, 10)]
    ruined, good = analyse([*falling(True), *loss], draws=20)
    assert as_json(ruined)["share"]
    assert ruined.fits
    assert good.fits
    # a file that does not say: it can only be taken for a loss, which cannot be 0
    ruined, good = analyse([*falling(None), *loss], draws=20)
    assert ruined.fits == []
    assert set(ruined.refused) == set(FORMS)
    assert ruined.words == ("Not fitted: losses must be above 0: errors are counted relative to them.",)
    assert as_json(ruined)["fits"] == []
    assert good.fits
    with pytest.raises(UserError, match="ruined: losses must be above 0"):
        analyse(falling(None), draws=20)


def test_a_part_of_the_data_keeps_its_rows() -> None:
    data = data_of([Point(float(i), 4.0 / i) for i in range(1, 9)])
    part = data.part([5, 2])
    assert isinstance(part, Data)
    assert part.y_N.tolist() == [4.0 / 6, 4.0 / 3]


def test_ticks_of_a_logarithmic_axis() -> None:
    assert log_ticks(1, 128) == [2.0**i for i in range(8)]
    assert log_ticks(30, 40_000) == [100.0, 1000.0, 10_000.0]
    assert log_ticks(3, 3.5) == [3]
    for ticks, said in (
        ([1024.0, 2048.0, 4096.0, 8192.0], "1024 2048 4096 8192"),
        ([100.0, 1000.0, 10_000.0], "0.1k 1k 10k"),
        ([10.0, 1e4, 1e7], "1e1 1e4 1e7"),
    ):
        assert " ".join(log_tick_text(t, ticks) for t in ticks) == said

"""From points to what can be said: which forms fit, how sure their numbers are, what they foretell, and
whether the data can tell them apart at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from liubai.errors import UserError
from liubai.measure.scaling import (
    DRAWS,
    FORMS,
    LEAST_POINTS,
    WITH_ASYMPTOTE,
    Array,
    Data,
    Fit,
    Form,
    Point,
    aicc,
    by_problem,
    data_of,
    fit,
    resampled,
    search,
    with_intervals,
)
from liubai.seeds import derive

APART = 4.0  #: a difference in AICc that tells two forms apart …
DOUBT = 0.05  #: … unless the worse one wins in more than this share of the bootstrap
LOWER = 0.7  #: the share of the points that the rest is foretold from
BEYOND = 10.0  #: how many times the largest x the forms are asked about
LOOSE = 0.5  #: an interval of an asymptote that is wider than this share of the data's range pins nothing
SHOWN = 60  #: points of a drawn curve

Scores = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Held:
    """Fitted on the ``fitted`` lowest points, ``predicted`` were foretold: mean absolute error, mean signed
    error (above 0: too high), and the error of saying that nothing changes any more."""

    fitted: int
    predicted: int
    error: float
    bias: float
    flat: float


@dataclass(frozen=True, slots=True)
class Series:
    """One series of points with its fits, the best by AICc first. ``data`` is ``None`` where no form can take
    the values; ``refused``: form → why it was not fitted; ``wins``: form → the share of bootstrap samples of
    the best fit in which it does better; ``held``: form → how well the top was foretold from the lower
    part."""

    name: str
    points: Sequence[Point]
    data: Data | None
    fits: Sequence[Fit]
    refused: Mapping[str, str]
    wins: Mapping[str, float]
    held: Mapping[str, Held]
    by_problem: bool
    words: Sequence[str]


def analyse(points: Sequence[Point], draws: int = DRAWS, seed: int = 0) -> list[Series]:
    """Each series of ``points`` for itself. Raises ``UserError`` where none of them can be fitted."""
    names = list(dict.fromkeys(point.series for point in points))
    found = [
        _series(name, [p for p in points if p.series == name], draws, derive(seed, name)) for name in names
    ]
    if found and all(series.data is None for series in found):
        raise UserError(f"{found[0].name or 'points'}: {next(iter(found[0].refused.values()))}")
    if not any(series.fits for series in found):
        most = max((len({p.x for p in series.points}) for series in found if series.data), default=0)
        raise UserError(
            f"a scaling fit needs {LEAST_POINTS} points at different x in one series at the least; the "
            f"largest series has {most}. Add points, or give them the same series"
        )
    return found


def _series(name: str, points: Sequence[Point], draws: int, seed: int) -> Series:
    try:
        data = data_of(points)
    except UserError as error:
        words = (f"Not fitted: {error}.",)
        return Series(name, points, None, [], dict.fromkeys(FORMS, str(error)), {}, {}, False, words)
    planar = data.x_NK.shape[1] == 2
    forms = ("chinchilla",) if planar else ("sigmoid", "saturating", "power")
    scores: Scores = [point.scores for point in points]
    fits: list[Fit] = []
    refused: dict[str, str] = {}
    for form in forms:
        try:
            fits.append(with_intervals(data, fit(form, data), scores, draws, derive(seed, form)))
        except UserError as error:
            refused[form] = str(error)
    fits.sort(key=lambda found: found.aicc)
    won = wins(data, fits, scores, draws, derive(seed, "wins"))
    held = {f.form: h for f in fits if (h := held_out(f.form, data)) is not None}
    series = Series(name, points, data, fits, refused, won, held, by_problem(scores), ())
    return replace(series, words=tuple(in_words(series, data)))


def wins(data: Data, fits: Sequence[Fit], scores: Scores, draws: int, seed: int) -> dict[str, float]:
    """For each but the first, best, of ``fits`` the share of the best one's bootstrap samples in which it has
    the lower AICc."""
    if len(fits) < 2:
        return {}
    y_SN = resampled(data, fits[0], scores, draws, seed)
    n = len(data.y_N)

    def criteria(form: Form) -> Array:
        return np.array([aicc(error, n, form.parameters) for error in search(form, data, y_SN)[2]])

    best = criteria(FORMS[fits[0].form])
    return {f.form: float((criteria(FORMS[f.form]) < best).mean()) for f in fits[1:]}


def held_out(name: str, data: Data, lower: float = LOWER) -> Held | None:
    """``None`` where the lower part is too small for the form, or nothing is left to foretell."""
    order = np.argsort(data.x_NK.prod(1), kind="stable")
    count = max(FORMS[name].least, math.ceil(lower * len(order)))
    low, high = data.part(order[:count].tolist()), data.part(order[count:].tolist())
    if not len(high.y_N) or len(np.unique(low.x_NK, axis=0)) < FORMS[name].least:
        return None
    # whether it is a share is known from all of them
    missed = fit(name, low).predict(high.x_NK) - high.y_N
    flat = float(np.abs(low.y_N[-1] - high.y_N).mean())
    return Held(count, len(high.y_N), float(np.abs(missed).mean()), float(missed.mean()), flat)


def apart(best: Fit, other: Fit, won: float, n: int) -> bool:
    """Can ``n`` points tell the two forms apart? Not where the other fits as closely and is only charged for
    its parameters: then it is not needed, which is not to say that it is wrong."""
    return not _spare(best, other, n) and other.aicc - best.aicc > APART and won <= DOUBT


def _spare(best: Fit, other: Fit, n: int) -> bool:
    """Has the other more parameters, and no misfit that would tell against it?"""
    misfit = n * math.log(max(other.error, 1e-300) / max(best.error, 1e-300))
    return FORMS[other.form].parameters > FORMS[best.form].parameters and misfit <= APART


# --- in words -------------------------------------------------------------------------------------


def in_words(series: Series, data: Data) -> list[str]:
    """What a reader should take home, the most important first."""
    if not series.fits:
        return [_refused(series)]
    said: list[str] = []
    best = series.fits[0]
    like = [f for f in series.fits[1:] if not apart(best, f, series.wins[f.form], len(data.y_N))]
    told = [f for f in series.fits[1:] if f not in like]
    if told:
        others = " and ".join(f"the {f.form} one (AICc {f.aicc - best.aicc:.1f} higher)" for f in told)
        said.append(f"The {best.form} form fits best, and the data tell it from {others}.")
    said += [_alike(best, other, series.wins[other.form], data) for other in like]
    said += [text for f in (best, *like) if (text := _asymptote(f, data))]
    if best.form in series.held:
        held = series.held[best.form]
        error, bias, flat = _error(held.error, data), _error(held.bias, data, True), _error(held.flat, data)
        worth = "better" if held.error < held.flat else "no better"
        said.append(
            f"Fitted on the lowest {held.fitted} points, the {best.form} form foretells the other "
            f"{held.predicted} with a mean error of {error} ({bias} on average): {worth} than saying that "
            f"nothing changes any more ({flat})."
        )
    else:
        said.append("There are too few points to foretell the top ones from the others.")
    return said + ([_refused(series)] if series.refused else [])


def _alike(best: Fit, other: Fit, won: float, data: Data) -> str:
    """Why the two cannot be told apart, and how far apart they would lead."""
    if _spare(best, other, len(data.y_N)):
        why = f"the latter fits as closely, with {FORMS[other.form].parameters} parameters in place of "
        why += str(FORMS[best.form].parameters)
    else:
        why = f"AICc differs by {other.aicc - best.aicc:.1f}"
    top_1K = data.x_NK[[int(data.x_NK.prod(1).argmax())]] * BEYOND
    values = [float(f.predict(top_1K)[0]) for f in (best, other)]
    here, there = (_value(value, data) for value in values)
    never = " (no share can be more than all)" if data.share and max(values) > 1 else ""
    return (
        f"The data cannot tell the {best.form} from the {other.form} form: {why} (lower AICc in {won:.0%} of "
        f"the bootstrap samples). At {BEYOND:.0f} times the largest x they say {here} and {there}{never}."
    )


def _refused(series: Series) -> str:
    places = len({(p.x, p.n, p.d) for p in series.points})
    needs = ", ".join(f"{form} {FORMS[form].least}" for form in series.refused)
    return f"Not fitted, for there are points at only {places} different x: {needs} would be needed."


def _asymptote(found: Fit, data: Data) -> str:
    name = WITH_ASYMPTOTE.get(found.form)
    if name is None:
        return ""
    low, high = found.intervals[name]
    value = found.params[name]
    text = f"{_value(value, data)} (95 % interval {_value(low, data)} to {_value(high, data)})"
    spread = float(data.y_N.max() - data.y_N.min())
    if found.at_bound or high - low > LOOSE * spread:
        return f"The asymptote of the {found.form} form is not pinned down: {text}."
    return f"The asymptote of the {found.form} form is {text}."


def _value(value: float, data: Data) -> str:
    return f"{100 * value:.1f} %" if data.share else f"{value:.4g}"


def _error(value: float, data: Data, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f} points" if data.share else f"{value:{sign}.3g}"


# --- as JSON --------------------------------------------------------------------------------------


def as_json(series: Series) -> dict[str, Any]:
    """``scaling.json``'s entry: points, fits, and curves with their 95 % band to draw. ``alike``: forms that
    the data cannot tell from the best."""
    data = series.data
    best, n = next(iter(series.fits), None), len(series.points)
    alike = [f.form for f in series.fits[1:] if best and not apart(best, f, series.wins[f.form], n)]
    return {
        "series": series.name,
        "axis": series.points[0].axis,
        "points": [[p.x, p.y] if p.n is None else [p.x, p.y, p.n, p.d] for p in series.points],
        "share": data.share if data else series.points[0].share,
        "bootstrap": "problems" if series.by_problem else "residuals",
        "fits": [_fit_json(found, data) for found in series.fits] if data else [],
        "alike": alike,
        "refused": dict(series.refused),
        "wins": dict(series.wins),
        "held_out": {
            form: {
                "fitted": h.fitted, "predicted": h.predicted, "error": h.error, "bias": h.bias, "flat": h.flat
            }
            for form, h in series.held.items()
        },
        "words": list(series.words),
    }  # fmt: skip


def _fit_json(found: Fit, data: Data) -> dict[str, Any]:
    told: dict[str, Any] = {
        "form": found.form,
        "params": dict(found.params),
        "intervals": {name: list(pair) for name, pair in found.intervals.items()},
        "aicc": found.aicc if math.isfinite(found.aicc) else None,
        "at_bound": found.at_bound,
    }
    if data.x_NK.shape[1] == 1:
        low, high = float(data.x_NK.min()), float(data.x_NK.max())
        xs_NK = np.geomspace(low, BEYOND * high, SHOWN)[:, None]
        told["curve"] = [xs_NK[:, 0].tolist(), found.predict(xs_NK).tolist(), *band(found, xs_NK)]
    return told


def band(found: Fit, xs_NK: Array) -> list[list[float]]:
    """The lower and the upper end of the fits of all bootstrap samples, at each x."""
    drawn_SN = np.array([Fit(found.form, params, 0.0, 0.0).predict(xs_NK) for params in found.draws])
    if not len(drawn_SN):
        return []
    ends: list[list[float]] = np.quantile(drawn_SN, [0.025, 0.975], axis=0).tolist()
    return ends

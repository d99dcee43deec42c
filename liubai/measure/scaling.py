"""Scaling fits: what a measure does as compute (or tokens, or parameters) grows, and what can be said of it.

Forms, with x in its own unit (FLOP, tokens):

- ``sigmoid``: y = R + (A − R)/(1 + (M/x)^B): from R to the asymptote A, half of the way at x = M, steepness
  B. ScaleRL's fit of reward against RL compute (arXiv 2510.13786), R being fitted, too.
- ``saturating``: y = A + c·x^(−b): a power law toward an asymptote, Chinchilla's form along one axis.
- ``power``: y = c·x^b: a plain power law, which has no asymptote.
- ``chinchilla``: L = E + A/N^α + B/D^β, nothing negative (Hoffmann et al., arXiv 2203.15556), where points
  have n and d.

All are least squares — of the values where they are shares, of the relative error otherwise. A form is linear
but for one or two of its parameters: those are searched on a grid that is refined around several starts, the
others solved exactly within their bounds (a share stays between 0 and 1). Everything is decided by the seed.
Left out on purpose: noise that differs from point to point, and forms with a break.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from liubai.errors import UserError

Array = NDArray[np.float64]

LEAST_POINTS = 6  #: below this nothing is extrapolated
DRAWS = 300  #: of the bootstrap
LEVEL = 0.95
STARTS, ZOOMS, FINE = 4, 10, 5  #: of the search: starts, refinements, places a side


@dataclass(frozen=True, slots=True)
class Point:
    """``scores``: the same measure by problem, where it is known; ``y`` is then their mean. ``axis`` says
    what x is, with its unit; ``share`` whether y is a share, from 0 to 1, or a loss, where that is known."""

    x: float
    y: float
    series: str = ""
    n: float | None = None
    d: float | None = None
    scores: tuple[float, ...] = ()
    axis: str = "x"
    share: bool | None = None


@dataclass(frozen=True, slots=True)
class Form:
    """``searched`` and ``solved`` name its parameters; ``coarse``: places a side of the first grid."""

    name: str
    searched: tuple[str, ...]
    solved: tuple[str, ...]
    coarse: int

    @property
    def parameters(self) -> int:
        return len(self.searched) + len(self.solved)

    @property
    def least(self) -> int:
        """Points, so that AICc exists: one more than parameters, the noise's and one."""
        return max(LEAST_POINTS, self.parameters + 3)


FORMS = {
    form.name: form
    for form in (
        Form("sigmoid", ("M", "B"), ("R", "A"), 16),
        Form("saturating", ("b",), ("A", "c"), 60),
        Form("power", ("b",), ("c",), 60),
        Form("chinchilla", ("alpha", "beta"), ("E", "A", "B"), 16),
    )
}
WITH_ASYMPTOTE = {"sigmoid": "A", "saturating": "A", "chinchilla": "E"}


@dataclass(frozen=True, slots=True)
class Data:
    """``x_NK`` has one column, or n and d. ``weight_N`` makes residuals absolute or relative."""

    x_NK: Array
    y_N: Array
    share: bool
    weight_N: Array

    def part(self, at: Sequence[int]) -> Data:
        i = list(at)
        return Data(self.x_NK[i], self.y_N[i], self.share, self.weight_N[i])


@dataclass(frozen=True, slots=True)
class Fit:
    """``params`` in the units of x; ``error`` is the weighted sum of squares; ``intervals`` are of 95 %."""

    form: str
    params: Mapping[str, float]
    error: float
    aicc: float
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    draws: tuple[Mapping[str, float], ...] = ()
    at_bound: bool = False  #: does the search end at an edge of what it may try?

    def predict(self, x_NK: Array) -> Array:
        return curve(self.form, self.params, x_NK)


def data_of(points: Sequence[Point]) -> Data:
    """Raises ``UserError`` for values that no fit can take."""
    planar = all(p.n is not None and p.d is not None for p in points)
    x_NK = np.array([[p.n, p.d] if planar else [p.x] for p in points], float)
    y_N = np.array([p.y for p in points], float)
    if not (np.isfinite(x_NK).all() and (x_NK > 0).all() and np.isfinite(y_N).all()):
        raise UserError("a scaling fit needs x (n, d) above 0 and finite y: its axes are logarithmic")
    inside = bool((y_N >= 0).all() and (y_N <= 1).all())
    said = {p.share for p in points} - {None}
    if len(said) > 1:
        raise UserError("a series is of shares or of losses; some of its points say one, some the other")
    share = said == {True} if said else inside and rises(x_NK.prod(1), y_N)
    if share and not inside:
        raise UserError("shares must be from 0 to 1")
    if not share and (y_N <= 0).any():
        raise UserError("losses must be above 0: errors are counted relative to them")
    return Data(x_NK, y_N, share, np.ones_like(y_N) if share else 1 / y_N)


def rises(x_N: Array, y_N: Array) -> bool:
    """Does y grow with x, by and large? What nobody has called a share or a loss is a share if it does."""
    lx = np.log(x_N) - np.log(x_N).mean()
    return float(lx @ (y_N - y_N.mean())) >= 0


def curve(form: str, params: Mapping[str, float], x_NK: Array) -> Array:
    """The form's value at each row of x."""
    x = x_NK[:, 0]
    p = params
    match form:
        case "sigmoid":
            return p["R"] + (p["A"] - p["R"]) * _rise(np.log(x / p["M"]) * p["B"])
        case "saturating":
            return p["A"] + p["c"] * x ** -p["b"]
        case "power":
            return np.asarray(p["c"] * x ** p["b"])
        case "chinchilla":
            return p["E"] + p["A"] * x ** -p["alpha"] + p["B"] * x_NK[:, 1] ** -p["beta"]
    raise ValueError(f"no form is called {form!r}")


def _rise(z: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(z / 2)))


# --- the search -----------------------------------------------------------------------------------


def _ranges(form: Form, data: Data) -> list[tuple[float, float]]:
    """Where each searched parameter is looked for, as the search sees it: logarithms but for a plain b."""
    logs = np.log(data.x_NK)
    if form.name == "sigmoid":
        low, high = float(logs[:, 0].min()), float(logs[:, 0].max())
        # a curve that bends far beyond the data is not to be told from one that never does
        width = max(high - low, 0.1)
        return [(low - width, high + width), (math.log(0.5 / width), math.log(60 / width))]
    if form.name == "power":
        return [(-4.0, 4.0)]
    return [(math.log(0.01), math.log(4.0))] * len(form.searched)


def _basis(form: Form, theta_GP: Array, logs_NK: Array, centre_K: Array) -> Array:
    """(G, N, m): what the solved parameters are multiplied by, x in units of its geometric mean."""
    z_NK = logs_NK - centre_K
    if form.name == "sigmoid":
        s_GN = _rise(np.exp(theta_GP[:, 1:]) * (logs_NK[:, 0] - theta_GP[:, :1]))
        return np.stack([1 - s_GN, s_GN], -1)
    if form.name == "power":
        return np.exp(theta_GP[:, :1] * z_NK[:, 0])[..., None]
    powers = [np.exp(-np.exp(theta_GP[:, k : k + 1]) * z_NK[:, k]) for k in range(len(form.searched))]
    return np.stack([np.ones_like(powers[0]), *powers], -1)


def _bounds(form: Form, share: bool) -> list[tuple[float, float]]:
    """Of the solved parameters."""
    free, unit, positive = (-math.inf, math.inf), (0.0, 1.0), (0.0, math.inf)
    if form.name == "sigmoid":
        return [unit, unit] if share else [positive, positive]
    if form.name == "saturating":
        return [unit, free] if share else [positive, free]
    return [positive] * len(form.solved)


def _solve(basis_GNm: Array, y_GN: Array, bounds: Sequence[tuple[float, float]]) -> tuple[Array, Array]:
    """Least squares within a box, each row for itself: (coefficients (G, m), error (G)).

    The optimum of a convex problem in a box lies on a face whose free coefficients solve the smaller problem
    and are in the box: where the free solution is not, all faces are tried, and the best one inside is taken.
    """
    gram_Gmm = np.einsum("gni,gnj->gij", basis_GNm, basis_GNm)
    right_Gm = np.einsum("gni,gn->gi", basis_GNm, y_GN)
    total_G = np.einsum("gn,gn->g", y_GN, y_GN)
    best_Gm, error_G = np.zeros_like(right_Gm), np.full(len(total_G), np.inf)
    left = np.arange(len(total_G))  # rows whose optimum is not known yet
    low_m, high_m = (np.array([pair[i] for pair in bounds]) for i in (0, 1))
    for face in product(*([None, *filter(math.isfinite, pair)] for pair in bounds)):
        gram, right = gram_Gmm[left], right_Gm[left]
        found = _on_face(gram, right, face)
        inside = ((found >= low_m - 1e-12) & (found <= high_m + 1e-12)).all(1)
        cost = total_G[left] + np.einsum("gi,gij,gj->g", found, gram, found) - 2 * (found * right).sum(1)
        better = inside & (cost < error_G[left])
        best_Gm[left[better]], error_G[left[better]] = found[better], np.maximum(cost[better], 0.0)
        if all(end is None for end in face):
            left = left[~inside]
        if not len(left):
            break
    return best_Gm, error_G


def _on_face(gram_Gmm: Array, right_Gm: Array, face: Sequence[float | None]) -> Array:
    """The optimum with some coefficients held where ``face`` says."""
    free = [i for i, end in enumerate(face) if end is None]
    found = np.array([0.0 if end is None else end for end in face]) + np.zeros_like(right_Gm)
    if free:
        inner = gram_Gmm[:, free][:, :, free]
        # two columns may be all but the same: a slope of almost nothing
        ridge = 1e-12 * np.trace(inner, axis1=1, axis2=2)[:, None, None] * np.eye(len(free))
        rest = right_Gm[:, free] - np.einsum("gij,gj->gi", gram_Gmm[:, free], found)
        found[:, free] = np.linalg.solve(inner + ridge, rest[..., None])[..., 0]
    return found


def search(form: Form, data: Data, y_SN: Array) -> tuple[Array, Array, Array]:
    """Fit each row of ``y_SN`` at the data's x: (searched (S, p), solved (S, m), error (S)), in the search's
    own units. Rows do not know of each other, so many bootstrap samples are one call."""
    logs_NK = np.log(data.x_NK)
    centre_K = logs_NK.mean(0)
    ranges, bounds = _ranges(form, data), _bounds(form, data.share)
    w_N, yw_SN = data.weight_N, y_SN * data.weight_N
    grid = [np.linspace(low, high, form.coarse) for low, high in ranges]
    theta_GP = np.stack([axis.ravel() for axis in np.meshgrid(*grid, indexing="ij")], -1)
    basis_GNm = _basis(form, theta_GP, logs_NK, centre_K) * w_N[:, None]
    S, p, starts = len(y_SN), len(ranges), STARTS if len(y_SN) == 1 else 2
    step_P = np.array([(high - low) / (form.coarse - 1) for low, high in ranges])
    low_P, high_P = (np.array([pair[i] for pair in ranges]) for i in (0, 1))
    place_SQP = np.empty((S, starts, p))
    for s in range(S):
        _, error_G = _solve(basis_GNm, np.broadcast_to(yw_SN[s], basis_GNm.shape[:2]), bounds)
        place_SQP[s] = theta_GP[_apart(error_G, theta_GP, step_P, starts)]
    offsets = np.array(list(product(*[np.linspace(-1, 1, FINE)] * p)))
    for zoom in range(ZOOMS):
        span_P = step_P * 2.0**-zoom
        near = np.clip(place_SQP[:, :, None] + offsets * span_P, low_P, high_P)  # (S, Q, F, p)
        flat = near.reshape(-1, p)
        basis = _basis(form, flat, logs_NK, centre_K) * w_N[:, None]
        rows = np.repeat(yw_SN, starts * len(offsets), axis=0)
        solved, error = _solve(basis, rows, bounds)
        pick = error.reshape(S, starts, -1).argmin(-1)
        place_SQP = np.take_along_axis(near, pick[:, :, None, None], 2)[:, :, 0]
        each = np.take_along_axis(error.reshape(S, starts, -1), pick[..., None], 2)[..., 0]
        coefficients = np.take_along_axis(
            solved.reshape(S, starts, len(offsets), -1), pick[:, :, None, None], 2
        )[:, :, 0]
    first = each.argmin(1)
    rows_S = np.arange(S)
    return place_SQP[rows_S, first], coefficients[rows_S, first], each[rows_S, first]


def _apart(error_G: Array, theta_GP: Array, step_P: Array, starts: int) -> list[int]:
    """The best places of the grid that are no neighbours: the starts."""
    chosen: list[int] = []
    for g in np.argsort(error_G, kind="stable"):
        if all((np.abs(theta_GP[g] - theta_GP[c]) > 2.5 * step_P).any() for c in chosen):
            chosen.append(int(g))
            if len(chosen) == starts:
                break
    return [*chosen, *[chosen[0]] * (starts - len(chosen))]


def _named(form: Form, theta: Array, solved: Array, data: Data) -> dict[str, float]:
    """Parameters in the units of x."""
    centre = np.log(data.x_NK).mean(0)
    if form.name == "sigmoid":
        values = {"M": math.exp(min(theta[0], 700)), "B": math.exp(theta[1])}
        return values | dict(zip(form.solved, map(float, solved), strict=True))
    if form.name == "power":
        return {"b": float(theta[0]), "c": float(solved[0] * math.exp(-theta[0] * centre[0]))}
    powers = np.exp(theta)
    scaled = [float(c * math.exp(b * m)) for c, b, m in zip(solved[1:], powers, centre, strict=True)]
    return dict(zip(form.searched, map(float, powers), strict=True)) | dict(
        zip(form.solved, [float(solved[0]), *scaled], strict=True)
    )


def aicc(error: float, n: int, parameters: int) -> float:
    """Akaike's criterion for small samples, of normal noise of unknown size; ∞ where there are too few."""
    k = parameters + 1
    if n - k - 1 < 1:
        return math.inf
    return n * math.log(max(error, 1e-300) / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def fit(name: str, data: Data) -> Fit:
    """The best fit without intervals. Raises ``UserError`` with fewer points than the form needs."""
    form = FORMS[name]
    places = len(np.unique(data.x_NK, axis=0))
    if places < form.least:
        raise UserError(
            f"the {name} form has {form.parameters} parameters and needs {form.least} points at different x; "
            f"there are {places}"
        )
    theta, solved, error = search(form, data, data.y_N[None])
    low_high = np.array(_ranges(form, data))
    edge = 1e-3 * (low_high[:, 1] - low_high[:, 0])
    at_bound = bool(((theta[0] - low_high[:, 0] < edge) | (low_high[:, 1] - theta[0] < edge)).any())
    found = Fit(name, _named(form, theta[0], solved[0], data), float(error[0]), 0.0, at_bound=at_bound)
    return replace(found, aicc=aicc(found.error, len(data.y_N), form.parameters))


# --- what can be said of it -----------------------------------------------------------------------


def resampled(data: Data, found: Fit, scores: Sequence[Sequence[float]], draws: int, seed: int) -> Array:
    """``draws`` rows of y (S, N): means over resampled problems where every point has the scores of the same
    problems, else the fit plus its own resampled residuals.

    Few residuals of a fit with as many parameters are too small by far, and how much too small is not known:
    each row's are scaled by √(N/χ²) of N − p degrees of freedom, as Student's t has it.
    """
    rng = np.random.default_rng(seed)
    if by_problem(scores):
        table_NP = np.array([list(row) for row in scores], float)
        picks_SP = rng.integers(0, table_NP.shape[1], (draws, table_NP.shape[1]))
        return np.array([table_NP[:, picks].mean(1) for picks in picks_SP], float)
    predicted_N = found.predict(data.x_NK)
    residual_N = (data.y_N - predicted_N) * data.weight_N
    n = len(residual_N)
    scale_S = np.sqrt(n / rng.chisquare(max(1, n - FORMS[found.form].parameters), draws))
    drawn_SN = (residual_N - residual_N.mean())[rng.integers(0, n, (draws, n))] * scale_S[:, None]
    y_SN = predicted_N + drawn_SN / data.weight_N
    return np.asarray(np.clip(y_SN, 0, 1) if data.share else np.maximum(y_SN, 1e-12), float)


def by_problem(scores: Sequence[Sequence[float]]) -> bool:
    return bool(scores) and len(scores[0]) > 1 and len({len(row) for row in scores}) == 1


def with_intervals(data: Data, found: Fit, scores: Sequence[Sequence[float]], draws: int, seed: int) -> Fit:
    """The same with the fits of ``draws`` bootstrap samples and their 95 % intervals."""
    form = FORMS[found.form]
    theta, solved, _ = search(form, data, resampled(data, found, scores, draws, seed))
    fits = tuple(_named(form, t, c, data) for t, c in zip(theta, solved, strict=True))
    ends = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    intervals: dict[str, tuple[float, float]] = {}
    for name in found.params:
        low, high = np.quantile([drawn[name] for drawn in fits], ends)
        intervals[name] = (float(low), float(high))
    return replace(found, intervals=intervals, draws=fits)

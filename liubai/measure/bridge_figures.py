"""From measured thoughts to figures: means with intervals, curves, and where thoughts fork.

Thoughts about one problem are not independent. The intervals are those of a bootstrap over problems: problems
are drawn with replacement, with all their thoughts, and the middle 95 % of the means are given. Shapes: N
values of M kinds, P problems, R draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from liubai.measure.bridge import CONTEXTS, Bridged

DRAWS = 1000
#: Where a step curve is looked at: thoughts differ in their number of steps.
GRID = tuple(i / 10 for i in range(11))
#: The share of tokens that are called forking, by entropy (Wang et al. 2025, arXiv 2506.01939).
FORKING = 0.2
#: Words that are named.
NAMED = 12

Group = Callable[[Bridged], bool]
GROUPS: dict[str, Group] = {
    "all": lambda b: True,
    "right": lambda b: b.written.right,
    "wrong": lambda b: not b.written.right,
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over ``n`` values with its standard error and the middle 95 % of the draws; ``None`` where there
    are no values, or fewer than two problems to draw from."""

    mean: float | None
    low: float | None
    high: float | None
    stderr: float | None
    n: int


def bootstrap(values_NM: ArrayLike, problems_N: Sequence[int], draws: int = DRAWS) -> list[Estimate]:
    """The mean of each column, NaN being no value, and its interval over problems. The draws are always the
    same ones, so that a figure can be repeated."""
    values = np.asarray(values_NM, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    names, row_N = np.unique(np.asarray(problems_N, dtype=np.int64), return_inverse=True)
    P, known_NM = len(names), ~np.isnan(values)
    sums_PM, counts_PM = np.zeros((P, values.shape[1])), np.zeros((P, values.shape[1]))
    np.add.at(sums_PM, row_N, np.where(known_NM, values, 0.0))
    np.add.at(counts_PM, row_N, known_NM)
    drawn_RM = np.empty((0, values.shape[1]))
    if P > 1:
        times_RP = np.random.default_rng(0).multinomial(P, np.full(P, 1 / P), size=draws)
        with np.errstate(invalid="ignore"):  # a draw may have no value of a kind: it says nothing of that
            drawn_RM = (times_RP @ sums_PM) / (times_RP @ counts_PM)
    return [
        _estimate(float(sums_PM[:, m].sum()), counts_PM[:, m], drawn_RM[:, m]) for m in range(values.shape[1])
    ]


def _estimate(total: float, counts_P: NDArray[np.float64], drawn_R: NDArray[np.float64]) -> Estimate:
    n = int(counts_P.sum())
    if not n:
        return Estimate(None, None, None, None, 0)
    drawn = drawn_R[~np.isnan(drawn_R)]
    if int((counts_P > 0).sum()) < 2:
        return Estimate(total / n, None, None, None, n)
    low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
    return Estimate(total / n, low, high, float(drawn.std()), n)


def figures(found: Sequence[Bridged], word: Callable[[int], str] = str) -> dict[str, Any]:
    """Everything that ``liubai bridge --json`` says of the thoughts; bits, where no other unit is named.
    ``word`` writes a token."""
    return {
        name: {group: of([b for b in found if belongs(b)]) for group, belongs in GROUPS.items()}
        for name, of in MEASURES.items()
    } | {"gain": gains(found), "forks": forks(found, word)}


def _nll(found: Sequence[Bridged]) -> dict[str, Any]:
    rows = [[b.nll.get(c, math.nan) for c in CONTEXTS] for b in found]
    return _named(CONTEXTS, bootstrap(np.reshape(rows, (-1, len(CONTEXTS))), _problems(found)))


def _perplexity(found: Sequence[Bridged]) -> dict[str, Any]:
    """Two to the mean bits per scored token. Where several right answers are added up it is the perplexity of
    no single sequence: the bits are those of any of them, the tokens their mean."""
    rows = [[b.nll.get(c, math.nan) / b.tokens for c in CONTEXTS] for b in found]
    means = bootstrap(np.reshape(rows, (-1, len(CONTEXTS))), _problems(found))
    return _named(CONTEXTS, [_raised(e) for e in means])


def _chance(found: Sequence[Bridged]) -> dict[str, Any]:
    """The probability of a right answer. A mean of bits is ruled by the few thoughts that are sure of a wrong
    answer; this one is not."""
    rows = [[2.0 ** -b.nll[c] if c in b.nll else math.nan for c in CONTEXTS] for b in found]
    return _named(CONTEXTS, bootstrap(np.reshape(rows, (-1, len(CONTEXTS))), _problems(found)))


def _raised(e: Estimate) -> Estimate:
    mean, low, high = (None if bits is None else 2.0**bits for bits in (e.mean, e.low, e.high))
    spread = None if mean is None or e.stderr is None else mean * math.log(2) * e.stderr
    return Estimate(mean, low, high, spread, e.n)


def _utility(found: Sequence[Bridged]) -> dict[str, Any]:
    return asdict(bootstrap([b.utility for b in found], _problems(found))[0])


def _curve(found: Sequence[Bridged]) -> dict[str, Any]:
    """After a share of its steps, rounded down."""

    def at(values: Sequence[float]) -> list[float]:
        return [values[int(share * (len(values) - 1) + 1e-9)] for share in GRID]

    rows = [[*at(b.curve), *at(b.entropy), *(2.0**-bits for bits in at(b.curve))] for b in found]
    each = [asdict(e) for e in bootstrap(np.reshape(rows, (-1, 3 * len(GRID))), _problems(found))]
    parts = (each[i : i + len(GRID)] for i in range(0, len(each), len(GRID)))
    return {"share": list(GRID), **dict(zip(("nll", "entropy", "chance"), parts, strict=True))}


def _thought(found: Sequence[Bridged]) -> dict[str, Any]:
    """The thought itself: bits per token, of its entropy and of its own surprise, and its size."""
    tokens = [
        (b.written.problem, e, s) for b in found for e, s in zip(b.token_entropy, b.surprise, strict=True)
    ]
    each = bootstrap(np.reshape([t[1:] for t in tokens], (-1, 2)), [t[0] for t in tokens])
    size = [[len(b.written.thought.ids), len(b.written.thought.pieces)] for b in found]
    return _named(("entropy", "surprise"), each) | _named(
        ("tokens", "steps"), bootstrap(np.reshape(size, (-1, 2)), _problems(found))
    )


MEASURES: Mapping[str, Callable[[Sequence[Bridged]], dict[str, Any]]] = {
    "nll": _nll,
    "perplexity": _perplexity,
    "chance": _chance,
    "utility": _utility,
    "curve": _curve,
    "thought": _thought,
}


def gains(found: Sequence[Bridged]) -> dict[str, Any]:
    """What a step buys, of all steps and of those that are right and wrong by the family's rules; and the
    share of steps that make the answer less likely."""
    steps = [
        (b.written.problem, gain, piece.right)
        for b in found
        for gain, piece in zip(b.gains, b.written.thought.pieces, strict=True)
    ]

    def mean(kept: Sequence[tuple[int, float, bool | None]]) -> dict[str, Any]:
        return asdict(bootstrap([gain for _, gain, _ in kept], [problem for problem, _, _ in kept])[0])

    checked = {ok: [s for s in steps if s[2] is ok] for ok in (True, False)}
    costly = bootstrap([float(gain < 0) for _, gain, _ in steps], [problem for problem, _, _ in steps])[0]
    return {
        "step": mean(steps),
        "right_step": mean(checked[True]),
        "wrong_step": mean(checked[False]),
        "costly": asdict(costly),
    }


def forks(found: Sequence[Bridged], word: Callable[[int], str] = str) -> dict[str, Any]:
    """The tokens of highest entropy, over all thoughts: from which entropy on, how much of all entropy they
    carry, and which words they are. ``word`` writes a token."""
    tokens = [
        (entropy, id)
        for b in found
        for entropy, id in zip(b.token_entropy, (*b.written.thought.ids, None), strict=False)
    ]
    tokens.sort(key=lambda t: -t[0])
    count = math.ceil(FORKING * len(tokens))
    total = math.fsum(entropy for entropy, _ in tokens)
    times: dict[int | None, list[float]] = {}
    for entropy, id in tokens:
        times.setdefault(id, []).append(entropy)
    forking: dict[int | None, int] = {}
    for _, id in tokens[:count]:
        forking[id] = forking.get(id, 0) + 1
    named = sorted(forking, key=lambda id: -forking[id])[:NAMED]
    return {
        "tokens": len(tokens),
        "threshold": tokens[count - 1][0] if count else None,
        "carry": math.fsum(e for e, _ in tokens[:count]) / total if total else None,
        "words": [
            {
                "word": "</think>" if id is None else word(id),
                "forking": forking[id],
                "written": len(times[id]),
                "entropy": math.fsum(times[id]) / len(times[id]),
            }
            for id in named
        ],
    }


def _problems(found: Sequence[Bridged]) -> list[int]:
    return [b.written.problem for b in found]


def _named(names: Sequence[str], estimates: Sequence[Estimate]) -> dict[str, Any]:
    return {name: asdict(e) for name, e in zip(names, estimates, strict=True)}

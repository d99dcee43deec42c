"""pass@k, cons@k and an honest standard error. Pure functions on lists: no models, no files.

``correct[p][s]`` says whether sample ``s`` of problem ``p`` was right; problems may have different
numbers of samples. Deliberately left out: how an answer is extracted or compared. The caller hands
over the extracted answers (``None`` where none could be read) and, where strings are not enough, a
key that maps equal answers to one value: by string, 1/2 and 0.5 would split the vote.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that ``k`` of ``n`` samples, ``c`` of them right, hold a right one.

    The unbiased estimator ``1 − C(n−c, k) / C(n, k)`` of Chen et al. (arXiv 2107.03374) in its
    product form, which never builds a large binomial; 1 when fewer than ``k`` samples are wrong.
    Raises ``ValueError`` when ``n < k``: there is no unbiased estimate from fewer samples than k.
    """
    if k < 1:
        raise ValueError(f"pass@k needs k of at least 1, not {k}")
    if not 0 <= c <= n:
        raise ValueError(f"{c} of {n} samples cannot be right")
    if n < k:
        raise ValueError(f"pass@{k} needs at least {k} samples per problem; this one has {n}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def pass_curve(correct: Sequence[Sequence[bool]], ks: Iterable[int]) -> dict[int, float]:
    """``{k: pass@k}``, each the mean over problems. Raises ``ValueError`` as :func:`pass_at_k` does."""
    if not correct:
        raise ValueError("pass@k of no problems is not defined")
    counts = [(len(row), sum(map(bool, row))) for row in correct]
    return {k: math.fsum(pass_at_k(n, c, k) for n, c in counts) / len(counts) for k in ks}


def majority(answers: Sequence[str | None], key: Callable[[str], Hashable] | None = None) -> int | None:
    """The index of the first answer of the class with most votes; ``None`` when failures win.

    Samples without an answer are one class and vote like any other, so a model that mostly says
    nothing usable has no majority answer. Ties go to the class that was seen first.
    """
    if not answers:
        raise ValueError("a vote needs at least one answer")
    # A pair, so that a key that returns None for some answer is still not the class of failures.
    ballots = [(a is not None, None if a is None else key(a) if key else a) for a in answers]
    votes: dict[tuple[bool, Hashable], int] = {}
    for ballot in ballots:
        votes[ballot] = votes.get(ballot, 0) + 1
    winner = max(votes, key=votes.__getitem__)  # dicts keep order and max keeps the first
    return ballots.index(winner) if winner[0] else None


def cons_at_k(
    answers: Sequence[Sequence[str | None]],
    correct: Sequence[Sequence[bool]],
    k: int | None = None,
    key: Callable[[str], Hashable] | None = None,
) -> float:
    """cons@k: the share of problems whose majority answer over the first ``k`` samples is right.

    ``k=None`` takes every sample. The verdict is that of the winning class's first member. Raises
    ``ValueError`` when answers and verdicts do not match or a problem has fewer than ``k`` samples.
    """
    if not answers or len(answers) != len(correct):
        raise ValueError(f"answers of {len(answers)} problems, verdicts of {len(correct)}")
    right = 0
    for row, verdicts in zip(answers, correct, strict=True):
        if len(row) != len(verdicts):
            raise ValueError(f"a problem has {len(row)} answers and {len(verdicts)} verdicts")
        if k is not None and not 1 <= k <= len(row):
            raise ValueError(f"cons@{k} needs at least {k} samples per problem; this one has {len(row)}")
        winner = majority(row[:k], key)
        right += winner is not None and bool(verdicts[winner])
    return right / len(answers)


def clustered_stderr(values: Sequence[Sequence[float]]) -> float:
    """The standard error of the mean over problems, in the unit of ``values`` (bools: a share).

    Samples of one problem are not independent, so a problem counts once, by its mean: the standard
    deviation of the problem means over √(number of problems). NaN below two problems.
    """
    if any(not row for row in values):
        raise ValueError("a problem without samples has no mean")
    if len(values) < 2:
        return math.nan
    means = [math.fsum(row) / len(row) for row in values]
    centre = math.fsum(means) / len(means)
    variance = math.fsum((m - centre) ** 2 for m in means) / (len(means) - 1)
    return math.sqrt(variance / len(means))

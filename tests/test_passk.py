"""pass@k against brute force over subsets, cons@k against hand-made votes."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations, product

import pytest

from liubai.measure.passk import clustered_stderr, cons_at_k, majority, pass_at_k, pass_curve


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int) -> None:
    for c, k in product(range(n + 1), range(1, n + 1)):
        draws = list(combinations([i < c for i in range(n)], k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_stays_exact_for_many_samples() -> None:
    exact = 1 - Fraction(math.comb(9_990, 1_000), math.comb(10_000, 1_000))
    assert pass_at_k(10_000, 10, 1_000) == pytest.approx(float(exact), rel=1e-10)


def test_pass_at_k_edges() -> None:
    assert pass_at_k(4, 0, 4) == 0.0
    assert pass_at_k(4, 1, 4) == 1.0  # n − c < k
    assert pass_at_k(16, 4, 1) == pytest.approx(0.25)
    for n, c, k in [(3, 1, 4), (3, 4, 1), (3, 1, 0), (3, -1, 1)]:
        with pytest.raises(ValueError):  # noqa: PT011 - any of the three sentences
            pass_at_k(n, c, k)


def test_curve_is_the_mean_over_problems_and_never_falls() -> None:
    correct = [[True, False, False, False], [True] * 4, [False] * 4]
    curve = pass_curve(correct, [1, 2, 4])
    assert curve == pytest.approx({1: 5 / 12, 2: 0.5, 4: 2 / 3})
    assert list(curve.values()) == sorted(curve.values())
    with pytest.raises(ValueError, match="pass@8"):
        pass_curve(correct, [8])
    with pytest.raises(ValueError, match="no problems"):
        pass_curve([], [1])


def test_vote_counts_equal_answers_together() -> None:
    answers = ["1/3", "1/2", "0.5", "1/3", "2/4"]
    assert majority(answers) == 0
    assert majority(answers, lambda a: Fraction(a)) == 1


def test_ties_go_to_the_first_seen() -> None:
    assert majority(["b", "a", "a", "b"]) == 0
    assert majority(["a", "b", "b", "a", None]) == 0


def test_failures_vote_but_never_win_as_right() -> None:
    assert majority([None, None, "7"]) is None
    assert majority([None, "7"]) is None  # a tie that the failures were first in
    assert majority(["7", None]) == 0
    assert majority(["x", "x", None], lambda a: None) == 0  # a key of None is not a failure
    # Even a verdict that calls a failure right (a broken grader) does not count.
    assert cons_at_k([[None, None, "7"]], [[True, True, True]]) == 0.0


def test_cons_at_k_takes_the_first_k_and_averages_problems() -> None:
    answers = [["1", "2", "2"], ["3", "3", None]]
    correct = [[True, False, False], [True, True, False]]
    assert cons_at_k(answers, correct) == 0.5
    assert cons_at_k(answers, correct, k=1) == 1.0
    with pytest.raises(ValueError, match="cons@4"):
        cons_at_k(answers, correct, k=4)
    with pytest.raises(ValueError, match="verdicts"):
        cons_at_k(answers, [[True], [True]])


def test_standard_error_is_clustered_by_problem() -> None:
    # Copies of one verdict add no information: 4 problems stay 4 observations.
    once = [[1.0], [0.0], [1.0], [0.0]]
    assert clustered_stderr([row * 16 for row in once]) == pytest.approx(clustered_stderr(once))
    assert clustered_stderr(once) == pytest.approx(math.sqrt((1 / 3) / 4))
    assert math.isnan(clustered_stderr([[1.0, 0.0]]))
    with pytest.raises(ValueError, match="without samples"):
        clustered_stderr([[True], []])

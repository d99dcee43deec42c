"""Named parts whose sum is the total; errors earn nothing and cost nothing."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from liubai.grade import RewardWeights, Verdict, reward, shuffled
from liubai.types import Reward

RIGHT = Verdict(True, "2", {"correct": 1.0, "format": 1.0})
WRONG = Verdict(False, "3", {"correct": 0.0, "format": 1.0})
NOTHING = Verdict(False, None, {"correct": 0.0, "format": 0.0})
HALF = Verdict(False, "2", {"correct": 0.5, "format": 1.0})
BROKEN = Verdict(False, "2", {"correct": 0.0, "format": 1.0}, "timeout after 5.0 s")


def rewarded(
    verdict: Verdict,
    tokens: int = 10,
    *,
    truncated: bool = False,
    found: dict[str, float] | None = None,
    **weights: float,
) -> Reward:
    return reward(
        verdict,
        formatted=verdict.parts["format"] > 0,
        tokens=tokens,
        cap=100,
        truncated=truncated,
        weights=RewardWeights(**weights),
        **(found or {}),
    )


@pytest.mark.parametrize(
    ("verdict", "total"), [(RIGHT, 1.5), (WRONG, -0.5), (NOTHING, 0.0), (HALF, 0.5), (BROKEN, 0.0)]
)
def test_totals_with_default_weights(verdict: Verdict, total: float) -> None:
    assert rewarded(verdict).total == total


def test_parts_are_always_there_and_add_up() -> None:
    for verdict in (RIGHT, WRONG, NOTHING, HALF):
        got = rewarded(verdict, 95, overlong=-1.0, no_answer=-0.25)
        assert list(got.parts) == ["correct", "wrong", "no_answer", "format", "overlong"]
        assert sum(got.parts.values()) == got.total


def test_an_error_is_countable_and_never_wrong() -> None:
    got = rewarded(BROKEN, 100, overlong=-1.0)
    assert got.total == 0.0
    assert "error" in got.parts
    assert not any(got.parts.values())
    assert "error" not in rewarded(WRONG).parts


def test_a_truncated_answer_is_no_answer() -> None:
    got = rewarded(RIGHT, 100, truncated=True, no_answer=-0.25)
    assert got.parts["no_answer"] == got.total == -0.25
    assert got.parts["correct"] == got.parts["format"] == 0.0


@pytest.mark.parametrize(("tokens", "penalty"), [(0, 0.0), (80, 0.0), (90, -0.25), (100, -0.5), (120, -0.5)])
def test_overlong_ramps_from_its_start_to_the_cap(tokens: int, penalty: float) -> None:
    assert rewarded(RIGHT, tokens, overlong=-0.5).parts["overlong"] == pytest.approx(penalty)


FOUND = {"language": 0.5, "preference": -1.5, "process": 0.75}


def test_findings_without_a_weight_leave_no_trace() -> None:
    for verdict in (RIGHT, WRONG, NOTHING, BROKEN):
        assert rewarded(verdict, found=FOUND) == rewarded(verdict)
    got = rewarded(RIGHT, found=FOUND, process=2.0)
    assert list(got.parts) == ["correct", "wrong", "no_answer", "format", "overlong", "process"]


def test_findings_are_weighed_and_added() -> None:
    got = rewarded(WRONG, found=FOUND, language=0.5, preference=2.0, process=-1.0)
    assert list(got.parts)[5:] == ["language", "preference", "process"]
    assert got.parts["language"] == 0.25
    assert got.parts["preference"] == -3.0
    assert got.parts["process"] == -0.75
    assert got.total == sum(got.parts.values()) == -0.5 + 0.25 - 3.0 - 0.75
    assert rewarded(WRONG, language=0.5, preference=2.0, process=1.0).total == -0.5  # nothing was found


WEIGHTS = {"language": 1.0, "preference": 1.0, "process": 1.0}


def test_language_needs_the_format() -> None:
    got = rewarded(NOTHING, found=FOUND, **WEIGHTS)
    assert [got.parts[name] for name in FOUND] == [0.0, -1.5, 0.75]


def test_a_truncated_answer_earns_nothing_for_language_and_steps_and_cannot_flee_from_the_preference() -> (
    None
):
    got = rewarded(RIGHT, 100, truncated=True, found=FOUND, **WEIGHTS)
    assert [got.parts[name] for name in FOUND] == [0.0, -1.5, 0.0]
    assert got.total == -1.5


def test_findings_about_an_answer_that_could_not_be_judged_count_nothing() -> None:
    got = rewarded(BROKEN, found=FOUND, **WEIGHTS)
    assert got.total == 0.0
    assert not any(got.parts.values())
    assert list(got.parts)[5:] == [*FOUND, "error"]


@pytest.mark.parametrize(
    "bad",
    [
        {"overlong": 0.5},
        {"overlong_from": 1.0},
        {"corect": 1.0},
        {"wrong": float("nan")},
        {"process": float("inf")},
    ],
)
def test_bad_weights_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        RewardWeights(**bad)


def test_a_cap_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="cap"):
        reward(RIGHT, formatted=True, tokens=1, cap=0, truncated=False, weights=RewardWeights())


@given(st.lists(st.floats(-2, 2), max_size=20), st.integers(0, 99))
def test_shuffled_keeps_the_rewards_and_follows_its_seed(totals: list[float], seed: int) -> None:
    rewards = [Reward({"correct": t}, t) for t in totals]
    mixed = shuffled(rewards, random.Random(seed))
    assert sorted(r.total for r in mixed) == sorted(totals)
    assert mixed == shuffled(rewards, random.Random(seed))

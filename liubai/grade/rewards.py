"""From a verdict to a reward: named parts, whose sum is the total.

A part is what it adds to the total, weight included. ``error`` is there only for answers that could
not be judged, so they can be counted; they earn nothing and cost nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from liubai.grade.judge import Verdict
from liubai.types import Reward


class RewardWeights(BaseModel):
    """What each finding adds to the total. The overlong penalty is DAPO's soft one (arXiv 2503.14476,
    eq. 13): nothing up to the share ``overlong_from`` of the token cap, then linear, all of it at the
    cap."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    correct: float = Field(
        default=1.0, description="added for a right answer, a share of it for a score between"
    )
    wrong: float = Field(default=-1.0, description="added for a wrong answer")
    no_answer: float = Field(default=0.0, description="added for no usable answer, or one cut off")
    format: float = Field(default=0.5, description="added for one thought and one answer, in their tags")
    overlong: float = Field(default=0.0, le=0, description="added at the token cap, e.g. -0.5")
    overlong_from: float = Field(default=0.8, ge=0, lt=1, description="share of the cap where that begins")


def reward(
    verdict: Verdict,
    *,
    formatted: bool,
    tokens: int,
    cap: int,
    truncated: bool,
    weights: RewardWeights,
) -> Reward:
    """The reward of one answer of ``tokens`` tokens under a budget of ``cap``.

    A truncated answer has no usable answer and no format, whatever its text happens to look like.
    Parts are always ``correct``, ``wrong``, ``no_answer``, ``format``, ``overlong``; ``error`` is added,
    with all parts 0, when the verdict is an error. Raises ``ValueError`` for a cap below 1.
    """
    if cap < 1:
        raise ValueError("the token cap is at least 1")
    parts = dict.fromkeys(("correct", "wrong", "no_answer", "format", "overlong"), 0.0)
    if verdict.error is not None:
        return Reward({**parts, "error": 0.0}, 0.0)
    if truncated or verdict.answer is None:
        parts["no_answer"] = weights.no_answer
    else:
        score = verdict.parts["correct"]
        parts["correct"] = weights.correct * score
        parts["wrong"] = weights.wrong * (1.0 - score)
    if formatted and not truncated:
        parts["format"] = weights.format
    parts["overlong"] = weights.overlong * overlong_share(tokens, cap, weights.overlong_from)
    # "+ 0.0": a weight times nothing may be -0.0, which reads badly in a log
    parts = {name: value + 0.0 for name, value in parts.items()}
    return Reward(parts, sum(parts.values()))


def overlong_share(tokens: int, cap: int, start: float) -> float:
    """0 up to ``start·cap`` tokens, 1 from the cap on, linear between."""
    begin = start * cap
    return min(1.0, max(0.0, (tokens - begin) / (cap - begin)))


def shuffled(rewards: Sequence[Reward], rng: random.Random) -> list[Reward]:
    """The same rewards for other answers: the control in which RL must learn nothing."""
    return rng.sample(list(rewards), len(rewards))

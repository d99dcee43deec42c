"""From a verdict to a reward: named parts, whose sum is the total.

A part is what it adds to the total, weight included. ``error`` is there only for answers that could
not be judged, so they can be counted; they earn nothing and cost nothing. R1's total is such a sum, of
rules, language and, late, preference (arXiv 2501.12948v2); which of them a stage has, its weights say.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

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
    language: float = Field(
        default=0.0, description="times the share of the thought's words in the question's language"
    )
    preference: float = Field(default=0.0, description="times what the reward model says of the answer")
    process: float = Field(default=0.0, description="times the share of the thought's steps that are right")
    faithful: float = Field(default=0.0, description="times how far the passage supports the answer")

    @model_serializer(mode="wrap")
    def _asked(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``faithful`` the key is left out: stages that do not ask for it keep their fingerprints."""
        found: dict[str, Any] = write(self)
        return found if self.faithful else {k: v for k, v in found.items() if k != "faithful"}


def reward(
    verdict: Verdict,
    *,
    formatted: bool,
    tokens: int,
    cap: int,
    truncated: bool,
    weights: RewardWeights,
    language: float = 0.0,
    preference: float = 0.0,
    process: float = 0.0,
    faithful: float = 0.0,
) -> Reward:
    """The reward of one answer of ``tokens`` tokens under a budget of ``cap``. ``language``, ``preference``,
    ``process`` and ``faithful`` are what was found, before any weight.

    A truncated answer has no usable answer and no format, whatever its text happens to look like, and its
    language, steps and faithfulness earn nothing. Language needs the format, too: where the thought ends is
    not known without. The reward model's word always counts, or an answer could flee from a bad one by not
    ending. Parts are always ``correct``, ``wrong``, ``no_answer``, ``format``, ``overlong``, and of
    ``language``, ``preference``, ``process``, ``faithful`` those that have a weight; ``error`` is added, with
    all parts 0, when the verdict is an error. Raises ``ValueError`` for a cap below 1.
    """
    if cap < 1:
        raise ValueError("the token cap is at least 1")
    found = {
        "language": language if formatted and not truncated else 0.0,
        "preference": preference,
        "process": process if not truncated else 0.0,
        "faithful": faithful if not truncated else 0.0,
    }
    weighed = {name: weight for name in found if (weight := getattr(weights, name))}
    parts = dict.fromkeys(("correct", "wrong", "no_answer", "format", "overlong", *weighed), 0.0)
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
    for name, weight in weighed.items():
        parts[name] = weight * found[name]
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

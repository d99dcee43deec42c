"""Advantages: pure functions of rewards. Shapes: P problems, G samples of each."""

from __future__ import annotations

from torch import Tensor

#: Rewards that differ by less than this are equal: float noise must not become a huge advantage.
TOLERANCE = 1e-6


def group_advantages(rewards_PG: Tensor, *, normalize_std: bool = True, eps: float = 1e-6) -> Tensor:
    """GRPO: ``(r − mean) / (std + eps)`` over each group (DeepSeekMath, arXiv 2402.03300, §4.1.2).

    std is the sample standard deviation (divisor G − 1). ``normalize_std=False`` leaves the division
    out (Dr. GRPO, arXiv 2503.20783). Worked example: rewards 90, 80, 70, 60 have mean 75 and std
    12.91, hence advantages 1.162, 0.387, −0.387, −1.162, or 15, 5, −5, −15 without the division.

    Raises ``ValueError`` for groups of one: there is no baseline to compare with.
    """
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] < 2:
        raise ValueError(f"rewards must be [problems, samples ≥ 2], not {list(rewards_PG.shape)}")
    centered = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if not normalize_std:
        return centered
    return centered / (rewards_PG.std(dim=1, keepdim=True) + eps)


def has_variance(rewards_PG: Tensor) -> Tensor:
    """Boolean ``[P]``: which groups can teach anything. The others must be dropped *before* any
    denominator is computed, or they dilute the mean of those that can."""
    return (rewards_PG.amax(dim=1) - rewards_PG.amin(dim=1)) > TOLERANCE

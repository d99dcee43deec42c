"""Advantages: pure functions of rewards. Shapes: P problems, G samples of each."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

#: Rewards that differ by less than this are equal: float noise must not become a huge advantage.
TOLERANCE = 1e-6

Advantage = Literal["grpo", "dr-grpo", "batch-std", "rloo", "reinforce++", "reinforce++-baseline"]

#: Kinds whose baseline is the group's own: a group of equal rewards teaches nothing.
GROUPED = ("grpo", "dr-grpo", "batch-std", "rloo", "reinforce++-baseline")


def advantages(rewards_PG: Tensor, kind: Advantage, lengths_PG: Tensor, eps: float = 1e-6) -> Tensor:
    """``[P, G]``; every token of an answer gets its answer's. ``lengths_PG`` are the answers' tokens.

    - ``grpo``: ``(r − mean) / (std + eps)`` over each group (DeepSeekMath, arXiv 2402.03300, §4.1.2).
    - ``dr-grpo``: ``r − mean`` (arXiv 2503.20783).
    - ``batch-std``: ``(r − mean of the group) / (std of the batch + eps)`` (arXiv 2508.08221).
    - ``rloo``: ``r − mean of the others`` ``= G/(G−1) · (r − mean)`` (arXiv 2402.14740).
    - ``reinforce++``: ``r``, whitened over all tokens of the batch (arXiv 2501.03262); the return of an
      outcome reward without discount is the same at every token.
    - ``reinforce++-baseline``: ``r − mean of the group``, whitened so.

    std is the sample standard deviation (divisor n − 1). Worked example: rewards 90, 80, 70, 60 have
    mean 75 and std 12.91, hence grpo 1.162, 0.387, −0.387, −1.162, dr-grpo 15, 5, −5, −15 and rloo 20,
    6.67, −6.67, −20.

    Raises ``ValueError`` for groups of one: there is no baseline to compare with.
    """
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] < 2:
        raise ValueError(f"rewards must be [problems, samples ≥ 2], not {list(rewards_PG.shape)}")
    samples = rewards_PG.shape[1]
    centered_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if kind == "grpo":
        return centered_PG / (rewards_PG.std(dim=1, keepdim=True) + eps)
    if kind == "dr-grpo":
        return centered_PG
    if kind == "batch-std":
        return centered_PG / (rewards_PG.std() + eps)
    if kind == "rloo":
        return centered_PG * samples / (samples - 1)
    return whiten(rewards_PG if kind == "reinforce++" else centered_PG, lengths_PG, eps)


def whiten(values_PG: Tensor, lengths_PG: Tensor, eps: float = 1e-6) -> Tensor:
    """Mean 0 and standard deviation 1 over all tokens, where an answer of n tokens stands n times."""
    tokens = lengths_PG.sum().clamp(min=2)
    mean = (values_PG * lengths_PG).sum() / tokens
    variance = ((values_PG - mean).square() * lengths_PG).sum() / (tokens - 1)
    return (values_PG - mean) / (variance.sqrt() + eps)


def has_variance(rewards_PG: Tensor) -> Tensor:
    """Boolean ``[P]``: which groups can teach anything. The others must be dropped *before* any
    denominator is computed, or they dilute the mean of those that can."""
    return (rewards_PG.amax(dim=1) - rewards_PG.amin(dim=1)) > TOLERANCE


def teaches(rewards_PG: Tensor, kind: Advantage) -> Tensor:
    """Boolean ``[P]``: the groups to keep. With a baseline of the whole batch, all of them, unless it has
    no variance at all."""
    if kind in GROUPED:
        return has_variance(rewards_PG)
    return has_variance(rewards_PG.reshape(1, -1)).expand(rewards_PG.shape[0]).clone()


def chosen(entropies: Tensor, share: float) -> float:
    """The entropy (nats) that the most uncertain ``share`` of all tokens reach (arXiv 2506.01939)."""
    count = entropies.numel()
    if not count:
        return 0.0
    # not torch.quantile: it refuses more than 2²⁴ numbers
    return float(entropies.double().kthvalue(max(1, count - max(1, round(share * count)) + 1)).values)

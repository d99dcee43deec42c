"""The policy loss as pure functions of log-probabilities, advantages and a mask.

A batch may be cut into micro-batches or packed in any way: every token carries its own ``weight``,
computed once from the *whole* update by :func:`token_weights`, and the loss is a plain sum. What
"GRPO" means is then one word, ``aggregation``, and it is required.

Shapes: B rows, T tokens, N sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

Aggregation = Literal["token-mean", "sequence-mean", "dr-grpo"]

#: Log-ratios are clamped to ±this before ``exp``: a runaway token must not become inf (pains 13).
CLAMP = 20.0


class LossConfig(BaseModel):
    """Default: clip-higher without KL (DAPO, arXiv 2503.14476), strictly on-policy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    aggregation: Aggregation
    clip_low: float = Field(0.2, ge=0)
    clip_high: float = Field(0.28, ge=0)
    kl: float = Field(0.0, ge=0, description="weight β of the k3 penalty to the reference")
    #: cap C of the truncated importance weight min(π_trainer/π_sampler, C); 0 = no correction
    importance_cap: float = Field(0.0, ge=0)


@dataclass(frozen=True, slots=True)
class LossInputs:
    """All ``[B, T]``; ``mask_BT`` marks completion tokens, the rest is ignored whatever it holds.

    ``old_logprobs_BT`` is the policy that the ratio is taken against; ``sampler_logprobs_BT`` is
    the behaviour policy. They are the same unless sampler and trainer differ.
    """

    logprobs_BT: Tensor
    old_logprobs_BT: Tensor
    sampler_logprobs_BT: Tensor
    advantages_BT: Tensor
    weights_BT: Tensor
    mask_BT: Tensor
    reference_logprobs_BT: Tensor | None = None


def token_weights(lengths_N: Sequence[int], aggregation: Aggregation, max_tokens: int) -> list[float]:
    """The weight of each token of sequence i, such that Σ weight · term is the aggregated loss.

    - ``token-mean``: ``1 / Σ|o|`` — every token of the update counts the same (DAPO).
    - ``sequence-mean``: ``1 / (N·|o_i|)`` — every answer counts the same (GRPO as printed).
    - ``dr-grpo``: ``1 / (N·L_max)`` — a constant, no length bias (arXiv 2503.20783).

    Sequences of no tokens do not count among the N.
    """
    n = sum(length > 0 for length in lengths_N)
    if aggregation == "token-mean":
        return [1.0 / max(1, sum(lengths_N))] * len(lengths_N)
    if aggregation == "sequence-mean":
        return [1.0 / (n * length) if length else 0.0 for length in lengths_N]
    return [1.0 / (max(1, n) * max_tokens)] * len(lengths_N)


def grpo_loss(x: LossInputs, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy gradient with an optional KL penalty in the loss (DeepSeekMath, eq. 3).

    ``Σ weight · ( −min(ρA, clip(ρ, 1−ε_low, 1+ε_high) A) · w + β·k3 )`` with ``ρ = π/π_old`` and
    ``w = min(π_old/π_sampler, C)`` where an importance cap is set. There is no entropy term.

    Returns the scalar loss and detached *sums over masked tokens* to log, keyed by name; ``tokens``
    counts them.
    """
    mask_BT = x.mask_BT
    log_ratio_BT = (x.logprobs_BT - x.old_logprobs_BT).clamp(-CLAMP, CLAMP)
    ratio_BT = torch.where(mask_BT, log_ratio_BT, 0.0).exp()
    clipped_BT = ratio_BT.clamp(1 - config.clip_low, 1 + config.clip_high)
    gain_BT = torch.minimum(ratio_BT * x.advantages_BT, clipped_BT * x.advantages_BT)
    importance_BT = torch.ones_like(gain_BT)
    if config.importance_cap > 0:
        gap_BT = (x.old_logprobs_BT - x.sampler_logprobs_BT).clamp(-CLAMP, CLAMP)
        importance_BT = gap_BT.exp().clamp(max=config.importance_cap).detach()
    term_BT = -gain_BT * importance_BT
    sums: dict[str, Tensor] = {}
    if x.reference_logprobs_BT is not None and config.kl > 0:
        kl_BT = k3(x.logprobs_BT, x.reference_logprobs_BT)
        term_BT = term_BT + config.kl * kl_BT
        sums["kl"] = _sum(kl_BT, mask_BT)
    loss = torch.where(mask_BT, x.weights_BT * term_BT, 0.0).sum()
    off_policy_BT = (x.logprobs_BT - x.sampler_logprobs_BT).detach().clamp(-CLAMP, CLAMP).exp()
    sums |= {
        "clip/low": _sum((ratio_BT < 1 - config.clip_low) & (x.advantages_BT < 0), mask_BT),
        "clip/high": _sum((ratio_BT > 1 + config.clip_high) & (x.advantages_BT > 0), mask_BT),
        "logprob_gap": _sum((x.logprobs_BT - x.sampler_logprobs_BT).abs(), mask_BT),
        # how far the samples are from the policy that learns from them, corrected for or not
        "importance": _sum(off_policy_BT, mask_BT),
        "importance_squared": _sum(off_policy_BT.square(), mask_BT),
        "tokens": mask_BT.sum(),
    }
    return loss, sums


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """``π_ref/π − log(π_ref/π) − 1 ≥ 0`` per token (Schulman 2020; DeepSeekMath, eq. 4)."""
    log_ratio = (reference - logprobs).clamp(-CLAMP, CLAMP)
    return log_ratio.exp() - log_ratio - 1


def _sum(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return torch.where(mask_BT, values_BT.detach().float(), 0.0).sum()

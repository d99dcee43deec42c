"""The policy loss as pure functions of log-probabilities, advantages and a mask.

One loss, put together from named parts: what the ratio to the old policy does (``objective``), how
tokens are weighed (``aggregation``), what is done where sampler and trainer differ (``importance``), and
the terms beside it (``kl``, ``entropy``). Algorithms are combinations: :mod:`liubai.learn.presets`.

A batch may be cut into micro-batches or packed in any way: every token carries its own ``weight``,
computed once from the *whole* update by :func:`token_weights`, and the loss is a plain sum. What
"GRPO" means is then one word, ``aggregation``, and it is required.

Shapes: B rows, T tokens, N sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

Aggregation = Literal["token-mean", "sequence-mean", "dr-grpo"]
Estimator = Literal["k1", "k2", "k3"]

#: Log-ratios are clamped to ±this before ``exp``: a runaway token must not become inf (pains 13).
CLAMP = 20.0


class LossConfig(BaseModel):
    """Default: clip-higher without KL (DAPO, arXiv 2503.14476), strictly on-policy."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    aggregation: Aggregation
    #: clip: PPO's and GRPO's; gspo: one ratio a sequence; cispo: every token keeps its gradient
    objective: Literal["clip", "gspo", "cispo"] = "clip"
    clip_low: float = Field(0.2, ge=0)
    clip_high: float = Field(0.28, ge=0)
    dual_clip: float = Field(0.0, ge=0, description="at most this × |A| is lost on a bad token; 0 = no bound")
    ratio_cap: float = Field(5.0, gt=0, description="the largest ratio of objective cispo")
    kl: float = Field(0.0, ge=0, description="weight β of the penalty to the reference")
    kl_estimator: Estimator = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    #: what to do where the sampler's probability is not the trainer's: w = π_trainer/π_sampler of the old
    #: policy; truncate: min(w, cap) (TIS); mask: w where floor ≤ w ≤ cap, else 0 (MIS; IcePop a token)
    importance: Literal["none", "truncate", "mask"] = "none"
    importance_level: Literal["token", "sequence"] = "token"
    importance_cap: float = Field(2.0, gt=0)
    importance_floor: float = Field(0.0, ge=0)
    entropy_bonus: float = Field(0.0, ge=0, description="weight c of the entropy in the loss")
    top_entropy: float = Field(
        1.0, gt=0, le=1, description="share of the tokens, the most uncertain, to learn"
    )

    @model_validator(mode="after")
    def _meaningful(self) -> Self:
        if self.kl and self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "k1 has no gradient in the loss on average: use k2 or k3 there, or kl_in = 'reward'"
            )
        if self.dual_clip and self.dual_clip <= 1:
            raise ValueError("dual_clip is above 1 (3 is usual), or 0 for none")
        if self.importance_floor > self.importance_cap:
            raise ValueError("importance_floor is above importance_cap")
        return self


@dataclass(frozen=True, slots=True)
class LossInputs:
    """All ``[B, T]``; ``mask_BT`` marks completion tokens, the rest is ignored whatever it holds.

    ``old_logprobs_BT`` is the policy that the ratio is taken against; ``sampler_logprobs_BT`` is
    the behaviour policy. They are the same unless sampler and trainer differ. ``sequences_BT`` numbers
    the sequences where a row holds several. ``chosen_BT`` is 1 on the tokens that are learned.
    """

    logprobs_BT: Tensor
    old_logprobs_BT: Tensor
    sampler_logprobs_BT: Tensor
    advantages_BT: Tensor
    weights_BT: Tensor
    mask_BT: Tensor
    reference_logprobs_BT: Tensor | None = None
    entropy_BT: Tensor | None = None
    chosen_BT: Tensor | None = None
    sequences_BT: Tensor | None = None


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


def policy_loss(x: LossInputs, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """``Σ weight · ( chosen · (w · objective − c·H) + β·KL )`` over the masked tokens.

    Returns the scalar loss and detached *sums over masked tokens* to log, keyed by name; ``tokens``
    counts them.
    """
    mask_BT = x.mask_BT
    term_BT, ratio_BT = OBJECTIVES[config.objective](x, config)
    term_BT = term_BT * importance_weights(x, config)
    if config.entropy_bonus > 0:
        assert x.entropy_BT is not None, "an entropy bonus needs the entropies"
        term_BT = term_BT - config.entropy_bonus * x.entropy_BT
    if x.chosen_BT is not None:  # the KL still holds the other tokens
        term_BT = torch.where(x.chosen_BT > 0, term_BT, 0.0)
    sums: dict[str, Tensor] = {}
    if x.reference_logprobs_BT is not None and config.kl > 0:
        kl_BT = KL[config.kl_estimator](x.logprobs_BT, x.reference_logprobs_BT)
        sums["kl"] = _sum(kl_BT, mask_BT)
        if config.kl_in == "loss":
            term_BT = term_BT + config.kl * kl_BT
    loss = torch.where(mask_BT, x.weights_BT * term_BT, 0.0).sum()
    off_policy_BT = (x.logprobs_BT - x.sampler_logprobs_BT).detach().clamp(-CLAMP, CLAMP).exp()
    bad_BT = x.advantages_BT < 0
    high = config.ratio_cap if config.objective == "cispo" else 1 + config.clip_high
    sums |= {
        "clip/low": _sum((ratio_BT < 1 - config.clip_low) & bad_BT & (config.objective != "cispo"), mask_BT),
        "clip/high": _sum(
            (ratio_BT > high) & ((x.advantages_BT > 0) | (config.objective == "cispo")), mask_BT
        ),
        "logprob_gap": _sum((x.logprobs_BT - x.sampler_logprobs_BT).abs(), mask_BT),
        # how far the samples are from the policy that learns from them, corrected for or not
        "importance": _sum(off_policy_BT, mask_BT),
        "importance_squared": _sum(off_policy_BT.square(), mask_BT),
        "tokens": mask_BT.sum(),
    }
    return loss, sums


# ---- objectives: the term to minimise, and the ratio ρ = π/π_old that it looks at, both [B, T] ----


def clip_objective(x: LossInputs, config: LossConfig) -> tuple[Tensor, Tensor]:
    """``−min(ρA, clip(ρ, 1−ε_low, 1+ε_high) A)`` (PPO, arXiv 1707.06347 eq. 7; DeepSeekMath eq. 3), and
    for A < 0 no more than ``−c·A`` where a dual clip c is set (arXiv 1912.09729)."""
    return _clipped(_ratio(x), x.advantages_BT, config)


def gspo_objective(x: LossInputs, config: LossConfig) -> tuple[Tensor, Tensor]:
    """The same of one ratio a sequence, ``s = (π(o)/π_old(o))^(1/|o|)`` (GSPO, arXiv 2507.18071).

    Written per token as ``lp − sg[lp] + sg[log s]``: with the weights of ``sequence-mean`` the sum over
    a sequence has the value and the gradient of the sequence's one term.
    """
    log_s_BT = sequence_mean(_log_ratio(x).detach(), x.mask_BT, x.sequences_BT)
    ratio_BT = torch.where(x.mask_BT, x.logprobs_BT - x.logprobs_BT.detach() + log_s_BT, 0.0).exp()
    return _clipped(ratio_BT, x.advantages_BT, config)


def cispo_objective(x: LossInputs, config: LossConfig) -> tuple[Tensor, Tensor]:
    """``−sg[min(ρ, cap)] · A · lp`` (CISPO, arXiv 2506.13585; one-sided as in ScaleRL, arXiv
    2510.13786): a large ratio is bounded, and no token loses its gradient."""
    ratio_BT = _ratio(x)
    logprobs_BT = torch.where(x.mask_BT, x.logprobs_BT, 0.0)  # NaN off the mask has a gradient through ×
    return -ratio_BT.detach().clamp(max=config.ratio_cap) * x.advantages_BT * logprobs_BT, ratio_BT


OBJECTIVES = {"clip": clip_objective, "gspo": gspo_objective, "cispo": cispo_objective}


def _clipped(ratio_BT: Tensor, advantages_BT: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    clipped_BT = ratio_BT.clamp(1 - config.clip_low, 1 + config.clip_high)
    gain_BT = torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    if config.dual_clip:
        bounded_BT = torch.maximum(gain_BT, config.dual_clip * advantages_BT)
        gain_BT = torch.where(advantages_BT < 0, bounded_BT, gain_BT)
    return -gain_BT, ratio_BT


def _log_ratio(x: LossInputs) -> Tensor:
    log_ratio_BT = (x.logprobs_BT - x.old_logprobs_BT).clamp(-CLAMP, CLAMP)
    return torch.where(x.mask_BT, log_ratio_BT, 0.0)


def _ratio(x: LossInputs) -> Tensor:
    return _log_ratio(x).exp()


# ---- sampler and trainer ----


def importance_weights(x: LossInputs, config: LossConfig) -> Tensor:
    """What the term is multiplied with, ``[B, T]``, no gradient: a function of ``w = π_old/π_sampler`` of
    each token, or of the whole sequence. ``truncate`` is TIS, TRL's ``token_truncate`` and
    ``sequence_truncate``; ``mask`` is MIS, its ``token_mask`` and ``sequence_mask``; IcePop is ``mask`` a
    token with floor 0.5 and cap 5 (OpenRLHF's ``icepop``)."""
    if config.importance == "none":
        return torch.ones_like(x.advantages_BT)
    gap_BT = torch.where(x.mask_BT, x.old_logprobs_BT - x.sampler_logprobs_BT, 0.0).detach()
    if config.importance_level == "sequence":
        gap_BT = sequence_sum(gap_BT, x.mask_BT, x.sequences_BT)
    w_BT = gap_BT.clamp(-CLAMP, CLAMP).exp()
    if config.importance == "truncate":
        return w_BT.clamp(max=config.importance_cap)
    within_BT = (w_BT >= config.importance_floor) & (w_BT <= config.importance_cap)
    return torch.where(within_BT, w_BT, 0.0)


def sequence_sum(values_BT: Tensor, mask_BT: Tensor, sequences_BT: Tensor | None) -> Tensor:
    """At every masked token the sum over its sequence's masked tokens; 0 elsewhere."""
    values_BT = torch.where(mask_BT, values_BT, 0.0)
    if sequences_BT is None:  # a row is a sequence
        return torch.where(mask_BT, values_BT.sum(1, keepdim=True), 0.0)
    # a number stands in one row only; padding, −1, is never on the mask
    number_BT = sequences_BT.clamp(min=0)
    sums_N = values_BT.new_zeros(int(number_BT.max()) + 1).index_add_(
        0, number_BT.flatten(), values_BT.flatten()
    )
    return torch.where(mask_BT, sums_N[number_BT], 0.0)


def sequence_mean(values_BT: Tensor, mask_BT: Tensor, sequences_BT: Tensor | None) -> Tensor:
    """At every masked token the mean over its sequence's masked tokens; 0 elsewhere."""
    count_BT = sequence_sum(torch.ones_like(values_BT), mask_BT, sequences_BT)
    return sequence_sum(values_BT, mask_BT, sequences_BT) / count_BT.clamp(min=1)


# ---- KL to a reference, per token (Schulman 2020, "Approximating KL divergence") ----


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """``log π − log π_ref``: unbiased, of either sign."""
    return (logprobs - reference).clamp(-CLAMP, CLAMP)


def k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """``(log π − log π_ref)² / 2``: in the loss, on-policy, its gradient is that of KL(π‖π_ref)."""
    return k1(logprobs, reference).square() / 2


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """``π_ref/π − log(π_ref/π) − 1 ≥ 0`` (DeepSeekMath, eq. 4)."""
    log_ratio = -k1(logprobs, reference)
    return log_ratio.exp() - log_ratio - 1


KL = {"k1": k1, "k2": k2, "k3": k3}


def _sum(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return torch.where(mask_BT, values_BT.detach().float(), 0.0).sum()

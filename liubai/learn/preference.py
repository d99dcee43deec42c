"""Learning from pairs of answers, one of which is preferred: for a reward model, and for the policy
itself. Pure functions of scores or log-probabilities; every loss is one number a pair, so that the caller
weighs pairs across micro-batches as it likes.

Left out: listwise losses, and those that need no reference.

Shapes: N pairs (of :func:`pointwise`: N answers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.nn import functional as F


class PreferenceConfig(BaseModel):
    """Default: DPO, labels taken at their word."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Literal["dpo", "ipo"] = "dpo"
    beta: float = Field(0.1, gt=0, description="how strongly the reference holds the policy")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of the pairs taken to be swapped")

    @model_validator(mode="after")
    def _meaningful(self) -> Self:
        if self.label_smoothing and self.kind == "ipo":
            raise ValueError("label_smoothing is a part of dpo: ipo is bounded without it, set it to 0 there")
        return self


# ---- reward models ----


def bradley_terry(chosen_N: Tensor, rejected_N: Tensor, margin: float = 0.0) -> Tensor:
    """``−log σ(r_c − r_r − margin)``, ``[N]``: the scores are log-odds of being preferred (Bradley and
    Terry 1952; InstructGPT, arXiv 2203.02155 eq. 1; with a margin Llama 2, arXiv 2307.09288 eq. 2). Only
    differences of scores are learned."""
    return F.softplus(margin - (chosen_N - rejected_N))  # log σ itself is −inf where σ is 0


def pointwise(scores_N: Tensor, safe_N: Tensor) -> Tensor:
    """Binary cross-entropy of a label, 1 or True for safe, on the score as a logit, ``[N]``. R1's safety
    model learns so, from answers that stand alone (arXiv 2501.12948, supplementary)."""
    return F.binary_cross_entropy_with_logits(scores_N, safe_N.to(scores_N.dtype), reduction="none")


def length_balanced(pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Which pairs to keep, as indices in order, so that the preferred answer is the longer one as often
    as the shorter one: a reward model that looks at the length alone is then right half of the time.

    ``pairs`` are lengths in tokens, ``(chosen, rejected)``. Of the side that has more, the pairs with the
    largest difference go first, of equal differences the last; nothing else goes. R1 chose its
    preference data for comparable lengths.
    """
    longer = [i for i, (chosen, rejected) in enumerate(pairs) if chosen > rejected]
    shorter = [i for i, (chosen, rejected) in enumerate(pairs) if chosen < rejected]
    surplus = longer if len(longer) > len(shorter) else shorter
    keep = min(len(longer), len(shorter))
    dropped = set(sorted(surplus, key=lambda i: abs(pairs[i][0] - pairs[i][1]))[keep:])
    return [i for i in range(len(pairs)) if i not in dropped]


# ---- the policy ----


def preference_loss(
    chosen_N: Tensor,
    rejected_N: Tensor,
    reference_chosen_N: Tensor,
    reference_rejected_N: Tensor,
    config: PreferenceConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses ``[N]`` of completion log-probabilities under the policy and under the reference. With the
    bracket ``x = (lp_c − lp_r) − (ref_c − ref_r)`` and the smoothing ε:

    - ``dpo``: ``−(1 − ε) log σ(βx) − ε log σ(−βx)`` (arXiv 2305.18290 eq. 7; with ε, cDPO:
      Mitchell 2023, "A note on DPO with noisy preferences").
    - ``ipo``: ``(x − 1/(2β))²`` (arXiv 2310.12036 eq. 17, whose τ is β).

    DPO's log-probabilities are sums over the completion. For IPO the caller decides: sums are the formula
    as printed; with means a token, as in TRL, the aim 1/(2β) is as far for a long answer as for a short one.

    Beside them detached *sums over the pairs* to log: ``reward/chosen`` and ``reward/rejected``, β times
    what the policy adds to the reference; their difference ``margin`` ``= βx``; and ``right``, the pairs
    with x > 0.
    """
    gain_chosen_N, gain_rejected_N = chosen_N - reference_chosen_N, rejected_N - reference_rejected_N
    bracket_N = gain_chosen_N - gain_rejected_N
    if config.kind == "ipo":
        losses_N = (bracket_N - 1 / (2 * config.beta)).square()
    else:
        logits_N, swapped = config.beta * bracket_N, config.label_smoothing
        losses_N = (1 - swapped) * F.softplus(-logits_N) + swapped * F.softplus(logits_N)
    sums = {
        "margin": config.beta * bracket_N.detach().sum(),
        "right": (bracket_N.detach() > 0).sum(),
        "reward/chosen": config.beta * gain_chosen_N.detach().sum(),
        "reward/rejected": config.beta * gain_rejected_N.detach().sum(),
    }
    return losses_N, sums

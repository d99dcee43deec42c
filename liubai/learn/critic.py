"""The critic of PPO: what a token gains over what was expected of it, and how the expectation learns.

Everything is aligned with the position that *predicts*, as in :class:`liubai.learn.packing.Batch`: the
value at t is of the text up to and with token t, the reward at t is for the token that follows, and the
mask is True where that token is the answer's.

Left out: values of what follows a truncated answer. It ends where it was cut, with what it was paid.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liubai.learn.advantages import TOLERANCE


@torch.no_grad()
def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Advantages and returns ``[B, T]``, 0 off the mask, without gradients (GAE, arXiv 1506.02438 eq. 16):
    ``A_t = Σ_l (γλ)^l δ_{t+l}``, ``δ_t = r_t + γV_{t+1} − V_t``, and ``R_t = A_t + V_t``.

    An answer is a run of masked positions; the value after its last is 0. At λ = γ = 1, which outcome
    rewards want, R is the sum of the rewards still to come, whatever the critic says.
    """
    rewards_BT = torch.where(mask_BT, rewards_BT, 0.0)
    values_BT = torch.where(mask_BT, values_BT, 0.0)
    last_B1 = torch.zeros_like(mask_BT[:, :1])
    goes_on_BT = torch.cat([mask_BT[:, 1:], last_B1], 1)
    next_BT = torch.cat([values_BT[:, 1:], last_B1.to(values_BT.dtype)], 1)
    delta_BT = rewards_BT + gamma * next_BT - values_BT
    decay_BT = (
        gamma * lam * goes_on_BT.to(values_BT.dtype)
    )  # nothing comes back from the next answer of a row
    advantages_BT = torch.empty_like(delta_BT)
    after_B = delta_BT.new_zeros(delta_BT.shape[0])
    for t in reversed(range(delta_BT.shape[1])):
        after_B = delta_BT[:, t] + decay_BT[:, t] * after_B
        advantages_BT[:, t] = after_B
    advantages_BT = torch.where(mask_BT, advantages_BT, 0.0)
    return advantages_BT, advantages_BT + values_BT


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    weights_BT: Tensor,
    mask_BT: Tensor,
    clip: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``Σ weight · ½ · max((V − R)², (clip(V, V_old ± ε) − R)²)`` over the masked tokens, the clipped value
    loss of OpenAI's PPO; a ``clip`` of 0 is none. The weights are those of
    :func:`liubai.learn.losses.token_weights`.

    Returns the scalar loss and detached *sums over masked tokens* to log: ``value_clipped`` counts the
    tokens that the clip keeps from learning, ``value_error`` is (V − R)², ``tokens`` counts them all.
    """
    # NaN off the mask has a gradient through ²
    values_BT, old_values_BT, returns_BT = (
        torch.where(mask_BT, t, 0.0) for t in (values_BT, old_values_BT, returns_BT)
    )
    error_BT = (values_BT - returns_BT).square()
    term_BT, clipped_BT = error_BT, torch.zeros_like(mask_BT)
    if clip > 0:
        near_BT = torch.clamp(values_BT, old_values_BT - clip, old_values_BT + clip)
        near_error_BT = (near_BT - returns_BT).square()
        term_BT, clipped_BT = torch.maximum(error_BT, near_error_BT), near_error_BT > error_BT
    loss = torch.where(mask_BT, weights_BT * term_BT / 2, 0.0).sum()
    sums = {
        "value_clipped": clipped_BT.sum(),
        "value_error": error_BT.detach().sum(),
        "tokens": mask_BT.sum(),
    }
    return loss, sums


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """``1 − Var(R − V) / Var(R)`` of two 1-D tensors: 1 for a critic that knows, 0 for one that says the
    same everywhere, negative for one that misleads. 0 where all returns are equal."""
    if not returns.numel() or float(returns.max() - returns.min()) < TOLERANCE:
        return 0.0
    values, returns = values.detach().double(), returns.detach().double()
    return float(1 - (returns - values).var(correction=0) / returns.var(correction=0))


def whiten_tokens(values_BT: Tensor, mask_BT: Tensor, eps: float = 1e-6) -> Tensor:
    """Mean 0 and standard deviation 1 (divisor n − 1) over the masked tokens, 0 elsewhere; what PPO does to
    its advantages. Of the whole update, not of a micro-batch."""
    values_BT = torch.where(mask_BT, values_BT, 0.0)
    tokens = mask_BT.sum()
    mean = values_BT.sum() / tokens.clamp(min=1)
    centered_BT = torch.where(mask_BT, values_BT - mean, 0.0)
    variance = centered_BT.square().sum() / (tokens - 1).clamp(min=1)
    return centered_BT / (variance.sqrt() + eps)

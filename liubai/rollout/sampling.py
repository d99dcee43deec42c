"""Choosing the next token: one uniform number per token, a pure function of (seed, index).

Inverse-CDF sampling with a counter-based generator: the draw does not depend on the batch, the
slot or the order of events, so an answer is the same alone, among 256 others, or after a resume.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liubai.errors import Diverged
from liubai.model import kernels

BROKEN = (
    "the model's logits are not numbers: its weights are broken; go back to an older checkpoint, or lower lr"
)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64 shifts in torch drag the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniform(seeds_S: Tensor, index_S: Tensor) -> Tensor:
    """Float64 numbers in [0, 1): splitmix64 (Steele et al. 2014) of int64 seed and token index."""
    z = seeds_S + (index_S + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
    z = (z ^ _shift_right(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ _shift_right(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 11).double() * 2.0**-53


def sample(
    logits_SV: Tensor, uniform_S: Tensor, temperature_S: Tensor, top_p_S: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids ``[S]`` and their log-probabilities ``[S]`` (nats) at the sampling temperature.

    The log-probability is of the full distribution at that temperature, also under ``top_p``
    (which training therefore refuses). Temperature 0 is greedy, with log-probabilities at 1. Raises
    ``Diverged`` for logits that are not numbers.
    """
    if top_p_S is None:
        if kernels.ready(logits_SV, temperature_S):
            try:
                return kernels.sample(logits_SV, uniform_S, temperature_S)
            except kernels.BadValue:
                raise Diverged(BROKEN) from None
        return _sample(logits_SV, uniform_S, temperature_S, None)
    # the others as if nobody asked for a nucleus: an answer must not depend on its neighbours
    ids_S, logprobs_S = sample(logits_SV, uniform_S, temperature_S)
    cut_C = (top_p_S < 1).nonzero()[:, 0]
    ids_S[cut_C], logprobs_S[cut_C] = _sample(
        logits_SV[cut_C], uniform_S[cut_C], temperature_S[cut_C], top_p_S[cut_C]
    )
    return ids_S, logprobs_S


def _sample(
    logits_SV: Tensor, uniform_S: Tensor, temperature_S: Tensor, top_p_S: Tensor | None
) -> tuple[Tensor, Tensor]:
    greedy_S = temperature_S == 0
    scale_S = torch.where(greedy_S, 1.0, temperature_S)
    probs_SV = torch.softmax(logits_SV.float() / scale_S[:, None], dim=-1)
    chances_SV = probs_SV if top_p_S is None else nucleus(probs_SV, top_p_S)
    # float64: summing in float32 would blow rounding differences of 1e-7 between batch sizes up to
    # 1e-6, enough for an answer to depend on its batch now and then
    cdf_SV = chances_SV.cumsum(-1, dtype=torch.float64)
    # right=True: the first token whose cumulative mass exceeds the threshold, so a token of
    # probability 0 is never chosen; u·total must not round up to the total.
    total_S1 = cdf_SV[:, -1:]
    threshold_S1 = torch.minimum(uniform_S[:, None] * total_S1, total_S1 * (1 - 2**-52))
    ids_S = torch.searchsorted(cdf_SV, threshold_S1, right=True)[:, 0]
    if bool((ids_S == logits_SV.shape[1]).any()):  # NaN is below nothing
        raise Diverged(BROKEN)
    if bool(greedy_S.any()):
        ids_S = torch.where(greedy_S, logits_SV.argmax(-1), ids_S)
    return ids_S, probs_SV.gather(1, ids_S[:, None])[:, 0].log()


def nucleus(probs_SV: Tensor, top_p_S: Tensor) -> Tensor:
    """Zero all but the smallest set of tokens whose mass reaches top_p (Holtzman et al. 2020).
    With top_p 1 nothing is touched, to the last bit: neighbours in a batch do not matter."""
    sorted_SV, order_SV = probs_SV.sort(-1, descending=True)
    before_SV = sorted_SV.cumsum(-1) - sorted_SV
    outside_SV = (before_SV >= top_p_S[:, None]) & (top_p_S[:, None] < 1)
    sorted_SV = sorted_SV.masked_fill(outside_SV, 0.0)
    return torch.zeros_like(probs_SV).scatter_(1, order_SV, sorted_SV)

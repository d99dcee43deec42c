"""Log-probabilities of given tokens without the ``[tokens, vocabulary]`` wall.

The vocabulary projection is done in chunks of tokens, and done again in the backward pass, so
memory does not grow with batch × length × vocabulary (the classic out-of-memory of RL trainers).
Shapes: N tokens, D hidden, V vocabulary.
"""

# mypy: disable-error-code="override,no-untyped-call,no-any-return"
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from liubai.model.matmul import outer_product, product

#: At most this many logits exist at a time (16 Mi float32 = 64 MiB).
CHUNK_LOGITS = 1 << 24


class _TokenLogprobs(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(targets_N.shape[0], dtype=torch.float32, device=hidden_ND.device)
        entropy, normalizer = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for rows in _chunks(hidden_ND.shape[0], weight_VD.shape[0]):
            logits = _logits(hidden_ND[rows], weight_VD, temperature)
            lse = logits.logsumexp(-1)
            chosen = logits.gather(1, targets_N[rows, None])[:, 0]
            probs = logits.sub(lse[:, None]).exp_()
            # H = lse − Σ p·logit
            entropy[rows] = lse - torch.linalg.vecdot(probs, logits)
            logprobs[rows], normalizer[rows] = chosen - lse, lse
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, normalizer)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_ND, weight_VD, targets_N, normalizer = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD)
        for rows in _chunks(hidden_ND.shape[0], weight_VD.shape[0]):
            logits = _logits(hidden_ND[rows], weight_VD, ctx.temperature)
            # d logprob / d logits = onehot − p
            scale = grad_N[rows, None] / ctx.temperature
            grad = logits.sub_(normalizer[rows, None]).exp_().mul_(-scale)
            grad.scatter_add_(1, targets_N[rows, None], scale)
            grad = grad.to(hidden_ND.dtype)
            grad_hidden[rows] = product(grad, weight_VD.T)
            grad_weight += outer_product(grad, hidden_ND[rows])
        return grad_hidden, grad_weight, None, None


def _logits(hidden_ND: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    logits = product(hidden_ND, weight_VD).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    rows = max(1, CHUNK_LOGITS // vocabulary)
    return (slice(i, i + rows) for i in range(0, tokens, rows))


def token_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``log softmax(hidden @ weightᵀ / temperature)`` at ``targets_N``, and the entropy, both
    float32 ``[N]`` in nats. Gradients flow through the first only: entropy is an instrument."""
    return _TokenLogprobs.apply(hidden_ND, weight_VD, targets_N, temperature)

"""Elementwise pieces of the Transformer with hand-written backward passes.

A small model on a CPU spends a third of a training step walking over memory. These three do the
same arithmetic as the obvious expressions in fewer passes, and each is checked against its obvious
expression, values and gradients, in float64.
"""

# mypy: disable-error-code="override,no-untyped-call,no-any-return"
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None  # the inverse of a rotation is its transpose


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(x1, cos, out=out[..., :half]).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=out[..., half:]).addcmul_(x1, sin)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turn each pair (x_i, x_{i+E/2}) of ``[..., heads, E]``; cos and sin ``[..., 1, E/2]``."""
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _turn(x, cos, sin)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        sigmoid = torch.sigmoid(gate)
        ctx.save_for_backward(gate, up, sigmoid)
        return (gate * sigmoid).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up, sigmoid = ctx.saved_tensors
        silu = gate * sigmoid
        # silu' = s + silu·(1 − s)
        slope = torch.addcmul(sigmoid + silu, silu, sigmoid, value=-1)
        return slope.mul_(up).mul_(grad), silu.mul_(grad)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` (Shazeer 2020)."""
    if torch.is_grad_enabled():
        return _SwiGLU.apply(gate, up)
    return torch.nn.functional.silu(gate).mul_(up)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _normalize(x, eps)
        ctx.save_for_backward(normed, scale, weight)
        return (normed * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        product = grad * normed
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        inner = (product @ weight.to(product.dtype)).unsqueeze(-1) / normed.shape[-1]
        grad_x = (grad * weight).sub_(normed * inner).mul_(scale)
        return grad_x.to(grad.dtype), grad_weight, None


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    scale = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
    return wide * scale, scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` (Zhang & Sennrich 2019); the mean square is taken in float32 or wider."""
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return (_normalize(x, eps)[0] * weight).to(x.dtype)

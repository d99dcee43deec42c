"""Elementwise pieces of the Transformer with hand-written backward passes.

A small model on a CPU spends a third of a training step walking over memory. These three compute what
the obvious expressions do in fewer passes — one, where :mod:`liubai.model.kernels` can — and each way is
checked against its obvious expression, values and gradients.
"""

# mypy: disable-error-code="override,no-untyped-call,no-any-return"
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from liubai.model import kernels


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1), None, None  # the inverse of a rotation is its transpose


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    if kernels.can_rotate(x, cos, sin):
        return kernels.rotate(x, cos, sin, direction)
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin, value=direction)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turn each pair (x_i, x_{i+E/2}) of ``[..., heads, E]``. ``cos`` and ``sin`` are
    ``[..., 1, E]``: each angle stands twice, and the first half of the sines is negative."""
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _turn(x, cos, sin, 1)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if kernels.ready(grad, gate, up):
            return kernels.swiglu_backward(grad, gate, up)
        return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return kernels.swiglu(gate, up) if kernels.ready(gate, up) else silu(gate).mul_(up)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` (Shazeer 2020)."""
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else _gated(gate, up)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = _normalize(x, weight, eps)
        ctx.save_for_backward(x, scale, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, weight = ctx.saved_tensors
        if kernels.ready(grad, x, weight):
            return *kernels.rms_norm_backward(grad, x, scale, weight), None
        wide, size = scale.dtype, x.shape[-1]
        grad_wide, weight_wide = grad.to(wide), weight.to(wide)
        # With a mean of 0, LayerNorm's fused backward pass is this one's, but for a term too many:
        # it takes off the mean of grad·weight, which is put back here.
        of_x, of_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad_wide,
            x.to(wide),
            [size],
            torch.zeros_like(scale),
            scale,
            weight_wide,
            None,
            [True, True, False],
        )
        of_x.addcmul_(scale, (grad_wide @ weight_wide).unsqueeze(-1), value=1 / size)
        return of_x.to(grad.dtype), of_weight.to(weight.dtype), None


def _normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if kernels.ready(x, weight):
        return kernels.rms_norm(x, weight, eps)
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    scale = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
    return (wide * scale).mul_(weight).to(x.dtype), scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` (Zhang & Sennrich 2019); the mean square is taken in float32 or wider."""
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return _normalize(x, weight, eps)[0]

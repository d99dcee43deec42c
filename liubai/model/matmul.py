"""Matrix products in float32, by the library that uses the whole width of the processor.

PyTorch's CPU build holds two: MKL, which it asks for float32 products, and oneDNN. On a processor
with AVX-512 that is not Intel's, MKL stays with AVX2, at half the speed; oneDNN does not. So there,
and only there, :func:`linear` asks oneDNN. The choice depends on the processor alone, never on a timing, so
that a run repeats bit for bit.

Shapes: M and N rows, K the dimension summed over.
"""

# mypy: disable-error-code="override,no-untyped-call,no-any-return"
from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

CPUINFO = Path("/proc/cpuinfo")

# oneDNN and PyTorch's layer over it each keep what they compiled, 1024 products of nearly a megabyte, read
# from the environment when the first is computed. Shapes that come again soon are far fewer.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "128")


@cache
def prefers_onednn() -> bool:
    """Is this a processor on which MKL leaves half of the vector unit idle?"""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    if not CPUINFO.exists():
        return False
    return "GenuineIntel" not in CPUINFO.read_text(encoding="utf-8", errors="replace")


def onednn_takes(*tensors: Tensor) -> bool:
    """Will products of these go to oneDNN?"""
    return (
        not torch.compiler.is_compiling()
        and prefers_onednn()
        and all(t.device.type == "cpu" and t.dtype == torch.float32 and t.numel() > 0 for t in tensors)
    )


def _onednn(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_MK, weight_NK, bias_N, "none", [], "")


def product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """``a @ bᵀ``, ``[M, N]``, of two matrices in any layout; without gradients."""
    if onednn_takes(a_MK, b_NK):
        return _onednn(a_MK, b_NK, None)
    return a_MK @ b_NK.T


def outer_product(a_KM: Tensor, b_KN: Tensor) -> Tensor:
    """``aᵀ @ b``, ``[M, N]``, where the K rows are many: the gradient of a weight."""
    if a_KM.shape[1] > b_KN.shape[1]:  # oneDNN is faster with the smaller side as the rows
        return product(b_KN.T, a_KM.T).T
    return product(a_KM.T, b_KN.T)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_NK)
        return _forward(x, weight_NK, bias_N)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_NK = ctx.saved_tensors
        grad_MN = grad.flatten(0, -2)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = product(grad_MN, weight_NK.T).view(x.shape)
        if ctx.needs_input_grad[1]:
            of_weight = outer_product(grad_MN, x.flatten(0, -2))
        if ctx.needs_input_grad[2]:
            of_bias = grad_MN.sum(0)
        return of_x, of_weight, of_bias


def _forward(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    out_MN = _onednn(x.flatten(0, -2), weight_NK, bias_N)
    return out_MN.view(*x.shape[:-1], weight_NK.shape[0])


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """``x @ weightᵀ + bias`` for ``x [..., K]``: ``torch.nn.functional.linear``, faster where it can be."""
    if x.ndim < 2 or not onednn_takes(x, weight_NK):
        return F.linear(x, weight_NK, bias_N)
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight_NK, bias_N)
    return _forward(x, weight_NK, bias_N)


class Linear(nn.Linear):
    """``nn.Linear`` by way of :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)

"""Weights as whole numbers of 8 bits with a scale a row: what a page can carry.

A matrix of R rows and C columns becomes ``q [R, C]`` in −127 … 127 and ``s [R]``, and stands for s_r · q_rc:
each row's largest weight is met, every other one to half a scale (round to nearest, symmetric; Jacob et al.
2018, arXiv 1712.05877, without the zero point). Vectors (norms, biases) are few and stay as they are. Left
out on purpose: fewer bits, groups within a row, any calibration.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LARGEST = 127


def quantised(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    """``q [R, C]`` int8 and ``s [R]`` float32. A row of zeros has a scale of 0."""
    weight_RC = weight_RC.detach().float()
    scale_R = weight_RC.abs().amax(1) / LARGEST
    by_R1 = torch.where(scale_R > 0, scale_R, 1.0)[:, None]
    return (weight_RC / by_R1).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale_R


def dequantised(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is left of ``weights`` after 8 bits, to the last bit what a page computes with."""
    found = {}
    for name, weight in weights.items():
        if weight.ndim == 2:
            q_RC, scale_R = quantised(weight)
            found[name] = q_RC.float() * scale_R[:, None]
        else:
            found[name] = weight.detach().float()
    return found


def packed(weight: Tensor) -> dict[str, Any]:
    """One tensor as JSON values: base64 of its int8 and of its scales, or of its float32, little-endian."""
    shape = list(weight.shape)
    if weight.ndim == 2:
        q_RC, scale_R = quantised(weight)
        return {"shape": shape, "data": _base64(q_RC), "scale": _base64(scale_R)}
    return {"shape": shape, "data": _base64(weight.detach().float())}


def name_of(value: Mapping[str, Any]) -> str:
    """The name of a packed tensor by what it holds: the same weights have one name, whoever has them."""
    told = f"{value['shape']} {value['data']} {value.get('scale', '')}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _base64(tensor: Tensor) -> str:
    array = tensor.contiguous().cpu().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()).decode()

"""Optimizers: Muon for hidden matrices, AdamW for the rest, and the learning-rate schedule.

Both steps are written out (no ``torch.optim``) so that their state is a flat dictionary of tensors:
saved as safetensors, restored bit for bit, never pickled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

#: Quintic Newton–Schulz coefficients (Jordan et al. 2024, Muon).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values all near 1."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.square().sum().sqrt() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Muon is for the matrices between hidden states, not for embeddings, the head or vectors."""
    return parameter.ndim == 2 and not name.startswith(("embed_tokens", "lm_head"))


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019), with Muon on hidden matrices when ``muon_lr`` is given.

    The loop in which it belongs::

        loss.backward()
        norm = optimizer.step(scale=schedule(step))    # clips, updates, clears the gradients

    Muon's update is scaled by ``0.2·√max(rows, columns)`` so that its root mean square matches
    AdamW's (Moonlight, arXiv 2502.16982, eq. 4), and the two learning rates are comparable.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        muon_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        max_norm: float = 1.0,
        eps: float = 1e-8,
    ) -> None:
        self.lr, self.muon_lr, self.betas, self.momentum = lr, muon_lr, betas, momentum
        self.weight_decay, self.max_norm, self.eps = weight_decay, max_norm, eps
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.steps = 0
        self.state: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            self.state[f"{name}/first"] = torch.zeros_like(p)
            if not self._by_muon(name, p):
                self.state[f"{name}/second"] = torch.zeros_like(p)

    def _by_muon(self, name: str, p: Tensor) -> bool:
        return self.muon_lr is not None and is_hidden_matrix(name, p)

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> float:
        """Update with learning rates times ``scale``; returns the gradient norm before clipping.

        A non-finite gradient changes nothing (no parameter, no moment, no count): the norm comes
        back non-finite and the caller decides.
        """
        grads = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        norm = math.sqrt(sum(float(g.norm()) ** 2 for g in grads.values()))
        if grads and math.isfinite(norm):
            self.steps += 1
            clip = min(1.0, self.max_norm / (norm + 1e-6))
            for name, g in grads.items():
                self._update(name, self.parameters[name], g * clip, scale)
        self.zero_grad()
        return norm

    def _update(self, name: str, p: Tensor, g: Tensor, scale: float) -> None:
        first = self.state[f"{name}/first"]
        if self._by_muon(name, p):
            assert self.muon_lr is not None
            first.mul_(self.momentum).add_(g)
            nesterov = g + self.momentum * first
            lr = scale * self.muon_lr
            p.mul_(1 - lr * self.weight_decay)
            p.add_(orthogonalize(nesterov), alpha=-lr * 0.2 * max(p.shape) ** 0.5)
            return
        b1, b2 = self.betas
        second = self.state[f"{name}/second"]
        first.lerp_(g, 1 - b1)
        second.lerp_(g * g, 1 - b2)
        root = (second / (1 - b2**self.steps)).sqrt_().add_(self.eps)
        lr = scale * self.lr
        if p.ndim == 2:
            p.mul_(1 - lr * self.weight_decay)
        p.addcdiv_(first, root, value=-lr / (1 - b1**self.steps))

    def zero_grad(self) -> None:
        for p in self.parameters.values():
            p.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and the step count, as tensors only."""
        return {**self.state, "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state.keys() != self.state_dict().keys():
            raise ValueError("this optimizer state belongs to another model or optimizer")
        self.steps = int(state["steps"].item())
        for name, tensor in self.state.items():
            tensor.copy_(state[name])


def warmup_decay(step: int, total: int, warmup: float = 0.05, decay: float = 0.5) -> float:
    """Learning-rate factor: linear warm-up, flat, linear decay to 0 (shares of ``total``)."""
    position = (step + 1) / total
    return min(1.0, position / max(warmup, 1e-9), (1 - step / total) / max(decay, 1e-9))

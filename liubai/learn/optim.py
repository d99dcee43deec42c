"""Optimizers: Muon for hidden matrices, AdamW for the rest, and the learning-rate schedule.

Both steps are written out (no ``torch.optim``) so that their state is a flat dictionary of tensors:
saved as safetensors, restored bit for bit, never pickled. Large tensors are updated a block at a time:
what a step needs beside the state does not grow with the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from liubai import ranks

#: Quintic Newton–Schulz coefficients (Jordan et al. 2024, Muon).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
#: AdamW updates this many numbers at a time; on a GPU, where each operation has its price, more
BLOCK, GPU_BLOCK = 1 << 20, 1 << 26


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
    return parameter.ndim == 2 and not name.startswith(("embed_tokens", "lm_head", "score"))


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019), with Muon on hidden matrices when ``muon_lr`` is given.

    The loop in which it belongs::

        loss.backward()
        norm = optimizer.step(scale=schedule(step))    # clips, updates, clears the gradients

    Muon's update is scaled by ``0.2·√max(rows, columns)`` so that its root mean square matches
    AdamW's (Moonlight, arXiv 2502.16982, eq. 4), and the two learning rates are comparable.

    Parameters of 16 bits have a master copy in float32 here: a step of 1e-6 would be lost in their
    rounding. Their gradients come together in float32, too. ``moments`` may be kept in bfloat16, at half the
    memory: with these betas a moment moves by 5 % of the difference, which 8 bits of mantissa still see.

    A resume point holds :meth:`weights`, what is learned in float32, and :meth:`state_dict`, the rest: the
    same tensors whether parameters are of 16 bits with a master, or parts in float32 on several ranks.

    Of a model that is shared out over ranks (:mod:`liubai.learn.sharded`) each rank updates its rows, whose
    state alone it has; the norm is that of all rows, and Muon orthogonalises whole matrices.
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
        moments: torch.dtype = torch.float32,
    ) -> None:
        self.lr, self.muon_lr, self.betas, self.momentum = lr, muon_lr, betas, momentum
        self.weight_decay, self.max_norm, self.eps = weight_decay, max_norm, eps
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.steps = 0
        self.state: dict[str, Tensor] = {}
        self._wide: dict[str, Tensor] = {}  # gradients of 16-bit parameters
        for name, p in self.parameters.items():
            own = ranks.local(p.detach())
            self.state[f"{name}/first"] = torch.zeros_like(own, dtype=moments)
            if not self._by_muon(name, p):
                self.state[f"{name}/second"] = torch.zeros_like(own, dtype=moments)
            if p.dtype in (torch.bfloat16, torch.float16):
                self.state[f"{name}/master"] = p.detach().float()
                p.register_post_accumulate_grad_hook(self._widen(name))  # type: ignore[no-untyped-call]

    @property
    def rates(self) -> str:
        """The learning rates by name, for messages."""
        return "lr" if self.muon_lr is None else "lr or muon_lr"

    @property
    def _is_shared_out(self) -> bool:
        return any(hasattr(p, "to_local") for p in self.parameters.values())

    def _by_muon(self, name: str, p: Tensor) -> bool:
        return self.muon_lr is not None and is_hidden_matrix(name, p)

    def _widen(self, name: str) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            assert p.grad is not None
            if name in self._wide:
                self._wide[name].add_(p.grad)
            else:
                self._wide[name] = p.grad.float()
            p.grad = None

        return hook

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> float:
        """Update with learning rates times ``scale``; returns the gradient norm before clipping.

        A non-finite gradient changes nothing (no parameter, no moment, no count): the norm comes
        back non-finite and the caller decides.
        """
        own = {n: ranks.local(p.grad) for n, p in self.parameters.items() if p.grad is not None}
        grads = own | self._wide
        del own
        norms = torch.stack([g.norm() for g in grads.values()]).tolist() if grads else []
        squares = sum(n**2 for n in norms)
        norm = math.sqrt(ranks.total(squares) if self._is_shared_out else squares)
        if grads and math.isfinite(norm):
            self.steps += 1
            clip = min(1.0, self.max_norm / (norm + 1e-6))
            self._wide = {}
            for name in list(grads):
                p = self.parameters[name]
                p.grad = None  # given back as soon as it is used
                self._update(name, p, grads.pop(name), clip, scale)
        self.zero_grad()
        return norm

    def _update(self, name: str, p: Tensor, grad: Tensor, clip: float, scale: float) -> None:
        w = self.state.get(f"{name}/master", ranks.local(p))
        grad = grad.to(w.dtype)
        first = self.state[f"{name}/first"]
        if self._by_muon(name, p):
            assert self.muon_lr is not None
            grad = grad * clip
            moved = first.mul_(self.momentum).add_(grad)
            nesterov = grad + self.momentum * moved
            lr = scale * self.muon_lr
            w.mul_(1 - lr * self.weight_decay)
            found = orthogonalize(ranks.whole(ranks.shared_as(nesterov, p)))
            w.add_(ranks.rows_of(found, p), alpha=-lr * 0.2 * max(p.shape) ** 0.5)
        else:
            decay = 1 - scale * self.lr * self.weight_decay if p.ndim == 2 else 1.0
            whole = [t.reshape(-1) for t in (w, grad, first, self.state[f"{name}/second"])]
            block = BLOCK if w.device.type == "cpu" else GPU_BLOCK
            for i in range(0, whole[0].numel(), block):
                self._adamw([t[i : i + block] for t in whole], clip, scale * self.lr, decay)
        if f"{name}/master" in self.state:
            p.copy_(w)

    def _adamw(self, part: list[Tensor], clip: float, lr: float, decay: float) -> None:
        """``part``: weights, gradient, first and second moment of the same numbers."""
        w, grad, first, second = part
        b1, b2 = self.betas
        g = grad * clip
        m, v = (t if t.dtype == g.dtype else t.to(g.dtype) for t in (first, second))
        m.lerp_(g, 1 - b1)
        v.lerp_(g * g, 1 - b2)
        root = (v / (1 - b2**self.steps)).sqrt_().add_(self.eps)
        w.mul_(decay).addcdiv_(m, root, value=-lr / (1 - b1**self.steps))
        for kept, t in ((first, m), (second, v)):
            if kept is not t:
                kept.copy_(t)

    def widen_parameters(self) -> None:
        """Make parameters of 16 bits their float32 masters. For the end of training: a checkpoint of float32
        holds what was learned, not its rounding."""
        for name, p in self.parameters.items():
            if (master := self.state.get(f"{name}/master")) is not None:
                p.data = master

    def zero_grad(self) -> None:
        self._wide = {}
        for p in self.parameters.values():
            p.grad = None

    def weights(self) -> dict[str, Tensor]:
        """What is learned: the masters of parameters of 16 bits, and all others themselves."""
        return {n: self.state.get(f"{n}/master", p.detach()) for n, p in self.parameters.items()}

    @torch.no_grad()
    def load_weights(self, saved: Mapping[str, Tensor]) -> None:
        """The inverse; parameters of 16 bits become their masters' rounding."""
        for name, own in self.weights().items():
            ranks.local(own).copy_(ranks.local(saved[name]))
            if f"{name}/master" in self.state:
                self.parameters[name].copy_(own)

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and the step count, as tensors only; shared out as their parameters are."""
        state = {n: ranks.shared_as(t, self.parameters[n.rpartition("/")[0]]) for n, t in self._moments()}
        return {**state, "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state.keys() != self.state_dict().keys():
            raise ValueError("this optimizer state belongs to another model or optimizer")
        self.steps = int(state["steps"].item())
        for name, tensor in self._moments():
            tensor.copy_(ranks.local(state[name]))

    def _moments(self) -> list[tuple[str, Tensor]]:
        return [(name, tensor) for name, tensor in self.state.items() if not name.endswith("/master")]


def warmup_decay(step: int, total: int, warmup: float = 0.05, decay: float = 0.5) -> float:
    """Learning-rate factor: linear warm-up, flat, linear decay to 0 (shares of ``total``)."""
    position = (step + 1) / total
    return min(1.0, position / max(warmup, 1e-9), (1 - step / total) / max(decay, 1e-9))


def cosine(step: int, total: int, warmup: float, floor: float) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine from 1 to ``floor``."""
    position = (step + 1) / total
    if warmup and position < warmup:
        return position / warmup
    done = (step / total - warmup) / max(1e-9, 1 - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, max(0.0, done)))) / 2

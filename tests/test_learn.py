"""Log-probabilities and optimizers against plain loops and torch's own."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import liubai.learn.logprobs
from liubai.learn.logprobs import token_logprobs
from liubai.learn.optim import Optimizer, is_hidden_matrix, orthogonalize, warmup_decay

# ---- log-probabilities in chunks ----


def projection(n: int, vocab: int = 30, hidden: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return (
        torch.randn(n, hidden, generator=generator).requires_grad_(),
        torch.randn(vocab, hidden, generator=generator).requires_grad_(),
        torch.randint(0, vocab, (n,), generator=generator),
    )


@pytest.mark.parametrize("chunk", [1 << 24, 100, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
def test_token_logprobs_equal_log_softmax(
    chunk: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liubai.learn.logprobs, "CHUNK_LOGITS", chunk)
    for n in (1, 3, 7, 20):
        hidden, weight, targets = projection(n)
        got, entropy = token_logprobs(hidden, weight, targets, temperature)
        wide_hidden, wide_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
        full = torch.log_softmax(wide_hidden @ wide_weight.T / temperature, dim=-1)
        wanted = full.gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy.double(), -(full.exp() * full).sum(-1), rtol=1e-5, atol=1e-5)
        assert not entropy.requires_grad
        cotangent = torch.linspace(-1, 2, n)
        got_grads = torch.autograd.grad(got, (hidden, weight), cotangent)
        wanted_grads = torch.autograd.grad(wanted, (wide_hidden, wide_weight), cotangent.double())
        for a, b in zip(got_grads, wanted_grads, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_token_logprobs_of_nothing() -> None:
    hidden, weight, targets = projection(0)
    logprobs, entropy = token_logprobs(hidden, weight, targets)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() == 0


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_logprob_memory_is_flat_in_vocab(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = 1 << 14
    monkeypatch.setattr(liubai.learn.logprobs, "CHUNK_LOGITS", chunk)
    for vocab in (500, 2000, 8000):
        hidden, weight, targets = projection(400, vocab=vocab, hidden=4)
        with Largest() as largest:
            logprobs, _ = token_logprobs(hidden, weight, targets, 0.9)
            logprobs.sum().backward()
        assert hidden.grad is not None
        # the weights and their gradient are there anyway; N × V would be 200,000 to 3,200,000
        assert largest.numel <= max(chunk, weight.numel())
        assert largest.numel >= min(chunk, weight.numel())  # the instrument did see something


# ---- optimizers ----


def with_gradients(model: torch.nn.Module, step: int, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) * scale


@pytest.mark.parametrize("max_norm", [1.0, 1e6])
def test_adamw_equals_torch(max_norm: float) -> None:
    model = tiny_model(0)
    theirs = copy.deepcopy(model)
    ours = Optimizer(model, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, max_norm=max_norm)
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    vectors = [p for p in theirs.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    for step in range(5):
        factor = 1.0 if step < 3 else 0.5
        with_gradients(model, step)
        with_gradients(theirs, step)
        for group in adamw.param_groups:
            group["lr"] = 3e-3 * factor
        wanted = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        assert ours.step(factor) == pytest.approx(float(wanted), rel=1e-5)
        adamw.step()
        assert all(p.grad is None for p in model.parameters())
    for a, b in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 32), (64, 16), (16, 64), (48, 31)])
def test_muon_orthogonalizes(shape: tuple[int, int]) -> None:
    for seed in range(5):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 2)
        result = orthogonalize(matrix)
        assert result.shape == shape
        values = torch.linalg.svdvals(result)
        assert 0.65 < values.min() <= values.max() < 1.25
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        alike = torch.nn.functional.cosine_similarity(result.flatten(), (u @ vh).flatten(), dim=0)
        assert alike > 0.98  # the nearest one, not just any


def test_muon_step_is_its_formula() -> None:
    """Two steps, so that the momentum counts; embeddings, head and vectors go by AdamW."""
    model = tiny_model(0)
    plain, muon = copy.deepcopy(model), copy.deepcopy(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    by_adam = Optimizer(plain, lr=1e-3, max_norm=1e6)
    by_muon = Optimizer(muon, lr=1e-3, muon_lr=1e-2, momentum=0.9, weight_decay=0.5, max_norm=1e6)
    hidden = {n for n, p in muon.named_parameters() if is_hidden_matrix(n, p)}
    assert len(hidden) == 2 * 7
    first = {n: torch.zeros_like(before[n]) for n in hidden}
    for step in range(2):
        with_gradients(muon, step)
        with_gradients(plain, step)
        for n, p in muon.named_parameters():
            if n in hidden:
                assert p.grad is not None
                first[n] = 0.9 * first[n] + p.grad
                update = orthogonalize(p.grad + 0.9 * first[n]) * 0.2 * math.sqrt(max(p.shape))
                before[n] = before[n] * (1 - 1e-2 * 0.5) - 1e-2 * update
        by_muon.step()
        by_adam.step()
    after, adam = dict(muon.named_parameters()), dict(plain.named_parameters())
    for n in hidden:
        torch.testing.assert_close(after[n].detach(), before[n], rtol=1e-5, atol=1e-6)
    for n in after.keys() - hidden:
        if after[n].ndim == 1:  # no weight decay on vectors
            assert torch.equal(after[n], adam[n])


def test_a_nonfinite_gradient_changes_nothing() -> None:
    model = tiny_model(0)
    optimizer = Optimizer(model, lr=1e-2, muon_lr=1e-2)
    with_gradients(model, 0)
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for bad in (math.nan, math.inf):
        with_gradients(model, 1)
        assert model.norm.weight.grad is not None
        model.norm.weight.grad[3] = bad
        assert not math.isfinite(optimizer.step())
        assert all(p.grad is None for p in model.parameters())
    for then, now in zip(before, (model.state_dict(), optimizer.state_dict()), strict=True):
        assert all(torch.equal(then[n], now[n]) for n in then)


@pytest.mark.parametrize("muon_lr", [None, 1e-2])
def test_optimizer_state_goes_on_bit_for_bit(muon_lr: float | None, tmp_path: Path) -> None:
    model = tiny_model(0)
    here = Optimizer(model, lr=1e-2, muon_lr=muon_lr)
    for step in range(3):
        with_gradients(model, step)
        here.step()
    save_file({n: t.clone() for n, t in here.state_dict().items()}, tmp_path / "state")
    other = copy.deepcopy(model)
    there = Optimizer(other, lr=1e-2, muon_lr=muon_lr)
    there.load_state_dict(load_file(tmp_path / "state"))
    for step in range(3, 6):
        for m, o in ((model, here), (other, there)):
            with_gradients(m, step)
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(t, there.state_dict()[n]) for n, t in here.state_dict().items())
    with pytest.raises(ValueError, match="another model or optimizer"):
        Optimizer(other, lr=1e-2, muon_lr=None if muon_lr else 1e-2).load_state_dict(here.state_dict())


def schedule(total: int, **shares: float) -> Sequence[float]:
    return [warmup_decay(step, total, **shares) for step in range(total)]


def test_warmup_and_decay() -> None:
    ten = schedule(10, warmup=0.4, decay=0.5)
    assert ten == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert schedule(4, warmup=0.0, decay=0.0) == [1.0] * 4
    assert schedule(4, warmup=0.0, decay=1.0) == [1.0, 0.75, 0.5, 0.25]
    assert schedule(100)[0] == pytest.approx(0.2)  # the defaults: 5 % up, 50 % down
    assert schedule(100)[4:51] == [1.0] * 47
    assert schedule(100)[99] == pytest.approx(0.02)

"""Advantages, losses, log-probabilities and optimizers against plain loops and torch's own."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import liubai.learn.logprobs
from liubai.learn.advantages import group_advantages, has_variance
from liubai.learn.logprobs import token_logprobs
from liubai.learn.losses import LossConfig, LossInputs, grpo_loss, k3, token_weights
from liubai.learn.optim import Optimizer, is_hidden_matrix, orthogonalize, warmup_decay

AGGREGATIONS = ("token-mean", "sequence-mean", "dr-grpo")


# ---- advantages ----


def test_advantages_of_the_worked_example() -> None:
    rewards = torch.tensor([[90.0, 80.0, 70.0, 60.0]], dtype=torch.float64)
    assert group_advantages(rewards, normalize_std=False).tolist() == [[15.0, 5.0, -5.0, -15.0]]
    got = group_advantages(rewards)[0].tolist()
    assert got == pytest.approx([1.162, 0.387, -0.387, -1.162], abs=5e-4)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(2, 6).flatmap(
        lambda g: st.lists(st.lists(st.floats(-10, 10), min_size=g, max_size=g), min_size=1, max_size=4)
    )
)
def test_advantages_equal_a_plain_loop(rewards: list[list[float]]) -> None:
    got = group_advantages(torch.tensor(rewards, dtype=torch.float64)).tolist()
    for row, advantages in zip(rewards, got, strict=True):
        mean = sum(row) / len(row)
        std = math.sqrt(sum((r - mean) ** 2 for r in row) / (len(row) - 1))
        wanted = [(r - mean) / (std + 1e-6) for r in row]
        assert advantages == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("shape", [(3, 1), (3, 0), (4,)])
def test_a_group_of_one_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="samples ≥ 2"):
        group_advantages(torch.zeros(shape))


def test_float_noise_is_no_variance() -> None:
    noise = sum([0.1] * 10)  # 0.9999999999999999
    rows = [[1.0, noise, 1.0], [1.0, 1.0, 1.0], [1.0, 0.99, 1.0], [0.0, 0.0, 1.0]]
    rewards = torch.tensor(rows, dtype=torch.float64)
    assert rewards[0].std() > 0
    assert has_variance(rewards).tolist() == [False, False, True, True]


# ---- the loss ----

LENGTHS = (5, 2, 7, 1)


def loss_inputs(seed: int, aggregation: Any, *, spread: float = 0.5) -> dict[str, Tensor]:
    """Four sequences of unequal length in rows of seven, some off-policy by far, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return torch.randn(4, 7, generator=generator, dtype=torch.float64) * scale

    logprobs = -2 + normal(0.5)
    old = logprobs + normal(spread)
    weights = torch.tensor(token_weights(LENGTHS, aggregation, 9), dtype=torch.float64)
    return {
        "logprobs_BT": logprobs.requires_grad_(),
        "old_logprobs_BT": old,
        "sampler_logprobs_BT": old + normal(spread),
        "advantages_BT": normal(1.0),
        "weights_BT": weights[:, None].expand(4, 7).clone(),
        "mask_BT": torch.arange(7)[None] < torch.tensor(LENGTHS)[:, None],
        "reference_logprobs_BT": logprobs.detach() + normal(spread),
    }


def plain_loss(x: dict[str, Tensor], config: LossConfig) -> tuple[float, list[list[float]], dict[str, float]]:
    """DeepSeekMath eq. 3 token by token, with its derivative by hand."""
    total, gradient = 0.0, [[0.0] * 7 for _ in range(4)]
    sums = dict.fromkeys(("low", "high", "cap", "kl"), 0.0)
    n, tokens = len(LENGTHS), sum(LENGTHS)
    for b, length in enumerate(LENGTHS):
        weight = {"token-mean": 1 / tokens, "sequence-mean": 1 / (n * length), "dr-grpo": 1 / (n * 9)}
        w = weight[config.aggregation]
        for t in range(length):
            lp, old, sampler, a, ref = (
                float(x[name][b, t].detach())
                for name in ("logprobs_BT", "old_logprobs_BT", "sampler_logprobs_BT", "advantages_BT",
                             "reference_logprobs_BT")
            )  # fmt: skip
            ratio = math.exp(lp - old)
            low, high = 1 - config.clip_low, 1 + config.clip_high
            clipped = min(max(ratio, low), high)
            importance = 1.0
            if config.importance_cap:
                importance = min(math.exp(old - sampler), config.importance_cap)
                sums["cap"] += importance == config.importance_cap
            acts = clipped * a < ratio * a
            sums["low"] += acts and ratio < low
            sums["high"] += acts and ratio > high
            k = math.exp(ref - lp) - (ref - lp) - 1
            sums["kl"] += k
            total += w * (-min(ratio * a, clipped * a) * importance + config.kl * k)
            slope = 0.0 if acts else -a * ratio * importance
            gradient[b][t] = w * (slope + config.kl * (1 - math.exp(ref - lp)))
    return total, gradient, sums


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_low": 0.1, "clip_high": 0.4},
        {"importance_cap": 1.2},
        {"kl": 0.3},
        {"kl": 0.1, "importance_cap": 2.0},
    ],
)
def test_loss_equals_a_plain_loop(aggregation: Any, options: dict[str, float]) -> None:
    config = LossConfig(aggregation=aggregation, **options)  # type: ignore[arg-type]
    acted = dict.fromkeys(("low", "high", "cap"), 0.0)
    for seed in range(4):
        x = loss_inputs(seed, aggregation)
        loss, sums = grpo_loss(LossInputs(**x), config)
        wanted, gradient, counts = plain_loss(x, config)
        assert loss.item() == pytest.approx(wanted, rel=1e-12)
        (got,) = torch.autograd.grad(loss, x["logprobs_BT"])
        torch.testing.assert_close(got, torch.tensor(gradient, dtype=torch.float64), rtol=1e-10, atol=1e-14)
        acted = {name: acted[name] + counts[name] for name in acted}
        assert (float(sums["clip/low"]), float(sums["clip/high"])) == (counts["low"], counts["high"])
        assert float(sums["tokens"]) == sum(LENGTHS)
        if "kl" in options:
            assert float(sums["kl"]) == pytest.approx(counts["kl"], rel=1e-6)
    # both sides of the clip, and the cap, were at work
    assert min(acted["low"], acted["high"]) >= 2
    assert acted["cap"] >= 2 * ("importance_cap" in options)


def test_what_stands_off_the_mask_is_ignored() -> None:
    config = LossConfig(aggregation="token-mean", kl=0.1, importance_cap=2.0)
    x = loss_inputs(0, "token-mean")
    clean, sums = grpo_loss(LossInputs(**x), config)
    (wanted,) = torch.autograd.grad(clean, x["logprobs_BT"])
    for poison in (math.nan, math.inf, -math.inf):
        y = {n: t if t.dtype is torch.bool else t.detach().where(x["mask_BT"], poison) for n, t in x.items()}
        y["logprobs_BT"].requires_grad_()
        loss, poisoned = grpo_loss(LossInputs(**y), config)
        (got,) = torch.autograd.grad(loss, y["logprobs_BT"])
        assert loss.item() == clean.item()
        assert torch.equal(got, wanted)
        assert {n: float(v) for n, v in poisoned.items()} == {n: float(v) for n, v in sums.items()}


def test_a_runaway_token_stays_finite() -> None:
    x = loss_inputs(0, "token-mean", spread=300.0)
    loss, _ = grpo_loss(LossInputs(**x), LossConfig(aggregation="token-mean", kl=0.1, importance_cap=2.0))
    assert loss.isfinite()
    assert torch.autograd.grad(loss, x["logprobs_BT"])[0].isfinite().all()


def test_default_loss_has_no_entropy_term() -> None:
    """No advantage, no gradient: neither a bonus nor a penalty is hidden in the default."""
    assert not [name for name in LossConfig.model_fields if "entropy" in name]
    x = loss_inputs(0, "token-mean")
    x["advantages_BT"] = torch.zeros(4, 7, dtype=torch.float64)
    loss, _ = grpo_loss(LossInputs(**x), LossConfig(aggregation="token-mean"))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, x["logprobs_BT"])[0].abs().max() == 0


def test_the_aggregation_has_to_be_named() -> None:
    with pytest.raises(ValidationError, match="aggregation"):
        LossConfig()  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="aggregation"):
        LossConfig(aggregation="bnpo")  # type: ignore[arg-type]


def test_token_weights_of_worked_examples() -> None:
    assert token_weights([3, 1], "token-mean", 10) == [1 / 4, 1 / 4]
    assert token_weights([3, 1], "sequence-mean", 10) == [1 / 6, 1 / 2]
    assert token_weights([3, 1], "dr-grpo", 10) == [1 / 20, 1 / 20]
    # an empty sequence does not count among the sequences
    assert token_weights([3, 0], "sequence-mean", 10) == [1 / 3, 0.0]
    assert token_weights([3, 0], "dr-grpo", 10)[0] == 1 / 10


@given(st.integers(1, 8), st.integers(1, 50), st.integers(50, 99))
def test_dr_grpo_of_equal_lengths_is_the_sequence_mean(count: int, length: int, longest: int) -> None:
    dr = token_weights([length] * count, "dr-grpo", longest)
    mean = token_weights([length] * count, "sequence-mean", longest)
    assert dr == pytest.approx([w * length / longest for w in mean])
    assert mean == pytest.approx(token_weights([length] * count, "token-mean", longest))


def test_k3_is_never_negative_and_zero_where_both_agree() -> None:
    difference = torch.linspace(-5, 5, 101, dtype=torch.float64)
    values = k3(torch.zeros(101, dtype=torch.float64), difference)
    assert (values >= 0).all()
    assert values[50] == 0
    assert values[60].item() == pytest.approx(math.e - 2)  # reference likelier by e


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

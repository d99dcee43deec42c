"""The critic: advantages by the definition's double sum, the value loss by a float64 loop, worked numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from liubai.learn.advantages import whiten
from liubai.learn.critic import explained_variance, gae, value_loss, whiten_tokens
from liubai.learn.losses import token_weights

f64 = torch.float64

#: Where the answers stand in their rows of nine: after prompts of unequal length; one row has none.
SPANS = ((2, 7), (0, 9), (4, 5), (3, 3), (1, 6))


def the_mask() -> Tensor:
    at = torch.arange(9)
    return torch.stack([(at >= first) & (at < end) for first, end in SPANS])


def normal(seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(5, 9, generator=torch.Generator().manual_seed(seed), dtype=f64) * scale


def poisoned(values: Tensor, poison: float) -> Tensor:
    return values.detach().where(the_mask(), poison)


POISONS = (math.nan, math.inf, -math.inf)


# ---- advantages ----


def plain_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Eq. 16 as printed: a sum of all later residuals for every token of one answer."""
    n = len(rewards)
    values = [*values, 0.0]
    delta = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_a_plain_loop(seed: int, gamma: float, lam: float) -> None:
    rewards, values, mask = normal(seed), normal(seed + 1000), the_mask()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for b, (first, end) in enumerate(SPANS):
        span = slice(first, end)
        wanted = plain_gae(rewards[b, span].tolist(), values[b, span].tolist(), gamma, lam)
        assert advantages[b, span].tolist() == pytest.approx(wanted, abs=1e-12)
        plus = [a + v for a, v in zip(wanted, values[b, span].tolist(), strict=True)]
        assert returns[b, span].tolist() == pytest.approx(plus, abs=1e-12)
    assert not bool(advantages[~mask].any())
    assert not bool(returns[~mask].any())


def test_gae_of_a_worked_example() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.8]])
    every = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = gae(rewards, values, every, gamma=1.0, lam=0.5)
    assert advantages[0].tolist() == pytest.approx([0.25, 0.3, 0.2])  # δ = 0.1, 0.2, 0.2
    assert returns[0].tolist() == pytest.approx([0.75, 0.9, 1.0])
    one_step, _ = gae(rewards, values, every, gamma=0.5, lam=0.0)
    assert one_step[0].tolist() == pytest.approx([-0.2, -0.2, 0.2])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999))
def test_without_discount_returns_are_the_rewards_to_come(seed: int) -> None:
    rewards, mask = normal(seed), the_mask()
    for critic in (normal(seed + 1), normal(seed + 2, scale=50.0)):  # whatever the critic says
        advantages, returns = gae(rewards, critic, mask)
        for b, (first, end) in enumerate(SPANS):
            for t in range(first, end):
                to_come = sum(rewards[b, t:end].tolist())
                assert returns[b, t].item() == pytest.approx(to_come, abs=1e-11)
                assert advantages[b, t].item() == pytest.approx(to_come - critic[b, t].item(), abs=1e-11)


@pytest.mark.parametrize("poison", POISONS)
def test_gae_ignores_what_stands_off_the_mask(poison: float) -> None:
    rewards, values, mask = normal(1), normal(2), the_mask()
    clean = gae(rewards, values, mask, 0.9, 0.8)
    for got, wanted in zip(
        gae(poisoned(rewards, poison), poisoned(values, poison), mask, 0.9, 0.8), clean, strict=True
    ):
        assert torch.equal(got, wanted)


def test_gae_of_wider_rows_and_of_answers_that_share_one() -> None:
    rewards, values, mask = normal(3), normal(4), the_mask()
    clean = gae(rewards, values, mask, 0.9, 0.8)
    wide = torch.nn.functional.pad
    padded = gae(wide(rewards, (0, 4)), wide(values, (0, 4), value=7.0), wide(mask, (0, 4)), 0.9, 0.8)
    apart = wide(mask, (0, 1))  # the last token of a document predicts nothing
    row = [wide(rewards, (0, 1)).view(1, -1), wide(values, (0, 1)).view(1, -1), apart.view(1, -1)]
    for one, more, shared in zip(clean, padded, gae(*row, 0.9, 0.8), strict=True):
        assert torch.equal(more[:, :9], one)
        assert not bool(more[:, 9:].any())
        assert torch.equal(shared.view(5, 10)[:, :9], one)


def test_advantages_are_no_way_to_the_critic() -> None:
    values = normal(5).requires_grad_()
    assert not any(t.requires_grad for t in gae(normal(6), values, the_mask()))


# ---- the value loss ----


def value_inputs(seed: int) -> dict[str, Tensor]:
    values = normal(seed)
    lengths = [end - first for first, end in SPANS]
    weights = torch.tensor(token_weights(lengths, "sequence-mean", 9), dtype=f64)
    return {
        "values_BT": values.requires_grad_(),
        "old_values_BT": values.detach() + normal(seed + 100),
        "returns_BT": normal(seed + 200),
        "weights_BT": weights[:, None].expand(5, 9).clone(),
        "mask_BT": the_mask(),
    }


@pytest.mark.parametrize("clip", [0.0, 0.2, 1.0])
def test_value_loss_equals_a_plain_loop(clip: float) -> None:
    clips = 0
    for seed in range(5):
        x = value_inputs(seed)
        loss, sums = value_loss(**x, clip=clip)
        (gradient,) = torch.autograd.grad(loss, x["values_BT"])
        wanted_gradient = torch.zeros(5, 9, dtype=f64)
        total, clipped, error = 0.0, 0, 0.0
        for b, (first, end) in enumerate(SPANS):
            for t in range(first, end):
                v, old, r = (x[n][b, t].item() for n in ("values_BT", "old_values_BT", "returns_BT"))
                weight = 1 / (4 * (end - first))
                near = min(max(v, old - clip), old + clip) if clip else v
                if (near - r) ** 2 > (v - r) ** 2:
                    clipped += 1
                    total += weight * (near - r) ** 2 / 2
                else:
                    total += weight * (v - r) ** 2 / 2
                    wanted_gradient[b, t] = weight * (v - r)
                error += (v - r) ** 2
        assert loss.item() == pytest.approx(total, rel=1e-12)
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-12, atol=1e-15)
        assert {n: float(s) for n, s in sums.items()} == pytest.approx(
            {"value_clipped": clipped, "value_error": error, "tokens": 20}
        )
        assert not any(s.requires_grad for s in sums.values())
        clips += clipped
    assert clips >= 5 if clip else clips == 0


@pytest.mark.parametrize(
    ("returns", "loss", "slope", "clipped"),
    [
        (0.0, 0.5, 1.0, 0),  # the value has moved away from the return: it is pulled back, clip or no clip
        (2.0, 1.62, 0.0, 1),  # … towards it, and far enough for one update
    ],
)
def test_value_loss_of_worked_numbers(returns: float, loss: float, slope: float, clipped: int) -> None:
    value = torch.tensor([[1.0]], dtype=f64, requires_grad=True)
    zero, one = torch.zeros(1, 1, dtype=f64), torch.ones(1, 1, dtype=f64)
    got, sums = value_loss(value, zero, zero + returns, one, one.bool(), clip=0.2)
    assert got.item() == pytest.approx(loss)
    assert torch.autograd.grad(got, value)[0].item() == slope
    assert int(sums["value_clipped"]) == clipped


@pytest.mark.parametrize("clip", [0.0, 0.2])
@pytest.mark.parametrize("poison", POISONS)
def test_value_loss_ignores_what_stands_off_the_mask(clip: float, poison: float) -> None:
    x = value_inputs(0)
    clean, sums = value_loss(**x, clip=clip)
    (wanted,) = torch.autograd.grad(clean, x["values_BT"])
    y: dict[str, Any] = {n: t if t.dtype is torch.bool else poisoned(t, poison) for n, t in x.items()}
    y["values_BT"].requires_grad_()
    loss, other = value_loss(**y, clip=clip)
    assert loss.item() == clean.item()
    assert torch.equal(torch.autograd.grad(loss, y["values_BT"])[0], wanted)
    assert {n: float(s) for n, s in other.items()} == {n: float(s) for n, s in sums.items()}


def test_value_loss_of_micro_batches_adds_up() -> None:
    x = value_inputs(1)
    whole, sums = value_loss(**x, clip=0.2)
    parts = [value_loss(**{n: t[rows] for n, t in x.items()}, clip=0.2) for rows in ([0, 3], [1, 2, 4])]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), rel=1e-12)
    for name, value in sums.items():
        assert sum(float(s[name]) for _, s in parts) == pytest.approx(float(value))


# ---- instruments ----


def test_explained_variance_of_worked_numbers() -> None:
    returns = torch.tensor([0.0, 1.0, 2.0, 3.0])  # variance 1.25
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(returns + 7, returns) == 1.0  # a constant error is no variance
    assert explained_variance(torch.full((4,), 9.0), returns) == 0.0
    assert explained_variance(returns / 2, returns) == pytest.approx(0.75)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    noisy = returns + torch.tensor([1.0, -1.0, -1.0, 1.0])  # an error of variance 1
    assert explained_variance(noisy, returns) == pytest.approx(1 - 1 / 1.25)


def test_explained_variance_where_there_is_none() -> None:
    values = torch.tensor([0.1, 0.5, 0.9])
    assert explained_variance(values, torch.full((3,), 0.1)) == 0.0
    noise = torch.tensor([1.0, 1.0 + 1e-7, 1.0 - 1e-7])  # float noise is no variance
    assert explained_variance(values, noise) == 0.0
    assert explained_variance(values[:1], values[:1]) == 0.0
    assert explained_variance(values[:0], values[:0]) == 0.0
    with_gradient = explained_variance(values.clone().requires_grad_(), torch.arange(3.0))
    assert isinstance(with_gradient, float)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.floats(-100, 100), st.floats(0.1, 100))
def test_whitened_tokens_have_mean_0_and_deviation_1(seed: int, mean: float, scale: float) -> None:
    mask = the_mask()
    got = whiten_tokens(normal(seed, scale) + mean, mask)
    assert not bool(got[~mask].any())
    tokens = got[mask].tolist()
    assert sum(tokens) == pytest.approx(0, abs=1e-9)
    assert sum(t * t for t in tokens) / (len(tokens) - 1) == pytest.approx(1, rel=1e-4)


def test_whitened_tokens_are_those_of_the_whole_batch() -> None:
    values, mask = normal(8), the_mask()
    got = whiten_tokens(values, mask)
    flat = values[mask][None]
    torch.testing.assert_close(got[mask], whiten(flat, torch.ones_like(flat))[0], rtol=1e-12, atol=1e-12)
    for poison in POISONS:
        assert torch.equal(whiten_tokens(poisoned(values, poison), mask), got)
    assert not bool(whiten_tokens(values, torch.zeros_like(mask)).any())
    one = torch.zeros_like(mask)
    one[1, 3] = True
    assert not bool(whiten_tokens(values, one).any())  # of one token there is nothing to compare

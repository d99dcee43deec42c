"""The loss of a process reward model and the score of an answer: float64 loops and worked numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from liubai.learn.process import aggregate, step_loss

f64 = torch.float64

#: The last tokens of the steps: three in the first row, none in the second, one in the third.
ENDS = torch.tensor([[0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]], dtype=torch.bool)
RIGHT = torch.tensor([[0, 1, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]])


def logits(seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(3, 6, generator=torch.Generator().manual_seed(seed), dtype=f64)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, f64])
def test_step_loss_equals_a_plain_loop(dtype: torch.dtype) -> None:
    z = logits().requires_grad_()
    losses = step_loss(z, RIGHT.to(dtype), ENDS)
    assert losses.dtype == f64
    cotangent = torch.linspace(-1, 2, 18, dtype=f64).view(3, 6)
    (gradient,) = torch.autograd.grad((losses * cotangent).sum(), z)
    for b in range(3):
        for t in range(6):
            wanted = slope = 0.0
            if ENDS[b, t]:
                p = 1 / (1 + math.exp(-z[b, t].item()))
                wanted = -math.log(p if RIGHT[b, t] else 1 - p)
                slope = (p - float(RIGHT[b, t])) * float(cotangent[b, t])
            assert losses[b, t].item() == pytest.approx(wanted, rel=1e-12)
            assert gradient[b, t].item() == pytest.approx(slope, rel=1e-12)


def test_step_loss_of_worked_numbers() -> None:
    z = torch.tensor([[0.0, math.log(3), math.log(3), 1000.0, -1000.0]], requires_grad=True)
    labels, every = torch.tensor([[1, 1, 0, 0, 1]]), torch.ones(1, 5, dtype=torch.bool)
    losses = step_loss(z, labels, every)
    wanted = [math.log(2), -math.log(3 / 4), math.log(4), 1000, 1000]
    assert losses[0].tolist() == pytest.approx(wanted)
    assert torch.autograd.grad(losses.sum(), z)[0][0].tolist() == pytest.approx([-0.5, -0.25, 0.75, 1, -1])


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_step_loss_ignores_what_stands_off_the_mask(poison: float) -> None:
    z = logits(1).requires_grad_()
    clean = step_loss(z, RIGHT, ENDS)
    (wanted,) = torch.autograd.grad(clean.sum(), z)
    bad = z.detach().where(ENDS, poison).requires_grad_()
    for labels in (RIGHT.double().where(ENDS, poison), RIGHT.where(ENDS, -100)):
        losses = step_loss(bad, labels, ENDS)
        assert torch.equal(losses, clean)
        assert torch.equal(torch.autograd.grad(losses.sum(), bad)[0], wanted)


def test_scores_of_worked_steps() -> None:
    steps = [0.9, 0.5, 0.8]
    assert aggregate(steps, "min") == 0.5
    assert aggregate(steps, "product") == pytest.approx(0.36)
    assert aggregate(steps, "mean") == pytest.approx(2.2 / 3)
    assert aggregate(steps, "last") == 0.8


@pytest.mark.parametrize("how", ["min", "product", "mean", "last"])
def test_an_answer_without_steps_earns_nothing(how: str) -> None:
    assert aggregate([], how) == 0.0  # type: ignore[arg-type]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_scores_lie_between_the_weakest_step_and_the_strongest(steps: list[float]) -> None:
    least, product, mean, last = (aggregate(steps, how) for how in ("min", "product", "mean", "last"))  # type: ignore[arg-type]
    assert 0 <= product <= least <= last <= max(steps)
    assert least - 1e-12 <= mean <= max(steps) + 1e-12
    if len(steps) == 1:
        assert least == product == mean == last == steps[0]
    # a step that is surely right changes neither the weakest nor the product, one surely wrong ends both
    assert (aggregate([*steps, 1.0], "min"), aggregate([*steps, 1.0], "product")) == (least, product)
    assert (aggregate([*steps, 0.0], "min"), aggregate([*steps, 0.0], "product")) == (0.0, 0.0)

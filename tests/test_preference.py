"""Losses of preferred pairs: float64 loops, worked numbers, TRL's own; and pairs of balanced length."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from liubai.learn.preference import (
    PreferenceConfig,
    bradley_terry,
    length_balanced,
    pointwise,
    preference_loss,
)

f64 = torch.float64


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64) * scale


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---- reward models ----


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_bradley_terry_equals_a_plain_loop(margin: float) -> None:
    scores = normal(0, 2, 9, scale=2.0).requires_grad_()
    got = bradley_terry(scores[0], scores[1], margin)
    assert got.shape == (9,)
    (gradient,) = torch.autograd.grad((got * torch.arange(9)).sum(), scores)
    for n, (chosen, rejected) in enumerate(scores.T.tolist()):
        x = chosen - rejected - margin
        assert got[n].item() == pytest.approx(-log_sigmoid(x), rel=1e-12)
        slope = n * sigmoid(-x)
        assert gradient[:, n].tolist() == pytest.approx([-slope, slope], rel=1e-12)


def test_bradley_terry_of_worked_numbers() -> None:
    chosen, rejected = torch.tensor([3.0, 1.0, math.log(3)]), torch.tensor([3.0, 0.0, 0.0])
    # a coin; odds of e to 1; three to one
    wanted = [math.log(2), math.log1p(math.exp(-1)), -math.log(3 / 4)]
    assert bradley_terry(chosen, rejected).tolist() == pytest.approx(wanted)
    assert bradley_terry(chosen[1:2], rejected[1:2], margin=1.0).item() == pytest.approx(math.log(2))


def test_a_reward_model_that_is_very_wrong_still_learns() -> None:
    scores = torch.tensor([[-500.0, 500.0], [500.0, -500.0]], requires_grad=True)
    losses = bradley_terry(scores[0], scores[1])
    assert losses.tolist() == [1000, 0]
    assert torch.autograd.grad(losses.sum(), scores)[0].tolist() == [[-1, 0], [1, 0]]
    labels = torch.tensor([True, True])
    assert pointwise(torch.tensor([-500.0, 500.0]), labels).tolist() == [500, 0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, f64])
def test_pointwise_equals_a_plain_loop(dtype: torch.dtype) -> None:
    scores = normal(1, 8, scale=3.0).requires_grad_()
    safe = [1, 0, 0, 1, 1, 0, 1, 0]
    got = pointwise(scores, torch.tensor(safe).to(dtype))
    assert got.dtype == f64
    (gradient,) = torch.autograd.grad(got.sum(), scores)
    for n, (score, label) in enumerate(zip(scores.tolist(), safe, strict=True)):
        assert got[n].item() == pytest.approx(-log_sigmoid(score if label else -score), rel=1e-12)
        assert gradient[n].item() == pytest.approx(sigmoid(score) - label, rel=1e-12)


# ---- pairs of balanced length ----


def test_length_balanced_of_a_worked_example() -> None:
    pairs = [(9, 2), (5, 4), (3, 3), (8, 4), (2, 6), (1, 2), (7, 5)]
    # longer: 0 (by 7), 1 (1), 3 (4), 6 (2); shorter: 4, 5. Two of the longer have to go: 0 and 3
    assert length_balanced(pairs) == [1, 2, 4, 5, 6]
    swapped = [(rejected, chosen) for chosen, rejected in pairs]
    assert length_balanced(swapped) == [1, 2, 4, 5, 6]
    # of equal differences the last goes
    assert length_balanced([(2, 1), (3, 2), (4, 3), (5, 7)]) == [0, 3]
    assert length_balanced([(2, 1), (3, 1)]) == []
    assert length_balanced([(4, 4), (1, 1)]) == [0, 1]
    assert length_balanced([]) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=7))
def test_length_balanced_is_the_largest_subset_with_the_smallest_differences(
    pairs: list[tuple[int, int]],
) -> None:
    def balanced(subset: tuple[int, ...]) -> bool:
        signs = [(pairs[i][0] > pairs[i][1]) - (pairs[i][0] < pairs[i][1]) for i in subset]
        return sum(signs) == 0

    def difference(subset: tuple[int, ...]) -> int:
        return sum(abs(pairs[i][0] - pairs[i][1]) for i in subset)

    got = tuple(length_balanced(pairs))
    every = range(len(pairs))
    subsets = [s for size in range(len(pairs) + 1) for s in combinations(every, size) if balanced(s)]
    largest = max(map(len, subsets))
    least = min(difference(s) for s in subsets if len(s) == largest)
    assert balanced(got)
    assert (len(got), difference(got)) == (largest, least)
    assert list(got) == sorted(set(got))
    assert {i for i in every if pairs[i][0] == pairs[i][1]} <= set(got)


# ---- the policy ----

CONFIGS: list[dict[str, Any]] = [
    {},
    {"beta": 0.5},
    {"beta": 0.3, "label_smoothing": 0.2},
    {"kind": "ipo"},
    {"kind": "ipo", "beta": 0.4},
]


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_preference_loss_equals_a_plain_loop(options: dict[str, Any]) -> None:
    config = PreferenceConfig(**options)
    x = (-20 + normal(2, 4, 11, scale=4.0)).requires_grad_()
    losses, sums = preference_loss(*x, config)
    assert losses.shape == (11,)
    cotangent = torch.linspace(-1, 2, 11, dtype=f64)
    (gradient,) = torch.autograd.grad((losses * cotangent).sum(), x)
    beta, swapped = config.beta, config.label_smoothing
    wanted: dict[str, float] = defaultdict(float)
    for n, (chosen, rejected, of_chosen, of_rejected) in enumerate(x.T.tolist()):
        bracket = (chosen - rejected) - (of_chosen - of_rejected)
        if config.kind == "ipo":
            loss, slope = (bracket - 1 / (2 * beta)) ** 2, 2 * (bracket - 1 / (2 * beta))
        else:
            z = beta * bracket
            loss = -(1 - swapped) * log_sigmoid(z) - swapped * log_sigmoid(-z)
            slope = beta * (-(1 - swapped) * sigmoid(-z) + swapped * sigmoid(z))
        assert losses[n].item() == pytest.approx(loss, rel=1e-10)
        slope *= float(cotangent[n])
        assert gradient[:2, n].tolist() == pytest.approx([slope, -slope], rel=1e-10, abs=1e-14)
        wanted["margin"] += beta * bracket
        wanted["right"] += bracket > 0
        wanted["reward/chosen"] += beta * (chosen - of_chosen)
        wanted["reward/rejected"] += beta * (rejected - of_rejected)
    assert 2 <= wanted["right"] <= 9
    assert {name: float(v) for name, v in sums.items()} == pytest.approx(wanted)
    assert not any(v.requires_grad for v in sums.values())


def test_preference_losses_of_worked_numbers() -> None:
    def loss_at(bracket: float, **options: Any) -> tuple[float, float]:
        chosen = torch.tensor([bracket], dtype=f64, requires_grad=True)
        zero = torch.zeros(1, dtype=f64)
        losses, _ = preference_loss(chosen, zero, zero, zero, PreferenceConfig(**options))
        return losses.item(), torch.autograd.grad(losses.sum(), chosen)[0].item()

    # where nothing is learned yet: a coin, and the gradient that every pair gets
    assert loss_at(0.0) == pytest.approx((math.log(2), -0.05))
    assert loss_at(10 * math.log(3)) == pytest.approx((-math.log(3 / 4), -0.025))
    # IPO is content at 1/(2β) and pulls back beyond it
    assert loss_at(5.0, kind="ipo") == pytest.approx((0, 0))
    assert loss_at(6.0, kind="ipo") == pytest.approx((1, 2))
    # cDPO is content where it is as sure as the labels are: σ(βx) = 1 − ε
    assert loss_at(10 * math.log(3), label_smoothing=0.25)[1] == pytest.approx(0, abs=1e-15)
    assert loss_at(10 * math.log(3), label_smoothing=0.2)[1] < 0 < loss_at(40.0, label_smoothing=0.2)[1]


def test_a_pair_that_is_very_wrong_stays_finite() -> None:
    chosen = torch.tensor([-1e5, 1e5], requires_grad=True)
    zero = torch.zeros(2)
    losses, _ = preference_loss(chosen, zero, zero, zero, PreferenceConfig())
    assert losses.tolist() == pytest.approx([1e4, 0])
    assert torch.autograd.grad(losses.sum(), chosen)[0].tolist() == pytest.approx([-0.1, 0])


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_only_what_the_policy_changes_is_judged(options: dict[str, Any]) -> None:
    """An answer that the reference, too, finds likely is no better for it."""
    config = PreferenceConfig(**options)
    x, shift = normal(3, 4, 5, scale=3.0), normal(4, 2, 5, scale=3.0)
    losses, sums = preference_loss(*x, config)
    moved, moved_sums = preference_loss(*(x + torch.cat([shift, shift])), config)
    torch.testing.assert_close(moved, losses)
    assert {n: float(v) for n, v in moved_sums.items()} == pytest.approx(
        {n: float(v) for n, v in sums.items()}
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"beta": 0.0}, "beta"),
        ({"beta": math.inf}, "finite"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"kind": "kto"}, "kind"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "label_smoothing is a part of dpo"),
        ({"margin": 1.0}, "margin"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        PreferenceConfig(**options)


# ---- TRL's own losses on the same tensors ----

LENGTHS = (3, 5, 2, 4, 1, 6, 2, 3)  # completions: four chosen, four rejected


@pytest.mark.parametrize(
    ("theirs", "options", "means", "pairs"),
    [
        ("sigmoid", {"beta": 0.3}, False, 4),
        ("sigmoid_norm", {"beta": 0.3}, True, 4),
        ("ipo", {"kind": "ipo", "beta": 0.3}, True, 4),
        ("aot", {"beta": 0.3, "label_smoothing": 0.2}, False, 1),  # which sorts its pairs: of one it is cDPO
    ],
)
def test_loss_and_gradient_equal_trl(theirs: str, options: dict[str, Any], means: bool, pairs: int) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    from trl.trainer.dpo_trainer import DPOTrainer

    config = PreferenceConfig(**options)
    rows = [*range(pairs), *range(4, 4 + pairs)]
    lengths = torch.tensor(LENGTHS)[rows]
    mask = (torch.arange(9) >= 2) & (torch.arange(9) < 2 + lengths[:, None])  # after prompts of two
    logprobs = (-2 + normal(5, 8, 8))[rows].where(mask[:, 1:], 0.0).requires_grad_()
    reference = normal(6, 8, scale=2.0)[rows] - 2.0 * lengths
    given = torch.cat([logprobs.sum(1), reference]).view(4, pairs)
    if means:
        given = given / lengths.view(2, pairs).repeat(2, 1)
    losses, sums = preference_loss(*given, config)

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), args=SimpleNamespace(),
        accelerator=SimpleNamespace(device="cpu", gather=lambda t: t, gather_for_metrics=lambda t: t),
        beta=config.beta, label_smoothing=config.label_smoothing, loss_types=[theirs], loss_weights=[1.0],
        f_divergence_type="reverse_kl", ld_alpha=None, precompute_ref_logps=True, use_weighting=False,
        aux_loss_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    empty = torch.zeros(2 * pairs, 8)
    outputs = SimpleNamespace(log_probs=logprobs, entropy=empty, mean_logits=empty, is_top1=empty.bool())
    inputs = {
        "input_ids": mask.long(), "attention_mask": mask.long(), "completion_mask": mask.long(),
        "ref_chosen_logps": reference[:pairs], "ref_rejected_logps": reference[pairs:],
    }  # fmt: skip
    wanted = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    assert losses.mean().item() == pytest.approx(wanted.item(), rel=1e-9)
    (mine,) = torch.autograd.grad(losses.mean(), logprobs)
    (other,) = torch.autograd.grad(wanted, logprobs)
    torch.testing.assert_close(mine[mask[:, 1:]], other[mask[:, 1:]])
    assert mine.abs().sum() > 0
    if not means:  # TRL logs sums in any case
        logged = trainer._metrics["train"]
        names = {"margin": "margins", "right": "accuracies", "reward/chosen": "chosen"}
        for name, their_name in {**names, "reward/rejected": "rejected"}.items():
            assert float(sums[name]) / pairs == pytest.approx(logged[f"rewards/{their_name}"][0])


def test_the_reward_loss_equals_trl() -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    from trl.trainer.reward_trainer import RewardTrainer

    scores = normal(7, 10, 1, scale=2.0).requires_grad_()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), args=SimpleNamespace(center_rewards_coefficient=None),
        accelerator=SimpleNamespace(gather=lambda t: t, gather_for_metrics=lambda t: t),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    for margin in (0.0, 0.8):
        inputs = {"attention_mask": torch.ones(10, 3), "margin": torch.full((5,), margin, dtype=f64)}
        wanted = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores), inputs)
        got = bradley_terry(scores[:5, 0], scores[5:, 0], margin).mean()
        assert got.item() == pytest.approx(wanted.item(), rel=1e-12)
        (mine,) = torch.autograd.grad(got, scores)
        (other,) = torch.autograd.grad(wanted, scores)
        torch.testing.assert_close(mine, other)

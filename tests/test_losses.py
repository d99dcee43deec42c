"""Advantages and losses: every name of the menu against a float64 loop, worked numbers, and TRL's own."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from liubai.errors import UserError
from liubai.learn.advantages import Advantage, advantages, chosen, has_variance, teaches
from liubai.learn.losses import LossConfig, LossInputs, k1, k2, k3, policy_loss, token_weights
from liubai.learn.presets import PRESETS
from liubai.stages import rl

AGGREGATIONS = ("token-mean", "sequence-mean", "dr-grpo")
KINDS: tuple[Advantage, ...] = ("grpo", "dr-grpo", "batch-std", "rloo", "reinforce++", "reinforce++-baseline")
f64 = torch.float64


# ---- advantages ----


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("grpo", [1.162, 0.387, -0.387, -1.162]),
        ("dr-grpo", [15, 5, -5, -15]),
        ("batch-std", [1.162, 0.387, -0.387, -1.162]),
        ("rloo", [20, 6.667, -6.667, -20]),
        ("reinforce++", [1.162, 0.387, -0.387, -1.162]),
        ("reinforce++-baseline", [1.162, 0.387, -0.387, -1.162]),
    ],
)
def test_advantages_of_the_worked_example(kind: Advantage, wanted: list[float]) -> None:
    rewards = torch.tensor([[90.0, 80.0, 70.0, 60.0]], dtype=f64)
    got = advantages(rewards, kind, torch.ones(1, 4))
    assert got[0].tolist() == pytest.approx(wanted, abs=5e-4)


def plain_advantages(rewards: list[list[float]], lengths: list[list[int]], kind: str) -> list[list[float]]:
    def std(values: Sequence[float]) -> float:
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))

    means = [sum(row) / len(row) for row in rewards]
    centered = [[r - m for r in row] for row, m in zip(rewards, means, strict=True)]
    flat = [r for row in rewards for r in row]
    if kind == "grpo":
        return [[c / (std(r) + 1e-6) for c in row] for row, r in zip(centered, rewards, strict=True)]
    if kind == "dr-grpo":
        return centered
    if kind == "batch-std":
        return [[c / (std(flat) + 1e-6) for c in row] for row in centered]
    if kind == "rloo":
        return [
            [r - (sum(row[:i]) + sum(row[i + 1 :])) / (len(row) - 1) for i, r in enumerate(row)]
            for row in rewards
        ]
    values = rewards if kind == "reinforce++" else centered
    tokens = [
        v
        for row, ns in zip(values, lengths, strict=True)
        for v, n in zip(row, ns, strict=True)
        for _ in range(n)
    ]
    mean = sum(tokens) / len(tokens)
    return [[(v - mean) / (std(tokens) + 1e-6) for v in row] for row in values]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_advantages_equal_a_plain_loop(kind: Advantage, data: st.DataObject) -> None:
    groups, samples = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 6))

    def table(of: st.SearchStrategy[Any]) -> Any:
        row = st.lists(of, min_size=samples, max_size=samples)
        return data.draw(st.lists(row, min_size=groups, max_size=groups))

    rewards, lengths = table(st.floats(-10, 10)), table(st.integers(1, 9))
    got = advantages(torch.tensor(rewards, dtype=f64), kind, torch.tensor(lengths))
    for mine, wanted in zip(got.tolist(), plain_advantages(rewards, lengths, kind), strict=True):
        assert mine == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8))
def test_rloo_is_dr_grpo_scaled(rewards: list[float]) -> None:
    row, ones, n = torch.tensor([rewards], dtype=f64), torch.ones(1, len(rewards)), len(rewards)
    scaled = advantages(row, "dr-grpo", ones) * n / (n - 1)
    torch.testing.assert_close(advantages(row, "rloo", ones), scaled)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 1), (3, 0), (4,)])
def test_a_group_of_one_is_refused(kind: Advantage, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="samples ≥ 2"):
        advantages(torch.zeros(shape), kind, torch.ones(shape))


def test_float_noise_is_no_variance() -> None:
    noise = sum([0.1] * 10)  # 0.9999999999999999
    rows = [[1.0, noise, 1.0], [1.0, 1.0, 1.0], [1.0, 0.99, 1.0], [0.0, 0.0, 1.0]]
    rewards = torch.tensor(rows, dtype=f64)
    assert rewards[0].std() > 0
    assert has_variance(rewards).tolist() == [False, False, True, True]
    # a baseline of the whole batch learns from a group that is all right, and from one that is all wrong
    assert teaches(rewards, "grpo").tolist() == [False, False, True, True]
    assert teaches(rewards, "reinforce++").tolist() == [True] * 4
    assert teaches(rewards[:2], "reinforce++").tolist() == [False] * 2


def test_the_most_uncertain_share() -> None:
    entropies = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    least = chosen(entropies, 0.4)
    assert (entropies >= least).tolist() == [False, False, False, True, True]
    assert bool((entropies >= chosen(entropies, 1.0)).all())
    assert chosen(torch.empty(0), 0.2) == 0.0
    many = torch.arange((1 << 24) + 4, dtype=torch.float32)  # more than torch.quantile takes
    assert chosen(many, 0.25) == 3 * (1 << 22) + 3


# ---- the loss ----

LENGTHS = (5, 2, 7, 1)


def loss_inputs(seed: int, aggregation: Any, *, spread: float = 0.5) -> dict[str, Tensor]:
    """Four sequences of unequal length in rows of seven, some off-policy by far, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return torch.randn(4, 7, generator=generator, dtype=f64) * scale

    logprobs = -2 + normal(0.5)
    old = logprobs + normal(spread)
    weights = torch.tensor(token_weights(LENGTHS, aggregation, 9), dtype=f64)
    advantages_B1 = normal(1.0)[:, :1]
    return {
        "logprobs_BT": logprobs.requires_grad_(),
        "old_logprobs_BT": old,
        "sampler_logprobs_BT": old + normal(spread),
        "advantages_BT": advantages_B1.expand(4, 7).clone(),
        "weights_BT": weights[:, None].expand(4, 7).clone(),
        "mask_BT": torch.arange(7)[None] < torch.tensor(LENGTHS)[:, None],
        "reference_logprobs_BT": logprobs.detach() + normal(spread),
        "entropy_BT": normal(1.0).abs().requires_grad_(),
        "chosen_BT": (normal(1.0) > -0.5).double(),
    }


def plain_loss(x: dict[str, Tensor], config: LossConfig) -> tuple[Tensor, dict[str, float]]:
    """The formulas token by token, on float64 scalars; autograd only differentiates."""
    total = torch.zeros((), dtype=f64)
    sums = dict.fromkeys(("low", "high", "dual", "cap", "floor", "kl", "left out"), 0.0)
    n, tokens = len(LENGTHS), sum(LENGTHS)
    for b, length in enumerate(LENGTHS):
        at = {name: [t[b, i] for i in range(length)] for name, t in x.items()}
        logprobs, old, sampler = at["logprobs_BT"], at["old_logprobs_BT"], at["sampler_logprobs_BT"]
        a = float(at["advantages_BT"][0])
        mean_ratio = sum(float(p.detach() - q) for p, q in zip(logprobs, old, strict=True)) / length
        mean_now = sum(logprobs) / length
        product = math.exp(sum(float(q - s) for q, s in zip(old, sampler, strict=True)))
        weight = {"token-mean": 1 / tokens, "sequence-mean": 1 / (n * length), "dr-grpo": 1 / (n * 9)}
        for t in range(length):
            ratio = torch.exp(logprobs[t] - old[t])
            if (
                config.objective == "gspo"
            ):  # the whole sequence's ratio; each token brings its share of the gradient
                ratio = math.exp(mean_ratio) * torch.exp(logprobs[t] - logprobs[t].detach())
                if config.aggregation == "sequence-mean":  # … which for this one is the formula as printed
                    ratio = torch.exp(mean_now - sum(old) / length)
            low, high = 1 - config.clip_low, 1 + config.clip_high
            gain = torch.min(ratio * a, ratio.clamp(low, high) * a)
            if config.dual_clip and a < 0 and gain < config.dual_clip * a:
                gain = torch.tensor(config.dual_clip * a, dtype=f64)
                sums["dual"] += 1
            if config.objective == "cispo":
                gain = min(float(ratio.detach()), config.ratio_cap) * a * logprobs[t]
                sums["high"] += float(ratio) > config.ratio_cap
            else:
                sums["low"] += a < 0 and float(ratio) < low
                sums["high"] += a > 0 and float(ratio) > high
            w = math.exp(float(old[t] - sampler[t])) if config.importance_level == "token" else product
            if config.importance == "none":
                w = 1.0
            elif config.importance == "truncate":
                sums["cap"] += w > config.importance_cap
                w = min(w, config.importance_cap)
            else:
                sums["cap"] += w > config.importance_cap
                sums["floor"] += w < config.importance_floor
                w = w if config.importance_floor <= w <= config.importance_cap else 0.0
            term = -gain * w - config.entropy_bonus * at["entropy_BT"][t]
            if "chosen_BT" in at and at["chosen_BT"][t] == 0:
                term = torch.zeros((), dtype=f64)
                sums["left out"] += 1
            gap = logprobs[t] - at["reference_logprobs_BT"][t]
            kl = {"k1": gap, "k2": gap**2 / 2, "k3": torch.exp(-gap) + gap - 1}[config.kl_estimator]
            sums["kl"] += float(kl)
            if config.kl_in == "loss":
                term = term + config.kl * kl
            total = total + weight[config.aggregation] * term
    return total, sums


OPTIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["low", "high"]),
    ({"clip_low": 0.1, "clip_high": 0.4}, ["low", "high"]),
    ({"dual_clip": 1.2}, ["dual"]),
    ({"objective": "gspo", "clip_low": 0.05, "clip_high": 0.05}, ["low", "high"]),
    ({"objective": "cispo", "ratio_cap": 1.3}, ["high"]),
    ({"importance": "truncate", "importance_cap": 1.2}, ["cap"]),
    ({"importance": "mask", "importance_cap": 1.3, "importance_floor": 0.8}, ["cap", "floor"]),
    ({"importance": "truncate", "importance_level": "sequence", "importance_cap": 1.2}, ["cap"]),
    ({"importance": "mask", "importance_level": "sequence", "importance_floor": 0.5}, ["cap", "floor"]),
    ({"kl": 0.3}, []),
    ({"kl": 0.3, "kl_estimator": "k2"}, []),
    ({"kl": 0.3, "kl_estimator": "k1", "kl_in": "reward"}, []),
    ({"entropy_bonus": 0.1}, []),
    ({"top_entropy": 0.7}, ["left out"]),
    ({"top_entropy": 0.7, "kl": 0.1, "entropy_bonus": 0.1, "importance": "truncate"}, ["left out"]),
]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("options", "must_act"), OPTIONS, ids=lambda o: "-".join(map(str, o))[:40])
def test_loss_equals_a_plain_loop(aggregation: Any, options: dict[str, Any], must_act: list[str]) -> None:
    config = LossConfig(aggregation=aggregation, **options)
    acted: dict[str, float] = defaultdict(float)
    for seed in range(6):
        x = loss_inputs(seed, aggregation)
        if config.top_entropy == 1:
            del x["chosen_BT"]
        variables = [x["logprobs_BT"], x["entropy_BT"]]
        loss, sums = policy_loss(LossInputs(**x), config)
        wanted, counts = plain_loss(x, config)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
        for got, theirs in zip(
            torch.autograd.grad(loss, variables, allow_unused=True, retain_graph=True),
            torch.autograd.grad(wanted, variables, allow_unused=True),
            strict=True,
        ):
            zero = torch.zeros(4, 7, dtype=f64)
            torch.testing.assert_close(
                zero if got is None else got, zero if theirs is None else theirs, rtol=1e-10, atol=1e-14
            )
        for name, count in counts.items():
            acted[name] += count
        assert (float(sums["clip/low"]), float(sums["clip/high"])) == (counts["low"], counts["high"])
        assert float(sums["tokens"]) == sum(LENGTHS)
        if config.kl:
            assert float(sums["kl"]) == pytest.approx(counts["kl"], rel=1e-6)
    assert all(acted[name] >= 2 for name in must_act)


@pytest.mark.parametrize("options", [o for o, _ in OPTIONS], ids=str)
def test_sequences_that_share_a_row_have_the_same_loss(options: dict[str, Any]) -> None:
    """Rows of one sequence each, and all of them in one row, with their numbers."""
    config = LossConfig(aggregation="sequence-mean", **options)
    x = loss_inputs(3, "sequence-mean")
    loss, sums = policy_loss(LossInputs(**x), config)
    row = {name: t.detach().reshape(1, -1) for name, t in x.items()}
    row["logprobs_BT"].requires_grad_()
    row["sequences_BT"] = torch.where(x["mask_BT"], torch.arange(4)[:, None], -1).view(1, -1)
    packed, packed_sums = policy_loss(LossInputs(**row), config)
    assert packed.item() == pytest.approx(loss.item(), rel=1e-12)
    (mine,) = torch.autograd.grad(loss, x["logprobs_BT"])
    (theirs,) = torch.autograd.grad(packed, row["logprobs_BT"])
    torch.testing.assert_close(theirs.view(4, 7), mine, rtol=1e-10, atol=1e-14)
    assert {n: float(v) for n, v in sums.items()} == pytest.approx(
        {n: float(v) for n, v in packed_sums.items()}
    )


def test_on_policy_every_objective_is_reinforce() -> None:
    gradients = []
    for objective in ("clip", "gspo", "cispo"):
        x = loss_inputs(0, "sequence-mean")
        x["old_logprobs_BT"] = x["sampler_logprobs_BT"] = x["logprobs_BT"].detach().clone()
        loss, sums = policy_loss(
            LossInputs(**x), LossConfig(aggregation="sequence-mean", objective=objective)
        )  # type: ignore[arg-type]
        gradients.append(torch.autograd.grad(loss, x["logprobs_BT"])[0])
        assert float(sums["clip/low"]) == float(sums["clip/high"]) == 0
    wanted = torch.where(x["mask_BT"] & (x["chosen_BT"] > 0), -x["weights_BT"] * x["advantages_BT"], 0.0)
    for gradient in gradients:
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("options", [o for o, _ in OPTIONS], ids=str)
def test_what_stands_off_the_mask_is_ignored(options: dict[str, Any]) -> None:
    config = LossConfig(aggregation="token-mean", **options)
    x = loss_inputs(0, "token-mean")
    clean, sums = policy_loss(LossInputs(**x), config)
    (wanted,) = torch.autograd.grad(clean, x["logprobs_BT"])
    for poison in (math.nan, math.inf, -math.inf):
        y = {n: t if t.dtype is torch.bool else t.detach().where(x["mask_BT"], poison) for n, t in x.items()}
        y["logprobs_BT"].requires_grad_()
        loss, poisoned = policy_loss(LossInputs(**y), config)
        (got,) = torch.autograd.grad(loss, y["logprobs_BT"])
        assert loss.item() == clean.item()
        assert torch.equal(got, wanted)
        assert {n: float(v) for n, v in poisoned.items()} == {n: float(v) for n, v in sums.items()}


@pytest.mark.parametrize("options", [o for o, _ in OPTIONS], ids=str)
def test_a_runaway_token_stays_finite(options: dict[str, Any]) -> None:
    x = loss_inputs(0, "token-mean", spread=300.0)
    loss, _ = policy_loss(LossInputs(**x), LossConfig(aggregation="token-mean", **options))
    assert loss.isfinite()
    assert torch.autograd.grad(loss, x["logprobs_BT"])[0].isfinite().all()


def test_default_loss_has_no_entropy_term() -> None:
    """No advantage, no gradient: neither a bonus nor a penalty is hidden in the default (pains 16)."""
    x = loss_inputs(0, "token-mean")
    x["advantages_BT"] = torch.zeros(4, 7, dtype=f64)
    loss, _ = policy_loss(LossInputs(**x), LossConfig(aggregation="token-mean"))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, x["logprobs_BT"])[0].abs().max() == 0
    for preset in PRESETS.values():
        assert "entropy_bonus" not in preset["loss"]


def test_the_aggregation_has_to_be_named() -> None:
    with pytest.raises(ValidationError, match="aggregation"):
        LossConfig()  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="aggregation"):
        LossConfig(aggregation="bnpo")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kl": 0.1, "kl_estimator": "k1"}, "k1 has no gradient"),
        ({"dual_clip": 0.5}, "dual_clip is above 1"),
        ({"importance_floor": 3.0}, "importance_floor is above"),
        ({"clip_low": math.nan}, "finite"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        LossConfig(aggregation="token-mean", **options)


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


def test_kl_estimators_on_worked_numbers() -> None:
    difference = torch.linspace(-5, 5, 101, dtype=f64)
    zero = torch.zeros(101, dtype=f64)
    assert (k3(zero, difference) >= 0).all()
    for k in (k1, k2, k3):
        assert float(k(zero, zero)[0]) == 0
    # reference likelier by e
    assert k3(zero, difference)[60].item() == pytest.approx(math.e - 2)
    assert k2(zero, difference)[60].item() == pytest.approx(0.5)
    assert k1(zero, difference)[60].item() == pytest.approx(-1)


def test_kl_estimators_on_average() -> None:
    """k1 and k3 have the mean KL(π‖π_ref); in the loss, k2 has its gradient and k3 that of the reverse."""
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=f64, requires_grad=True)
    reference = torch.tensor([0.1, 0.2, -0.5], dtype=f64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    p = logprobs.exp()
    forward = (p * (logprobs - reference)).sum()
    backward = (reference.exp() * (reference - logprobs)).sum()
    for k in (k1, k3):
        assert float((p * k(logprobs, reference)).sum()) == pytest.approx(float(forward))

    def mean_gradient(k: Any) -> Tensor:
        """Samples come from π, but nobody differentiates that."""
        return torch.autograd.grad((p.detach() * k(logprobs, reference)).sum(), logits, retain_graph=True)[0]

    torch.testing.assert_close(mean_gradient(k2), torch.autograd.grad(forward, logits, retain_graph=True)[0])
    torch.testing.assert_close(mean_gradient(k3), torch.autograd.grad(backward, logits, retain_graph=True)[0])
    torch.testing.assert_close(mean_gradient(k1), torch.zeros(3, dtype=f64), atol=1e-12, rtol=0)


# ---- presets ----


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_config_and_gives_way(name: str) -> None:
    config = rl.Config.model_validate(rl.Config.filled({"steps": 1, "preset": name}))
    for key, value in PRESETS[name]["loss"].items():
        assert getattr(config.loss, key) == value
    assert config.advantage == PRESETS[name]["advantage"]
    raw = {"steps": 1, "preset": name, "loss": {"clip_high": 0.5}, "minibatches": 3}
    own = rl.Config.model_validate(rl.Config.filled(raw))
    assert own.loss.clip_high == 0.5
    assert own.loss.aggregation == config.loss.aggregation
    assert own.minibatches == 3


def test_presets_have_the_numbers_of_their_papers() -> None:
    """Written down once more, from the papers: a slip in the table is a slip in every run."""
    p = {name: rl.Config.model_validate(rl.Config.filled({"steps": 1, "preset": name})) for name in PRESETS}
    clips = {name: (c.loss.clip_low, c.loss.clip_high) for name, c in p.items() if name != "cispo"}
    assert clips == {
        "liubai": (0.2, 0.28), "paper-r1": (10, 10), "deepseekmath": (0.2, 0.2), "dr-grpo": (0.2, 0.2),
        "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "rloo": (10, 10), "reinforce++": (0.2, 0.2),
    }  # fmt: skip
    assert {name: c.loss.aggregation for name, c in p.items()} == {
        "liubai": "token-mean", "paper-r1": "sequence-mean", "deepseekmath": "sequence-mean",
        "dr-grpo": "dr-grpo", "dapo": "token-mean", "gspo": "sequence-mean", "cispo": "token-mean",
        "rloo": "dr-grpo", "reinforce++": "token-mean",
    }  # fmt: skip
    assert {name: c.loss.kl for name, c in p.items() if c.loss.kl} == {
        "paper-r1": 1e-3, "deepseekmath": 0.04, "rloo": 0.03, "reinforce++": 0.01,
    }  # fmt: skip
    assert {n for n, c in p.items() if c.loss.kl_in == "reward"} == {"rloo", "reinforce++"}
    assert {n: c.loss.objective for n, c in p.items() if c.loss.objective != "clip"} == {
        "gspo": "gspo",
        "cispo": "cispo",
    }
    assert (p["dapo"].refills > 0, p["dapo"].rewards.overlong) == (True, -1.0)


def test_a_loss_without_a_preset_is_weighed_as_ours() -> None:
    raw = {"steps": 1, "loss": {"kl": 0.001}}
    loss = rl.Config.model_validate(rl.Config.filled(raw)).loss
    ours = rl.Config.model_validate(rl.Config.filled({"steps": 1, "preset": "liubai"})).loss
    assert loss == ours.model_copy(update={"kl": 0.001})
    assert raw == {"steps": 1, "loss": {"kl": 0.001}}
    own = rl.Config.filled({"steps": 1, "loss": {"aggregation": "dr-grpo"}})["loss"]
    assert own == {"aggregation": "dr-grpo"}


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(UserError, match=r"no preset 'dapoo'; did you mean 'dapo'\?"):
        rl.Config.filled({"steps": 1, "preset": "dapoo"})


# ---- TRL's own loss on the same tensors ----

THEIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo", "beta": 0.1}, {"aggregation": "sequence-mean", "kl": 0.1}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"aggregation": "dr-grpo"}),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"aggregation": "token-mean", "clip_high": 0.28}),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.3},
        {"aggregation": "token-mean", "objective": "cispo", "ratio_cap": 1.3},
    ),
    "gspo": (
        {
            "loss_type": "grpo", "importance_sampling_level": "sequence",
            "epsilon_low": 0.03, "epsilon_high": 0.04,
        },
        {"aggregation": "sequence-mean", "objective": "gspo", "clip_low": 0.03, "clip_high": 0.04},
    ),
    "tis": (
        {"loss_type": "dapo", "epsilon_high": 0.28, "use_vllm": True},
        {"aggregation": "token-mean", "clip_high": 0.28, "importance": "truncate", "importance_cap": 1.2},
    ),
    "top entropy": ({"loss_type": "dapo", "top_entropy_quantile": 0.4}, {"aggregation": "token-mean"}),
}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
def test_loss_and_gradient_equal_trl(name: str) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    from trl.trainer.grpo_trainer import GRPOTrainer

    theirs, ours = THEIRS[name]
    config = LossConfig(**{"clip_high": 0.2, **ours})
    x = loss_inputs(1, config.aggregation)
    mask = x["mask_BT"].long()
    entropy = x["entropy_BT"].detach()
    if name == "top entropy":
        least = chosen(entropy[x["mask_BT"]], 0.4)
        x["chosen_BT"] = (entropy >= least).double()
    else:
        del x["chosen_BT"]
    ratio = (x["old_logprobs_BT"] - x["sampler_logprobs_BT"]).exp()

    class Trainer(SimpleNamespace):
        get_high_entropy_mask = GRPOTrainer.get_high_entropy_mask

    trainer = Trainer(
        **{
            "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, "importance_sampling_level": "token",
            "top_entropy_quantile": 1.0, "use_vllm": False, **theirs,
        },
        _get_per_token_logps_and_entropies=lambda *a, **k: (x["logprobs_BT"], entropy, None),
        aux_loss_enabled=False,
        off_policy_mask_threshold=None,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=True),
        max_completion_length=9,
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=SimpleNamespace(
            num_processes=1, device=torch.device("cpu"), gather=lambda t: t,
            reduce=lambda t, reduction=None: t, pad_across_processes=lambda t, **k: t,
        ),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": torch.zeros(4, 7, dtype=torch.long),
        "completion_mask": mask,
        "advantages": x["advantages_BT"][:, 0],
        "old_per_token_logps": x["old_logprobs_BT"],
        "ref_per_token_logps": x["reference_logprobs_BT"],
        "importance_sampling_ratio": ratio.clamp(max=config.importance_cap),
        "num_items_in_batch": mask.sum(),
    }
    wanted = GRPOTrainer._compute_loss(trainer, None, inputs)
    got, _ = policy_loss(LossInputs(**x), config)
    assert got.item() == pytest.approx(wanted.item(), abs=1e-5)
    (mine,) = torch.autograd.grad(got, x["logprobs_BT"])
    (other,) = torch.autograd.grad(wanted, x["logprobs_BT"])
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert mine.abs().sum() > 0

"""The algorithm menu in use: every option reaches its tokens through packing, sharing and threads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import tiny_model
from test_update import EOS, settings_of, some_groups, update_of
from torch import Tensor

import liubai.learn.logprobs
from liubai.learn.advantages import advantages, chosen, teaches
from liubai.learn.logprobs import token_logprobs
from liubai.learn.losses import KL, LossInputs, policy_loss, token_weights
from liubai.learn.replicas import Replicas
from liubai.learn.update import UpdateConfig, reference_kl
from liubai.model.transformer import Transformer
from liubai.stages import rl
from liubai.stages.rollouts import GradedGroup
from liubai.types import Group, Problem, Reward, Sample, Span, Stop

f64 = torch.float64


def read(model: Transformer, s: Sample, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of a completion, from the whole softmax."""
    ids = torch.tensor([s.prompt_ids + s.completion_ids])
    full = torch.log_softmax(model(ids)[0] / temperature, -1)[len(s.prompt_ids) - 1 : -1]
    return full.gather(1, ids[0, len(s.prompt_ids) :, None])[:, 0], -(full.exp() * full).sum(-1)


def by_the_book(
    model: Transformer, groups: Sequence[Group], config: UpdateConfig, reference: Transformer
) -> dict[str, Tensor]:
    """The gradient of one update: one answer at a time, in float64, then one padded rectangle."""
    model, reference = copy.deepcopy(model).double(), copy.deepcopy(reference).double()
    samples = [s for g in groups for s in g.samples]
    rewards = torch.tensor([[r.total for r in g.rewards] for g in groups], dtype=f64)
    with torch.no_grad():
        references = [read(reference, s, config.temperature)[0] for s in samples]
    if config.loss.kl_in == "reward":
        kl = KL[config.loss.kl_estimator]
        spent = [
            kl(torch.tensor(s.logprobs, dtype=f64), r).sum() for s, r in zip(samples, references, strict=True)
        ]
        rewards -= config.loss.kl * torch.stack(spent).view_as(rewards)
    assert bool(teaches(rewards, config.advantage).all())
    lengths = [len(s.completion_ids) for s in samples]
    given = advantages(rewards, config.advantage, torch.tensor(lengths).view_as(rewards)).flatten()
    weights = torch.tensor(token_weights(lengths, config.loss.aggregation, config.max_tokens), dtype=f64)
    now = [read(model, s, config.temperature) for s in samples]

    def rows(parts: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)

    def spread(values: Tensor) -> Tensor:
        return rows([v.expand(n) for v, n in zip(values, lengths, strict=True)])

    mask = rows([torch.ones(n, dtype=torch.bool) for n in lengths])
    entropy, sampler = rows([e for _, e in now]), rows([torch.tensor(s.logprobs, dtype=f64) for s in samples])
    first_pass = config.loss.importance != "none" or config.loss.top_entropy < 1
    loss, _ = policy_loss(
        LossInputs(
            logprobs_BT=rows([lp for lp, _ in now]),
            old_logprobs_BT=rows([lp.detach() for lp, _ in now]) if first_pass else sampler,
            sampler_logprobs_BT=sampler,
            advantages_BT=spread(given),
            weights_BT=spread(weights),
            mask_BT=mask,
            reference_logprobs_BT=rows(references),
            entropy_BT=entropy,
            chosen_BT=(entropy >= chosen(entropy[mask].detach(), config.loss.top_entropy)).double(),
        ),
        config.loss,
    )
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


OPTIONS: list[dict[str, Any]] = [
    {"advantage": "dr-grpo"},
    {"advantage": "rloo"},
    {"advantage": "batch-std"},
    {"advantage": "reinforce++"},
    {"advantage": "reinforce++-baseline"},
    {"loss": {"objective": "gspo", "clip_low": 0.05, "clip_high": 0.05}},
    {"loss": {"objective": "cispo", "ratio_cap": 1.1}},
    {"loss": {"dual_clip": 1.1}},
    {"loss": {"importance": "truncate", "importance_cap": 1.1}},
    {"loss": {"importance": "mask", "importance_cap": 1.2, "importance_floor": 0.8}},
    {"loss": {"importance": "truncate", "importance_level": "sequence", "importance_cap": 1.1}},
    {"loss": {"kl": 0.3}},
    {"loss": {"kl": 0.3, "kl_estimator": "k2"}},
    {"loss": {"kl": 0.05, "kl_estimator": "k1", "kl_in": "reward"}},
    {"loss": {"kl": 0.05, "kl_estimator": "k3", "kl_in": "reward"}, "advantage": "reinforce++"},
    {"loss": {"entropy_bonus": 0.5}},
    {"loss": {"top_entropy": 0.3}},
]


@pytest.mark.parametrize("share_from", [1, 99])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_update_has_the_gradient_of_every_option(options: dict[str, Any], share_from: int) -> None:
    config = settings_of(
        "sequence-mean", share_from=share_from, tokens_per_microbatch=100, temperature=0.8, **options
    )
    model, reference = tiny_model(1), tiny_model(2)
    metrics, got = update_of(model, some_groups(), config, reference=reference)
    wanted = by_the_book(model, some_groups(), config, reference)
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        scale = wanted[name].abs().max().item()
        torch.testing.assert_close(gradient.double(), wanted[name], rtol=1e-3, atol=3e-4 * scale)
    plain = settings_of("sequence-mean", share_from=share_from, tokens_per_microbatch=100, temperature=0.8)
    _, other = update_of(model, some_groups(), plain, reference=reference)
    assert not torch.allclose(
        other["norm.weight"], got["norm.weight"], rtol=1e-2
    )  # the option does something
    if config.loss.kl_in == "reward":
        assert metrics["reward/kl"] != 0


def test_the_kl_of_an_answer_is_the_sum_over_its_own_tokens() -> None:
    """Micro-batches mix and sort answers; each sum must come back to its own."""
    reference = tiny_model(2)
    config = settings_of(loss={"kl": 1.0, "kl_estimator": "k1", "kl_in": "reward"}, tokens_per_microbatch=60)
    groups = some_groups()
    got, halvings = reference_kl(Replicas(reference), groups, config, EOS)
    assert halvings == 0
    for g, row in zip(groups, got, strict=True):
        for s, kl in zip(g.samples, row, strict=True):
            wanted = torch.tensor(s.logprobs).sum() - read(reference, s, 1.0)[0].sum()
            assert float(kl) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("chunk", [1 << 24, 40])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_has_a_gradient_when_asked(
    monkeypatch: pytest.MonkeyPatch, chunk: int, temperature: float
) -> None:
    monkeypatch.setattr(liubai.learn.logprobs, "CHUNK_LOGITS", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 5, generator=generator), torch.randn(20, 5, generator=generator)
    targets = torch.arange(7)
    narrow = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    wide = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    logprobs, entropy = token_logprobs(*narrow, targets, temperature, entropy_learns=True)
    full = torch.log_softmax(wide[0] @ wide[1].T / temperature, -1)
    cotangent = torch.linspace(-1, 2, 7)
    got = torch.autograd.grad((logprobs + cotangent * entropy).sum(), narrow)
    plain = full.gather(1, targets[:, None])[:, 0] - cotangent.double() * (full.exp() * full).sum(-1)
    for mine, theirs in zip(got, torch.autograd.grad(plain.sum(), wide), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


# ---- dynamic sampling ----


def graded(index: int, totals: Sequence[float]) -> GradedGroup:
    s = Sample((1,), (2,), (0.0,), Stop.EOS, (Span(0, 1),))
    rewards = tuple(Reward({}, t) for t in totals)
    return GradedGroup(index, Group(Problem("", "", "exact"), (s,) * len(totals), rewards), ())


class Source:
    """Groups whose rewards are all equal, but for those in ``useful``."""

    def __init__(self, useful: set[int]) -> None:
        self.useful, self.next, self.asked = useful, 0, [0][:0]

    def collect(self, groups: int) -> list[GradedGroup]:
        self.asked.append(groups)
        self.next += groups
        return [
            graded(i, (1.0, 0.0 if i in self.useful else 1.0)) for i in range(self.next - groups, self.next)
        ]


@pytest.mark.parametrize(
    ("useful", "refills", "asked"),
    [
        ({0, 1, 2, 3}, 5, [4]),
        ({0, 3, 4, 5}, 5, [4, 2]),
        ({0, 5, 6, 8}, 5, [4, 3, 1, 1]),
        (set(), 2, [4, 4, 4]),  # all solved: the cap ends it
        (set(), 0, [4]),
    ],
)
def test_groups_without_variance_are_written_anew(useful: set[int], refills: int, asked: list[int]) -> None:
    source = Source(useful)
    config = rl.Config.model_validate({"steps": 1, "groups": 4, "refills": refills})
    groups = rl.collect(source, config)  # type: ignore[arg-type]
    assert source.asked == asked
    assert [g.index for g in groups] == list(range(sum(asked)))


def test_a_dropped_group_changes_nothing_but_the_count() -> None:
    """What was written in vain must not dilute a mean (pains 12)."""
    config = settings_of("token-mean")
    flat = [replace(g, rewards=tuple(replace(r, total=1.0) for r in g.rewards)) for g in some_groups(5, 2)]
    metrics, got = update_of(tiny_model(1), [*some_groups(), *flat], config)
    _, wanted = update_of(tiny_model(1), some_groups(), config)
    assert metrics["zero_variance"] == pytest.approx(2 / 5)
    for name, gradient in got.items():
        assert torch.equal(gradient, wanted[name])

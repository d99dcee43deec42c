"""Packing loses nothing, and one update is the same however it is cut, packed or padded."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import naive_logprobs, random_sample, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import liubai.learn.update
from liubai.learn.logprobs import batch_logprobs
from liubai.learn.losses import LossConfig
from liubai.learn.optim import Optimizer
from liubai.learn.packing import Batch, Sequence1, micro_batches, pack, place
from liubai.learn.update import Lot, UpdateConfig, WeightsDisagree, lots, read_lot, sequences, update
from liubai.model.transformer import Transformer
from liubai.rollout.engine import Request, generate
from liubai.rollout.torch_engine import TorchEngine
from liubai.types import Group, Problem, Reward, Sample, Span, Stop

EOS = 1
AGGREGATIONS = ("token-mean", "sequence-mean", "dr-grpo")
PROBLEM = Problem("", "", "exact")


def settings_of(aggregation: Any = "token-mean", **changes: Any) -> UpdateConfig:
    loss = LossConfig(aggregation=aggregation, **changes.pop("loss", {}))
    plain: dict[str, Any] = {
        "advantage": "grpo",
        "minibatches": 1,
        "max_tokens": 40,
        "temperature": 1.0,
        "tokens_per_microbatch": 4096,
        "share_from": 1,
    }
    return UpdateConfig(loss=loss, **(plain | changes))


def group_of(samples: Sequence[Sample], totals: Sequence[float]) -> Group:
    return Group(PROBLEM, tuple(samples), tuple(Reward({}, total) for total in totals))


def some_groups(seed: int = 0, count: int = 3) -> list[Group]:
    """Groups of four, off-policy, completions of 1 to 90 tokens, no two groups alike."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for g in range(count):
        lengths = torch.randint(1, 40, (4,), generator=generator).tolist()
        lengths[g % 4] = 60 + 10 * g
        samples = [random_sample(generator, prompt=3 + 5 * g, completion=n) for n in lengths]
        samples = [replace(s, prompt_ids=samples[0].prompt_ids) for s in samples]
        groups.append(group_of(samples, torch.randn(4, generator=generator).tolist()))
    return groups


# ---- packing ----


def documents(lengths: Sequence[int], learn: Sequence[Sequence[bool]]) -> list[Sequence1]:
    """Every token has a number of its own, as its id and as its value."""
    found, at = [], 100
    for n, wanted in zip(lengths, learn, strict=True):
        ids = list(range(at, at + n))
        found.append(Sequence1(ids, wanted, {"own": [float(i) for i in ids], "next": [i + 0.5 for i in ids]}))
        at += n
    return found


def check(batches: Sequence[Batch], packed: Sequence[Sequence1], pad: int) -> None:
    """Every token once, everything aligned with the position that predicts."""
    seen, learned = Counter[int](), Counter[int]()
    for b in batches:
        real = b.documents_BT >= 0
        seen.update(b.ids_BT[real].tolist())
        learned.update(b.targets_BT[b.mask_BT].tolist())
        assert (b.ids_BT[~real] == pad).all()
        assert not (b.mask_BT & ~real).any()
        assert b.tokens == int(real.sum())
        assert torch.equal(b.targets_BT[b.mask_BT], b.ids_BT[b.mask_BT] + 1)
        assert torch.equal(b.values["own"][b.mask_BT], b.targets_BT[b.mask_BT].float())
        assert torch.equal(b.values["next"][b.mask_BT], b.targets_BT[b.mask_BT] + 0.5)
        for row in range(b.ids_BT.shape[0]):
            for document in b.documents_BT[row].unique().tolist():
                inside = b.documents_BT[row] == document
                if document >= 0:
                    assert b.positions_BT[row, inside].tolist() == list(range(int(inside.sum())))
                    ids = b.ids_BT[row, inside]
                    assert torch.equal(ids - ids[0], torch.arange(len(ids)))
        first = b.positions_BT == 0
        starts = set(b.ids_BT[first & real].tolist())
        assert starts == {s.ids[0] for s in packed} & set(b.ids_BT[real].tolist())
    assert seen == Counter(i for s in packed for i in s.ids)
    # the first token of a document has no position that predicts it
    assert learned == Counter(s.ids[i] for s in packed for i in range(1, len(s.ids)) if s.learn[i])


LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(0, 50), st.integers(1, 300), st.randoms(use_true_random=False))
def test_packing_keeps_every_token_once(lengths: list[int], spare: int, tokens: int, rng: Any) -> None:
    packed = documents(lengths, [[rng.random() < 0.7 for _ in range(n)] for n in lengths])
    width = max(lengths) + spare
    whole = pack(packed, width, pad_id=7)
    assert whole.ids_BT.shape[1] == width
    check([whole], packed, 7)
    check(list(whole.split(2)), packed, 7)
    parts = micro_batches(packed, 7, tokens)
    check(parts, packed, 7)
    for part in parts:
        assert part.ids_BT.numel() <= max(tokens, max(lengths))  # padding included
        assert part.attention_documents is None
    several = [len(set(row.tolist()) - {-1}) > 1 for row in whole.documents_BT]
    assert (whole.attention_documents is not None) == any(several)


@given(LENGTHS, st.integers(0, 50))
def test_place_puts_each_sequence_in_one_row(lengths: list[int], spare: int) -> None:
    width = max(lengths) + spare
    rows = place(lengths, width)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    fill = [sum(lengths[i] for i in row) for row in rows]
    assert max(fill) <= width
    assert sum(f * 2 <= width for f in fill) <= 1  # first fit: two such rows would have been one


def test_a_sequence_wider_than_the_row_is_refused() -> None:
    with pytest.raises(ValueError, match="5 tokens does not fit a row of 4"):
        pack(documents([5], [[True] * 5]), 4, 0)


def test_what_continues_a_prefix_keeps_its_place_and_has_a_row_of_its_own() -> None:
    whole = documents([6, 4], [[False, False, True, True, True, True], [True] * 4])
    rest = [whole[0].after(2), whole[1].after(0)]
    (batch,) = micro_batches(rest, 0, 100)
    assert batch.ids_BT.tolist() == [[102, 103, 104, 105], [106, 107, 108, 109]]
    assert batch.positions_BT.tolist() == [[2, 3, 4, 5], [0, 1, 2, 3]]
    assert batch.values["own"][:, 0].tolist() == [103.0, 107.0]
    with pytest.raises(ValueError, match="cannot share its row"):
        pack(rest, 20, 0)


def test_a_long_prefix_bounds_the_rows_of_a_micro_batch() -> None:
    """Each row holds keys of all that it continues."""
    long = documents([1010] * 40, [[True] * 1010] * 40)
    parts = micro_batches([s.after(1000) for s in long], 0, 2048)
    assert [b.ids_BT.shape for b in parts] == [(8, 10)] * 5


def test_padding_and_packing_do_not_change_logprobs() -> None:
    model = tiny_model(1)
    samples = [s for g in some_groups() for s in g.samples]
    pairs = [(s, [float(i)] * len(s.completion_ids)) for i, s in enumerate(samples)]
    listed = sequences(pairs, settings_of(), version=0)
    ways = {
        "packed": [pack(listed, 200, EOS)],
        "padded": [pack([s], 200, EOS) for s in listed],
        "micro": micro_batches(listed, EOS, 150),
        "other pad": [pack(listed, 200, 33)],
    }
    for temperature in (1.0, 0.7):
        for batches in ways.values():
            for batch in batches:
                with torch.no_grad():
                    logprobs_BT, entropy_BT = batch_logprobs(model, batch, temperature)
                assert (logprobs_BT[~batch.mask_BT] == 0).all()
                assert torch.equal(entropy_BT > 0, batch.mask_BT)
                number_BT = batch.values["advantages"]
                for i in number_BT[batch.mask_BT].unique().tolist():
                    got = logprobs_BT[batch.mask_BT & (number_BT == i)]
                    wanted = naive_logprobs(model, samples[int(i)], temperature)
                    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("share_from", "shared"), [(1, 3), (4, 2), (32, 0)])
def test_reading_a_prompt_once_does_not_change_logprobs(share_from: int, shared: int) -> None:
    """Prompts of 3, 8 and 13 tokens, and one of a single token, of which nothing can be shared."""
    model = tiny_model(1)
    samples = [s for g in some_groups() for s in g.samples]
    samples.append(random_sample(torch.Generator().manual_seed(4), prompt=1, completion=12))
    config = settings_of(tokens_per_microbatch=100, share_from=share_from)
    cut = lots(
        sequences([(s, [float(i)] * len(s.completion_ids)) for i, s in enumerate(samples)], config, 0),
        config,
        EOS,
    )
    assert sum(bool(lot.prompt) for lot in cut) == shared
    seen = []
    for lot in cut:
        with torch.no_grad():
            read = list(read_lot(model, lot, config))
        for batch, logprobs_BT, _ in read:
            number_BT = batch.values["advantages"]
            for i in {int(n) for n in number_BT[batch.mask_BT].tolist()}:
                got = logprobs_BT[batch.mask_BT & (number_BT == i)]
                wanted = naive_logprobs(model, samples[i], 1.0)
                torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-5)
                seen.append(i)
    assert sorted(seen) == list(range(len(samples)))


def test_pad_equals_eos_keeps_the_real_eos_in_the_loss() -> None:
    ended = [
        Sample((5, EOS, 6), (7, 8, EOS), (-1.0, -2.0, -3.0), Stop.EOS, (Span(0, 3),)),
        Sample((5, EOS, 6), (EOS,), (-4.0,), Stop.EOS, (Span(0, 1),)),
        Sample((5,), (9, 9, 9, 9, 9), (-5.0,) * 5, Stop.LENGTH, (Span(0, 5),)),
    ]
    listed = sequences(
        [(s, [1.0 + i] * len(s.completion_ids)) for i, s in enumerate(ended)], settings_of(), version=0
    )
    padded = [pack([s], 32, EOS) for s in listed]
    for batches in ([pack(listed, 32, EOS)], padded, micro_batches(listed, EOS, 8)):
        targets = torch.cat([b.targets_BT[b.mask_BT] for b in batches]).tolist()
        old = torch.cat([b.values["logprobs"][b.mask_BT] for b in batches]).tolist()
        advantages = torch.cat([b.values["advantages"][b.mask_BT] for b in batches]).tolist()
        assert Counter(zip(targets, old, advantages, strict=True)) == Counter(
            (token, lp, 1.0 + i)
            for i, s in enumerate(ended)
            for token, lp in zip(s.completion_ids, s.logprobs, strict=True)
        )
    metrics = update_of(tiny_model(0), [group_of(ended, [1.0, 0.0, 0.5])], settings_of())[0]
    assert metrics["update_tokens"] == 9


# ---- one update ----


class Taken(Optimizer):
    """Keeps the gradient of the first step instead of taking it."""

    def step(self, scale: float = 1.0) -> float:
        self.taken = {n: p.grad.clone() for n, p in self.parameters.items() if p.grad is not None}
        self.zero_grad()
        return 0.0


def update_of(
    model: Transformer, groups: Sequence[Group], config: UpdateConfig, **options: Any
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The metrics and the gradient of one update of a copy of ``model``."""
    model = copy.deepcopy(model)
    optimizer = Taken(model, lr=1.0)
    options = {"version": 9, **options}
    metrics = update(model, optimizer, groups, config, pad_id=EOS, **options)
    return metrics, optimizer.taken


def plain_gradient(model: Transformer, groups: Sequence[Group], config: UpdateConfig) -> dict[str, Tensor]:
    """The same by the book: one sequence at a time, full log-softmax, float64, no clip in reach of it."""
    model = copy.deepcopy(model).double()
    pairs = []
    for g in groups:
        r = torch.tensor([x.total for x in g.rewards], dtype=torch.float64)
        pairs += list(zip(g.samples, ((r - r.mean()) / (r.std() + 1e-6)).tolist(), strict=True))
    n, tokens = len(pairs), sum(len(s.completion_ids) for s, _ in pairs)
    loss = torch.zeros((), dtype=torch.float64)
    for s, a in pairs:
        ids, start = torch.tensor([s.prompt_ids + s.completion_ids]), len(s.prompt_ids)
        full = torch.log_softmax(model(ids)[0] / config.temperature, -1)[start - 1 : -1]
        lp = full.gather(1, ids[0, start:, None])[:, 0]
        ratio = (lp - torch.tensor(s.logprobs, dtype=torch.float64)).exp()
        clipped = ratio.clamp(1 - config.loss.clip_low, 1 + config.loss.clip_high)
        length = len(s.completion_ids)
        weight = {
            "token-mean": 1 / tokens,
            "sequence-mean": 1 / (n * length),
            "dr-grpo": 1 / (n * config.max_tokens),
        }[config.loss.aggregation]
        loss = loss - weight * torch.minimum(ratio * a, clipped * a).sum()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("share_from", [1, 9, 32])
@pytest.mark.usefixtures("threads")
def test_update_has_the_gradient_of_the_formula(
    aggregation: str, temperature: float, share_from: int
) -> None:
    """And no other term: an entropy bonus anywhere on the way would show."""
    config = settings_of(
        aggregation, temperature=temperature, share_from=share_from, tokens_per_microbatch=100
    )
    metrics, got = update_of(tiny_model(1), some_groups(), config)
    wanted = plain_gradient(tiny_model(1), some_groups(), config)
    assert got.keys() == wanted.keys()
    assert 0 < metrics["clip/low"] < 1
    assert 0 < metrics["clip/high"] < 1
    for name, gradient in got.items():
        scale = wanted[name].abs().max().item()
        torch.testing.assert_close(gradient.double(), wanted[name], rtol=1e-4, atol=1e-4 * scale)


def parameters_after(
    groups: Sequence[Group], config: UpdateConfig, steps: int = 1, **options: Any
) -> dict[str, Tensor]:
    model = tiny_model(1)
    optimizer = Optimizer(model, lr=3e-3, eps=1e-4)  # eps above the float noise of the gradients
    for step in range(steps):
        update(model, optimizer, groups[step:] + groups[:step], config, version=9, pad_id=EOS, **options)
    return {n: p.detach() for n, p in model.named_parameters()}


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 3e-6) -> None:
    for name, p in got.items():
        torch.testing.assert_close(p, wanted[name], rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss", [{}, {"kl": 0.2, "importance": "truncate", "importance_cap": 1.5}])
@pytest.mark.usefixtures("threads")
def test_microbatch_split_gives_the_same_gradient(aggregation: str, loss: dict[str, float]) -> None:
    reference = tiny_model(2)
    whole = settings_of(aggregation, tokens_per_microbatch=100_000, loss=loss)
    wanted_metrics, wanted = update_of(tiny_model(1), some_groups(), whole, reference=reference)
    after = parameters_after(some_groups(), whole, reference=reference)
    assert not torch.equal(after["norm.weight"], dict(tiny_model(1).named_parameters())["norm.weight"])
    for tokens in (1, 64, 256):
        config = replace(whole, tokens_per_microbatch=tokens)
        metrics, got = update_of(tiny_model(1), some_groups(), config, reference=reference)
        assert_close(got, wanted)
        assert metrics == pytest.approx(wanted_metrics, rel=1e-4, abs=1e-6)
        assert_close(parameters_after(some_groups(), config, reference=reference), after)


def test_equivalent_configurations_take_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three updates: packed, padded to one sequence a row, and accumulated one by one."""
    groups, config = some_groups(), settings_of(tokens_per_microbatch=100_000)

    def padded(listed: Sequence[Sequence1], config: UpdateConfig, pad: int) -> list[Lot]:
        return [Lot((), [pack([s], 256, pad) for s in reversed(listed)])]

    def packed(listed: Sequence[Sequence1], config: UpdateConfig, pad: int) -> list[Lot]:
        return [Lot((), [pack(listed, 300, pad)])]

    ways = [parameters_after(groups, config, 3)]
    ways.append(parameters_after(groups, replace(config, tokens_per_microbatch=1), 3))
    for way in (padded, packed):
        monkeypatch.setattr(liubai.learn.update, "lots", way)
        ways.append(parameters_after(groups, config, 3))
    for other in ways[1:]:
        assert_close(other, ways[0], 5e-6)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_answers_without_tokens_change_nothing(minibatches: int) -> None:
    empty = [
        group_of([Sample((5, 6), (), (), Stop.ABORT, ()) for _ in range(2)], [0.0, 1.0]) for _ in range(2)
    ]
    model = tiny_model(1)
    config = settings_of(minibatches=minibatches)
    metrics = update(model, Optimizer(model, lr=1e-2), empty, config, version=0, pad_id=EOS)
    assert (metrics["update_tokens"], metrics["grad_norm"], metrics["skipped"]) == (1.0, 0.0, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model(1).parameters(), strict=True))


def test_minibatches_are_updates_one_after_another() -> None:
    groups = some_groups(count=4)
    model, other = tiny_model(1), tiny_model(1)
    optimizer, second = Optimizer(model, lr=1e-2), Optimizer(other, lr=1e-2)
    metrics = update(model, optimizer, groups, settings_of(minibatches=2), version=9, pad_id=EOS)
    for half in (groups[:2], groups[2:]):
        update(other, second, half, settings_of(), version=9, pad_id=EOS)
    assert (metrics["updates"], optimizer.steps) == (2, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_zero_variance_group_changes_nothing() -> None:
    """Neither the denominators nor the pull of the KL penalty; and they are counted."""
    groups = some_groups()
    generator = torch.Generator().manual_seed(5)
    noise = sum([0.1] * 10)
    flat = [
        group_of([random_sample(generator, prompt=4, completion=30) for _ in range(4)], [reward] * 3 + [last])
        for reward, last in ((5.0, 5.0), (1.0, noise), (0.0, 0.0))
    ]
    config = settings_of("sequence-mean", loss={"kl": 0.5})
    wanted_metrics, wanted = update_of(tiny_model(1), groups, config, reference=tiny_model(2))
    metrics, got = update_of(tiny_model(1), [flat[0], *groups, *flat[1:]], config, reference=tiny_model(2))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert wanted_metrics["zero_variance"] == 0
    assert metrics["zero_variance"] == pytest.approx(3 / 6)
    for name in wanted_metrics:
        if not name.startswith("zero_variance"):
            assert metrics[name] == wanted_metrics[name]

    model = tiny_model(1)
    optimizer = Optimizer(model, lr=1e-2)
    alone = update(model, optimizer, flat, config, version=9, pad_id=EOS, reference=tiny_model(2))
    assert alone["zero_variance"] == 1
    assert optimizer.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model(1).parameters(), strict=True))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_nonfinite_step_is_skipped_and_reported(bad: float) -> None:
    model, reference = tiny_model(1), tiny_model(2)
    optimizer = Optimizer(model, lr=1e-2)
    config = settings_of(loss={"kl": 0.1})
    update(model, optimizer, some_groups(), config, version=9, pad_id=EOS, reference=reference)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with torch.no_grad():
        reference.embed_tokens.weight[7, 0] = bad
    metrics = update(model, optimizer, some_groups(), config, version=9, pad_id=EOS, reference=reference)
    assert (metrics["skipped"], metrics["updates"]) == (1, 1)
    for then, now in zip(before, (model.state_dict(), optimizer.state_dict()), strict=True):
        assert all(torch.equal(then[n], now[n]) for n in then)
    good = update(model, optimizer, some_groups(), config, version=9, pad_id=EOS, reference=tiny_model(2))
    assert good["skipped"] == 0  # nothing of it is left in the gradients


# ---- the canary ----


def written(engine: TorchEngine, temperature: float = 1.0) -> list[Group]:
    requests = [
        Request(id=i, prompt_ids=(5, 6, 7 + i // 4), max_tokens=40, seed=i, temperature=temperature)
        for i in range(16)
    ]
    samples = generate(engine, requests)
    return [group_of(samples[i : i + 4], [0.0, 1.0, 2.0, 5.0]) for i in range(0, 16, 4)]


def test_canary_catches_stale_weights() -> None:
    trainer = tiny_model(1)
    optimizer = Optimizer(trainer, lr=3e-2)
    engine = TorchEngine(tiny_model(1), eos_ids=[EOS], slots=16, max_length=64)
    engine.load(trainer.state_dict(), version=0)
    groups = written(engine)
    metrics = update(trainer, optimizer, groups, settings_of(), version=0, pad_id=EOS)
    assert metrics["logprob_gap/fresh"] < 1e-5
    # one real step later; the transfer says that it worked, and did nothing
    stale = {n: t.clone() for n, t in engine.model.state_dict().items()}
    engine.load(stale, version=1)
    with pytest.raises(WeightsDisagree, match="did not reach the engine"):
        update(trainer, optimizer, written(engine), settings_of(), version=1, pad_id=EOS)
    assert all(p.grad is None for p in trainer.parameters())  # or it would turn up in the next update
    # the same tokens are no lie when they say that older weights wrote them
    late = update(trainer, optimizer, groups, settings_of(), version=1, pad_id=EOS)
    assert late["logprob_gap"] > 0.02
    assert late["logprob_gap/fresh"] == 0
    # and after a real transfer all is well
    engine.load(trainer.state_dict(), version=2)
    update(trainer, optimizer, written(engine), settings_of(), version=2, pad_id=EOS)


def test_canary_catches_weights_one_small_step_old() -> None:
    """At a learning rate that people use: the gap of a single step is small, and found all the same."""
    trainer = tiny_model(1)
    optimizer = Optimizer(trainer, lr=2e-4)
    engine = TorchEngine(tiny_model(1), eos_ids=[EOS], slots=16, max_length=64)
    engine.load(trainer.state_dict(), version=0)
    update(trainer, optimizer, written(engine), settings_of(), version=0, pad_id=EOS)
    engine.load({n: t.clone() for n, t in engine.model.state_dict().items()}, version=1)
    with pytest.raises(WeightsDisagree):
        update(trainer, optimizer, written(engine), settings_of(), version=1, pad_id=EOS)


def test_the_ratio_is_to_the_policy_before_the_first_minibatch() -> None:
    """With an importance cap the old log-probabilities are computed here; clipping must still act."""
    groups = some_groups(count=4)
    config = settings_of(minibatches=4, loss={"importance": "truncate"})
    model = tiny_model(1)
    metrics = update(model, Optimizer(model, lr=3e-2), groups, config, version=9, pad_id=EOS)
    assert metrics["updates"] == 4
    assert metrics["clip/low"] + metrics["clip/high"] > 0.01


def test_an_answer_that_could_not_be_graded_teaches_nothing() -> None:
    """Not even that failing is better than being wrong."""
    generator = torch.Generator().manual_seed(3)
    samples = [random_sample(generator, prompt=4, completion=20) for _ in range(4)]
    error = Reward({"error": 0.0}, 0.0)
    wrong = Reward({}, -1.0)
    only_wrong = Group(PROBLEM, tuple(samples), (error, wrong, wrong, wrong))
    model = tiny_model(1)
    optimizer = Optimizer(model, lr=1e-2)
    metrics = update(model, optimizer, [only_wrong], settings_of(), version=9, pad_id=EOS)
    assert (metrics["zero_variance"], optimizer.steps) == (1, 0)


ALL_KINDS = ("grpo", "dr-grpo", "batch-std", "rloo", "reinforce++", "reinforce++-baseline")


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_what_it_says_never_matters(kind: str, kl_in: str) -> None:
    """Other tokens in the answers that could not be graded: not a bit of the new weights differs."""
    groups = []
    for seed in (3, 4):
        kept, lost = torch.Generator().manual_seed(5), torch.Generator().manual_seed(seed)
        failed = {(0, 0), (1, 0), (1, 1), (1, 2), (1, 3), (2, 2)}  # one group wholly
        groups.append(
            [
                Group(
                    PROBLEM,
                    tuple(
                        random_sample(lost if (g, i) in failed else kept, prompt=4, completion=20)
                        for i in range(4)
                    ),
                    tuple(
                        Reward({"error": 0.0}, 0.0) if (g, i) in failed else Reward({}, float(i % 2) * 2 - 1)
                        for i in range(4)
                    ),
                )
                for g in range(3)
            ]
        )
    loss = {"kl": 0.0 if kl_in == "loss" else 0.05, "kl_in": kl_in}
    after = []
    for which in groups:
        model = tiny_model(1)
        config = settings_of(advantage=kind, loss=loss)
        update(
            model, Optimizer(model, lr=1e-2), which, config, version=9, pad_id=EOS, reference=tiny_model(2)
        )
        after.append(model.state_dict())
    for name, tensor in after[0].items():
        torch.testing.assert_close(tensor, after[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "batch-std", "rloo"])
def test_a_kl_in_the_reward_brings_no_group_back(kind: str) -> None:
    """All four are right: that their KLs differ in the fourth digit is no lesson."""
    (group,) = some_groups(count=1)
    right = Group(PROBLEM, group.samples, (Reward({}, 1.0),) * 4)
    config = settings_of(advantage=kind, loss={"kl": 1e-3, "kl_in": "reward"})
    model = tiny_model(1)
    metrics = update(
        model, Optimizer(model, lr=1e-2), [right], config, version=9, pad_id=EOS, reference=tiny_model(2)
    )
    assert metrics["zero_variance"] == 1
    assert "updates" not in metrics


def test_one_broken_minibatch_of_three_is_one() -> None:
    groups = some_groups()
    ids = groups[1].samples[0].completion_ids
    broken = Group(
        PROBLEM,
        tuple(replace(s, logprobs=(math.nan,) * len(s.logprobs)) for s in groups[1].samples),
        groups[1].rewards,
    )
    assert ids
    model = tiny_model(1)
    optimizer = Optimizer(model, lr=1e-2)
    config = settings_of(minibatches=3)
    metrics = update(model, optimizer, [groups[0], broken, groups[2]], config, version=9, pad_id=EOS)
    assert (metrics["skipped"], metrics["updates"], optimizer.steps) == (1, 3, 2)
    assert math.isfinite(metrics["grad_norm"])


def test_ess_falls_with_distance_from_the_sampler() -> None:
    metrics, _ = update_of(tiny_model(1), some_groups(), settings_of())
    assert 0 < metrics["ess"] < 0.9


def test_canary_looks_at_the_fresh_tokens_of_a_mixed_sample() -> None:
    trainer = tiny_model(1)
    engine = TorchEngine(tiny_model(1), eos_ids=[EOS], slots=16, max_length=64)
    engine.load(tiny_model(3).state_dict(), version=0)
    honest = written(engine)
    spoilt = [replace(g, samples=tuple(mixed_spans(s) for s in g.samples)) for g in honest]
    update(trainer, Optimizer(trainer, lr=1e-3), honest, settings_of(), version=1, pad_id=EOS)
    with pytest.raises(WeightsDisagree):
        update(trainer, Optimizer(trainer, lr=1e-3), spoilt, settings_of(), version=1, pad_id=EOS)


def mixed_spans(s: Sample) -> Sample:
    """The second half claims to be of version 1."""
    half = len(s.completion_ids) // 2
    spans = (Span(0, half), Span(1, len(s.completion_ids) - half))
    return replace(s, versions=tuple(span for span in spans if span.count))


def test_canary_knows_the_temperature() -> None:
    trainer = tiny_model(1)
    engine = TorchEngine(tiny_model(1), eos_ids=[EOS], slots=16, max_length=64)
    engine.load(trainer.state_dict(), version=0)
    groups = written(engine, temperature=0.7)
    metrics, _ = update_of(trainer, groups, settings_of(temperature=0.7), version=0)
    assert metrics["logprob_gap/fresh"] < 1e-5
    with pytest.raises(WeightsDisagree):
        update_of(trainer, groups, settings_of(), version=0)

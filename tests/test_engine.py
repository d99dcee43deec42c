"""The embedded engine writes what the plain model would write, whoever shares its batch."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import pytest
import torch
from conftest import naive_logprobs, tiny_config, tiny_model
from torch import Tensor

from liubai.learn.losses import LossConfig
from liubai.learn.update import UpdateConfig, lots, read_lot, sequences
from liubai.model.transformer import Transformer
from liubai.rollout.engine import Partial, Request, StaleWeights, generate
from liubai.rollout.sampling import nucleus, sample, uniform
from liubai.rollout.torch_engine import TorchEngine
from liubai.types import Sample, Span, Stop

EOS = 1
MODEL = tiny_model(1)
OTHER = tiny_model(2)
with torch.no_grad():
    MODEL.embed_tokens.weight[EOS] *= 0.3  # the end is rare enough for some answers to grow long
SEED = 20240229


def engine_of(
    model: Transformer = MODEL, *, slots: int = 64, version: int = 0, eos: Sequence[int] = (EOS,)
) -> TorchEngine:
    engine = TorchEngine(copy.deepcopy(model), eos_ids=eos, slots=slots, max_length=512)
    engine.load(model.state_dict(), version)
    return engine


def mixed(count: int, *, longest: int = 300, temperature: float = 1.0) -> list[Request]:
    """Prompts of 1 to 140 tokens, some shared; a few answers long enough to cross several bands."""
    rng = random.Random(7)
    lengths = [1, 62, 63, 64, 65, 127, 128, 129, *(rng.randint(1, 140) for _ in range(count))]
    requests = []
    for i in range(count):
        prompt = tuple(rng.randrange(60) for _ in range(lengths[i]))
        if i % 5 == 4:
            prompt = requests[i - 1].prompt_ids
        budget = longest if i % 10 == 1 else rng.randint(1, 40)
        requests.append(
            Request(id=i, prompt_ids=prompt, max_tokens=budget, seed=SEED + i, temperature=temperature)
        )
    return requests


def assert_same(got: Sequence[Sample], wanted: Sequence[Sample], tolerance: float = 1e-5) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert a.completion_ids == b.completion_ids
        assert (a.prompt_ids, a.stop, a.versions) == (b.prompt_ids, b.stop, b.versions)
        assert a.logprobs == pytest.approx(b.logprobs, abs=tolerance)


# ---- engine and trainer ----


def trained_logprobs(model: Transformer, samples: Sequence[Sample], temperature: float) -> list[Tensor]:
    """By the code of the update: prompts of 32 tokens and more read once, its own temperature."""
    config = UpdateConfig(
        loss=LossConfig(aggregation="token-mean"), advantage="grpo", minibatches=1, max_tokens=512,
        temperature=temperature, tokens_per_microbatch=1024,
    )  # fmt: skip
    found: dict[float, Tensor] = {}
    pairs = [(s, [float(i)] * len(s.completion_ids)) for i, s in enumerate(samples)]
    for lot in lots(sequences(pairs, config, 0), config, EOS):
        with torch.no_grad():
            read = list(read_lot(model, lot, config))
        for batch, logprobs_BT, _ in read:
            numbers_BT = batch.values["advantages"]  # which sample a token belongs to
            for i in numbers_BT[batch.mask_BT].unique().tolist():
                found[i] = logprobs_BT[batch.mask_BT & (numbers_BT == i)]
    return [found[float(i)] for i in range(len(samples))]


def check_logprobs(temperature: float) -> None:
    requests = mixed(24, temperature=temperature)
    samples = generate(engine_of(), requests)
    assert max(len(s.prompt_ids) + len(s.completion_ids) for s in samples) > 256
    for s, trained in zip(samples, trained_logprobs(MODEL, samples, temperature), strict=True):
        wanted = naive_logprobs(MODEL, s, temperature).tolist()
        assert list(s.logprobs) == pytest.approx(wanted, abs=1e-4)
        assert list(s.logprobs) == pytest.approx(trained.tolist(), abs=1e-4)
        assert s.versions == (Span(0, len(s.completion_ids)),)


def test_sampler_logprob_equals_trainer_logprob() -> None:
    check_logprobs(1.0)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_logprobs_at_temperature(temperature: float) -> None:
    check_logprobs(temperature)


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_every_architecture_decodes_as_it_trains(architecture: str) -> None:
    model = tiny_model(4, tiny_config(architecture, num_key_value_heads=4, tie_word_embeddings=False))
    for s in generate(engine_of(model), mixed(12, longest=80)):
        assert list(s.logprobs) == pytest.approx(naive_logprobs(model, s).tolist(), abs=1e-4)


# ---- one answer is the same in any company ----


def test_batch_of_one_equals_batch_of_64() -> None:
    requests = mixed(64)
    together = generate(engine_of(slots=64), requests)
    alone = generate(engine_of(slots=1), requests)
    assert_same(together, alone)
    ends = [len(s.prompt_ids) + len(s.completion_ids) for s in alone]
    assert {(e - 1).bit_length() for e in ends} >= {6, 7, 8, 9}  # every band was in use
    assert {s.stop for s in alone} == {Stop.EOS, Stop.LENGTH}


@pytest.mark.parametrize("slots", [3, 17])
def test_refilled_slots_change_nothing(slots: int) -> None:
    requests = mixed(50, longest=150)
    assert_same(generate(engine_of(slots=slots), requests), generate(engine_of(slots=64), requests))


def test_requests_may_arrive_at_any_time_and_in_any_order() -> None:
    requests = mixed(20, longest=80)
    engine, done = engine_of(slots=8), {}
    waiting = requests[::-1]
    while waiting or engine.pending:
        if waiting:
            engine.submit([waiting.pop(0)])
        done.update((r.id, s) for r, s in engine.step())
    assert_same([done[r.id] for r in requests], generate(engine_of(), requests))


def ask(seed: int, *, prompt: Sequence[int] = (5, 6, 7), tokens: int = 30, **options: float) -> Request:
    return Request(id=seed, prompt_ids=tuple(prompt), max_tokens=tokens, seed=seed, **options)  # type: ignore[arg-type]


def test_the_seed_alone_decides_the_answer() -> None:
    first, again, other = (generate(engine_of(slots=n), [ask(s)])[0] for n, s in ((1, 3), (9, 3), (9, 4)))
    assert first.completion_ids == again.completion_ids
    assert first.completion_ids != other.completion_ids
    many = generate(engine_of(), [ask(seed) for seed in range(50)])
    assert len({s.completion_ids for s in many}) == 50


# ---- ending ----


def test_stop_reasons() -> None:
    samples = generate(engine_of(), [ask(seed, tokens=40) for seed in range(60)])
    by_eos = [s for s in samples if s.stop is Stop.EOS]
    cut = [s for s in samples if s.stop is Stop.LENGTH]
    assert by_eos
    assert cut
    assert len(by_eos) + len(cut) == 60
    for s in by_eos:
        assert s.completion_ids[-1] == EOS
        assert EOS not in s.completion_ids[:-1]
    for s in cut:
        assert len(s.completion_ids) == 40
        assert EOS not in s.completion_ids


def test_an_end_on_the_last_allowed_token_is_an_end() -> None:
    samples = generate(engine_of(), [ask(seed) for seed in range(60)])
    seed, s = next((i, s) for i, s in enumerate(samples) if s.stop is Stop.EOS and len(s.completion_ids) > 1)
    n = len(s.completion_ids)
    assert_same(generate(engine_of(), [ask(seed, tokens=n)]), [s])
    (cut,) = generate(engine_of(), [ask(seed, tokens=n - 1)])
    assert (cut.stop, cut.completion_ids) == (Stop.LENGTH, s.completion_ids[:-1])


def test_any_of_several_end_tokens_ends() -> None:
    samples = generate(engine_of(eos=(EOS, 9, 30)), [ask(seed, tokens=60) for seed in range(40)])
    assert {s.completion_ids[-1] for s in samples if s.stop is Stop.EOS} == {EOS, 9, 30}


def test_one_token_from_a_prompt_of_one() -> None:
    samples = generate(engine_of(), [ask(seed, prompt=(7,), tokens=1) for seed in range(40)])
    for s in samples:
        assert len(s.completion_ids) == 1
        assert s.stop is (Stop.EOS if s.completion_ids == (EOS,) else Stop.LENGTH)
        assert list(s.logprobs) == pytest.approx(naive_logprobs(MODEL, s).tolist(), abs=1e-5)


def test_abort_gives_back_what_was_begun() -> None:
    requests = mixed(12, longest=80)
    whole = generate(engine_of(), requests)
    engine, done = engine_of(slots=5), {}
    for _ in range(4):
        done.update((r.id, s) for r, s in engine.step())
    engine.submit(requests)
    for _ in range(6):
        done.update((r.id, s) for r, s in engine.step())
    aborted = {r.id: s for r, s in engine.abort()}
    assert engine.pending == 0
    assert engine.step() == []
    assert aborted
    assert not aborted.keys() & done.keys()
    for i, s in aborted.items():
        assert s.stop is Stop.ABORT
        assert s.completion_ids == whole[i].completion_ids[: len(s.completion_ids)]
        assert s.logprobs == pytest.approx(whole[i].logprobs[: len(s.logprobs)], abs=1e-5)
    assert_same(generate(engine, requests), whole)  # and it works on as if nothing had been


def test_end_tokens_in_the_prompt_are_words_like_others() -> None:
    """pad == eos == some prompt token: nothing is inferred from token values."""
    prompts = [(EOS,), (EOS, EOS, 5), (5, EOS), (0, 0, EOS, 0), tuple([EOS] * 70)]
    requests = [ask(i, prompt=p, tokens=20) for i, p in enumerate(prompts)]
    samples = generate(engine_of(), requests)
    assert_same(samples, generate(engine_of(slots=1), requests))
    for s, p in zip(samples, prompts, strict=True):
        assert s.prompt_ids == p
        assert list(s.logprobs) == pytest.approx(naive_logprobs(MODEL, s).tolist(), abs=1e-4)


# ---- choosing ----


@torch.no_grad()
def test_greedy_is_the_argmax_of_the_plain_model() -> None:
    prompts = [(7,), (5, 6, 7), tuple(range(2, 60))]
    requests = [ask(i, prompt=p, tokens=90, temperature=0.0) for i, p in enumerate(prompts)]
    # one that samples shares the batch
    samples = generate(engine_of(), [*requests, ask(9, tokens=90)])
    for s, p in zip(samples[:3], prompts, strict=True):
        ids = list(p)
        while len(ids) < len(p) + 90 and (len(ids) == len(p) or ids[-1] != EOS):
            ids.append(int(MODEL(torch.tensor([ids]))[0, -1].argmax()))
        assert list(s.completion_ids) == ids[len(p) :]
        assert list(s.logprobs) == pytest.approx(naive_logprobs(MODEL, s).tolist(), abs=1e-4)
    assert_same(samples[3:], generate(engine_of(), [ask(9, tokens=90)]))


@torch.no_grad()
def test_top_p_keeps_to_the_nucleus() -> None:
    samples = generate(engine_of(), [ask(i, tokens=20, top_p=0.6, temperature=0.8) for i in range(30)])
    free = generate(engine_of(), [ask(i, tokens=20, temperature=0.8) for i in range(30)])
    assert [s.completion_ids for s in samples] != [s.completion_ids for s in free]
    for s in samples:
        logits = MODEL(torch.tensor([s.prompt_ids + s.completion_ids]))[0, len(s.prompt_ids) - 1 : -1]
        for token, p in zip(s.completion_ids, torch.softmax(logits / 0.8, -1), strict=True):
            likelier = p[p > p[token]].sum()
            assert likelier < 0.6
        # the log-probability is of the full distribution
        assert list(s.logprobs) == pytest.approx(naive_logprobs(MODEL, s, 0.8).tolist(), abs=1e-4)


def test_top_p_of_one_request_leaves_its_neighbours_alone() -> None:
    requests = [ask(i, tokens=40) for i in range(20)]
    together = generate(engine_of(), [*requests, ask(99, tokens=40, top_p=0.3)])[:20]
    assert_same(together, generate(engine_of(), requests))
    # to the last bit: the distribution of a row with top_p 1 is not touched
    probs = torch.softmax(torch.randn(50, 400, generator=torch.Generator().manual_seed(0)) * 6, -1)
    top_p = torch.tensor([0.5, 1.0] * 25)
    assert torch.equal(nucleus(probs, top_p)[1::2], probs[1::2])


def test_nucleus_is_the_smallest_set_that_reaches_p() -> None:
    probs = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).expand(5, 4)
    kept = nucleus(probs, torch.tensor([0.01, 0.49, 0.51, 0.76, 0.95])) > 0
    assert kept.tolist() == [
        [False, True, False, False],
        [False, True, False, False],
        [False, True, False, True],
        [False, True, True, True],
        [True, True, True, True],
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_follow_the_distribution(temperature: float) -> None:
    """χ² of 40,000 draws; a token of probability 0 is never among them, wherever it stands."""
    n, inf = 40_000, float("inf")
    logits = torch.tensor([-inf, 1.0, 0.0, -inf, -1.5, 2.0, 0.3, -3.0, -inf])
    u = uniform(torch.arange(n) * 7919 + 1, torch.arange(n) % 50)
    ids, logprobs = sample(logits.expand(n, -1).contiguous(), u, torch.full((n,), temperature))
    wanted = torch.softmax(logits.double() / temperature, -1)
    counts = torch.bincount(ids, minlength=9)
    possible = wanted > 0
    assert counts[~possible].sum() == 0
    chi2 = ((counts - n * wanted)[possible] ** 2 / (n * wanted)[possible]).sum().item()
    assert chi2 < 20.5  # 5 degrees of freedom: one draw in a thousand exceeds it
    torch.testing.assert_close(logprobs.double(), wanted[ids].log(), rtol=0, atol=1e-6)


def test_the_edges_of_the_uniform_number_choose_possible_tokens() -> None:
    inf = float("inf")
    logits = torch.tensor([[-inf, 0.0, -inf, 0.0, -inf], [-inf, -inf, -9.0, -inf, -inf]])
    for u, wanted in ((0.0, [1, 2]), (0.49, [1, 2]), (0.51, [3, 2]), (1 - 2**-53, [3, 2])):
        assert sample(logits, torch.full((2,), u).double(), torch.ones(2))[0].tolist() == wanted
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(64, 5000, generator=generator) * 4
    wide[:, 4000:] = -inf
    ids, logprobs = sample(wide, torch.full((64,), 1 - 2**-53).double(), torch.ones(64))
    assert (ids < 4000).all()
    assert logprobs.isfinite().all()


def splitmix64(seed: int, index: int) -> float:
    """Steele, Lea and Flood 2014, as printed."""
    mask = (1 << 64) - 1
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) / 2**53


def test_uniform_is_splitmix64() -> None:
    rng = random.Random(0)
    pairs = [(rng.getrandbits(63), rng.randrange(4096)) for _ in range(500)]
    pairs += [(0, 0), (2**63 - 1, 0), (1, 10**6)]
    seeds, index = (torch.tensor(column) for column in zip(*pairs, strict=True))
    got = uniform(seeds, index)
    assert got.dtype == torch.float64
    assert got.tolist() == [splitmix64(*pair) for pair in pairs]
    assert splitmix64(0, 0) == (0xE220A8397B1DCDAF >> 11) / 2**53  # the published first output of seed 0


# ---- new weights ----


def test_new_weights_change_the_answers() -> None:
    engine, requests = engine_of(), [ask(seed) for seed in range(8)]
    before = generate(engine, requests)
    engine.load(OTHER.state_dict(), 3)
    after = generate(engine, requests)
    assert engine.version == 3
    assert [s.completion_ids for s in before] != [s.completion_ids for s in after]
    assert_same(after, generate(engine_of(OTHER, version=3), requests))


def test_weights_must_be_newer_and_there_at_all() -> None:
    engine = engine_of(version=4)
    for stale in (4, 3, 0):
        with pytest.raises(StaleWeights, match="not newer than 4"):
            engine.load(OTHER.state_dict(), stale)
    assert_same(generate(engine, [ask(1)]), generate(engine_of(version=4), [ask(1)]))
    empty = TorchEngine(copy.deepcopy(MODEL), eos_ids=[EOS])
    assert empty.version == -1
    empty.submit([ask(1)])
    with pytest.raises(StaleWeights, match="load first"):
        empty.step()


def test_weights_of_another_shape_are_refused() -> None:
    engine, requests = engine_of(), [ask(seed) for seed in range(4)]
    good = {n: t.clone() for n, t in OTHER.state_dict().items()}
    fewer = {n: t for n, t in good.items() if n != "norm.weight"}
    for bad in (fewer, {**good, "spare": torch.zeros(1)}, {**good, "norm.weight": torch.zeros(1)}):
        with pytest.raises(ValueError, match="another shape"):
            engine.load(bad, 9)
    assert engine.version == 0
    assert_same(generate(engine, requests), generate(engine_of(), requests))  # nothing was half-loaded


def test_loading_does_not_alias_the_trainers_weights() -> None:
    trainer = copy.deepcopy(MODEL)
    engine = engine_of(trainer)
    with torch.no_grad():
        for p in trainer.parameters():
            p.mul_(-1)
    assert_same(generate(engine, [ask(1)]), generate(engine_of(), [ask(1)]))


def drive(
    engine: TorchEngine, requests: Sequence[Request], updates: dict[int, tuple[Transformer, int]]
) -> list[Sample]:
    """Run, loading ``updates[k]`` after ``k`` steps."""
    engine.submit(requests)
    done: dict[int, Sample] = {}
    k = 0
    while engine.pending:
        if k in updates:
            model, version = updates[k]
            engine.load(model.state_dict(), version)
        done.update((r.id, s) for r, s in engine.step())
        k += 1
    return [done[r.id] for r in requests]


def test_inflight_without_an_update_is_plain() -> None:
    requests = mixed(20, longest=150)
    same = {5: (MODEL, 1), 33: (MODEL, 2)}
    samples = drive(engine_of(slots=8), requests, same)
    for s, plain in zip(samples, generate(engine_of(), requests), strict=True):
        assert s.completion_ids == plain.completion_ids
        assert s.logprobs == pytest.approx(plain.logprobs, abs=1e-5)
        assert s.stop is plain.stop


def test_inflight_update_keeps_the_past_and_changes_the_future() -> None:
    requests = mixed(30, longest=200)
    plain = generate(engine_of(), requests)
    third = tiny_model(3)
    policies = {0: MODEL, 1: OTHER, 2: third}
    samples = drive(engine_of(slots=11), requests, {12: (OTHER, 1), 30: (third, 2)})
    seen = set()
    for s, before in zip(samples, plain, strict=True):
        n = len(s.completion_ids)
        seen.add(tuple(span.version for span in s.versions))
        assert all(span.count > 0 for span in s.versions)
        assert sum(span.count for span in s.versions) == n
        assert [span.version for span in s.versions] == sorted({span.version for span in s.versions})
        at = 0
        for span in s.versions:
            # what the trainer gives these tokens under the weights that wrote them, whole prefix given
            wanted = naive_logprobs(policies[span.version], s)[at : at + span.count].tolist()
            assert list(s.logprobs[at : at + span.count]) == pytest.approx(wanted, abs=1e-4)
            if span.version == 0:
                assert s.completion_ids[: span.count] == before.completion_ids[: span.count]
                assert s.logprobs[: span.count] == pytest.approx(before.logprobs[: span.count], abs=1e-5)
            at += span.count
    assert seen >= {(0,), (0, 1), (0, 1, 2), (1,), (1, 2), (2,)}


# ---- stopping and going on elsewhere ----


def steps(engine: TorchEngine, count: int) -> dict[int, Sample]:
    return {r.id: s for _ in range(count) for r, s in engine.step()}


def finish(engine: TorchEngine) -> dict[int, Sample]:
    done = {}
    while engine.pending:
        done |= steps(engine, 1)
    return done


def test_a_fresh_engine_goes_on_bit_for_bit() -> None:
    """At the point where a stage saves: new weights are loaded right after."""
    requests = mixed(30, longest=150)
    here = engine_of(slots=11)
    here.submit(requests)
    first = steps(here, 25)
    partials = here.partials()
    begun = [p for p in partials if p.completion_ids]
    assert begun
    assert begun == partials[: len(begun)]  # begun ones first
    assert {p.request.id for p in partials} | first.keys() == set(range(30))
    assert here.pending == len(partials)
    there = TorchEngine(copy.deepcopy(OTHER), eos_ids=[EOS], slots=11, max_length=512)
    there.resume(partials)
    assert there.partials() == partials
    for engine in (here, there):
        engine.load(OTHER.state_dict(), 1)
    assert finish(here) == finish(there)


def test_a_fresh_engine_goes_on_under_the_same_weights() -> None:
    requests = mixed(30, longest=150)
    here = engine_of(slots=11)
    here.submit(requests)
    done = steps(here, 25)
    there = engine_of(slots=7)
    there.resume(here.partials())
    done |= finish(there)
    assert_same([done[i] for i in range(30)], generate(engine_of(), requests))


def test_partials_leave_the_engine_as_it_was() -> None:
    requests = mixed(12, longest=60)
    engine = engine_of(slots=5)
    engine.submit(requests)
    done: dict[int, Sample] = {}
    while engine.pending:
        engine.partials()
        done |= steps(engine, 1)
    assert_same([done[i] for i in range(12)], generate(engine_of(slots=5), requests), tolerance=0)


# ---- what cannot be asked ----


def test_a_request_that_cannot_fit_is_refused() -> None:
    engine = engine_of()
    (exact,) = generate(engine, [ask(0, prompt=(5,) * 500, tokens=12)])
    assert len(exact.completion_ids) <= 12
    with pytest.raises(ValueError, match="needs 513 tokens"):
        engine.submit([ask(0, prompt=(5,) * 500, tokens=13)])
    with pytest.raises(ValueError, match="needs 513 tokens"):
        engine.resume([Partial(ask(0, prompt=(5,) * 500, tokens=13))])
    with pytest.raises(ValueError, match="needs 513 tokens"):
        engine.submit([ask(1), ask(0, prompt=(5,) * 500, tokens=13)])
    assert engine.pending == 0  # all or nothing


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt_ids": ()}, "at least one prompt token"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_a_senseless_request_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**{"id": 0, "prompt_ids": (1,), "max_tokens": 3, "seed": 0, **wrong})  # type: ignore[arg-type]

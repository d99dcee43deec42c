"""What serving asks of the engine beyond training: withdrawing one answer, hearing tokens as they come, end
tokens and alternatives of one request. None of it may touch a neighbour."""

from __future__ import annotations

import copy
import random
from collections import defaultdict

import pytest
import torch
from conftest import naive_logprobs, tiny_model

from liubai.rollout.engine import Fresh, Request, generate
from liubai.rollout.torch_engine import TorchEngine
from liubai.types import Sample, Stop

EOS, VOCABULARY = 1, 60
MODEL = tiny_model(1)
with torch.no_grad():
    MODEL.embed_tokens.weight[EOS] *= 0.3


def engine_of(*, slots: int = 64, lot: int | None = None) -> TorchEngine:
    engine = TorchEngine(copy.deepcopy(MODEL), eos_ids=[EOS], slots=slots, max_length=512, lot=lot)
    engine.load(MODEL.state_dict(), 0)
    return engine


def ask(id: int, **options: object) -> Request:
    given = {"prompt_ids": (5, 6, 7 + id % 3), "max_tokens": 40, "seed": 1000 + id, **options}
    return Request(id=id, **given)  # type: ignore[arg-type]


def told(engine: TorchEngine, requests: list[Request]) -> tuple[dict[int, list[Fresh]], dict[int, Sample]]:
    """Every token as ``fresh`` told it, and every answer as ``step`` gave it."""
    heard, done = defaultdict(list), {}
    engine.submit(requests)
    while engine.pending:
        ended = engine.step()
        ids = [fresh.id for fresh in engine.fresh()]
        assert len(ids) == len(set(ids))
        assert {request.id for request, _ in ended} <= set(ids)
        for fresh in engine.fresh():
            heard[fresh.id].append(fresh)
        done.update((request.id, sample) for request, sample in ended)
    return heard, done


def assert_close(got: Sample, wanted: Sample) -> None:
    assert (got.completion_ids, got.stop) == (wanted.completion_ids, wanted.stop)
    assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)


# ---- hearing ----


@pytest.mark.parametrize("slots", [3, 64])
def test_fresh_is_the_answer_token_by_token(slots: int) -> None:
    heard, done = told(engine_of(slots=slots), [ask(i) for i in range(20)])
    assert heard.keys() == done.keys() == set(range(20))
    for i, sample in done.items():
        assert tuple(fresh.token for fresh in heard[i]) == sample.completion_ids
        assert tuple(fresh.logprob for fresh in heard[i]) == sample.logprobs
        assert all(fresh.alternatives == () for fresh in heard[i])


def test_to_listen_changes_nothing() -> None:
    requests = [ask(i) for i in range(20)]
    _, done = told(engine_of(slots=7), requests)
    assert [done[i] for i in range(20)] == generate(engine_of(slots=7), requests)  # to the last bit


def test_nothing_is_fresh_where_nothing_was_written() -> None:
    engine = engine_of()
    assert engine.fresh() == []
    engine.submit([ask(0, max_tokens=1)])
    assert engine.fresh() == []
    engine.step()
    assert [fresh.id for fresh in engine.fresh()] == [0]
    assert engine.step() == []
    assert engine.fresh() == []


def test_what_was_fresh_stays_told_after_a_withdrawal_and_a_load() -> None:
    engine = engine_of()
    engine.submit([ask(0), ask(1)])
    engine.step()
    before = engine.fresh()
    engine.cancel([0])
    assert engine.fresh() == before
    engine.load(MODEL.state_dict(), 1)
    assert engine.fresh() == before


# ---- withdrawing ----


def test_cancel_leaves_the_neighbours_alone() -> None:
    """A planted fault here (the wrong cache row dropped) would garble whoever moved into the hole."""
    requests = [ask(i, prompt_ids=tuple([5 + i % 9] * (1 + 9 * i))) for i in range(12)]
    whole = dict(enumerate(generate(engine_of(), requests)))
    engine, done, rng = engine_of(slots=5), {}, random.Random(3)
    engine.submit(requests)
    gone: dict[int, Sample | None] = {}
    for _ in range(400):
        if not engine.pending:
            break
        done.update((r.id, s) for r, s in engine.step())
        if rng.random() < 0.3 and len(gone) < 6:
            i = rng.choice([i for i in range(12) if i not in done and i not in gone] or [0])
            pending = engine.pending
            begun = {request.id: sample for request, sample in engine.cancel([i])}
            assert engine.pending == pending - (i not in done)
            gone[i] = begun.get(i)
    assert len(gone) >= 4
    assert done.keys() | gone.keys() == set(range(12))
    for i in done.keys() - gone.keys():
        assert_close(done[i], whole[i])
    begun_ones = {i: s for i, s in gone.items() if s is not None}
    assert begun_ones
    for i, sample in begun_ones.items():
        n = len(sample.completion_ids)
        assert sample.stop is Stop.ABORT
        assert n > 0
        assert sample.completion_ids == whole[i].completion_ids[:n]
        assert sample.logprobs == pytest.approx(whole[i].logprobs[:n], abs=1e-5)


def test_cancel_frees_the_slot_at_once() -> None:
    engine = engine_of(slots=1)
    engine.submit([ask(0, max_tokens=500), ask(1), ask(2)])
    engine.step()
    assert (engine.in_use, engine.pending) == (1, 3)
    begun = engine.cancel([0])
    assert [request.id for request, _ in begun] == [0]
    assert (engine.in_use, engine.pending) == (0, 2)
    engine.step()
    assert [fresh.id for fresh in engine.fresh()] == [1]


def test_cancel_of_one_that_waits_and_of_one_that_nobody_knows() -> None:
    engine = engine_of(slots=1)
    engine.submit([ask(0), ask(1), ask(2)])
    engine.step()
    assert engine.cancel([1, 99]) == []  # not begun: nothing to give back
    assert engine.pending == 2
    done = {}
    while engine.pending:
        done.update((r.id, s) for r, s in engine.step())
    assert done.keys() == {0, 2}
    assert engine.cancel([0, 1, 2]) == []


def test_cancel_between_load_and_step() -> None:
    """New weights send what was begun back to the queue; from there, too, it is given back."""
    engine = engine_of()
    engine.submit([ask(0), ask(1)])
    engine.step()
    engine.load(MODEL.state_dict(), 1)
    ((request, sample),) = engine.cancel([0])
    assert (request.id, sample.stop, len(sample.completion_ids)) == (0, Stop.ABORT, 1)
    assert engine.pending == 1


def test_small_lots_let_in_who_waits_as_soon_as_a_slot_is_free() -> None:
    for lot, begun in ((None, 0), (1, 1)):  # a sixteenth of 32 slots is 2
        engine = engine_of(slots=32, lot=lot)
        engine.submit([ask(i, max_tokens=400, seed=0, temperature=0.0) for i in range(31)])
        engine.submit([ask(31, max_tokens=1), ask(32)])
        engine.step()
        assert engine.in_use == 31
        engine.step()
        assert (32 in {fresh.id for fresh in engine.fresh()}) == bool(begun)
        engine.lot = 1  # changed on the way
        engine.step()
        assert 32 in {fresh.id for fresh in engine.fresh()}


# ---- end tokens of one request ----


def test_stop_ids_end_this_answer_and_no_other() -> None:
    plain = generate(engine_of(), [ask(i) for i in range(30)])
    i, sample = next((i, s) for i, s in enumerate(plain) if len(set(s.completion_ids)) > 8)
    stop = sample.completion_ids[5]
    at = sample.completion_ids.index(stop)
    requests = [ask(j, stop_ids=(58, stop) if j == i else ()) for j in range(30)]
    got = generate(engine_of(slots=11), requests)
    assert got[i].completion_ids == sample.completion_ids[: at + 1]
    assert got[i].stop is Stop.EOS
    for j in range(30):
        if j != i:
            assert_close(got[j], plain[j])


def test_the_next_in_a_slot_has_its_own_stop_ids() -> None:
    every = tuple(range(VOCABULARY))
    # the second goes on and has some, too, so that they are looked at when the third follows the first
    requests = [ask(0, stop_ids=every), ask(1, stop_ids=(EOS,)), ask(2), ask(3)]
    samples = generate(engine_of(slots=2), requests)
    plain = generate(engine_of(), [ask(i) for i in range(4)])
    assert samples[0].completion_ids == plain[0].completion_ids[:1]
    assert samples[0].stop is Stop.EOS
    for got, wanted in zip(samples[1:], plain[1:], strict=True):
        assert_close(got, wanted)
    assert max(len(s.completion_ids) for s in samples[1:]) > 1


def test_a_stop_id_that_was_cancelled_with_its_answer_is_forgotten() -> None:
    engine = engine_of(slots=1)
    engine.submit([ask(0, stop_ids=tuple(range(2, VOCABULARY)), max_tokens=2), ask(1)])
    engine.step()
    engine.cancel([0])
    done = {}
    while engine.pending:
        done.update((r.id, s) for r, s in engine.step())
    assert_close(done[1], generate(engine_of(), [ask(1)])[0])


# ---- alternatives ----


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_alternatives_are_the_likeliest_of_the_full_distribution(temperature: float) -> None:
    """Against a loop over the plain model, in float64; also where a nucleus cuts the choice."""
    requests = [
        ask(0, alternatives=3, temperature=temperature),
        ask(1, alternatives=5, temperature=temperature, top_p=0.4),
        ask(2, alternatives=0),
        ask(3, alternatives=100, temperature=temperature),
    ]
    heard, done = told(engine_of(), requests)
    for request in requests:
        sample, count = done[request.id], min(request.alternatives, VOCABULARY)
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
        at = len(sample.prompt_ids)
        rows = torch.log_softmax(MODEL(ids)[0, at - 1 : -1].double() / (temperature or 1.0), -1)
        for fresh, row in zip(heard[request.id], rows.tolist(), strict=True):
            wanted = sorted(((p, i) for i, p in enumerate(row)), reverse=True)[:count]
            assert len(fresh.alternatives) == count
            assert [i for i, _ in fresh.alternatives] == [i for _, i in wanted]
            assert [p for _, p in fresh.alternatives] == pytest.approx([p for p, _ in wanted], abs=1e-4)
            if count == VOCABULARY:
                assert dict(fresh.alternatives)[fresh.token] == pytest.approx(fresh.logprob, abs=1e-5)


def test_alternatives_of_one_leave_its_neighbours_and_itself_alone() -> None:
    plain = generate(engine_of(), [ask(i) for i in range(12)])
    asked = generate(engine_of(), [ask(i, alternatives=4 * (i % 2)) for i in range(12)])
    assert asked == plain  # to the last bit


def test_the_next_in_a_slot_has_no_alternatives_that_it_did_not_ask_for() -> None:
    heard, _ = told(engine_of(slots=1), [ask(0, alternatives=2), ask(1), ask(2, alternatives=1)])
    assert [{len(fresh.alternatives) for fresh in heard[i]} for i in range(3)] == [{2}, {0}, {1}]


def test_nobody_pays_for_what_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("alternatives were computed for nobody")

    monkeypatch.setattr(TorchEngine, "_look", never)
    engine = engine_of(slots=2)
    engine.submit([ask(0), ask(1), ask(2, alternatives=2)])
    engine.cancel([2])
    while engine.pending:
        engine.step()


def test_logprobs_stay_those_of_the_trainer() -> None:
    for sample in generate(engine_of(), [ask(i, alternatives=2, stop_ids=(9,)) for i in range(8)]):
        assert list(sample.logprobs) == pytest.approx(naive_logprobs(MODEL, sample).tolist(), abs=1e-4)


def test_fewer_than_no_alternatives_are_refused() -> None:
    with pytest.raises(ValueError, match="alternatives must be at least 0"):
        ask(0, alternatives=-1)

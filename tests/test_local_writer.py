"""Many coroutines, one engine: the answers are the engine's own, and nobody's trouble is another's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import torch
from conftest import tiny_model

from liubai.errors import Diverged, UserError
from liubai.model.transformer import Transformer
from liubai.rollout.beam import BeamSearch
from liubai.rollout.engine import Request, generate
from liubai.rollout.local import Judging, LocalWriter, run
from liubai.rollout.torch_engine import TorchEngine
from liubai.rollout.writer import Beams, Judge, Piece
from liubai.types import Sample, Stop

EOS = 1
MODEL = tiny_model(1)
with torch.no_grad():
    MODEL.embed_tokens.weight[EOS] *= 0.3  # some answers grow long


def engine_of(model: Transformer = MODEL, slots: int = 8) -> TorchEngine:
    engine = TorchEngine(model, eos_ids=(EOS,), slots=slots, max_length=200, lot=1)
    engine.load(model.state_dict(), 0)
    return engine


def writer_of(
    slots: int = 8, judges: dict[Judge, Judging] | None = None, model: Transformer = MODEL
) -> LocalWriter:
    return LocalWriter(engine_of(model, slots), eos_ids=(EOS,), judges=judges)


def requests(count: int, max_tokens: int = 30) -> list[Request]:
    return [
        Request(id=i, prompt_ids=(2 + i % 5, 9, 11), max_tokens=max_tokens, seed=1000 + i)
        for i in range(count)
    ]


def endless(i: int = 0, max_tokens: int = 150) -> Request:
    """Greedy, and on this prompt without an end."""
    return Request(id=i, prompt_ids=(7, 7, 7), max_tokens=max_tokens, seed=i, temperature=0.0)


def test_the_answers_are_those_of_the_engine_alone() -> None:
    asked = requests(40)
    wanted = generate(engine_of(), asked)
    writer = writer_of(slots=5)
    found = run(writer, [writer.write(r) for r in asked])
    assert [(s.completion_ids, s.stop) for s in found] == [(s.completion_ids, s.stop) for s in wanted]
    assert [s.logprobs for s in found] == [pytest.approx(s.logprobs, abs=1e-5) for s in wanted]
    assert writer.engine.pending == 0


def test_equal_ids_of_strangers_do_not_meet() -> None:
    asked = [Request(id=0, prompt_ids=(i, 5), max_tokens=12, seed=i) for i in range(2, 12)]
    writer = writer_of()
    found = run(writer, [writer.write(r) for r in asked])
    assert [s.prompt_ids for s in found] == [r.prompt_ids for r in asked]


def test_what_is_heard_is_the_answer() -> None:
    asked = [
        Request(id=i, prompt_ids=(3, i), max_tokens=20, seed=i, alternatives=i % 3) for i in range(2, 14)
    ]
    writer = writer_of(slots=4)
    told: list[list[Piece]] = [[] for _ in asked]
    found = run(writer, [writer.write(r, heard.append) for r, heard in zip(asked, told, strict=True)])
    for request, pieces, sample in zip(asked, told, found, strict=True):
        assert tuple(i for p in pieces for i in p.ids) == sample.completion_ids
        assert tuple(x for p in pieces for x in p.logprobs) == sample.logprobs
        for piece in pieces:
            assert [len(a) for a in piece.alternatives] == (
                [request.alternatives] if request.alternatives else []
            )
            for likeliest, i, logprob in zip(piece.alternatives, piece.ids, piece.logprobs, strict=False):
                assert dict(likeliest).get(i, logprob) == pytest.approx(logprob, abs=1e-5)


def test_answers_that_lead_to_answers_are_written_together() -> None:
    """What follows an answer is asked for before the next step: five times four tokens beside one answer of
    twenty are twenty steps, through however many tasks the news of an answer goes."""
    writer = writer_of(slots=16)
    steps = 0
    step = writer.engine.step

    def counted() -> list[tuple[Request, Sample]]:
        nonlocal steps
        steps += 1
        return step()

    writer.engine.step = counted  # type: ignore[method-assign]

    async def chain(i: int) -> int:
        total = 0
        for k in range(5):
            parts = await asyncio.gather(*(writer.write(endless(i, 4)) for _ in range(1 + k % 2)))
            total += sum(len(p.completion_ids) for p in parts)
        return total

    async def long() -> int:
        return len((await writer.write(endless(9, 20))).completion_ids)

    assert run(writer, [*(chain(i) for i in range(4)), long()]) == [28, 28, 28, 28, 20]
    assert steps == 20


def test_the_order_of_events_repeats() -> None:
    def trace() -> list[tuple[int, int]]:
        writer, events = writer_of(slots=3), list[tuple[int, int]]()

        async def job(i: int) -> None:
            for k in range(3):
                sample = await writer.write(
                    Request(id=0, prompt_ids=(2, 3 + i), max_tokens=9, seed=10 * i + k)
                )
                events.append((i, len(sample.completion_ids)))

        run(writer, [job(i) for i in range(7)])
        return events

    assert trace() == trace()


def test_nobody_waits_for_a_crowd() -> None:
    """First come, first served: a short answer that comes after three long ones is not the last."""
    writer, ended = writer_of(slots=2), list[str]()

    async def job(name: str, max_tokens: int) -> None:
        await writer.write(endless(0, max_tokens))
        ended.append(name)

    run(writer, [job("long", 100), job("short", 5), job("next", 40), job("last", 40)])
    assert ended == ["short", "next", "last", "long"]


def test_who_is_cancelled_frees_the_slot() -> None:
    writer = writer_of(slots=1)

    async def job() -> tuple[Sample, int]:
        heard = asyncio.Event()
        first = asyncio.create_task(writer.write(endless(), lambda piece: heard.set()))
        waiting = asyncio.create_task(writer.write(endless(1)))
        await heard.wait()
        first.cancel()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        with pytest.raises(asyncio.CancelledError):
            await waiting
        left = writer.engine.pending
        return await writer.write(endless(2, 3)), left

    [(sample, left)] = run(writer, [job()])
    assert left == 0
    assert len(sample.completion_ids) == 3


def test_an_error_of_one_leaves_the_others_alone() -> None:
    writer = writer_of(judges={"process": lambda answers: [1 / 0 for _ in answers]})

    def deaf(piece: Piece) -> None:
        raise KeyError("deaf")

    async def all_kinds() -> list[object]:
        too_long = Request(id=0, prompt_ids=(2,) * 150, max_tokens=60, seed=0)
        return await asyncio.gather(
            writer.write(endless(0, 20), deaf),
            writer.write(too_long),
            writer.judge("process", [("q", "a")]),
            writer.judge("preference", [("q", "a")]),
            writer.beams(too_long, 2),
            writer.write(endless(1, 20)),
            return_exceptions=True,
        )

    [(*errors, good)] = run(writer, [all_kinds()])
    assert [type(e) for e in errors] == [KeyError, ValueError, ZeroDivisionError, UserError, ValueError]
    assert isinstance(good, Sample)
    assert len(good.completion_ids) == 20
    assert writer.engine.pending == 0


def test_the_first_error_of_a_job_stops_the_rest_and_is_raised() -> None:
    writer = writer_of()
    stopped = []

    async def fails() -> None:
        await writer.write(endless(0, 3))
        raise UserError("as asked")

    async def goes_on() -> None:
        try:
            await writer.write(endless(1))
        except asyncio.CancelledError:
            stopped.append(True)
            raise

    with pytest.raises(UserError, match="as asked"):
        run(writer, [fails(), goes_on()])
    assert stopped == [True]
    assert writer.engine.pending == 0


def test_broken_weights_end_all_that_is_open_and_nothing_hangs() -> None:
    broken = tiny_model(2)
    with torch.no_grad():
        broken.norm.weight[0] = torch.nan
    writer = writer_of(model=broken)

    async def both() -> list[object]:
        jobs = (writer.write(r) for r in requests(2))
        return await asyncio.gather(*jobs, return_exceptions=True)

    [found] = run(writer, [both()])
    assert [type(e) for e in found] == [Diverged, Diverged]
    assert writer.engine.pending == 0


def test_an_engine_that_fails_in_an_unknown_way_is_told_to_all() -> None:
    writer = writer_of()

    def step() -> list[tuple[Request, Sample]]:
        raise RuntimeError("unknown")

    writer.engine.step = step  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="unknown"):
        run(writer, [writer.write(endless()), writer.write(endless(1))])


def test_beams_are_those_of_the_search() -> None:
    asked = Request(id=0, prompt_ids=(4, 5, 6), max_tokens=12, seed=0)
    search = BeamSearch(MODEL, asked, 3, eos_ids=(EOS,))
    steps = 1
    while search.step():
        steps += 1
    writer = writer_of()
    beams, sample = run(writer, [both_of(writer, asked)])[0]
    assert beams == search.best()
    assert beams.steps == steps
    assert len(sample.completion_ids) == 12


async def both_of(writer: LocalWriter, asked: Request) -> tuple[Beams, Sample]:
    return await asyncio.gather(writer.beams(asked, 3), writer.write(endless(0, 12)))


def test_judges_are_asked_together_and_answer_each() -> None:
    heard: list[list[tuple[str, str]]] = []

    def judge(answers: Sequence[tuple[str, str]]) -> list[float]:
        heard.append(list(answers))
        return [float(len(response)) for _, response in answers]

    writer = writer_of(judges={"preference": judge})
    assert writer.judges() == {"preference"}
    jobs = [writer.judge("preference", [("q", "a" * i)] * (i % 3)) for i in range(6)]
    assert run(writer, jobs) == [[float(i)] * (i % 3) for i in range(6)]
    assert len(heard) == 1


def test_somebody_outside_may_be_waited_for() -> None:
    """A tool takes its time while others are written, and while nobody is."""
    writer = writer_of()

    async def with_tool() -> int:
        first = await writer.write(endless(0, 4))
        await asyncio.sleep(0.01)
        second = await writer.write(endless(1, 4))
        return len(first.completion_ids + second.completion_ids)

    assert run(writer, [with_tool(), with_tool()]) == [8, 8]


def test_the_same_writer_works_again() -> None:
    writer = writer_of()
    for _ in range(2):
        [sample] = run(writer, [writer.write(endless(0, 5))])
        assert sample.stop is Stop.LENGTH

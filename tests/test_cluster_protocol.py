"""The engine over many actors as others use it: partials, withdrawals, questions to each actor, its end."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_model
from crew import Hand, ScriptedCrew, engine_of, length_of, requests_of

from liubai.cluster.crew import Lost, Report, Written
from liubai.cluster.engine import RemoteEngine
from liubai.rollout.canary import Canaries, NotArrived
from liubai.rollout.engine import Partial, Request, StaleWeights, generate
from liubai.rollout.engines import EngineConfig, canary_for, engine_for
from liubai.types import Sample, Span


def test_weights_only_grow_newer_and_must_be_there() -> None:
    engine = engine_of(ScriptedCrew(1))
    assert engine.version == -1
    with pytest.raises(StaleWeights):
        engine.step()
    engine.load({}, 3)
    assert engine.version == 3
    with pytest.raises(StaleWeights):
        engine.load({}, 3)


def test_what_cannot_be_written_is_refused_at_once() -> None:
    engine = engine_of(ScriptedCrew(1))
    with pytest.raises(ValueError, match="33 tokens"):
        engine.submit(requests_of(1, 1, max_tokens=30))
    engine.submit(requests_of(1, 1))
    with pytest.raises(ValueError, match="pending already"):
        engine.submit(requests_of(1, 1))
    assert engine.pending == 1


def test_an_idle_engine_asks_nobody() -> None:
    crew = ScriptedCrew(1, die=1.0)
    engine = engine_of(crew)
    engine.load({}, 0)
    assert engine.step() == []
    assert engine.losses == 0


@pytest.mark.parametrize("exact", [True, False])
def test_partials_are_what_is_pending_and_can_be_taken_up_elsewhere(exact: bool) -> None:
    crew = ScriptedCrew(2, rush=0.0)
    engine = engine_of(crew, exact=exact)
    engine.load({}, 0)
    asked = requests_of(4, 3)
    engine.submit(asked)
    home: dict[int, Sample] = {}
    while len(home) < 3:
        home |= {request.id: sample for request, sample in engine.step()}
    left = engine.partials()
    assert [p.request for p in left] == [r for r in asked if r.id not in home]
    assert all(p == Partial(p.request) for p in left)
    other = engine_of(ScriptedCrew(3))
    other.load({}, 0)
    other.resume(left)
    while other.pending:
        for request, sample in other.step():
            assert request.id not in home
            home[request.id] = sample
    assert home.keys() == {r.id for r in asked}


def test_begun_answers_of_another_engine_go_on() -> None:
    crew = ScriptedCrew(1)
    engine = engine_of(crew, exact=False)
    engine.load({}, 4)
    request = requests_of(1, 1, max_tokens=12)[0]
    length = length_of(request)
    assert length > 2
    engine.resume([Partial(request, (8, 9), (-0.5, -0.5), (Span(2, 2),))])
    ((_, sample),) = [pair for _ in range(3) for pair in engine.step()]
    assert sample.versions == (Span(2, 2), Span(4, length - 2))


@pytest.mark.parametrize("exact", [True, False])
def test_what_is_withdrawn_is_never_heard_of(exact: bool) -> None:
    crew = ScriptedCrew(2, rush=0.0)
    engine = engine_of(crew, exact=exact, room=40)
    engine.load({}, 0)
    asked = requests_of(5, 3)
    engine.submit(asked[:9])
    for _ in range(2):
        engine.step()
    engine.submit(asked[9:])  # not cut into lots yet
    gone = {r.id for r in asked[::2]} & {p.request.id for p in engine.partials()}
    assert engine.cancel([*gone, 999]) == []
    home = Counter[int]()
    while engine.pending:
        home.update(request.id for request, _ in engine.step())
    assert not home.keys() & gone
    assert set(home.values()) <= {1}
    engine.submit(asked[:6])
    engine.step()
    assert engine.abort() == []
    assert engine.pending == 0
    assert not any(hand.lots and any(t.spans for t in hand.lots) for hand in crew.hands.values())
    # the same numbers once more
    assert len(generate(engine, asked)) == 15


def test_fresh_is_what_came_home() -> None:
    engine = engine_of(ScriptedCrew(1))
    engine.load({}, 0)
    engine.submit(requests_of(1, 3))
    seen: dict[int, list[int]] = {}
    home: dict[int, Sample] = {}
    while engine.pending:
        home |= {request.id: sample for request, sample in engine.step()}
        for token in engine.fresh():
            seen.setdefault(token.id, []).append(token.token)
    assert {id: tuple(ids) for id, ids in seen.items()} == {id: s.completion_ids for id, s in home.items()}


PROBES = [Request(id=-1 - i, prompt_ids=(9,), max_tokens=2, seed=i) for i in range(3)]


@pytest.mark.parametrize("exact", [True, False])
def test_one_may_ask_each_before_all_others(exact: bool) -> None:
    crew = ScriptedCrew(2, rush=0.1)
    engine = engine_of(crew, exact=exact, room=30, slots=2)
    engine.load({}, 0)
    asked = requests_of(6, 2)
    engine.submit(asked)
    engine.step()
    found = engine.ask_each(PROBES)
    expected = [s.completion_ids for s in generate(other(), PROBES)]
    assert {place: [s.completion_ids for s in said] for place, said in found.items()} == {
        0: expected,
        1: expected,
    }
    assert {place for place, ids in crew.written if set(ids) & {-1, -2, -3}} == {0}
    assert {place for place, ids in crew.written if set(ids) & {-4, -5, -6}} == {1}
    home = Counter[int]()
    while engine.pending:
        home.update(request.id for request, _ in engine.step())
    assert home == Counter(range(12))
    assert engine.ask_each([]) == {}


def test_what_came_home_while_one_asked_is_in_a_resume_point() -> None:
    crew = ScriptedCrew(2, rush=1.0)
    engine = engine_of(crew, exact=False, slots=2)
    engine.load({}, 0)
    asked = requests_of(3, 4)
    engine.submit(asked)
    engine.step()
    engine.ask_each(PROBES)
    assert engine._kept
    left = engine.partials()
    assert len(left) == engine.pending
    assert {p.request.id for p in left} == {r.id for r in asked}
    home = [request.id for request, _ in engine.step()]
    while engine.pending:
        home += [request.id for request, _ in engine.step()]
    assert sorted(home) == [r.id for r in asked]


@pytest.mark.parametrize("state", ["starting", "down"])
def test_who_is_not_there_is_not_waited_for(state: str) -> None:
    crew = ScriptedCrew(3)
    engine = engine_of(crew)
    engine.load({}, 0)
    engine.step()
    generate(engine, requests_of(3, 1))
    crew.hands.pop(1)
    engine._lose(1, "its node is gone")
    engine._places[1].due = math.inf if state == "down" else 0.0
    hear = crew.hear

    def without(seconds: float) -> list[Report | Lost]:
        return [one for one in hear(seconds) if one.place != 1]

    crew.hear = without  # type: ignore[method-assign]
    assert engine.ask_each(PROBES).keys() == {0, 2}
    assert engine._places[1].state == state
    assert engine.pending == 0


def test_an_actor_that_is_lost_over_what_it_was_asked_is_not_waited_for() -> None:
    crew = ScriptedCrew(2, rush=0.0)
    engine = engine_of(crew)
    engine.load({}, 0)
    generate(engine, requests_of(2, 1))
    hear = crew.hear

    def dying(seconds: float) -> list[Report | Lost]:
        if (hand := crew.hands.get(1)) and hand.lots:
            del crew.hands[1]
            engine._places[1].losses = 5  # it is not started again at once
            return [Lost(1, "killed"), *hear(seconds)]
        return hear(seconds)

    crew.hear = dying  # type: ignore[method-assign]
    assert engine.ask_each(PROBES).keys() == {0}
    assert engine.pending == 0


class Knowing(ScriptedCrew):
    """Actors whose log-probabilities say which weights they have; that of place 1 takes no others than the
    first."""

    deaf = False

    def load(self, place: int, weights: object, version: int, oldest: int | None) -> None:
        hand = self.hands[place]
        known = getattr(hand, "weights", None)
        super().load(place, weights, version, oldest)
        hand.weights = known if known and place == 1 and self.deaf else weights  # type: ignore[attr-defined]

    def advance(self, hand: Hand) -> list[Written]:
        by = float(hand.weights["by"])  # type: ignore[attr-defined]
        return [one._replace(logprobs=(by,) * len(one.ids)) for one in super().advance(hand)]


@pytest.mark.parametrize("deaf", [False, True])
def test_the_canary_asks_every_actor(deaf: bool) -> None:
    """A transfer may fail in one alone, of which the canary has a memory of its own."""
    crew = Knowing(3)
    crew.deaf = deaf
    engine = engine_of(crew)
    by = 0.0
    config = EngineConfig(kind="vllm")
    canary = canary_for(config, engine, tiny_model(0), [(5, 6)], temperature=1.0, max_tokens=8, seed=0)
    assert isinstance(canary, Canaries)

    def score(samples: Sequence[Sample]) -> list[list[float]]:
        return [[by] * len(s.completion_ids) for s in samples]

    canary.canary.score = score
    for version in range(3):
        by = -1.0 - version
        engine.load({"by": torch.tensor(by)}, version)
        if deaf and version:
            with pytest.raises(NotArrived, match=r"^rollout actor 1: .* still answers as with version 0"):
                canary.look(version)
            break
        canary.look(version)
        assert canary.gap == 0
    assert engine.pending == 0


def other() -> RemoteEngine:
    engine = engine_of(ScriptedCrew(1))
    engine.load({}, 0)
    return engine


def test_to_close_is_to_end_them_all_once(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = ScriptedCrew(1)
    engine = engine_of(crew)
    engine.close()
    assert crew.closed
    monkeypatch.setattr(crew, "close", lambda: pytest.fail("closed a second time"))
    engine.close()


def test_the_actors_of_a_stage_end_with_it(tmp_path: Path) -> None:
    """Each has a GPU, which the next stage may want."""
    crew = ScriptedCrew(2)
    given: dict[str, object] = {}

    def make(config: EngineConfig, model: object, **settings: object) -> RemoteEngine:
        given.update(settings)
        return engine_of(crew)

    cluster: Any = SimpleNamespace(engine_for=make)
    with ExitStack() as stack:
        engine_for(
            EngineConfig(),
            tiny_model(0),
            parent=tmp_path,
            eos_ids=[1],
            slots=2,
            max_length=32,
            folder=tmp_path / "weights",
            stack=stack,
            cluster=cluster,
        )
        assert not crew.closed
    assert crew.closed
    assert given["folder"] == tmp_path / "weights"

"""The engine over many actors, against actors without processes: nothing lost, nothing doubled or stale."""

from __future__ import annotations

import io
import itertools
import math
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_model
from crew import Hand, ScriptedCrew, length_of
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import liubai.cluster.engine as module
from liubai.cluster.connect import connect
from liubai.cluster.crew import Lost, Report, Written
from liubai.cluster.engine import RemoteEngine
from liubai.commands.shared import Elsewhere
from liubai.errors import UserError
from liubai.rollout.canary import Canaries, NotArrived
from liubai.rollout.engine import Partial, Request, StaleWeights, generate
from liubai.rollout.engines import EngineConfig, canary_for, engine_for
from liubai.stages.view import LiveView, PlainView
from liubai.types import Sample, Span


def requests_of(groups: int, samples: int, first: int = 0, max_tokens: int = 12) -> list[Request]:
    return [
        Request(id=g * samples + j, prompt_ids=(5, g, 7), max_tokens=max_tokens, seed=1000 * g + j)
        for g in range(first, first + groups)
        for j in range(samples)
    ]


def engine_of(crew: ScriptedCrew, **settings: object) -> RemoteEngine:
    plain: dict[str, object] = {"slots": 8, "max_length": 32}
    return RemoteEngine(crew, **(plain | settings))  # type: ignore[arg-type]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


# ---- exact: lots are what decides ----


@given(
    size=st.integers(1, 5),
    groups=st.integers(1, 9),
    samples=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    die=st.sampled_from([0.0, 0.02, 0.05]),
)
def test_a_run_with_losses_is_the_run_without(
    size: int, groups: int, samples: int, seed: int, die: float
) -> None:
    """To the last bit: log-probabilities here tell with whom an answer was written."""
    clock = Clock()
    quiet = engine_of(ScriptedCrew(size))
    crew = ScriptedCrew(size, seed, die=die, twice=0.1, rush=0.3)
    engine = engine_of(crew, clock=clock)
    for version in range(3):
        asked = requests_of(groups, samples, first=groups * version)
        for each in (quiet, engine):
            each.load({}, version)
        expected = generate(quiet, asked)
        found: dict[int, Sample] = {}
        engine.submit(asked)
        while engine.pending:
            clock.now += 100.0  # whoever was lost is due
            for request, sample in engine.step():
                assert request.id not in found
                found[request.id] = sample
        assert [found[r.id] for r in asked] == expected
        assert all(s.versions == (Span(version, len(s.completion_ids)),) for s in found.values())
    assert engine.losses == sum(crew.starts) - size + sum(a.state == "down" for a in engine._places)
    assert engine.doubled >= crew.told_twice * (die == 0)
    assert engine.stale == 0


def test_lots_are_whole_groups_one_an_actor() -> None:
    crew = ScriptedCrew(3)
    engine = engine_of(crew)
    engine.load({}, 0)
    generate(engine, requests_of(7, 4))
    groups = [sorted({id // 4 for id in ids}) for _, ids in crew.written]
    assert groups == [[0, 1], [2, 3], [4, 5, 6]]
    assert sorted(place for place, _ in crew.written) == [0, 1, 2]


def test_an_actor_has_one_lot_at_a_time() -> None:
    """The others being gone, the one that is left writes one lot after the other."""
    crew = ScriptedCrew(3, rush=0.2)
    engine = engine_of(crew)
    engine.load({}, 0)
    engine.submit(requests_of(6, 4))
    for place in (1, 2):
        del crew.hands[place]
        engine._lose(place, "gone")
        engine._places[place].due = math.inf  # nobody comes back
    while engine.pending:
        engine.step()
        assert len(crew.hands[0].lots) <= 1
    assert [place for place, _ in crew.written] == [0, 0, 0]
    assert Counter(id for _, ids in crew.written for id in ids) == Counter(range(24))


def test_a_lost_lot_is_written_again_whole_and_first() -> None:
    crew = ScriptedCrew(1, rush=0.0)
    engine = engine_of(crew, clock=(clock := Clock()))
    engine.load({}, 0)
    asked = requests_of(2, 3, max_tokens=9)
    engine.submit(asked)
    home: list[tuple[Request, Sample]] = []
    while not home:
        home += engine.step()
    assert len(home) < 6
    del crew.hands[0]
    engine._lose(0, "gone")
    engine.submit(requests_of(1, 3, first=2))
    while engine.pending:
        clock.now += 1
        home += engine.step()
    assert [ids for _, ids in crew.written] == [tuple(range(6)), tuple(range(6)), (6, 7, 8)]
    assert sorted(request.id for request, _ in home) == list(range(9))
    lengths = [length_of(request) for request in asked]
    assert engine.doubled == lengths.count(min(lengths))  # those that were home came once more


# ---- in flight ----


@given(
    size=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    die=st.sampled_from([0.0, 0.1]),
    bound=st.sampled_from([None, 0, 1, 3]),
)
def test_in_flight_each_comes_home_once_and_none_too_old(
    size: int, seed: int, die: float, bound: int | None
) -> None:
    clock = Clock()
    crew = ScriptedCrew(size, seed, die=die, twice=0.1, rush=0.2)
    engine = engine_of(crew, exact=False, max_staleness=bound, clock=clock)
    found: dict[int, Sample] = {}
    for version in range(6):
        engine.load({}, version)
        engine.submit(requests_of(3, 4, first=3 * version))
        for _ in range(3):  # not to the end: the rest goes on under the next weights
            clock.now += 100.0
            take(engine, found, bound)
    while engine.pending:
        clock.now += 100.0
        take(engine, found, bound)
    assert found.keys() == {r.id for r in requests_of(18, 4)}
    if bound is None:
        assert engine.stale == 0


def take(engine: RemoteEngine, found: dict[int, Sample], bound: int | None) -> None:
    for request, sample in engine.step():
        assert request.id not in found
        assert bound is None or engine.version - sample.version <= bound
        found[request.id] = sample


def test_what_is_too_old_is_counted_and_asked_for_again() -> None:
    crew = ScriptedCrew(1, rush=0.0)
    engine = engine_of(crew, exact=False, max_staleness=1)
    asked = requests_of(1, 3, max_tokens=12)
    lengths = {r.id: length_of(r) for r in asked}
    engine.load({}, 0)
    engine.submit(asked)
    engine.step()  # it says that it is there
    found: dict[int, Sample] = {}
    for version in range(1, 4):  # a token under each version
        take(engine, found, 1)
        engine.load({}, version)
    while engine.pending:
        take(engine, found, 1)
    old = [id for id, length in lengths.items() if length > 2]
    assert engine.stale == len(old) > 0
    assert found.keys() == lengths.keys()
    assert all(found[id].versions == (Span(3, lengths[id]),) for id in old)  # from the beginning


def test_what_an_actor_began_again_is_counted() -> None:
    crew = ScriptedCrew(1)
    engine = engine_of(crew, exact=False, max_staleness=0)
    engine.load({}, 0)
    engine.submit(requests_of(1, 1))
    engine._take(Report(0, begun_again=3))
    assert engine.stale == 3


@given(seed=st.integers(0, 10**6), samples=st.integers(1, 5), room=st.integers(20, 200))
def test_an_actor_is_given_no_more_than_it_has_room_for(seed: int, samples: int, room: int) -> None:
    crew = ScriptedCrew(2, seed, die=0.05, rush=0.2)
    engine = engine_of(crew, exact=False, room=room, clock=(clock := Clock()))
    engine.load({}, 0)
    engine.submit(requests_of(12, samples))
    while engine.pending:
        clock.now += 100.0
        engine.step()
    assert crew.most <= room


def test_work_goes_to_the_least_loaded() -> None:
    crew = ScriptedCrew(3, rush=0.0)
    engine = engine_of(crew, exact=False)
    engine.load({}, 0)
    engine.submit(requests_of(6, 4, max_tokens=20))
    engine.step()
    assert Counter(place for place, _ in crew.written) == {0: 2, 1: 2, 2: 2}


def test_of_a_lost_lot_only_the_rest_is_asked_for_again() -> None:
    crew = ScriptedCrew(1, rush=0.0)
    engine = engine_of(crew, exact=False, clock=(clock := Clock()))
    engine.load({}, 0)
    engine.submit(requests_of(1, 6, max_tokens=9))
    home: list[tuple[Request, Sample]] = []
    while not home:
        home += engine.step()
    del crew.hands[0]
    engine._lose(0, "gone")
    while engine.pending:
        clock.now += 1
        home += engine.step()
    assert sorted(request.id for request, _ in home) == list(range(6))
    first, again = (set(ids) for _, ids in crew.written)
    assert first == set(range(6))
    assert again < first
    assert engine.doubled == 0


def test_answers_of_a_superseded_lot_are_dropped() -> None:
    """An actor that was taken for lost and speaks all the same."""
    crew = ScriptedCrew(2, rush=0.0)
    engine = engine_of(crew, exact=False)
    engine.load({}, 0)
    engine.submit([r for r in requests_of(1, 9) if length_of(r) > 4][:2])
    engine.step()
    (place, _), (old,) = crew.written[0], crew.hands[0].lots
    assert place == 0
    crew.hands[0].lots = []
    engine._lose(0, "silent")
    engine.step()  # the other one has it now
    crew.rush = 1.0
    hand = crew.hands[1]
    late = crew.advance(type(hand)(version=0, reported=True, lots=[old]))
    engine._ended = []
    engine._take(Report(0, tuple(late)))
    assert engine._ended == []
    assert engine.doubled == len(late) == 2
    assert engine.pending == 2


# ---- losses in a row ----


def test_an_actor_that_dies_again_and_again_ends_the_run_with_a_sentence() -> None:
    crew = ScriptedCrew(2, die=1.0)
    said: list[str] = []
    engine = engine_of(crew, clock=(clock := Clock()), warn=said.append)
    engine.load({}, 0)
    engine.submit(requests_of(2, 2))
    starts: list[float] = []

    def go_on() -> None:
        while True:
            clock.now += 0.25
            engine.step()
            starts.extend([clock.now] * (crew.starts[0] - len(starts)))

    with pytest.raises(
        UserError, match=r"rollout actor \d was lost 9 times in a row .*come up.*told to.*again"
    ):
        go_on()
    waits = [b - a for a, b in itertools.pairwise(starts)]
    assert waits == sorted(waits)
    assert max(waits) <= module.LONGEST_PAUSE + 0.5
    assert waits[-1] > 8
    assert "rollout actor 0 was lost (it was told to); it is started again" in said


def test_a_lot_that_kills_whoever_writes_it_ends_the_run_with_a_sentence() -> None:
    """It comes up each time: it is not the actor's fault."""
    crew = ScriptedCrew(1)
    engine = engine_of(crew, exact=False, clock=(clock := Clock()))
    engine.load({}, 0)
    engine.submit(requests_of(1, 2))

    def hear(seconds: float) -> list[Report | Lost]:
        hand = crew.hands.get(0)
        if hand is None:
            return []
        if not hand.reported:
            hand.reported = True
            return [Report(0)]
        del crew.hands[0]
        return [Lost(0, "out of memory")]

    crew.hear = hear  # type: ignore[method-assign]
    with pytest.raises(UserError, match="9 actors in a row were lost over the same 2 answers"):
        to_the_end(engine, clock, 60)


def to_the_end(engine: RemoteEngine, clock: Clock, seconds: float) -> None:
    while engine.pending:
        clock.now += seconds
        engine.step()


def test_an_actor_that_is_silent_over_its_work_is_taken_for_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = ScriptedCrew(2, rush=1.0)
    said: list[str] = []
    engine = engine_of(crew, clock=(clock := Clock()), warn=said.append)
    engine.load({}, 0)
    engine.submit(requests_of(2, 2))
    hear = crew.hear
    deaf = {0}

    def silent(seconds: float) -> list[Report | Lost]:
        clock.now += 50.0
        news = hear(seconds) if crew.starts[0] > 1 or not crew.written else []
        return [n for n in news if crew.starts[0] > 1 or n.place not in deaf or not crew.written]

    monkeypatch.setattr(crew, "hear", silent)
    home = []
    while engine.pending:
        home += engine.step()
    assert len(home) == 4
    assert crew.starts[0] == 2
    assert any("said nothing for 300 s" in line for line in said)


def test_time_in_which_nobody_listened_is_no_silence() -> None:
    crew = ScriptedCrew(1, rush=0.0)
    engine = engine_of(crew, clock=(clock := Clock()))
    engine.load({}, 0)
    engine.submit(requests_of(1, 4))
    while engine.pending:
        clock.now += 10_000  # an update, say
        engine.step()
    assert engine.losses == 0


def test_a_cluster_without_room_ends_the_run_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = ScriptedCrew(2)
    engine = engine_of(crew, clock=(clock := Clock()))
    engine.load({}, 0)
    engine.submit(requests_of(1, 1))

    def nothing(seconds: float) -> list[Report | Lost]:
        clock.now += 10
        return []

    monkeypatch.setattr(crew, "hear", nothing)
    with pytest.raises(UserError, match=r"no rollout actor has come up within 300 s.*--actors"):
        to_the_end(engine, clock, 0)
    assert clock.now < 400


# ---- the protocol ----


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


def test_what_everybody_does_is_said_in_a_line() -> None:
    clock = Clock()
    lines: list[str] = []
    crew = ScriptedCrew(2, rush=0.0)
    engine = engine_of(crew, slots=2, clock=clock, status=lines.append)
    engine.load({}, 0)
    assert engine.describe() == "actors: 0 starting, 1 starting"
    engine.submit(requests_of(2, 4, max_tokens=1))
    engine.step()
    assert engine.describe() == (
        "actors: 0 writing 4 (queue 2, 0 tokens/s), 1 writing 4 (queue 2, 0 tokens/s)"
    )
    clock.now = 2.0
    engine.step()
    assert engine.describe() == "actors: 0 idle, 1 idle"
    assert lines == ["actors: 0 idle, 1 idle"]  # not more than once a second
    engine.submit(requests_of(1, 4, first=5))
    engine.step()
    del crew.hands[0]
    engine._lose(0, "gone")
    assert engine.describe() == "actors: 0 down, 1 idle, 4 waiting, 1 lost"
    many = engine_of(ScriptedCrew(9, rush=0.0), slots=3, clock=clock)
    many.load({}, 0)
    many.submit(requests_of(9, 4))
    many.step()
    many._lose(8, "gone")
    assert many.describe() == "actors: 8 writing (queue 8, 0 tokens/s), 1 down, 4 waiting, 1 lost"


def test_speed_is_that_of_the_last_half_minute() -> None:
    clock = Clock()
    crew = ScriptedCrew(1)
    engine = engine_of(crew, clock=clock)
    engine.load({}, 0)
    asked = requests_of(2, 4)
    engine.submit(asked)
    clock.now = 8.0
    while engine.pending:
        engine.step()
    engine.submit(requests_of(1, 4, first=9))
    engine._hand_out()
    tokens = sum(length_of(r) for r in asked)
    clock.now = 10.0
    assert f"{tokens / 10:,.0f} tokens/s" in engine.describe()
    clock.now = 60.0
    assert " 0 tokens/s" in engine.describe()


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


# ---- what a person sees and says ----


def test_the_line_is_seen_in_both_views() -> None:
    clock = Clock()
    stream = io.StringIO()
    plain = PlainView(stream, every=5.0, clock=clock)
    for now in (0.0, 1.0, 14.0, 15.0, 16.0):
        clock.now = now
        plain.status(f"actors: at {now:g}")
    assert stream.getvalue().splitlines() == ["  actors: at 0", "  actors: at 15"]
    console = Console(file=io.StringIO(), width=120)
    live = LiveView(console, clock=clock)
    live.start("zero", "rl", 4)
    live.status("actors: 0 idle")
    console.print(live.picture())
    live.finish("zero", False)
    console.print(live.picture())
    assert console.file.getvalue().count("actors: 0 idle") == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(("actors", "trainers"), [(2, 1), (None, 2)])
def test_what_is_for_a_cluster_needs_one(actors: int | None, trainers: int) -> None:
    with pytest.raises(UserError, match="add --cluster auto"):
        Elsewhere(None, actors, trainers)


def test_ranks_are_no_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank was given the same options as the one who started it."""
    monkeypatch.delenv("RANK", raising=False)
    assert Elsewhere("auto", None, 2).needs_trainers()
    assert not Elsewhere("auto", None, 1).needs_trainers()
    monkeypatch.setenv("RANK", "1")
    assert not Elsewhere("auto", None, 2).needs_trainers()


def test_without_ray_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'liubai\[ray\]'"):
        connect("127.0.0.1:1")

"""The engine over many actors, against actors without processes: nothing lost, nothing doubled or stale."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping

import pytest
from crew import Clock, ScriptedCrew, engine_of, length_of, requests_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import liubai.cluster.engine as module
from liubai.cluster.crew import Lost, Report
from liubai.cluster.engine import RemoteEngine
from liubai.errors import UserError
from liubai.rollout.engine import Request, generate
from liubai.types import Sample, Span

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
    engine.step()
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


@pytest.mark.parametrize("last", [Report(0), Lost(0, "killed")])
def test_who_is_heard_in_the_last_moment_was_not_silent(last: Report | Lost) -> None:
    crew = ScriptedCrew(1)
    engine = engine_of(crew, clock=(clock := Clock()))
    engine.load({}, 0)
    engine.submit(requests_of(1, 2))
    news = iter([(1, [Report(0)]), (module.SILENT - 1, []), (2, [last])])

    def hear(seconds: float) -> list[Report | Lost]:
        crew.hands[0].reported = True
        passed, heard = next(news)
        clock.now += passed
        return heard

    crew.hear = hear  # type: ignore[method-assign]
    for _ in range(3):
        engine.step()
    assert engine.losses == isinstance(last, Lost)


def test_who_comes_late_is_given_the_newest_weights_alone() -> None:
    """A place on which nobody comes would keep one copy a step for ever."""
    crew, given, old = ScriptedCrew(2), list[tuple[int, int]](), list[object]()
    load, share, hear = crew.load, crew.share, crew.hear

    def loaded(place: int, weights: object, version: int, oldest: int | None) -> None:
        given.append((place, version))
        load(place, weights, version, oldest)

    def shared(weights: Mapping[str, Tensor]) -> object:
        old.append(engine._weights)
        return share(weights)

    def deaf(seconds: float) -> list[Report | Lost]:
        """The second one does not come."""
        crew.hands.pop(1, None)
        return hear(seconds)

    crew.load, crew.share, crew.hear = loaded, shared, deaf  # type: ignore[method-assign]
    engine = engine_of(crew)
    for version in range(3):
        engine.load({}, version)
        engine.submit(requests_of(1, 2, first=version))
        to_the_end(engine, Clock(), 1)
    assert given == [(0, 0), (0, 1), (0, 2)]
    assert old == [None, None, None]  # there need not be room for the old and the new
    crew.hear = hear  # type: ignore[method-assign]
    crew.start(1)
    engine.submit(requests_of(1, 2, first=3))
    to_the_end(engine, Clock(), 1)
    assert given[3:] == [(1, 2)]


def test_who_was_given_up_is_not_lost_again() -> None:
    crew, said = ScriptedCrew(1, rush=0.0), list[str]()
    engine = engine_of(crew, warn=said.append)
    engine.load({}, 0)
    engine.submit(requests_of(1, 2))
    engine.step()
    for why in ("it has said nothing for 300 s", "its process has died"):
        engine._lose(0, why)
    assert engine.losses == len(said) == 1


def test_the_next_actor_waits_until_the_last_one_is_known_to_be_gone() -> None:
    """Its work does not."""
    crew = ScriptedCrew(2, rush=0.0)
    engine = engine_of(crew, clock=(clock := Clock()))
    engine.load({}, 0)
    engine.submit(requests_of(2, 2))
    engine.step()
    del crew.hands[0]
    engine._lose(0, "it cannot be reached")
    crew.vacant = lambda place: clock.now >= 100  # type: ignore[method-assign]
    to_the_end(engine, clock, 1)
    assert crew.starts == [1, 1]
    assert [place for place, _ in crew.written] == [0, 1, 1]
    clock.now = 100
    engine.submit(requests_of(1, 2, first=2))
    to_the_end(engine, clock, 1)
    assert crew.starts == [2, 1]
    assert engine.losses == 1


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

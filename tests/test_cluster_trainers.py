"""Ranks on a cluster, without Ray: their processes are real, or their actors' answers are written down; and
the way to a cluster."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import scripted_ray
import torch
from conftest import Silent, tiny_config
from scripted_ray import Anywhere, OutOfMemoryError, RayTaskError, Ref, Script, ScriptedRay

import liubai.cluster.trainers as module
from liubai import ranks
from liubai.cluster import connect as way
from liubai.cluster import placement
from liubai.cluster.placement import Places, Room, Share, how_many
from liubai.cluster.trainers import LONG, RankFailed, Said, TrainerActor, Trainers, as_asked
from liubai.commands.shared import Elsewhere
from liubai.errors import UserError
from liubai.rollout.engines import EngineConfig

# ---- a rank's process ----


def heard(program: str, until: Callable[[Said], bool] = lambda said: said.code is not None) -> Said:
    """All that it says until it has ended."""

    async def whole() -> Said:
        actor = TrainerActor()
        await actor.start(["-c", program], {"WORD": "bamboo"}, os.getcwd())
        out: list[str] = []
        err: list[str] = []
        try:
            while True:
                said = await actor.hear()
                out += said.out
                err += said.err
                if until(said):
                    return Said(tuple(out), tuple(err), said.code)
        finally:
            await actor.end()

    return asyncio.run(asyncio.wait_for(whole(), 30))


def test_what_a_rank_prints_is_passed_on() -> None:
    said = heard(
        "import os, sys; print(os.environ['WORD']); print('白菜', file=sys.stderr); "
        "sys.stdout.write('no end'); sys.exit(3)"
    )
    assert said == Said(("bamboo", "no end"), ("白菜",), 3)


def test_a_line_without_end_stops_nobody() -> None:
    """An assertion on a tensor, or a progress bar."""
    said = heard(f"import sys; sys.stderr.write('x' * {5 * LONG} + '\\nlast\\n'); print('y' * {3 * LONG})")
    assert said.code == 0
    assert "".join(said.err) == "x" * 5 * LONG + "last"
    assert said.err[-1] == "last"
    assert "".join(said.out) == "y" * 3 * LONG


def test_the_end_of_a_rank_is_seen_whoever_holds_its_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT", 60.0)
    monkeypatch.setattr(module, "LAST", 0.2)
    said = heard(
        "import subprocess, sys; print('before', file=sys.stderr, flush=True); "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); sys.exit(7)"
    )
    assert said == Said((), ("before",), 7)


# ---- the group ----


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> ScriptedRay:
    ray = scripted_ray.installed(monkeypatch)
    monkeypatch.setattr(module, "Places", Anywhere)
    monkeypatch.setattr(module, "room", lambda fixed: Room((Share(2.0),), fixed))
    return ray


def rank(*said: Said | Exception, **script: Callable[..., Any]) -> Script:
    """An actor whose rank says one after the other, and then nothing more."""
    left = iter(said)
    plain: Script = {
        "open": lambda: ("node", "10.0.0.1", 29500),
        "start": lambda *_: 7,
        "hear": lambda: next(left, Ref(ready=False)),
    }
    return plain | script


class Group:
    """Two ranks, and what was said of them."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, bool]] = []
        self.notes: list[str] = []
        say = lambda line, aside: self.lines.append((line, aside))  # noqa: E731
        self.trainers = Trainers(["-m", "x"], 2, Share(1.0), say, self.notes.append)

    def run(self) -> None:
        self.trainers.run()


WELL = Said((), (), 0)


@pytest.mark.parametrize("where", ["open", "start", "hear"])
def test_a_rank_killed_for_its_memory_is_a_loss(where: str, ray: ScriptedRay) -> None:
    killed = OutOfMemoryError("Task was killed due to the node running low on memory. A page follows")
    ray.actors = [rank(WELL), rank(WELL, **{where: lambda *_: killed}), rank(WELL), rank(WELL)]
    group = Group()
    group.run()
    assert group.trainers.losses == 1
    (note,) = group.notes
    assert "(Task was killed due to the node running low on memory); all 2 ranks start again" in note


def test_a_rank_that_sigterm_has_ended_is_a_loss(ray: ScriptedRay) -> None:
    """It ends in order, with an exit code of its own: a node that is emptied is nobody's mistake."""
    told = Said((), ("liubai: stopped; what was saved is in run",), 143)
    ray.actors = [rank(told), rank(WELL), rank(WELL), rank(WELL)]
    group = Group()
    group.run()
    assert group.trainers.losses == 1
    assert "rank 0 of 2 was ended by SIGTERM" in group.notes[0]


def test_a_mistake_of_ours_is_no_loss(ray: ScriptedRay) -> None:
    wrong = RayTaskError(TypeError("no such argument"))
    ray.actors = [rank(WELL), rank(start=lambda *_: wrong)]
    with pytest.raises(TypeError, match="no such argument"):
        Group().run()


def test_ranks_that_do_not_come_up_again_are_named_and_end_the_run(
    ray: ScriptedRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LATE", 0.01)
    monkeypatch.setattr(module, "ABSENT", 0.1)
    never = lambda *_: Ref(ready=False)  # noqa: E731
    ray.actors = [rank(WELL), rank(OutOfMemoryError("gone")), rank(), rank(open=never)]
    group = Group()
    with pytest.raises(UserError, match=r"not come up within 0 s \(of 2 ranks: 1\).*ray status"):
        group.run()
    lost, late = group.notes
    assert "all 2 ranks start again" in lost
    assert "are waited for that have no place yet (of 2 ranks: 1)" in late


def test_a_group_that_starts_again_is_told_of_the_same_room(
    ray: ScriptedRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the dead driver's actors had is not free yet; the number of actors must not depend on it."""
    first = Room((Share(3.0), Share(4.0, 1.0)), fixed=True)
    rooms = iter([Room((Share(5.0),)), first, Room((Share(1.0),))])  # before the ranks are there, and after
    monkeypatch.setattr(module, "room", lambda fixed: next(rooms))
    ray.actors = [rank(WELL), rank(OutOfMemoryError("gone")), rank(WELL), rank(WELL)]
    Group().run()
    variables = [given[1] for name, given in ray.calls if name == "start"]
    assert [v["RANK"] for v in variables] == ["0", "1", "0", "1"]
    (told,) = {v[placement.ROOM] for v in variables}
    monkeypatch.setenv(placement.ROOM, told)
    monkeypatch.setitem(sys.modules, "ray._private.state", SimpleNamespace(available_resources_per_node=dict))
    assert placement.room(fixed=False) == first


def test_a_users_mistake_is_told_without_whose_it_is(ray: ScriptedRay) -> None:
    ray.actors = [
        rank(Said((), ("liubai: it was lost", "a library says good-bye"), 2)),
        rank(Said((), ("liubai (rank 1): no such file: liubai: x",), 2)),
    ]
    with pytest.raises(UserError, match=r"^it was lost$"):
        Group().run()
    ray.actors = [rank(WELL), rank(Said((), ("liubai (rank 1): no such file: liubai: x",), 2))]
    with pytest.raises(UserError, match=r"^no such file: liubai: x$"):
        Group().run()


def test_a_mistake_of_the_program_in_any_rank_shows_its_traceback(ray: ScriptedRay) -> None:
    trace = ("Traceback (most recent call last):", "  line 3", "TypeError: no such argument")
    ray.actors = [
        rank(Said((), ("liubai: another process of this run has ended",), 2)),
        rank(Said((), trace[:1]), Said((), trace[1:], 1)),
    ]
    group = Group()
    with pytest.raises(RankFailed, match="rank 1 of 2 has failed with exit code 1"):
        group.run()
    assert not issubclass(RankFailed, UserError)
    assert group.lines == [(line, True) for line in trace]


# ---- how many there is room for ----


@pytest.mark.parametrize(
    ("share", "nodes", "count"),
    [
        (Share(2.0), [Share(3.0), Share(3.0)], 2),  # not 3: nobody is on two nodes
        (Share(2.0), [Share(8.0), Share(1.0), Share(5.0)], 6),
        (Share(1.0, 2.0), [Share(8.0, 3.0), Share(8.0, 1.0), Share(1.0, 4.0)], 2),
        (Share(4.0), [Share(3.0), Share(3.0)], 1),  # one at least, which then says what is not there
        (Share(4.0), [], 1),
    ],
)
def test_as_many_as_the_single_nodes_have_room_for(share: Share, nodes: list[Share], count: int) -> None:
    assert how_many(None, share, "actors", Room(tuple(nodes))) == count
    assert how_many(9, share, "actors", Room(tuple(nodes))) == 9


def test_a_cluster_of_this_machine_has_no_room_at_once() -> None:
    here = Room((Share(2.0),), fixed=True)
    assert how_many(2, Share(1.0), "actors", here) == 2
    with pytest.raises(
        UserError, match=r"no room for 5 actors of 1 CPU each: .* 2 CPU, which is enough for 2;"
    ):
        how_many(5, Share(1.0), "actors", here)
    with pytest.raises(UserError, match=r"no room for 1 actors of 3 CPU each"):
        how_many(None, Share(3.0), "actors", here)


def test_ranks_that_a_machine_has_no_gpus_for_are_refused_at_once(
    ray: ScriptedRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "room", lambda fixed: Room((Share(8.0, 1.0),), fixed))
    say = lambda *_: None  # noqa: E731
    with pytest.raises(UserError, match=r"no room for 2 trainers of 1 CPU, 1 GPU each"):
        Trainers(["-m", "x"], 2, Share(1.0, 1.0), say, say, fixed=True).run()
    assert ray.calls == []


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A cluster of two cores where nothing more finds a place; how long was waited each time."""
    waited: list[float] = []

    class GetTimeoutError(Exception): ...

    def get(ref: object, timeout: float) -> None:
        waited.append(timeout)
        raise GetTimeoutError

    ray, util, exceptions = ModuleType("ray"), ModuleType("ray.util"), ModuleType("ray.exceptions")
    ray.get = get  # type: ignore[attr-defined]
    ray.cluster_resources = ray.available_resources = lambda: {"CPU": 2.0}  # type: ignore[attr-defined]
    group = SimpleNamespace(ready=object)
    util.placement_group = lambda *_, **__: group  # type: ignore[attr-defined]
    util.remove_placement_group = lambda _: None  # type: ignore[attr-defined]
    exceptions.GetTimeoutError = GetTimeoutError  # type: ignore[attr-defined]
    for part in (ray, util, exceptions):
        monkeypatch.setitem(sys.modules, part.__name__, part)
    return waited


def test_a_rank_says_at_once_that_its_machine_has_no_room_for_its_actors(
    full: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its address alone it cannot tell a cluster of this machine from another one."""
    monkeypatch.setattr(way, "connect", lambda address: False)
    monkeypatch.setitem(sys.modules, "ray._private.state", SimpleNamespace(available_resources_per_node=dict))
    for name, text in placement.told(Room((Share(2.0),), fixed=True)).items():
        monkeypatch.setenv(name, text)
    cluster = way.Cluster("10.0.0.1:6379", Silent(), actors=500).__enter__()
    with pytest.raises(UserError, match=r"this machine has no room for 500 rollout actors .* 2 CPU"):
        cluster.engine(int, slots=4, max_length=16)  # type: ignore[arg-type]
    assert full == []


@pytest.mark.parametrize(
    ("others", "free_at", "waits", "said"),
    [
        (False, 0.0, 0.0, []),
        (False, 1.5, 1.5, []),  # a run has just ended
        (False, 60.0, 10.5, ["the cluster has 2 CPU (free: 1 CPU)"]),
        (True, 60.0, 3.5, []),  # what is theirs is nobody's business
        (True, 1.0, 1.0, []),  # it was not theirs: the end of a run was not known yet
        (True, 0.0, 0.0, []),
    ],
)
def test_what_an_ended_run_had_is_waited_for(
    others: bool, free_at: float, waits: float, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that counts the room too soon has fewer actors, to its end, and nobody knows."""
    now, notes = [0.0], list[str]()

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(placement, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(placement, "free", lambda: Share(2.0 if now[0] >= free_at else 1.0))
    monkeypatch.setattr(placement, "total", lambda: Share(2.0))
    monkeypatch.setattr(placement, "_alone", lambda: not others)
    monkeypatch.setattr(placement, "LOOK", 0.5)
    placement.free_again(notes.append)
    assert now == [waits]
    assert [note.partition(",")[0] for note in notes] == said


def test_a_rank_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forerunner's actors may not be gone, and it has been told what room there is."""
    monkeypatch.setattr(placement, "free", None)
    for name, text in placement.told(Room((Share(2.0),))).items():
        monkeypatch.setenv(name, text)
    placement.free_again(pytest.fail)


def test_with_a_node_gone_a_run_goes_on_with_fewer_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it was told how many."""

    class Small(Anywhere):
        def __init__(self, size: int, *how: Any) -> None:
            if size > 2:
                raise UserError("no room")
            super().__init__(size)

    view = Silent()
    monkeypatch.setattr(placement, "Places", Small)
    monkeypatch.setattr(placement, "room_now", lambda: Room((Share(1.0), Share(1.0))))
    cluster = way.Cluster("10.0.0.1:6379", view)
    assert cluster._places(3, Share(1.0), "actors").size == 2
    assert [note.partition(":")[0] for note in view.warnings] == [
        "there was room for 3 actors, and there is for 2 now"
    ]
    cluster.actors = 3
    with pytest.raises(UserError, match="no room"):
        cluster._places(3, Share(1.0), "actors")


@pytest.mark.parametrize(
    ("config", "seconds"),
    [
        ({"kind": "torch"}, 300),
        ({"kind": "vllm", "timeout": 1000}, 1000),
        ({"kind": "vllm", "timeout": 20}, 300),
    ],
)
def test_another_program_may_take_long_to_begin(
    config: dict[str, Any], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr(way.Cluster, "engine", lambda self, build, **how: made.update(how))
    way.Cluster("auto", Silent()).engine_for(
        EngineConfig(**config),
        tiny_config(),
        dtype=torch.float32,
        device="cpu",
        parent=Path("base"),
        folder=Path("run"),
        eos_ids=(1,),
        slots=4,
        max_length=9,
    )
    assert made["silent"] == seconds


def test_what_is_waited_for_is_said_soon(full: list[float]) -> None:
    notes: list[str] = []
    with pytest.raises(UserError, match="the cluster has no room for 5 actors of 1 CPU each within 60 s"):
        Places(5, Share(1.0), "SPREAD", "actors", notes.append)
    assert full == pytest.approx([5, 60], abs=1)
    (note,) = notes
    assert note.startswith("the cluster is waited for to have room for 5 actors of 1 CPU each, 60 s at most")


def test_the_report_is_where_the_user_said() -> None:
    whole = f"report: {Path('runs/x').absolute()}/report.html"
    assert as_asked(whole, Path("runs/x")) == "report: runs/x/report.html"
    assert as_asked(whole, Path("runs/y")) == whole


# ---- the way to a cluster ----


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What ``ray.init`` is told, and what it sees; on a machine of three GPUs."""
    seen: dict[str, Any] = {}
    services = SimpleNamespace(ConsolePopen=dict)

    def init(**given: Any) -> None:
        seen.update(given, gpus=os.environ.get("CUDA_VISIBLE_DEVICES"), how=services.ConsolePopen())
        if "error" in seen:
            raise seen["error"]

    ray = ModuleType("ray")
    ray.init = init  # type: ignore[attr-defined]
    private = SimpleNamespace(worker=SimpleNamespace(), services=services)
    ray._private = private  # type: ignore[attr-defined]
    ray.is_initialized = lambda: True  # type: ignore[attr-defined]
    for name in ("RAY_ADDRESS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray._private", private)
    monkeypatch.setattr(way, "_gpus", lambda: 3)
    before = dict(os.environ)
    yield seen
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def test_the_first_gpu_is_this_processs_own_where_it_learns(local: dict[str, Any]) -> None:
    assert way.connect("auto")  # it cannot grow
    assert local["gpus"] == "1,2"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_with_ranks_on_the_cluster_all_gpus_are_its(local: dict[str, Any]) -> None:
    way.connect("auto", beside=4)
    assert local["gpus"] is None
    assert local["num_cpus"] == len(os.sched_getaffinity(0)) + 4


def test_rays_processes_are_no_part_of_this_ones_group(local: dict[str, Any]) -> None:
    """To which `timeout` and batch systems send SIGTERM. Those of others on the cluster are theirs."""
    way.connect("auto")
    assert local["how"] == {"process_group": 0}
    assert sys.modules["ray._private"].services.ConsolePopen is dict


def test_no_more_learn_on_a_machine_than_it_has_cores(
    local: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster of this machine alone would begin them all, and wait for them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(way, "connect", pytest.fail)
    where = Elsewhere("auto", None, 4)
    with pytest.raises(UserError, match="--trainers 4: this machine has 3 cores"):
        module.train(where, 1, Path("recipe.toml"), [], Path("run"), [])


def test_where_ray_does_not_start_that_is_said(local: dict[str, Any]) -> None:
    local["error"] = Exception("The current node timed out during startup.\nA page")
    with pytest.raises(UserError, match=r"of this machine \(The current node timed out during startup\.\)"):
        way.connect("auto")


def test_a_cluster_is_left_whatever_goes_wrong_with_its_engine(local: dict[str, Any]) -> None:
    def close() -> None:
        raise RuntimeError("an actor could not be ended")

    sys.modules["ray"].shutdown = lambda: local.update(left=True)  # type: ignore[attr-defined]
    cluster = way.Cluster("auto", Silent())
    cluster._engine = SimpleNamespace(close=close)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="could not be ended"):
        cluster.__exit__()
    assert local["left"]


@pytest.mark.parametrize("address", ["auto", "local", "somewhere"])
def test_a_variable_that_names_no_cluster_is_named(
    address: str, local: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=rf"^RAY_ADDRESS '{address}': .*HOST:PORT"):
        way.connect("auto")
    with pytest.raises(UserError, match=r"^--cluster 'here': .*HOST:PORT"):
        way.connect("here")


def test_several_ranks_may_have_vllm_on_a_cluster(
    local: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There it is in the actors' processes, and takes part in nobody's process group."""
    monkeypatch.setattr(ranks, "_world", 2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    EngineConfig(kind="vllm").require(None)
    monkeypatch.delitem(sys.modules, "ray")
    with pytest.raises(UserError, match="for one process; of several"):
        EngineConfig(kind="vllm").require(None)

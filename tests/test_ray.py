"""Real processes on a real Ray cluster of several nodes, all on this machine, and real kills."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Silent

pytest.importorskip("ray")
# read when Ray is imported: its nodes listen on the loopback alone
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# that a node is gone is known after seconds, and not after a quarter of a minute
os.environ |= {"RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "1000"}

import ray
from ray.cluster_utils import Cluster as Nodes

import liubai.stages.rl as rl
from liubai.cluster.actors import Build
from liubai.cluster.connect import Cluster
from liubai.cluster.engine import RemoteEngine
from liubai.errors import UserError
from liubai.grade import GradeItem, RewardWeights
from liubai.rollout.engine import Engine, Request, generate
from liubai.stages.context import Context
from liubai.stages.rollouts import GradedGroup, Rollouts
from liubai.types import Sample

#: An untrained model is never right: the length is what its answers differ in.
REWARDS = RewardWeights(overlong=-0.5, overlong_from=0.0)
SMALL = {"object_store_memory": 80 << 20, "include_dashboard": False}


class View(Silent):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def status(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module", autouse=True)
def _without_tensorboard() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)
        yield


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head without work, and two nodes for an actor each."""
    cluster = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, **SMALL})
    for _ in range(2):
        cluster.add_node(num_cpus=1, **SMALL)
    yield cluster
    cluster.shutdown()


def config_of(**changes: Any) -> rl.Config:
    plain: dict[str, Any] = {
        "steps": 3,
        "groups": 4,
        "samples": 4,
        "max_tokens": 40,
        "slots": 8,
        "lr": 3e-3,
        "eval_every": 3,
        "eval_problems": 3,
        "eval_samples": 2,
        "save_every": 2,
        "rewards": REWARDS,
    }
    return rl.Config(**rl.Config.filled(plain | changes))


def run(config: rl.Config, folder: Path, base: Path, cluster: Cluster | None) -> View:
    view = View()
    context = Context(folder, 0, {"base": base}, view, stage="zero", cluster=cluster)
    try:
        rl.run(config, context)
    finally:
        context.close()
    return view


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Metrics, without what a clock measured."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = re.compile(r"time|tokens/s|seconds/.*")
    return [{n: v for n, v in row.items() if not clock.fullmatch(n)} for row in rows]


def assert_same_run(a: Path, b: Path) -> None:
    assert rows_of(a) == rows_of(b)
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    for path in (a / "checkpoint").iterdir():
        assert path.read_bytes() == (b / "checkpoint" / path.name).read_bytes(), path.name


def held(build: Build, folder: Path) -> Build:
    """Its engine says after each token that it has begun (``folder/PLACE``), and writes no other one while
    there is a file ``folder/hold``."""

    def built(place: int, stack: ExitStack) -> Engine:
        engine = build(place, stack)
        step = engine.step

        def stepped() -> list[tuple[Request, Sample]]:
            ended = step()
            (folder / str(place)).touch()
            while (folder / "hold").exists():
                time.sleep(0.01)
            return ended

        engine.step = stepped  # type: ignore[method-assign]
        return engine

    return built


@pytest.fixture(scope="module")
def quiet(nodes: Nodes, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which no actor is lost."""
    folder = tmp_path_factory.mktemp("quiet")
    with Cluster(nodes.address, View()) as cluster:
        run(config_of(), folder, base, cluster)
        assert cluster._engine is not None
        assert cluster._engine.actors == 2  # as many as there is room for
        assert cluster._engine.losses == 0
    return folder


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[int]]:
    """Kill an actor in the middle of its work at each of so many versions of the weights, or as soon after as
    one is given some: it has begun, and cannot have ended."""
    folder = tmp_path / "held"
    folder.mkdir()

    def arm(versions: list[int], how: Callable[[RemoteEngine, int], None] = kill) -> list[int]:
        done: list[int] = []
        hand_out, engine_of = RemoteEngine._hand_out, Cluster.engine

        def handed_out(engine: RemoteEngine) -> None:
            if len(done) == len(versions) or engine.version < versions[len(done)]:
                return hand_out(engine)
            (folder / "hold").touch()
            for begun in folder.glob("[0-9]"):
                begun.unlink()
            before = {lot for actor in engine._places for lot in actor.lots}
            hand_out(engine)
            given = [place for place, actor in enumerate(engine._places) if set(actor.lots) - before]
            if given:
                done.append(engine.version)
                wait_for((folder / str(given[0])).exists)
                how(engine, given[0])
            (folder / "hold").unlink()
            return None

        def engine(cluster: Cluster, build: Build, **given: Any) -> RemoteEngine:
            return engine_of(cluster, held(build, folder), **given)

        monkeypatch.setattr(RemoteEngine, "_hand_out", handed_out)
        monkeypatch.setattr(Cluster, "engine", engine)
        return done

    return arm


def kill(engine: RemoteEngine, place: int) -> None:
    """Returns when Ray has noticed."""
    crew: Any = engine.crew
    os.kill(crew.pids[place], signal.SIGKILL)
    ray.wait([ref for ref, whose in crew._awaited.items() if whose == place], timeout=120)


def test_one_actor_writes_what_this_process_would(nodes: Nodes, base: Path, tmp_path: Path) -> None:
    """To the last bit: the whole step is its lot."""
    run(config_of(), tmp_path / "here", base, None)
    with Cluster(nodes.address, View(), actors=1) as cluster:
        run(config_of(), tmp_path / "there", base, cluster)
    assert_same_run(tmp_path / "here", tmp_path / "there")


def test_a_run_with_killed_actors_is_the_run_without(
    nodes: Nodes, base: Path, quiet: Path, tmp_path: Path, kills: Callable[..., list[int]]
) -> None:
    view = View()
    done = kills([0, 1, 2])
    with Cluster(nodes.address, view) as cluster:
        run(config_of(), tmp_path / "killed", base, cluster)
        assert done == [0, 1, 2]
        assert cluster._engine is not None
        assert cluster._engine.actors == 2  # their number decides bits
        assert cluster._engine.losses == 3
        assert cluster._engine.describe().endswith("3 lost")
    assert_same_run(quiet, tmp_path / "killed")
    assert len([w for w in view.warnings if "was lost" in w]) == 3


def test_a_run_after_one_that_was_killed_has_all_the_room(nodes: Nodes) -> None:
    """What the other had is free a moment after its end. Counted too soon it makes fewer actors."""
    program = (
        "import ray, sys, time; from liubai.cluster.placement import Places, Share; "
        f"ray.init(address='{nodes.address}', log_to_driver=False, logging_level='ERROR'); "
        "actor = ray.remote(type('A', (), {'here': lambda self: 1})); "
        "places = Places(2, Share(1.0), 'SPREAD', ''); "
        "actors = [actor.options(**places.options(i)).remote() for i in range(2)]; "
        "ray.get([a.here.remote() for a in actors]); print('there', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "there\n"
        with Cluster(nodes.address, View()) as cluster:  # beside it there is no room
            assert sum(node.cpus for node in cluster._room.nodes) == 0
    finally:
        other.kill()
        other.wait()
    view = View()
    with Cluster(nodes.address, view) as cluster:
        assert sum(node.cpus for node in cluster._room.nodes) == 2
    assert view.warnings == []


def test_in_flight_every_problem_is_taken_once(
    nodes: Nodes, base: Path, tmp_path: Path, kills: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[GradedGroup] = []
    last: list[Rollouts] = []
    collect = Rollouts.collect

    def recording(rollouts: Rollouts, groups: int) -> list[GradedGroup]:
        found = collect(rollouts, groups)
        taken.extend(found)
        last[:] = [rollouts]
        version = rollouts.engine.version
        assert all(version - s.version <= 2 for g in found for s in g.group.samples)
        return found

    monkeypatch.setattr(Rollouts, "collect", recording)
    done = kills([1, 3])
    config = config_of(steps=6, inflight=True, max_staleness=2, save_every=10)
    with Cluster(nodes.address, View()) as cluster:
        run(config, tmp_path / "run", base, cluster)
        assert cluster._engine is not None
        assert cluster._engine.losses == len(done) == 2
    (rollouts,) = last
    assert rollouts.ahead == 2 * 4  # steps of lead, though an actor's slots hold two groups
    assert Counter(g.index for g in taken).most_common(1)[0][1] == 1
    assert len(taken) == 6 * 4
    assert {g.index for g in taken} | rollouts._open.keys() == set(range(rollouts.next_index))
    assert all(len(g.group.samples) == 4 for g in taken)
    assert [row["stale"] for row in rows_of(tmp_path / "run")[1:]][-1] == rollouts.stale


def test_with_a_node_its_actor_is_lost_and_finds_another(
    nodes: Nodes,
    base: Path,
    quiet: Path,
    tmp_path: Path,
    kills: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    added: dict[int, Any] = {}  # the place whose actor was lost, and the node that came
    homes: list[int] = []
    close = RemoteEngine.close

    def remove(engine: RemoteEngine, place: int) -> None:
        pid = engine.crew.pids[place]  # type: ignore[attr-defined]
        (lost,) = [node for node in nodes.worker_nodes if raylet_of(node) == parent_of(pid)]
        nodes.remove_node(lost, allow_graceful=False)
        os.kill(pid, signal.SIGKILL)  # it would live for a moment, and a node that is gone does not
        added[place] = nodes.add_node(num_cpus=1, **SMALL)

    def close_late(engine: RemoteEngine) -> None:
        """The run may have ended before the next actor is there."""
        ask = [Request(id=-1, prompt_ids=(1,), max_tokens=4, seed=0)]
        for place in () if homes else added:  # it is closed twice
            wait_for(lambda place=place: place in engine.ask_each(ask))
            homes.append(parent_of(engine.crew.pids[place]))  # type: ignore[attr-defined]
        close(engine)

    kills([1], remove)
    monkeypatch.setattr(RemoteEngine, "close", close_late)
    with Cluster(nodes.address, View()) as cluster:
        run(config_of(), tmp_path / "lost", base, cluster)
        assert cluster._engine is not None
        assert cluster._engine.losses == 1  # none was put on the node that was gone
    assert homes == [raylet_of(node) for node in added.values()]
    assert_same_run(quiet, tmp_path / "lost")


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def raylet_of(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


SLOW = """
import time

def check(gold, answer, meta):
    time.sleep(0.05)
    if answer == "hang":
        time.sleep(100)
    return answer == gold
"""


def test_a_grader_node_lost_costs_no_verdict(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "checker.py").write_text(SLOW)
    verifier = f"{tmp_path}/checker.py:check"
    said = ["hang" if i == 7 else str(i - i % 2) for i in range(120)]
    items = [GradeItem(verifier, str(i), f"<think></think><answer>{s}</answer>") for i, s in enumerate(said)]
    with Cluster(nodes.address, View()) as cluster, cluster.graders(2.0) as pool:
        tickets = pool.submit(items)
        verdicts: dict[int, Any] = {}
        removed = False
        while len(verdicts) < len(tickets):
            fresh = pool.poll()
            assert not fresh.keys() & verdicts.keys()
            verdicts |= fresh
            if not removed and len(verdicts) > 10:
                removed = True
                nodes.remove_node(min(nodes.worker_nodes, key=id), allow_graceful=False)
            time.sleep(0.01)
        assert removed
    nodes.add_node(num_cpus=1, **SMALL)
    assert verdicts.keys() == set(tickets)
    found = [verdicts[t] for t in tickets]
    assert [v.error for i, v in enumerate(found) if i != 7] == [None] * 119
    assert "timeout" in found[7].error
    assert pool.errors == 1
    assert [v.correct for v in found] == [i % 2 == 0 for i in range(120)]


def test_what_fails_in_every_actor_is_said_at_once(nodes: Nodes) -> None:
    def refuses(place: int, stack: ExitStack) -> Any:
        raise UserError("nothing like it here")

    with Cluster(nodes.address, View(), actors=1) as cluster:
        engine = cluster.engine(refuses, slots=4, max_length=16)
        engine.load({"x": torch.zeros(1)}, 0)
        with pytest.raises(UserError, match=r"^nothing like it here$"):
            generate(engine, [Request(id=0, prompt_ids=(1,), max_tokens=4, seed=0)])
        assert engine.losses == 0


def test_a_cluster_without_room_says_what_it_has(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liubai.cluster.placement.PLACED", 1.0)
    with (
        Cluster(nodes.address, View(), actors=7) as cluster,
        pytest.raises(UserError, match=r"no room for 7 rollout actors of 1 CPU each.* \d CPU, .* in all"),
    ):
        cluster.engine(int, slots=4, max_length=16)  # type: ignore[arg-type]


def test_where_no_cluster_is_that_is_said_at_once() -> None:
    with pytest.raises(UserError, match=r"no Ray cluster answers at '127\.0\.0\.1:1' .*refused"):
        Cluster("127.0.0.1:1", View()).__enter__()


@pytest.mark.parametrize("address", ["somewhere", "ray://127.0.0.1:1", "http://127.0.0.1:1", ":6379"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="HOST:PORT"):
        Cluster(address, View()).__enter__()


RECIPE = """
name = "ranks"
seed = 0
threads = 1

[stages.base]
kind = "pretrain"
steps = 30
tokens_per_step = 1024
save_every = 10

[stages.base.model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2

[stages.zero]
kind = "rl"
from = "base"
steps = 4
groups = 4
samples = 4
max_tokens = 24
slots = 16
eval_every = 4
eval_problems = 4
save_every = 1
"""


def liubai(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "liubai.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
        process_group=0,
    )


def test_a_killed_trainer_rank_is_started_again_and_the_run_goes_on(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    runs = {}
    for name in ("quiet", "killed"):
        out = tmp_path / name
        arguments = ["run", str(recipe), "--out", str(out), "--cluster", "auto", "--trainers", "2"]
        process = liubai(*arguments, "--actors", "1")
        if name == "killed":
            wait_for(lambda out=out: (out / "2-zero" / "state" / "meta.json").exists(), process)
            victim = rank_processes(out)["1"]
            os.kill(victim, signal.SIGKILL)
        said, errors = process.communicate(timeout=240)
        assert process.returncode == 0, said + errors
        runs[name] = out, said
    out, said = runs["killed"]
    assert "rank 1 of 2 was ended by SIGKILL; all 2 ranks start again" in said
    assert "continues after step" in said
    assert "start again" not in runs["quiet"][1]
    assert_same_run(runs["quiet"][0] / "2-zero", out / "2-zero")
    assert (out / "report.html").exists()
    wait_for(lambda: not rank_processes(out))


def rank_processes(out: Path) -> dict[str, int]:
    """RANK of each process that works on the run folder ``out`` -> its id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks = [v[5:].decode() for v in variables if v.startswith(b"RANK=")]
        if str(out).encode() in command and ranks:
            found[ranks[0]] = int(folder.name)
    return found


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 120
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        if process is not None and process.poll() is not None:
            raise AssertionError(process.communicate())
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("how", "to"),
    [
        (signal.SIGINT, os.kill),
        (signal.SIGTERM, os.kill),
        (signal.SIGKILL, os.kill),
        (signal.SIGTERM, os.killpg),  # as `timeout` and batch systems do
    ],
)
def test_however_a_run_ends_its_cluster_ends_with_it(
    how: signal.Signals, to: Callable[[int, int], None], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("steps = 4\n", "steps = 100000\n"))
    mark = f"mark-{os.getpid()}-{how}-{to.__name__}-"
    arguments = ["run", str(recipe), "--out", str(tmp_path / "run"), "--cluster", "auto", "--actors", "1"]
    process = liubai(*arguments, LIUBAI_TEST_MARK=mark)
    wait_for(lambda: (tmp_path / "run" / "2-zero" / "state").exists(), process)
    assert any("raylet" in name for name in marked(mark))
    to(process.pid, how)
    _, said = process.communicate(timeout=120)
    if how is not signal.SIGKILL:
        assert process.returncode == 128 + how
        assert "to continue:" in said
        assert "Stack trace" not in said
        assert "*** SIGTERM" not in said
        assert "Traceback" not in said
    # two of Ray's own helpers try for a minute to tell somebody of the death of the rest
    wait_for(lambda: all("Agent" in name for name in marked(mark)))


def marked(mark: str) -> list[str]:
    """Commands of the processes that inherited ``mark``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return found

"""``python -m bench.cluster``: what Ray costs, and what thirty kills do to a run.

*Cost*: the same RL stage in this process and with one actor on a cluster of this machine, each with the same
number of threads. Both compute the same to the last bit, which is checked, so their times can be compared:
wall clock and processor seconds (of all processes: driver, actor, Ray itself) from the end of the first step
to the end of the last, in turns.

*Kills*: the stage once undisturbed and once with a random actor killed at random moments (SIGKILL). It must
end in the same checkpoint, metrics and answers, and every problem must have been taken once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import liubai.stages.rl as rl
from liubai.cluster.connect import Cluster
from liubai.recipe.environment import describe
from liubai.stages import pretrain
from liubai.stages.context import Context
from liubai.stages.rollouts import GradedGroup, Rollouts

TICKS = os.sysconf("SC_CLK_TCK")


class Watch:
    """A view that looks at the clocks when the first step has ended, and when the last has."""

    def __init__(self) -> None:
        self.at: dict[int, tuple[float, float]] = {}
        self.last = 0
        self.said: list[str] = []

    def start(self, stage: str, kind: str, total: int) -> None: ...

    def finish(self, stage: str, reused: bool) -> None: ...

    def status(self, line: str) -> None: ...

    def warn(self, message: str) -> None:
        self.said.append(message)

    def update(self, stage: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        if step in (1, total):
            self.at[step] = time.perf_counter(), processor_seconds()
            self.last = step

    def seconds(self) -> tuple[float, float]:
        """Wall clock and processor, between the two."""
        (wall, cpu), (wall_1, cpu_1) = self.at[self.last], self.at[1]
        return wall - wall_1, cpu - cpu_1


def processor_seconds() -> float:
    """Of this process and all that descend from it."""
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(folder.name)] = int(fields[1])
        used[int(folder.name)] = (int(fields[11]) + int(fields[12])) / TICKS
    mine = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return sum(used.get(pid, 0.0) for pid in mine)


def run(config: rl.Config, base: Path, folder: Path, cluster: Cluster | None) -> Watch:
    watch = Watch()
    if cluster:
        cluster.view = watch
    context = Context(folder, 0, {"base": base}, watch, stage="zero", cluster=cluster)
    try:
        rl.run(config, context)
    finally:
        context.close()
    return watch


def result(folder: Path) -> dict[str, Any]:
    """All that a run leaves, without what a clock measured."""
    clock = re.compile(r"time|tokens/s|seconds/.*")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = [folder / "samples.jsonl", *sorted((folder / "checkpoint").iterdir())]
    return {
        "metrics": [{n: v for n, v in row.items() if not clock.fullmatch(n)} for row in rows],
        **{path.name: path.read_bytes() for path in files},
    }


def cost(config: rl.Config, base: Path, folder: Path, rounds: int) -> None:
    seconds: dict[str, list[tuple[float, float]]] = {"here": [], "ray": []}
    for number in range(rounds):
        for side in ("here", "ray") if number % 2 == 0 else ("ray", "here"):
            out = folder / f"{side}-{number}"
            if side == "here":
                watch = run(config, base, out, None)
            else:
                with Cluster("auto", Watch(), actors=1) as cluster:
                    watch = run(config, base, out, cluster)
            seconds[side].append(watch.seconds())
            print(f"  round {number + 1}, {side}: {watch.seconds()[0]:.2f} s, {watch.seconds()[1]:.2f} CPU s")
        assert result(folder / f"here-{number}") == result(folder / f"ray-{number}"), "not the same work"
    for i, what in enumerate(("wall clock", "processor")):
        here, ray = (statistics.median(s[i] for s in seconds[side]) for side in ("here", "ray"))
        ratios = [r[i] / h[i] for h, r in zip(seconds["here"], seconds["ray"], strict=True)]
        print(
            f"{what}: {here:.2f} s here, {ray:.2f} s with Ray: {100 * (ray / here - 1):+.1f} % "
            f"(rounds {', '.join(f'{100 * (ratio - 1):+.1f} %' for ratio in ratios)})"
        )


def kills(config: rl.Config, base: Path, folder: Path, count: int, seed: int, every: float) -> None:
    taken: list[int] = []
    close = Rollouts._close

    def recorded(rollouts: Rollouts, index: int) -> GradedGroup:
        taken.append(index)
        return close(rollouts, index)

    Rollouts._close = recorded  # type: ignore[method-assign,assignment]
    over = threading.Event()
    killed: list[int] = []

    def kill(cluster: Cluster) -> None:
        rng, dead = random.Random(seed), set[int]()  # those that nobody has missed yet, too
        while len(killed) < count and not over.wait(rng.expovariate(1 / every)):
            pids = dict(cluster._engine.crew.pids) if cluster._engine else {}  # type: ignore[attr-defined]
            alive = [place for place, pid in sorted(pids.items()) if pid not in dead]
            if alive:
                place = rng.choice(alive)
                os.kill(pids[place], signal.SIGKILL)
                dead.add(pids[place])
                killed.append(place)

    with Cluster("auto", Watch(), actors=2) as cluster:
        started = time.perf_counter()
        run(config, base, folder / "quiet", cluster)
        quiet, taken[:] = time.perf_counter() - started, []
        thread = threading.Thread(target=kill, args=(cluster,), daemon=True)
        thread.start()
        started = time.perf_counter()
        run(config, base, folder / "killed", cluster)
        disturbed = time.perf_counter() - started
        over.set()
        thread.join()
        engine = cluster._engine
        assert engine is not None
        print(f"{len(killed)} kills (actor 0: {killed.count(0)}, actor 1: {killed.count(1)})")
        print(
            f"losses that the engine noticed: {engine.losses}; answers dropped as doubled: {engine.doubled}"
        )
    wanted = config.steps * config.groups
    counts = Counter(taken)
    print(
        f"problems: {len(counts)} of {wanted} taken, {sum(n > 1 for n in counts.values())} of them more than "
        f"once; {config.samples} answers each"
    )
    assert counts == Counter(range(wanted))
    same = result(folder / "quiet") == result(folder / "killed")
    print(f"the same metrics, answers and checkpoint, byte for byte: {same}")
    print(f"{quiet:.1f} s undisturbed, {disturbed:.1f} s with kills")
    assert same
    assert len(killed) == count, "the run ended before; give it more --steps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("cost", "kills"))
    parser.add_argument(
        "--base", type=Path, help="the folder of a stage with a checkpoint; else a small one is made"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument(
        "--every", type=float, default=1.0, help="mean seconds between kills, while any lives"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the RL stage")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    changes = {key: json.loads(value) for key, _, value in (one.partition("=") for one in asked.set)}
    plain = {"steps": asked.steps, "eval_every": 10**6, "eval_problems": 4, "save_every": 10**6}
    config = rl.Config(**rl.Config.filled({"preset": "liubai", **plain, **changes}))
    print(json.dumps(describe(asked.threads)))
    size = f"{config.steps} steps of {config.groups} × {config.samples} answers"
    print(f"{size}, threads a process: {asked.threads}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = asked.base or folder / "1-base"
        if not asked.base:
            pretrain.run(pretrain.Config(steps=60, tokens_per_step=2048), Context(base, 0, {}, Watch()))
        if asked.what == "cost":
            cost(config, base, folder, asked.rounds)
        else:
            kills(config, base, folder, asked.kills, asked.seed, asked.every)


if __name__ == "__main__":
    main()

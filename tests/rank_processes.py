"""How jobs are started on several processes, which find each other as those of torchrun do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

Job = Callable[[Path], dict[str, Tensor]]
JOBS: dict[str, Job] = {}
REPOSITORY = Path(__file__).resolve().parent.parent


def job(function: Job) -> Job:
    JOBS[function.__name__] = function
    return function


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": paths}
    return {**os.environ, **where, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(command: Sequence[str], world: int) -> list[subprocess.Popen[str]]:
    """As torchrun would."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(rank, world, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


def on_ranks(names: Sequence[str], folder: Path, world: int = 2) -> dict[str, list[dict[str, Tensor]]]:
    """What the jobs return, on each rank."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = start(["-m", "rank_jobs", str(folder), *names], world)
    try:
        said = [p.communicate(timeout=240)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    assert [p.returncode for p in processes] == [0] * world, "\n".join(said)
    return {
        name: [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(world)] for name in names
    }

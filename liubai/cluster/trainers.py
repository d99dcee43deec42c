"""Ranks on the cluster: N processes of the same command, as ``torchrun`` starts them, each where a placement
group has room for it.

Rank 0 writes the run folder and joins the cluster for its answers; all read what earlier stages wrote, so the
run folder is on a disk that every node sees. When a rank is lost, all are ended and started again, and the
run goes on from its last resume point.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liubai.cluster.actors import why_lost
from liubai.cluster.placement import Places, Share
from liubai.errors import UserError

if TYPE_CHECKING:
    from liubai.commands.shared import Elsewhere

#: Losses in a row after which the run ends; a group that lived for ``SETTLED`` seconds begins a new row.
LOSSES, SETTLED = 5, 120.0
#: Seconds that the other ranks have to say what they think of the end of one.
GRACE = 5.0
#: Seconds after which a rank says that it lives.
HEARTBEAT = 5.0
#: Last words of a rank that are kept.
WORDS = 20

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Said:
    """What a rank has printed since it was last asked, and its exit code once it has one."""

    out: tuple[str, ...]
    err: tuple[str, ...]
    code: int | None = None


class TrainerActor:
    """On Ray: starts one process and passes on what it prints. The process ends with the actor."""

    async def open(self) -> tuple[str, str, int]:
        """The node's id and address, and a port there that is free."""
        import ray

        with socket.socket() as listener:
            listener.bind(("", 0))
            port: int = listener.getsockname()[1]
        address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return ray.get_runtime_context().get_node_id(), address, port

    async def start(self, command: Sequence[str], variables: Mapping[str, str], folder: str) -> int:
        """Its process id."""
        self._news = asyncio.Event()
        self._out: list[str] = []
        self._err: list[str] = []
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **variables},
            cwd=folder,
            start_new_session=True,
            preexec_fn=_end_with_parent(),
        )
        self._readers = asyncio.gather(
            self._read(self._process.stdout, self._out), self._read(self._process.stderr, self._err)
        )
        return self._process.pid

    async def hear(self) -> Said:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), HEARTBEAT)
        self._news.clear()
        code = None
        if self._readers.done():
            code = await self._process.wait()
        said = Said(tuple(self._out), tuple(self._err), code)
        self._out.clear()
        self._err.clear()
        return said

    async def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _read(self, pipe: asyncio.StreamReader | None, into: list[str]) -> None:
        assert pipe is not None
        while line := await pipe.readline():
            into.append(line.decode(errors="replace").rstrip("\n"))
            self._news.set()
        self._news.set()


def _end_with_parent() -> Callable[[], None]:
    """To be called in the child: an actor that is killed must not leave a rank behind."""
    libc = ctypes.CDLL(None)  # found before the fork, after which little is allowed

    def child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return child


class RankGone(Exception):
    """A process of the group was lost: killed, or with its node. Nobody's mistake."""


class Trainers:
    """``size`` ranks of ``command`` (arguments of the interpreter). ``say`` gets what rank 0 prints, line by
    line, and whether it is for stderr; ``warn`` is told of losses."""

    def __init__(
        self,
        command: Sequence[str],
        size: int,
        share: Share,
        say: Callable[[str, bool], None],
        warn: Callable[[str], None],
    ) -> None:
        self.command, self.size, self.share = list(command), size, share
        self.pids: list[int] = []  #: of the ranks, each on its node
        self.losses = 0
        self._say, self._warn = say, warn
        self._actors: list[Any] = []
        self._words: list[deque[str]] = []

    def run(self) -> None:
        """Returns when all ranks have ended well. Raises ``UserError`` when they have not, or when they were
        lost too often."""
        places = Places(self.size, self.share, "PACK", "trainers")
        in_a_row = 0
        try:
            while True:
                began = time.monotonic()
                try:
                    self._start(places)
                    return self._follow()
                except RankGone as gone:
                    self.losses += 1
                    in_a_row = 1 if time.monotonic() - began > SETTLED else in_a_row + 1
                    if in_a_row > LOSSES:
                        raise UserError(
                            f"the trainers were lost {in_a_row} times in a row ({gone}); what was saved is "
                            "whole: mend the cause and give the same command again"
                        ) from None
                    self._warn(f"{gone}; all {self.size} ranks start again from the last resume point")
                finally:
                    self._end()
        finally:
            places.give_back()

    def _start(self, places: Places) -> None:
        import ray
        from ray.exceptions import RayActorError

        kind: Any = ray.remote(TrainerActor)
        self._words = [deque(maxlen=WORDS) for _ in range(self.size)]
        self._actors = [
            kind.options(**places.options(rank), max_restarts=0).remote() for rank in range(self.size)
        ]
        try:
            homes = ray.get([actor.open.remote() for actor in self._actors])
            nodes = [node for node, _, _ in homes]
            _, address, port = homes[0]
            self.pids = ray.get(
                [
                    actor.start.remote(
                        self.command,
                        {
                            "RANK": str(rank),
                            "WORLD_SIZE": str(self.size),
                            "LOCAL_RANK": str(nodes[:rank].count(nodes[rank])),
                            "LOCAL_WORLD_SIZE": str(nodes.count(nodes[rank])),
                            "MASTER_ADDR": address,
                            "MASTER_PORT": str(port),
                        },
                        os.getcwd(),
                    )
                    for rank, actor in enumerate(self._actors)
                ]
            )
        except RayActorError as error:
            raise RankGone(f"a trainer was lost while it was starting ({why_lost(error)})") from error

    def _follow(self) -> None:
        """Until all have ended, or one has ended badly."""
        import ray

        codes: dict[int, int] = {}
        awaited = {actor.hear.remote(): rank for rank, actor in enumerate(self._actors)}
        deadline = float("inf")
        while awaited and time.monotonic() < deadline:
            ready, _ = ray.wait(list(awaited), num_returns=1, timeout=0.5)
            for ref in ready:
                rank = awaited.pop(ref)
                code = self._hear(rank, ref)
                if code is None:
                    awaited[self._actors[rank].hear.remote()] = rank
                    continue
                codes[rank] = code
                if code:  # the others will notice, or wait for it for ever
                    deadline = min(deadline, time.monotonic() + GRACE)
        killed = [rank for rank, code in sorted(codes.items()) if code < 0]
        if killed:
            what = _signal(-codes[killed[0]])
            raise RankGone(f"rank {killed[0]} of {self.size} was ended by {what}")
        if failed := [rank for rank, code in codes.items() if code]:  # in the order of their ends
            first = failed[0]
            last = self._words[first][-1] if self._words[first] else f"exit code {codes[first]}"
            raise UserError(last.removeprefix("liubai: "))

    def _hear(self, rank: int, ref: Any) -> int | None:
        import ray
        from ray.exceptions import RayActorError

        try:
            said: Said = ray.get(ref)
        except RayActorError as error:
            raise RankGone(f"rank {rank} of {self.size} was lost ({why_lost(error)})") from error
        self._words[rank] += said.err
        if rank == 0:
            for line in said.out:
                self._say(line, False)
            for line in said.err:
                if not line.startswith("liubai: "):  # its last word is said by whoever reads our error
                    self._say(line, True)
        return said.code

    def _end(self) -> None:
        import ray
        from ray.exceptions import RayError

        for actor in self._actors:
            with contextlib.suppress(RayError):
                ray.get(actor.end.remote(), timeout=GRACE)
            ray.kill(actor)
        self._actors = []


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def train(
    where: Elsewhere,
    threads: int,
    recipe: Path,
    overrides: Sequence[str],
    out: Path,
    reuse: Sequence[Path],
) -> None:
    """``liubai run`` by several ranks on a cluster; what rank 0 prints is printed here."""
    import ray

    from liubai.cluster.connect import connect
    from liubai.cluster.placement import total

    assert where.address is not None
    connect(where.address, beside=where.trainers * max(1, threads))
    try:
        command = [
            "-m",
            "liubai.cli",
            "run",
            str(recipe.absolute()),
            "--no-live",
            "--out",
            str(out.absolute()),
        ]
        command += [part for one in overrides for part in ("--set", one)]
        command += [part for run in reuse for part in ("--reuse", str(run.absolute()))]
        command += ["--cluster", ray.get_runtime_context().gcs_address]
        command += ["--actors", str(where.actors)] if where.actors else []
        share = Share(max(1, threads), 1.0 if total().gpus else 0.0)

        def say(line: str, aside: bool) -> None:
            print(line, file=sys.stderr if aside else sys.stdout, flush=True)

        Trainers(command, where.trainers, share, say, lambda text: say(f"note: {text}", False)).run()
    finally:
        ray.shutdown()  # type: ignore[no-untyped-call]

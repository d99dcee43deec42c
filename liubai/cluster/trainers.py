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
import re
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liubai.cluster.actors import ActorLost, fetched
from liubai.cluster.placement import Places, Share, how_many, room, told
from liubai.commands.stopping import TERMINATED
from liubai.errors import UserError

if TYPE_CHECKING:
    from liubai.commands.shared import Elsewhere

#: Losses in a row after which the run ends; a group that lived for ``SETTLED`` seconds begins a new row.
LOSSES, SETTLED = 5, 120.0
#: Seconds that the other ranks have to say what they think of the end of one.
GRACE = 5.0
#: Seconds that ranks may take to be there before a line says who is waited for, and before the run ends.
LATE, ABSENT = 30.0, 300.0
#: Seconds after which a rank says that it lives.
HEARTBEAT = 5.0
#: Seconds after its end in which what a rank has printed may still arrive.
LAST = 1.0
#: Bytes of a line without an end after which it is cut.
LONG = 1 << 16
#: Last words of a rank that are kept.
WORDS = 40
#: How a rank begins the sentence in which it says a user's mistake, and its exit code then.
SENTENCE, MISTAKE = re.compile(r"liubai( \(rank \d+\))?: "), 2

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Said:
    """What a rank has printed since it was last asked, and its exit code once it has one."""

    out: tuple[str, ...]
    err: tuple[str, ...]
    code: int | None = None


class _Rank(asyncio.SubprocessProtocol):
    """What a process prints, line by line."""

    def __init__(self) -> None:
        self.news, self.silent = asyncio.Event(), asyncio.Event()
        self.lines: dict[int, list[str]] = {1: [], 2: []}  # of its stdout and its stderr
        self._begun = {1: b"", 2: b""}
        self._open = {1, 2}

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *lines, rest = (self._begun[fd] + data).split(b"\n")
        while len(rest) > LONG:
            lines.append(rest[:LONG])
            rest = rest[LONG:]
        self._begun[fd] = rest
        self._say(fd, lines)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if self._begun[fd]:
            self._say(fd, [self._begun[fd]])
        self._open.discard(fd)
        if not self._open:
            self.silent.set()

    def process_exited(self) -> None:
        self.news.set()

    def _say(self, fd: int, lines: Sequence[bytes]) -> None:
        self.lines[fd] += [line.decode(errors="replace") for line in lines]
        if lines:
            self.news.set()


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
        self._transport, self._rank = await asyncio.get_running_loop().subprocess_exec(
            _Rank,
            sys.executable,
            *command,
            stdin=None,
            env={**os.environ, **variables},
            cwd=folder,
            start_new_session=True,
            preexec_fn=_end_with_parent(),
        )
        return self._transport.get_pid()

    async def hear(self) -> Said:
        rank = self._rank
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(rank.news.wait(), HEARTBEAT)
        rank.news.clear()
        if (code := self._transport.get_returncode()) is not None:
            with contextlib.suppress(TimeoutError):  # a child of the rank may hold them open for ever
                await asyncio.wait_for(rank.silent.wait(), LAST)
        said = Said(tuple(rank.lines[1]), tuple(rank.lines[2]), code)
        for lines in rank.lines.values():
            lines.clear()
        return said

    async def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._transport.get_pid(), signal.SIGKILL)
        self._transport.close()


def _end_with_parent() -> Callable[[], None]:
    """To be called in the child: an actor that is killed must not leave a rank behind."""
    libc = ctypes.CDLL(None)  # found before the fork, after which little is allowed

    def child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return child


class RankGone(Exception):
    """A process of the group was lost: killed, or with its node. Nobody's mistake."""


class RankFailed(Exception):
    """A rank has ended by an error that is no user's mistake; it has said which."""


class Trainers:
    """``size`` ranks of ``command`` (arguments of the interpreter). ``say`` gets what rank 0 prints, line by
    line, and whether it is for stderr; ``warn`` is told of losses. ``fixed``: see
    :class:`liubai.cluster.placement.Room`."""

    def __init__(
        self,
        command: Sequence[str],
        size: int,
        share: Share,
        say: Callable[[str, bool], None],
        warn: Callable[[str], None],
        fixed: bool = False,
    ) -> None:
        self.command, self.size, self.share, self.fixed = list(command), size, share, fixed
        self.pids: list[int] = []  #: of the ranks, each on its node
        self.losses = 0
        self._say, self._warn = say, warn
        self._actors: list[Any] = []
        self._room: dict[str, str] = {}
        self._words: list[deque[str]] = []

    def run(self) -> None:
        """Returns when all ranks have ended well. Raises ``UserError`` when they have not, were lost too
        often, have no room or are not there in time, and :class:`RankFailed`."""
        how_many(self.size, self.share, "trainers", room(self.fixed))
        places = Places(self.size, self.share, "PACK", "trainers", self._warn)
        in_a_row = 0
        try:
            while True:
                began = float("inf")
                try:
                    self._start(places)
                    began = time.monotonic()
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

        kind: Any = ray.remote(TrainerActor)
        self._words = [deque(maxlen=WORDS) for _ in range(self.size)]
        self._actors = [
            kind.options(**places.options(rank), max_restarts=0).remote() for rank in range(self.size)
        ]
        try:
            homes = self._all([actor.open.remote() for actor in self._actors])
            self._room = self._room or told(room(self.fixed))
            nodes = [node for node, _, _ in homes]
            _, address, port = homes[0]
            self.pids = self._all(
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
                            **self._room,
                        },
                        os.getcwd(),
                    )
                    for rank, actor in enumerate(self._actors)
                ]
            )
        except ActorLost as lost:
            raise RankGone(f"a trainer was lost while it was starting ({lost})") from lost

    def _all(self, refs: Sequence[Any]) -> list[Any]:
        """What each rank answers. Raises ``UserError`` when one of them does not come up."""
        import ray

        found: dict[int, Any] = {}
        began, said = time.monotonic(), False
        while len(found) < len(refs):
            ready, _ = ray.wait(
                [ref for rank, ref in enumerate(refs) if rank not in found], num_returns=1, timeout=0.5
            )
            found |= {refs.index(ref): fetched(ref) for ref in ready}
            waited = time.monotonic() - began
            if len(found) == len(refs) or waited < LATE:
                continue
            missing = ", ".join(str(rank) for rank in range(len(refs)) if rank not in found)
            if waited > ABSENT:
                raise UserError(
                    f"trainers have not come up within {ABSENT:.0f} s (of {self.size} ranks: {missing}); "
                    "`ray status` says what the cluster has to give and what is asked of it. What was saved "
                    "is whole: start more nodes, or give the same command with fewer --trainers"
                )
            if not said:
                said = True
                self._warn(
                    f"trainers are waited for that have no place yet (of {self.size} ranks: {missing}); the "
                    f"run ends if they are not there in {ABSENT:.0f} s"
                )
        return [found[rank] for rank in range(len(refs))]

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
        # a rank that was told to end has said so in its own way, and is as lost as one that was killed
        codes = {rank: -signal.SIGTERM if code == TERMINATED else code for rank, code in codes.items()}
        killed = [rank for rank, code in sorted(codes.items()) if code < 0]
        if killed:
            what = _signal(-codes[killed[0]])
            raise RankGone(f"rank {killed[0]} of {self.size} was ended by {what}")
        failed = [rank for rank, code in codes.items() if code]  # in the order of their ends
        for rank in failed:  # those who only noticed the end of another one have a sentence, too
            if codes[rank] != MISTAKE:
                for line in self._words[rank] if rank else ():  # rank 0 was heard all the time
                    self._say(line, True)
                raise RankFailed(f"rank {rank} of {self.size} has failed with exit code {codes[rank]}")
        if failed:
            words = self._words[failed[0]] or [f"exit code {MISTAKE}"]
            last = next((line for line in reversed(words) if SENTENCE.match(line)), words[-1])
            raise UserError(SENTENCE.sub("", last, count=1))

    def _hear(self, rank: int, ref: Any) -> int | None:
        try:
            said: Said = fetched(ref)
        except ActorLost as lost:
            raise RankGone(f"rank {rank} of {self.size} was lost ({lost})") from lost
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

        if ends := [actor.end.remote() for actor in self._actors]:
            ray.wait(ends, num_returns=len(ends), timeout=GRACE)
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def as_asked(line: str, out: Path) -> str:
    """The last line of a run, with the path as the user gave it: a rank was given the whole one."""
    begin = f"report: {out.absolute()}"
    return f"report: {out}{line.removeprefix(begin)}" if line.startswith(begin) else line


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

    from liubai.cluster.connect import connect, is_here
    from liubai.cluster.placement import free_again, total

    assert where.address is not None
    cores = len(os.sched_getaffinity(0))
    if is_here(where.address) and where.trainers > max(2, cores):
        raise UserError(
            f"--trainers {where.trainers}: this machine has {cores} cores, and a cluster of it alone has "
            f"room for no more than {max(2, cores)} processes that learn"
        )
    fixed = connect(where.address, beside=where.trainers * max(1, threads))
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
            print(as_asked(line, out), file=sys.stderr if aside else sys.stdout, flush=True)

        warn = lambda text: say(f"note: {text}", False)  # noqa: E731
        if where.actors is None:  # their number is that for which there is room
            free_again(warn)
        Trainers(command, where.trainers, share, say, warn, fixed).run()
    finally:
        ray.shutdown()  # type: ignore[no-untyped-call]

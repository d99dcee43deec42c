"""The process of a model as the event loop sees it: commands in, frames out, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from liubai.serve.wire import Frames, note

#: Bytes read at a time.
READ = 1 << 18
#: Seconds in which a killed process should be gone.
REAP_S = 30.0
#: How often in the time that it may be silent it is looked after.
LOOKS = 8


class Process:
    """Started when made. ``take(kind, body)`` gets every frame, ``on_end()`` is called once, when the other
    end of the socket is gone; after :meth:`end` neither is. To be used by one event loop's thread."""

    def __init__(
        self, settings: Mapping[str, Any], take: Callable[[int, bytes], None], on_end: Callable[[], None]
    ) -> None:
        self.take, self.on_end = take, on_end
        self.loop = asyncio.get_running_loop()
        self.frames = Frames()
        self.link, theirs = socket.socketpair()
        self.link.setblocking(False)
        root = str(Path(__file__).resolve().parents[2])
        fixed = {
            "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": str(settings["threads"]),
            # threads that spin while they wait take the cores from whoever answers the door: with one process
            # more than there are cores a step may take a hundred times as long
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        }
        try:
            with theirs:
                self.popen = subprocess.Popen(
                    # -P: nothing is imported from the folder in which the server happens to be started
                    [sys.executable, "-P", "-m", "liubai.serve.inside", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, **fixed},
                    start_new_session=True,
                )
        except BaseException:
            self.link.close()
            raise
        self._commands: list[list[Any]] = []
        self._unsent = bytearray()
        self.linked = True
        self.stuck = False  #: it lived, and did not work
        self._heard_at = self.loop.time()
        self._looking: asyncio.TimerHandle | None = None
        self.loop.add_reader(self.link, self._read)
        self._send(note(settings))

    @property
    def pid(self) -> int:
        return self.popen.pid

    def tell(self, command: list[Any]) -> None:
        """All commands of one turn of the loop go as one note. What is told to the dead is lost."""
        if not self._commands:
            self.loop.call_soon(self._tell)
        self._commands.append(command)

    def watch(self, awaited: Callable[[], bool], patience_s: float) -> None:
        """End it when it has said nothing for so long although something is ``awaited``: a process that works
        says so every second. Its end is then heard of as any other, with ``stuck``."""
        if not awaited():
            self._heard_at = self.loop.time()
        elif self.loop.time() - self._heard_at > patience_s:
            self.stuck = True
            self._kill()
            return
        self._looking = self.loop.call_later(patience_s / LOOKS, self.watch, awaited, patience_s)

    async def end(self) -> str:
        """Kill it, if it lives, and reap it. How it ended; what hangs in the kernel is waited for no longer
        than ``REAP_S``."""
        self._unlink()
        self._kill()
        try:
            code = await asyncio.to_thread(self.popen.wait, REAP_S)
        except subprocess.TimeoutExpired:
            return "its process does not end"
        return f"its process was ended by signal {-code}" if code < 0 else f"its process ended with {code}"

    def _kill(self) -> None:
        if self.popen.returncode is None:  # once it is reaped, its number may be another's
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.popen.pid, signal.SIGKILL)

    def _tell(self) -> None:
        commands, self._commands = self._commands, []
        self._send(note(commands))

    def _send(self, data: bytes = b"") -> None:
        if not self.linked:
            return
        waited = bool(self._unsent)
        self._unsent += data
        try:
            del self._unsent[: self.link.send(self._unsent)]
        except BlockingIOError:
            pass  # it reads between two steps
        except OSError:  # it is dead; the reader will notice
            self._unsent.clear()
        if self._unsent and not waited:
            self.loop.add_writer(self.link, self._send)
        elif not self._unsent and waited:
            self.loop.remove_writer(self.link)

    def _read(self) -> None:
        try:
            data = self.link.recv(READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._unlink()
            self.on_end()
            return
        self._heard_at = self.loop.time()
        for kind, body in self.frames.feed(data):
            self.take(kind, body)

    def _unlink(self) -> None:
        if self.linked:
            self.linked = False
            if self._looking is not None:
                self._looking.cancel()
            self.loop.remove_reader(self.link)
            self.loop.remove_writer(self.link)
            self.link.close()

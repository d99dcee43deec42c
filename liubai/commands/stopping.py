"""How a run is stopped from outside, and what is said then."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

#: Seconds in which a second SIGTERM is the same one: `timeout` sends it to a program and to its group.
SAME = 1.0
#: What the shell says of a program that SIGTERM has ended.
TERMINATED = 128 + signal.SIGTERM


@contextmanager
def heeding_sigterm() -> Iterator[Callable[[], bool]]:
    """SIGTERM is taken as Ctrl-C in this block: whoever has something open closes it on the way out. What it
    gives says whether there was one; the ``KeyboardInterrupt`` does not, for Ray raises one of its own in
    its place. Only the main thread can be asked that."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    last = -math.inf

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > SAME:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield lambda: last > -math.inf
    finally:
        signal.signal(signal.SIGTERM, before)


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def again() -> str:
    """How the user can give this command again."""
    if under_torchrun():  # it started this process, and none of its own options are known here
        return "the same torchrun command"
    return shlex.join([*_program(), *sys.argv[1:]])


def _program() -> list[str]:
    """By name where the shell finds it, else by its path from here."""
    if shutil.which("liubai") or not Path(sys.argv[0]).is_file():
        return ["liubai"]
    if Path(sys.argv[0]).name == "cli.py":  # python -m liubai.cli: the file itself cannot be started
        found = shutil.which("python")
        here = found and Path(found).parent == Path(sys.executable).parent
        return ["python" if here else os.path.relpath(sys.executable), "-m", "liubai.cli"]
    return [os.path.relpath(sys.argv[0])]

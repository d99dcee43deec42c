"""What the tests of the sandbox share: making an attack, and looking at it from outside."""

import contextlib
import os
import platform
import textwrap
import threading
import time
from pathlib import Path

import pytest

from bench.memory import tree_rss
from liubai.grade import seccomp
from liubai.grade.sandbox import Limits, Result, run

ROOT = Path(__file__).parents[1]

#: Raw system calls, past whatever Python would check. ``call`` returns the result or the error's name.
RAW = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    value = libc.syscall(number, *map(ctypes.c_long, args))
    return value if value >= 0 else errno.errorcode[ctypes.get_errno()]
"""


def attack(source: str, *, stdin: bytes = b"", **limits: float) -> Result:
    return run(textwrap.dedent(source), stdin, Limits(**{"seconds": 10.0, **limits}))  # type: ignore[arg-type]


def said(source: str) -> str:
    result = attack(source)
    assert result.why == "ok", result.stderr.decode()
    return result.stdout.decode().strip()


def refusals(source: str) -> set[str]:
    """What each line of ``source`` raises; the name of nothing raised is ``-``."""
    lines = [line.strip() for line in source.strip().splitlines()]
    done = said(
        "import ctypes, os, socket, subprocess, multiprocessing, sys, shutil, signal, resource\n"
        f"for line in {lines!r}:\n"
        "    try:\n        exec(line)\n        print('-')\n"
        "    except Exception as error:\n        print(type(error).__name__)"
    ).split()
    assert len(done) == len(lines)
    return set(done)


def number(name: str) -> int:
    numbers = {"clone": seccomp.CLONE, "clone3": (seccomp.CLONE3,) * 2, **seccomp.REFUSED}[name]
    found = numbers[list(seccomp.MACHINES).index(platform.machine())]
    if found is None:
        pytest.skip(f"no {name} on this machine")
    return found


def children() -> list[int]:
    """All descendants of this process."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return sorted(family - {os.getpid()})


def sandboxes(tmp_mb: int) -> list[int]:
    """All processes of a sandbox with this odd size of /tmp, whoever their parents are by now."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if f"\0--size\0{tmp_mb << 20}\0".encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
    return found


def gone(pids: list[int], within: float = 0.5) -> bool:
    """Are these processes dead (or reaped) soon?"""
    deadline = time.monotonic() + within
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Watched:
    """Looks at the descendants of this process a hundred times a second."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.most = self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._stop.wait(0.01):
            now = children()
            self.seen.update(now)
            self.most = max(self.most, len(now))
            self.peak = max(self.peak, tree_rss(os.getpid()) - tree_rss_of_one(os.getpid()))

    def __enter__(self) -> "Watched":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def tree_rss_of_one(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

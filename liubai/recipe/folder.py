"""A run's folder: which folders may be one, and that one run at a time works in it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from liubai.errors import UserError

#: Marks a folder as a run, and is locked while one works in it.
MARK = ".liubai-run"


def require_run(out: Path) -> None:
    """Raises ``UserError`` when ``out`` is there and is neither empty nor a run."""
    if out.exists() and not out.is_dir():
        raise UserError(f"'{out}' is a file; choose another folder with --out")
    if out.is_dir() and not (out / MARK).exists() and any(out.iterdir()):
        raise UserError(
            f"'{out}' is not empty and not a run of liubai; choose another folder with --out "
            "(nothing in it was touched)"
        )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder's lock. The system drops it when the process ends, however it ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / MARK, "a+", encoding="utf-8")  # noqa: SIM115 — closed below
    except OSError as error:
        raise UserError(
            f"cannot work in '{out}': {error.strerror}; choose another folder with --out"
        ) from None
    with lock:
        try:
            # lockf and not flock: a grader that outlives a killed run must not keep the lock
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            who = lock.read().strip()
            raise UserError(
                f"another run is working in '{out}'{f' (process {who})' if who else ''}; "
                "wait for it, or choose another folder with --out"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield

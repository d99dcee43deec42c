"""``python -m bench.memory COMMAND…``: run a command, then say how long it took and how much memory
its processes held at once.

The peak is that of the sum of resident sizes over the process tree, looked at ten times a second.
Pages that several processes share are counted for each of them, so it is an upper bound. Linux only.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERTZ = 10
PAGE = resource.getpagesize()


@dataclass(frozen=True, slots=True)
class Watched:
    """``peak_rss`` in bytes."""

    code: int
    seconds: float
    peak_rss: int


def watch(command: Sequence[str], env: Mapping[str, str] | None = None) -> Watched:
    """Run ``command`` to its end; its output goes where ours goes."""
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(command, env=env) as process:
        try:
            while process.poll() is None:
                peak = max(peak, tree_rss(process.pid))
                time.sleep(1 / HERTZ)
        except BaseException:
            process.terminate()
            raise
    return Watched(process.returncode, time.perf_counter() - started, peak)


def tree_rss(root: int) -> int:
    """Bytes resident in ``root`` and its descendants now."""
    children: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # the command's name is in parentheses and may contain anything: read after the last one
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        children.setdefault(int(fields[1]), []).append(int(folder.name))
        sizes[int(folder.name)] = int(fields[21]) * PAGE
    total, queue = 0, [root]
    while queue:
        pid = queue.pop()
        total += sizes.get(pid, 0)
        queue += children.get(pid, [])
    return total


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python -m bench.memory COMMAND…")
    seen = watch(sys.argv[1:])
    print(f"{seen.seconds:.1f} s, peak RSS {seen.peak_rss / 2**20:,.0f} MiB", file=sys.stderr)
    sys.exit(seen.code)


if __name__ == "__main__":
    main()

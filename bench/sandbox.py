"""``python -m bench.sandbox HUMANEVAL.jsonl``: verdicts a second, and how long a hanging program survives.

The file is OpenAI's (``task_id``, ``prompt``, ``canonical_solution``, ``test``, ``entry_point``). Every
canonical solution is graded ``--rounds`` times by a ``GraderPool``; its sandboxes are made anew each time.
The second figure is from the end of a program's time limit until none of its processes is left.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from pathlib import Path

from liubai.grade import GradeItem, GraderPool
from liubai.grade.sandbox import Limits, run

#: Holds on to life: no signal ends it, and its output is closed.
HANGING = """
import os, signal
for n in range(1, 64):
    try: signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError): pass
os.setsid() if os.getsid(0) != os.getpid() else None
os.closerange(0, 3)
while True: pass
"""


def items(path: Path) -> list[GradeItem]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        GradeItem(
            "code",
            f"{row['test']}\ncheck({row['entry_point']})\n",
            f"```python\n{row['prompt']}{row['canonical_solution']}```",
            {"timeout": 30.0},
        )
        for row in rows
    ]


def verdicts_per_second(work: list[GradeItem], workers: int) -> tuple[float, int]:
    """Verdicts a second, workers being up, and how many were right."""
    with GraderPool(workers, timeout_s=60.0) as pool:
        pool.gather(pool.submit(work[: 2 * workers]))
        started = time.perf_counter()
        verdicts = pool.gather(pool.submit(work))
        return len(work) / (time.perf_counter() - started), sum(v.correct for v in verdicts)


def survival(limit_s: float) -> float:
    """Seconds from the limit of a program that will not end to the death of its last process."""
    started = time.monotonic()
    thread = threading.Thread(target=run, args=(HANGING,), kwargs={"limits": Limits(seconds=limit_s)})
    thread.start()
    time.sleep(0.8 * limit_s)
    family = descendants()
    thread.join()
    while any(map(alive, family)):
        time.sleep(0.001)
    assert len(family) >= 3, "it was never there"
    return time.monotonic() - started - limit_s


def descendants() -> list[int]:
    """Processes below this one."""
    family, level = [], [os.getpid()]
    while level:
        level = [
            int(child)
            for pid in level
            for task in Path(f"/proc/{pid}/task").glob("*/children")
            for child in _read(task).split()
        ]
        family += level
    return family


def alive(pid: int) -> bool:
    return _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[:1] not in ([], ["Z"], ["X"])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("humaneval", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    work = items(options.humaneval) * options.rounds
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for workers in options.workers:
        rate, right = verdicts_per_second(work, workers)
        print(f"{workers} workers: {rate:.1f} verdicts/s, {right} of {len(work)} right")
    run("pass")
    late = sorted(survival(0.5) for _ in range(10))
    print(
        f"a hanging program is gone {late[5] * 1000:.0f} ms after its limit (worst {late[-1] * 1000:.0f} ms)"
    )


if __name__ == "__main__":
    main()

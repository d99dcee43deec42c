"""The process of one measurement: ``python -m bench.side JOB.json-text RESULT-FILE``."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from bench.job import Job, Result, own_peak_rss


def liubai_step(job: Job) -> Result:
    from bench import liubai_side

    return liubai_side.step(job)


def liubai_write(job: Job) -> Result:
    from bench import liubai_side

    return liubai_side.write(job)


def trl_step(job: Job) -> Result:
    from bench import peer_side

    return peer_side.step(job)


def transformers_write(job: Job) -> Result:
    from bench import peer_side

    return peer_side.write(job)


def checkpoint(job: Job) -> Result:
    """Write ``job.checkpoint`` with a mean length of ``knob["mean"]`` under ``job.cap``."""
    from bench import world

    hazard = world.make_checkpoint(Path(job.checkpoint), job.knob["mean"], job.cap)
    return _figures({"hazard": hazard})


def peak(job: Job) -> Result:
    """The best float32 matrix product of several sizes, FLOP/s: what this machine can do now."""
    best: dict[str, float] = {}
    for n in (512, 1024, 2048):
        a, b = torch.randn(n, n), torch.randn(n, n)
        out = a @ b
        rates: list[float] = []
        until = time.perf_counter() + job.knob.get("seconds", 1.0)
        while time.perf_counter() < until or len(rates) < 3:
            started = time.perf_counter()
            torch.mm(a, b, out=out)
            rates.append(2 * n**3 / (time.perf_counter() - started))
        best[str(n)] = sorted(rates)[len(rates) // 2]
    return _figures({"flops": max(best.values()), "by_size": best})


def _figures(notes: dict[str, object]) -> Result:
    return Result(seconds=[], tokens=[], lengths=[], prompt_tokens=0, peak_rss=own_peak_rss(), notes=notes)


TASKS = {
    "liubai-step": liubai_step,
    "liubai-write": liubai_write,
    "trl-step": trl_step,
    "transformers-write": transformers_write,
    "checkpoint": checkpoint,
    "peak": peak,
}


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    result = TASKS[job.task](job)
    Path(sys.argv[2]).write_text(json.dumps(asdict(result)), encoding="utf-8")


if __name__ == "__main__":
    main()

"""One measurement in one fresh process: what is asked, what comes back, and how it is started.

Two torch processes at a time slow each other many times over, so there is never more than one, and
the process that starts them does not import torch.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


class BenchError(Exception):
    """A measurement failed; the message ends with what its process said last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """``task`` is a key of ``bench.side.TASKS``; ``knob`` is what each side may tune for itself.

    ``warmup`` steps are run and not counted. For the generation tasks ``steps`` is the number of
    repetitions and ``prompts`` the number of requests.
    """

    task: str
    checkpoint: str = ""
    prompts: int = 32
    samples: int = 16
    cap: int = 100
    warmup: int = 1
    steps: int = 3
    seed: int = 0
    threads: int = 2
    knob: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Seconds and real completion tokens (up to and with the end token) of each counted step."""

    seconds: list[float]
    tokens: list[int]
    #: completion length of every counted answer
    lengths: list[int]
    prompt_tokens: int
    peak_rss: int
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def rates(self) -> list[float]:
        """Tokens a second, step by step."""
        return [n / s for n, s in zip(self.tokens, self.seconds, strict=True)]

    @property
    def mean_length(self) -> float:
        return sum(self.lengths) / max(1, len(self.lengths))


def run(job: Job, timeout: float | None = None) -> Result:
    """Do ``job`` in a process of its own. Raises :class:`BenchError`, also after ``timeout`` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "result.json"
        command = [sys.executable, "-m", "bench.side", json.dumps(asdict(job)), str(answer)]
        try:
            done = subprocess.run(
                command, env=environment(job.threads), capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise BenchError(f"{job.task} {job.knob} took more than {timeout:.0f} s") from None
        if done.returncode or not answer.exists():
            raise BenchError(f"{job.task} failed ({done.returncode}):\n{done.stderr[-3000:]}")
        return Result(**json.loads(answer.read_text(encoding="utf-8")))


def environment(threads: int) -> dict[str, str]:
    """The same for both sides: so many threads, no network, no telemetry, no progress bars."""
    fixed = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    return {**os.environ, **fixed}


def own_peak_rss() -> int:
    """Bytes of this process at its largest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

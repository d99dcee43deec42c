"""``python -m bench.run [--quick]``: a GRPO step and generation, Liubai beside TRL and transformers.

Every measurement is a fresh process, one at a time; the sides take turns, round after round, so a
slow minute of the machine falls on all. Before that each side tunes its own knob (TRL: micro-batch,
cache, continuous batching; Liubai: slots) and is measured at its best. Run it on a quiet machine, in
the environment that ``python -m bench.peers`` makes.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.job import BenchError, Job, Result, run
from bench.table import Rows, Shape, table, warnings


@dataclass(frozen=True, slots=True)
class Contender:
    """A side under a task; ``knobs`` are tried before the rounds and the fastest is kept."""

    name: str
    task: str
    knobs: Sequence[dict[str, Any]]
    warmup: int = 1


@dataclass(frozen=True, slots=True)
class Setting:
    """One table. ``mean`` None: answers never end by themselves, all have ``cap`` tokens."""

    title: str
    contenders: Sequence[Contender]  #: the first is what the others are compared with
    mean: float | None
    cap: int
    prompts: int
    samples: int
    trains: bool


#: The KV cache of transformers' continuous batching on a CPU, where it cannot size itself.
CONTINUOUS = {"num_blocks": 3072, "page_size": 64, "max_batch_tokens": 1024}


def settings(quick: bool) -> list[Setting]:
    mean, groups, samples, many = (16.0, 4, 4, 16) if quick else (85.0, 32, 16, 256)
    tight, loose, exact = (24, 48, 12) if quick else (100, 340, 128)
    micros: list[dict[str, Any]] = [{"micro": n} for n in ((8,) if quick else (64, 32, 128))]
    slots: list[dict[str, Any]] = [{"slots": n} for n in ((8, 16) if quick else (512, 256))]
    trainers = (
        Contender("TRL", "trl-step", [*micros, {"cache": "static"}, {"continuous": CONTINUOUS}]),
        Contender("Liubai", "liubai-step", slots),
        # its first steps prefer short answers; the second warm-up step brings it near its steady state
        Contender("Liubai, in flight", "liubai-step", [{**s, "inflight": True} for s in slots], 2),
    )
    writers = (
        Contender(
            "transformers.generate",
            "transformers-write",
            [{"batch": many}, {"batch": many, "cache": "static"}, {"continuous": CONTINUOUS}],
        ),
        Contender("Liubai's engine", "liubai-write", [{"slots": many}]),
    )
    tokens = f"{exact} tokens each"
    return [
        Setting(f"GRPO step, cap {tight}", trainers, mean, tight, groups, samples, True),
        Setting(f"GRPO step, ragged, cap {loose}", trainers, mean, loose, groups, samples, True),
        Setting(f"Generation, {tokens}", writers, None, exact, many, 1, False),
        Setting(f"Generation, ragged, cap {loose}", writers, mean, loose, 4 * many, 1, False),
    ]


def measure(setting: Setting, folder: Path, options: argparse.Namespace) -> tuple[list[Rows], list[float]]:
    """All rounds of one setting, and the GEMM peak measured once a round (FLOP/s)."""
    checkpoint = folder / "checkpoint"
    base = Job(
        task="checkpoint",
        checkpoint=str(checkpoint),
        prompts=setting.prompts,
        samples=setting.samples,
        cap=setting.cap,
        steps=options.steps,
        threads=options.threads,
    )
    hazard = run(replace(base, knob={"mean": setting.mean})).notes["hazard"]
    say(f"{setting.title}: the end token's probability is {hazard:.4f} a token")
    chosen = [_tune(contender, base, options) for contender in setting.contenders]
    rows = [Rows(c.name, _knob(k)) for c, k in zip(setting.contenders, chosen, strict=True)]
    peaks = []
    for number in range(options.rounds):
        peaks.append(run(replace(base, task="peak", knob={"seconds": options.peak})).notes["flops"])
        for contender, knob, row in zip(setting.contenders, chosen, rows, strict=True):
            job = replace(base, task=contender.task, knob=knob, warmup=contender.warmup, seed=1 + number)
            row.results.append(run(job))
            say(f"  round {number + 1}: {_said(contender.name, row.results[-1])}")
    return rows, peaks


def _tune(contender: Contender, base: Job, options: argparse.Namespace) -> dict[str, Any]:
    """The fastest knob, by its best step; later knobs are tried on top of the best so far."""
    best: dict[str, Any] = contender.knobs[0]
    if len(contender.knobs) == 1 or options.no_tune:
        return best
    fastest = 0.0
    for knob in contender.knobs:
        # knobs add up, but continuous batching has a cache of its own
        tried = {**best, **knob}
        if "continuous" in knob:
            tried.pop("cache", None)
        job = replace(base, task=contender.task, knob=tried, warmup=contender.warmup)
        try:
            result = run(job, timeout=options.patience)
        except BenchError as error:
            reason = str(error).strip().splitlines()[-1]
            say(f"  tuning {contender.name} ({_knob(tried)}): left out: {reason}")
            continue
        say(f"  tuning {contender.name} ({_knob(tried)}): {max(result.rates):,.0f} tokens/s")
        if max(result.rates) > fastest:
            best, fastest = tried, max(result.rates)
    if not fastest:
        raise BenchError(f"{contender.name} could not be run at all")
    return best


def _knob(knob: dict[str, Any]) -> str:
    shown = {k: v for k, v in knob.items() if k != "inflight"}
    return ", ".join("continuous batching" if k == "continuous" else f"{k} {v}" for k, v in shown.items())


def _said(name: str, result: Result) -> str:
    rates = ", ".join(f"{rate:,.0f}" for rate in result.rates)
    extra = f", {result.notes}" if result.notes else ""
    return f"{name}: {rates} tokens/s, mean length {result.mean_length:.1f}{extra}"


def say(line: str) -> None:
    """Progress goes to stderr; the tables are all of stdout."""
    print(line, file=sys.stderr, flush=True)


def machine(threads: int) -> str:
    """The processor and the versions, one line each."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = f"{len(names)} × {names[0].partition(':')[2].strip()}" if names else cpu
    packages = ", ".join(f"{p} {version(p)}" for p in ("liubai", "torch", "transformers", "trl"))
    return f"{cpu}; {threads} threads, float32; Python {platform.python_version()}, {packages}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does the script work?")
    parser.add_argument("--rounds", type=int, help="turns of every side (4; quick: 2)")
    parser.add_argument("--steps", type=int, help="counted steps a turn (2; quick: 1)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of both sides")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds that tuning gives one knob")
    parser.add_argument("--no-tune", action="store_true", help="every side with its first knob; quicker")
    parser.add_argument("--only", metavar="WORD", default="", help="only tables whose title has WORD in it")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 4)
    options.steps = options.steps or (1 if options.quick else 2)
    options.peak = 0.1 if options.quick else 1.0
    print(machine(options.threads) + "\n", flush=True)
    if options.quick:
        print("Quick run: sizes are tiny, the figures say nothing.\n")
    for setting in settings(options.quick):
        if options.only.lower() not in setting.title.lower():
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows, peaks = measure(setting, Path(folder), options)
            shape = Shape.read(Path(folder) / "checkpoint")
        peak = statistics.median(peaks)
        print(f"### {setting.title}\n")
        print(f"{_sizes(setting)} GEMM peak {peak / 1e9:,.0f} GFLOP/s ", end="")
        print(f"({min(peaks) / 1e9:,.0f}–{max(peaks) / 1e9:,.0f}).\n")
        print(table(rows, setting.cap, shape, peak, trains=setting.trains) + "\n")
        for warning in warnings(rows):
            print(f"**Warning**: {warning}\n")
        sys.stdout.flush()


def _sizes(setting: Setting) -> str:
    if setting.trains:
        return f"{setting.prompts} problems × {setting.samples} answers a step."
    return f"{setting.prompts:,} requests."


if __name__ == "__main__":
    try:
        main()
    except BenchError as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)

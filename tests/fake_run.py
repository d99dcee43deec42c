"""A made-up run folder for the tests of the report. Its numbers are drawn from formulas: no model
wrote them, and they say nothing about what training does.

By hand, to look at a page:  python tests/fake_run.py FOLDER [--controls]
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RECIPE = """\
name = "fake-zero"
seed = 7

[stages.base]
kind = "pretrain"
steps = 300

[stages.before]
kind = "eval"
from = "base"
samples = 16
"""


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def write_fake_run(
    path: Path, *, steps: int = 64, take_off: float | None = 20, controls: bool = False, seed: int = 7
) -> Path:
    """A finished run. ``take_off`` is the middle of the growth of reflections; None keeps them flat."""
    rng = random.Random(seed)
    rls: list[tuple[str, float | None]] = [("zero", take_off)]
    if controls:
        rls += [("shuffled", None), ("no-format", steps * 0.6)]
    recipe = RECIPE
    for name, _ in rls:
        recipe += f'\n[stages.{name}]\nkind = "rl"\nfrom = "base"\nsteps = {steps}\n'
        recipe += f'\n[stages.{name}-after]\nkind = "eval"\nfrom = "{name}"\nsamples = 16\n'
    path.mkdir(parents=True, exist_ok=True)
    (path / "recipe.toml").write_text(recipe, encoding="utf-8")

    base = stage(path, 0, "base", 240.3)
    lines(base / "metrics.jsonl", pretrain_rows(rng))
    write_eval(stage(path, 1, "before", 6.2), "base", 0.0, rng)
    for i, (name, middle) in enumerate(rls):
        folder = stage(path, 2 + 2 * i, name, 310.5)
        lines(folder / "metrics.jsonl", rl_rows(steps, middle, rng))
        lines(folder / "samples.jsonl", samples(steps, middle, rng))
        lines(folder / "warnings.jsonl", [{"message": "3 answers ended in a grading error (timeout 2 s)"}])
        growth = 0.0 if middle is None else 1.0 - 0.25 * i
        write_eval(stage(path, 3 + 2 * i, f"{name}-after", 9.4), name, growth, rng)
    return path


def stage(path: Path, number: int, name: str, seconds: float) -> Path:
    folder = path / f"{number}-{name}"
    folder.mkdir(exist_ok=True)
    (folder / "DONE").write_text(json.dumps({"seconds": seconds}))
    return folder


def lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def pretrain_rows(rng: random.Random) -> list[dict[str, Any]]:
    return [
        {
            "step": s,
            "time": s * 0.8,
            "loss": 1.05 + 3.6 * math.exp(-s / 40) + rng.gauss(0, 0.03),
            "lr": 0.01,
            "tokens": s * 16384,
            "tokens/s": 20400 + rng.gauss(0, 500),
            "grad_norm": 0.6,
        }
        for s in range(1, 301)
    ]


def rl_rows(steps: int, middle: float | None, rng: random.Random) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    tokens = 0.0
    for s in range(1, steps + 1):
        grown = 0.0 if middle is None else sigmoid((s - middle) / (steps / 16))
        noise = rng.gauss
        accuracy = 0.12 + 0.42 * grown + 0.05 * s / steps + noise(0, 0.02)
        length = 32 + 92 * grown + noise(0, 3)
        tokens += 512 * length
        generate, update = length / 26 + noise(0, 0.1), length / 38 + noise(0, 0.1)
        row: dict[str, Any] = {
            "step": s,
            "time": 4.9 * s,
            "accuracy": accuracy,
            "reward/total": 2.5 * accuracy - 0.6,
            "reward/correct": accuracy,
            "reward/wrong": accuracy - 1,
            "reward/no_answer": -0.02,
            "reward/format": 0.5 * (0.93 + noise(0, 0.01)),
            "reward/overlong": -0.06 * grown,
            "reward/error": 0.0,
            "length/mean": length,
            "length/right": length * 0.8,
            "length/wrong": length * 1.15,
            "length/max": 256,
            "truncated": 0.01 + 0.12 * grown,
            "format": 0.98 - 0.08 * grown,
            "reflections": max(0.0, 0.8 + 2.4 * grown + noise(0, 0.08)),
            "entropy": 0.7 - 0.35 * s / steps + noise(0, 0.01),
            "clip/low": abs(noise(0, 0.004)),
            "clip/high": abs(noise(0.004, 0.004)),
            "kl": 0.0,
            "zero_variance": 0.3,
            "zero_variance/right": 0.28 * grown,
            "zero_variance/wrong": 0.28 * (1 - grown),
            "logprob_gap": abs(noise(2e-4, 5e-5)),
            "ess": 0.97 + noise(0, 0.01),
            "ratio/max": 1.6 + abs(noise(0, 0.6)),
            "grad_norm": 0.4 + abs(noise(0, 0.1)),
            "lr": 3e-4,
            "loss": noise(0, 0.02),
            "tokens": tokens,
            "tokens/s": 512 * length / (generate + update + 0.1),
            "seconds/generate": generate,
            "seconds/grade": 0.1,
            "seconds/update": update,
            "staleness": 0.0,
            "grade_errors": 0.0,
        }
        if s % 8 == 0 or s == 1:
            row |= {
                "eval/pass@1": accuracy + noise(0.01, 0.01),
                "eval/pass@4": min(1.0, accuracy * 1.7),
                "eval/cons@4": accuracy * 1.2,
                "eval/length": length,
                "eval/reflections": row["reflections"],
                "eval/format": row["format"],
            }
        rows.append(row)
    return rows


def samples(steps: int, middle: float | None, rng: random.Random) -> list[dict[str, Any]]:
    found = []
    for s in [0, *range(8, steps + 1, 8)]:
        grown = 0.0 if middle is None else sigmoid((s - middle) / (steps / 16))
        for problem in range(4):
            numbers = [3 + problem, 4, 5]
            n = 1 + int(9 * grown * rng.random() + 2 * rng.random()) if problem < 3 else 0
            word = "等等" if problem == 2 else "wait"
            tries = [
                f"{numbers[0]} + {rng.randint(1, 9)} =7 * 5 ={rng.randint(10, 99)} :{rng.randint(1, 60)}"
                for _ in range(n)
            ]
            right = rng.random() < 0.15 + 0.6 * grown
            cut_off = not right and n > 8
            text = f" {f' {word} '.join(tries)} " + (
                "" if cut_off else f"</think> <answer> ( {numbers[0]} + 4 ) * 5 </answer>"
            )
            found.append(
                {
                    "step": s,
                    "probe": True,
                    "problem": problem,
                    "prompt": f"<|start|> {' '.join(map(str, numbers))} ->{5 * (numbers[0] + 4)} <think>",
                    "response": text,
                    "correct": right,
                    "answer": None if cut_off else f"( {numbers[0]} + 4 ) * 5",
                    "tokens": 12 * n + 14,
                    "stop": "length" if cut_off else "eos",
                }
            )
    return found


def write_eval(folder: Path, label: str, growth: float, rng: random.Random) -> None:
    p = 0.124 + 0.47 * growth
    ks = [1, 2, 4, 8, 16]
    curve = {str(k): 1 - (1 - p) ** (k ** (0.9 - 0.35 * growth)) for k in ks}
    (folder / "eval.json").write_text(
        json.dumps(
            {
                "label": label,
                "problems": "countdown/held-out",
                "n_problems": 256,
                "samples": 16,
                "pass@1": curve["1"],
                "pass@16": curve["16"],
                "cons@16": p * 1.3,
                "pass@k": curve,
                "mean_tokens": 32.4 + 88 * growth,
                "tokens_right": 30.1 + 70 * growth,
                "tokens_wrong": 33 + 110 * growth,
                "format": 0.981 - 0.03 * growth,
                "reflections": 0.81 + 2.3 * growth,
                "truncated": 0.004 + 0.07 * growth,
                "stderr": 0.0123 + 0.001 * rng.random(),
            }
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    from liubai.report import headline, save_figure, write_report

    made = write_fake_run(Path(sys.argv[1]), controls="--controls" in sys.argv)
    print(headline(made))
    print(write_report(made), save_figure(made, made / "figure.png"))

"""A made-up run folder for the tests of the report. Its numbers are drawn from formulas: no model
wrote them, and they say nothing about what training does.

By hand, to look at a page:  python tests/fake_run.py FOLDER [--controls | --pipeline]
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


# --- a pipeline of many stages, told over several families ----------------------------------------

#: (stage, kind, from …): what a recipe with every kind of stage looks like. Evaluations come in between.
PIPELINE = (
    ("base", "pretrain", ""),
    ("eval-base", "eval", "base"),
    ("zero", "rl", "base"),
    ("eval-zero", "eval", "zero"),
    ("cold", "sample", "zero"),
    ("dev1", "sft", "cold base"),
    ("eval-dev1", "eval", "dev1"),
    ("dev2", "rl", "dev1"),
    ("eval-dev2", "eval", "dev2"),
    ("chosen", "sample", "dev2"),
    ("dev3", "sft", "base chosen"),
    ("eval-dev3", "eval", "dev3"),
    ("liking", "reward_model", "dev3"),
    ("steps", "process", "dev3"),
    ("taste", "dpo", "dev3"),
    ("r1", "ppo", "liking steps dev3"),
    ("eval-r1", "eval", "eval-dev3 r1"),
    ("small", "distill", "base"),
)

#: label -> (pass@1 of make, sum, solve; score of errand), (format, language, readable, unsound), tokens
CHECKPOINTS: dict[str, tuple[tuple[float | None, ...], tuple[float | None, ...], float]] = {
    "Base": ((0.124, 0.31, 0.052, 0.22), (0.871, 0.902, 0.77, None), 31.4),
    "Zero": ((0.779, 0.841, 0.655, 0.203), (0.962, 0.612, 0.41, 0.184), 118.2),
    "Dev1": ((0.59, 0.722, 0.481, 0.704), (0.981, 0.957, 0.93, 0.091), 64.0),
    "Dev2": ((0.74, 0.85, 0.672, 0.715), (0.99, 0.981, None, 0.042), 97.5),
    "Dev3": ((0.781, 0.85, 0.698, 0.803), (0.993, 0.984, 0.97, 0.035), 88.8),
    "R1": ((0.798, 0.877, None, 0.921), (0.994, 0.991, 0.97, 0.03), 90.1),
}
FAMILIES = ("make", "sum", "solve", "errand")


def write_fake_pipeline(path: Path, steps: int = 40) -> Path:
    """A finished run of all kinds of stages with six checkpoints over four families."""
    rng = random.Random(11)
    recipe = 'name = "fake-pipeline"\nseed = 11\n'
    path.mkdir(parents=True, exist_ok=True)
    labels = iter(CHECKPOINTS)
    for i, (name, kind, parents) in enumerate(PIPELINE):
        recipe += f'\n[stages.{name}]\nkind = "{kind}"\n' + (f"from = {parents.split()}\n" if parents else "")
        folder = stage(path, i, name, 60.0 + i)
        if kind == "pretrain":
            lines(folder / "metrics.jsonl", pretrain_rows(rng))
        elif kind == "eval":
            label = next(labels)
            (folder / "eval.json").write_text(json.dumps(pipeline_eval(label)), encoding="utf-8")
        elif kind == "sample":
            dropped = (
                {"wrong": 611, "mixed language": 240} if name == "cold" else {"wrong": 95, "duplicate": 7}
            )
            asked = 2048 if name == "cold" else 400
            kept = {"asked": asked, "kept": asked - sum(dropped.values()), "dropped": dropped}
            (folder / "sample.json").write_text(json.dumps(kept), encoding="utf-8")
        elif kind in ("rl", "ppo"):
            rows = rl_rows(steps, steps / 3, rng)
            for row in rows:
                row |= rewarded(row["step"] / steps, later=name != "zero", liked=name == "r1")
            lines(folder / "metrics.jsonl", rows)
            lines(folder / "samples.jsonl", samples(steps, steps / 3, rng))
        else:
            lines(folder / "metrics.jsonl", taught_rows(kind, steps, rng))
    (path / "recipe.toml").write_text(recipe, encoding="utf-8")
    return path


def pipeline_eval(label: str) -> dict[str, Any]:
    """An evaluation over :data:`FAMILIES`; the last one is graded in degrees and has no pass@1."""
    shares, form, tokens = CHECKPOINTS[label]
    names = ("format", "language", "readable", "unsound")
    families: dict[str, dict[str, Any]] = {
        name: {
            ("score" if name == "errand" else "pass@1"): share,
            "stderr": 0.021,
            "mean_tokens": tokens,
            **dict(zip(names, form, strict=True)),
            "n_problems": 50,
        }
        for name, share in zip(FAMILIES, shares, strict=True)
    }
    known = [share for share in shares[:3] if share is not None]
    overall = sum(known) / len(known)
    result = {
        "label": label,
        "problems": dict.fromkeys(FAMILIES, 1.0),
        "n_problems": 200,
        "samples": 4,
        "pass@1": overall,
        "pass@4": min(1.0, overall * 1.2),
        "cons@4": overall * 1.1,
        "pass@k": {"1": overall, "2": overall * 1.1, "4": min(1.0, overall * 1.2)},
        "mean_tokens": tokens,
        "reflections": tokens / 40,
        "truncated": 0.01,
        "stderr": 0.011,
        "score": overall,
        **dict(zip(names, form, strict=True)),
        "families": families,
    }
    return result | ({"win_rate": 0.71, "against": "Dev3"} if label == "R1" else {})


def rewarded(done: float, *, later: bool, liked: bool) -> dict[str, float]:
    """What reinforcement learning logs besides when language, steps and preferences are judged."""
    row = {"language": 0.9 - (0.0 if later else 0.3 * done), "unsound": 0.15 - 0.1 * done}
    if later:
        row |= {"readable": 0.9 + 0.07 * done, "reward/language": 0.9, "reward/process": 0.4 + 0.1 * done}
    if liked:
        row |= {"reward/preference": 0.2 * done, "preference/score": 3 * done - 1, "win": 0.5 + 0.2 * done}
    return row


def taught_rows(kind: str, steps: int, rng: random.Random) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for s in range(1, steps + 1):
        done = s / steps
        row = {"step": s, "time": 0.5 * s, "loss": 0.3 + 0.4 * math.exp(-5 * done) + rng.gauss(0, 0.01)}
        row |= {"lr": 3e-4 * (1 - 0.9 * done), "tokens/s": 9000 + rng.gauss(0, 200)}
        if kind in ("reward_model", "dpo", "process"):
            row["accuracy"] = 0.5 + 0.4 * done
        if kind in ("reward_model", "dpo"):
            row["margin"] = 2.1 * done
        rows.append(row)
    return rows


if __name__ == "__main__":
    from liubai.report import headline, save_figure, write_report

    if "--pipeline" in sys.argv:
        made = write_fake_pipeline(Path(sys.argv[1]))
    else:
        made = write_fake_run(Path(sys.argv[1]), controls="--controls" in sys.argv)
    print(headline(made))
    print(write_report(made), save_figure(made, made / "figure.png"))

"""``python -m bench.seeds RECIPE.toml``: a recipe over several seeds, and its evaluations as one table.

Runs what ``--out`` does not hold yet; stages that another run has finished with the same fingerprint are
taken from there (``--reuse PATTERN``, in which ``{seed}`` stands for the seed). Figures are means over the
seeds, with the least and the greatest in brackets. ``--table`` runs nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.memory import watch

#: (heading, key of eval.json, digits after the point)
OVERALL = (
    ("format", "format", 3), ("language", "language", 3), ("readable", "readable", 3),
    ("unsound", "unsound", 3), ("tokens", "mean_tokens", 1), ("wins", "win_rate", 3),
)  # fmt: skip


def evaluations(run: Path) -> list[dict[str, Any]]:
    """The finished evaluations of a run, in order."""
    found = sorted(run.glob("*/eval.json"), key=lambda path: int(path.parent.name.partition("-")[0]))
    return [json.loads(path.read_text(encoding="utf-8")) for path in found if (path.parent / "DONE").exists()]


def seconds(run: Path) -> dict[str, float]:
    """What each finished stage took."""
    found = sorted(run.glob("*/DONE"), key=lambda path: int(path.parent.name.partition("-")[0]))
    return {
        path.parent.name.partition("-")[2]: json.loads(path.read_text(encoding="utf-8"))["seconds"]
        for path in found
    }


def cell(values: Sequence[float | None], digits: int) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    mean = f"{statistics.fmean(known):.{digits}f}"
    spread = f"{min(known):.{digits}f}–{max(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ({spread})"


def table(runs: Sequence[Path]) -> str:
    """Markdown: a row for each evaluation of the recipe, over the runs that have it."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for found in evaluations(run):
            rows.setdefault(found["label"], []).append(found)
    families = list(dict.fromkeys(f for found in rows.values() for e in found for f in e.get("families", {})))
    general = {"errand", "passage"} & set(families)
    heads = ["", *(f"{f}, score" if f in general else f for f in families), *(head for head, _, _ in OVERALL)]
    body = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for label, found in rows.items():
        cells = [label]
        for family in families:
            key = "score" if family in general else "pass@1"
            cells.append(cell([e.get("families", {}).get(family, {}).get(key) for e in found], 3))
        cells += [cell([e.get(key) for e in found], digits) for _, key, digits in OVERALL]
        body.append(cells)
    empty = [i for i in range(len(heads)) if i and all(row[i] == "–" for row in body[2:])]
    return "\n".join(f"| {' | '.join(c for i, c in enumerate(row) if i not in empty)} |" for row in body)


def times(runs: Sequence[Path]) -> str:
    """Seconds of each stage, the evaluations left out."""
    each = [seconds(run) for run in runs]
    names = dict.fromkeys(name for one in each for name in one if not name.startswith("eval-"))
    return ", ".join(f"{name} {cell([one.get(name) for one in each], 0)}" for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.seeds", description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="where the runs are")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--reuse", action="append", default=[], help="run folders; {seed} is the seed")
    parser.add_argument("--set", action="append", default=[], metavar="STAGE.KEY=VALUE")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    options = parser.parse_args()
    runs = []
    for seed in options.seeds.split(","):
        run = options.out / f"{options.recipe.stem}-{seed}"
        runs.append(run)
        if options.table:
            continue
        command = [sys.executable, "-m", "liubai.cli", "run", str(options.recipe)]
        command += ["--no-live", "--out", str(run)]
        for setting in (f"seed={seed}", *options.set):
            command += ["--set", setting]
        for pattern in options.reuse:
            if (other := Path(pattern.format(seed=seed))).exists() and other != run:
                command += ["--reuse", str(other)]
        seen = watch(command)
        if seen.code:
            sys.exit(f"bench: seed {seed} failed ({seen.code}); the same command continues it")
        print(f"seed {seed}: peak RSS {seen.peak_rss / 2**20:,.0f} MiB")
    print(f"\n{table(runs)}\n\nSeconds: {times(runs)}")


if __name__ == "__main__":
    main()

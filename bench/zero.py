"""``python -m bench.zero``: the R1-Zero recipe over three seeds, and its two controls, as a table.

Runs what ``--out`` does not hold yet (about ten minutes a seed on two cores) and reads the rest from
the run folders: ``<n>-<stage>/eval.json`` for the figures, ``DONE`` for the seconds. The controls
start from the base of the first seed; its folder is copied, and the runner takes it over only if its
fingerprint says that it is the same base. ``--table`` runs nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.memory import watch

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
#: (heading, key of eval.json, how to write it)
COLUMNS = (
    ("pass@1", "pass@1", "{:.3f}"),
    ("pass@16", "pass@16", "{:.3f}"),
    ("cons@16", "cons@16", "{:.3f}"),
    ("tokens", "mean_tokens", "{:.1f}"),
    ("reflections", "reflections", "{:.2f}"),
    ("format", "format", "{:.3f}"),
)


@dataclass(frozen=True, slots=True)
class Line:
    """One row: the stage evaluated before, the one after, and the stages whose time it took."""

    label: str
    folder: Path
    before: Path
    after: Path
    timed: tuple[str, ...]

    @property
    def memory(self) -> Path:
        return self.folder.with_suffix(".memory.json")


def lines(out: Path, seeds: Sequence[int]) -> list[Line]:
    runs = {seed: out / f"zero-{seed}" for seed in seeds}
    full = [
        Line(f"seed {seed}", run, run / "eval-base", run / "eval-zero", ("base", "zero"))
        for seed, run in runs.items()
    ]
    if not full:
        return []
    first, controls = full[0], out / "zero-controls"
    names = {"no-blank": "control: no blank", "shuffled": "control: shuffled rewards"}
    return full + [
        Line(f"{label} (seed {seeds[0]})", controls, first.before, controls / f"eval-{stage}", (stage,))
        for stage, label in names.items()
    ]


def stage_folder(path: Path) -> Path | None:
    """``run/eval-base`` -> ``run/2-eval-base``, the folder of the finished stage; None without one."""
    found = [f for f in path.parent.glob(f"*-{path.name}") if f.name.partition("-")[2] == path.name]
    return found[0] if len(found) == 1 and (found[0] / "DONE").exists() else None


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def run_recipe(recipe: str, seed: int, last: Line, settings: Sequence[str]) -> None:
    """Run what is not done yet, watched; the peak of its memory is kept beside the run folder."""
    folder, kept = last.folder, last.memory
    finished = stage_folder(last.after) is not None
    sets = [part for setting in (f"seed={seed}", *settings) for part in ("--set", setting)]
    command = [sys.executable, "-m", "liubai.cli", "run", str(RECIPES / recipe), "--no-live", *sets]
    seen = watch([*command, "--out", str(folder)])
    if seen.code:
        sys.exit(f"bench: {recipe} with seed {seed} failed ({seen.code}); the same command continues it")
    if finished and not kept.exists():
        return  # it was run elsewhere: looking at it again says nothing about its memory
    # a run that was continued, or only looked at again, never lowers what was seen before
    peak = max(seen.peak_rss, read(kept)["peak_rss"] if kept.exists() else 0)
    kept.write_text(json.dumps({"peak_rss": peak}) + "\n", encoding="utf-8")


def share_base(source: Path, controls: Path) -> None:
    """Give the controls the base of ``source``, where they have none yet."""
    base = stage_folder(source / "base")
    target = controls / "1-base"
    if base is None or target.exists():
        return
    controls.mkdir(parents=True, exist_ok=True)
    shutil.copytree(base, target)
    shutil.copy(source / ".liubai-run", controls)  # marks the folder as a run


def row(line: Line) -> list[str]:
    """Cells of the table; "–" where a stage has not been run."""
    before, after = stage_folder(line.before), stage_folder(line.after)
    cells = [line.label]
    for _, key, form in COLUMNS:
        figures = [
            form.format(read(f / "eval.json")[key]) if f and key in read(f / "eval.json") else "–"
            for f in (before, after)
        ]
        cells.append(" → ".join(figures))
    stages = [stage_folder(line.folder / name) for name in line.timed]
    done = [read(folder / "DONE")["seconds"] for folder in stages if folder]
    cells.append(" + ".join(f"{s:,.0f}" for s in done) if len(done) == len(stages) else "–")
    peak = f"{read(line.memory)['peak_rss'] / 2**20:,.0f} MiB" if line.memory.exists() else "–"
    return [*cells, peak]


def mean_row(full: Sequence[Line]) -> list[str] | None:
    """Means over the seeds that are done, with the spread (max − min) of the last column's value."""
    pairs = [(stage_folder(line.before), stage_folder(line.after)) for line in full]
    done = [(read(b / "eval.json"), read(a / "eval.json")) for b, a in pairs if b and a]
    if len(done) < 2:
        return None
    cells = [f"mean of {len(done)} (range after)"]
    for _, key, form in COLUMNS:
        before = statistics.fmean(b[key] for b, _ in done)
        after = [a[key] for _, a in done]
        spread = f"{form.format(min(after))}–{form.format(max(after))}"
        cells.append(f"{form.format(before)} → **{form.format(statistics.fmean(after))}** ({spread})")
    return [*cells, "", ""]


def table(rows: Sequence[Sequence[str]]) -> str:
    heads = ["run", *(head for head, _, _ in COLUMNS), "seconds", "peak RSS"]
    body = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in body)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.zero", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="where the runs are")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated; the first has the controls")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    parser.add_argument("--no-controls", action="store_true")
    parser.add_argument(
        "--set", action="append", default=[], metavar="STAGE.KEY=VALUE", help="for every seed's zero.toml"
    )
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    wanted = lines(options.out, seeds)
    full, controls = wanted[: len(seeds)], wanted[len(seeds) :]
    if options.no_controls:
        controls = []
    if not options.table:
        options.out.mkdir(parents=True, exist_ok=True)
        for seed, line in zip(seeds, full, strict=True):
            run_recipe("zero.toml", seed, line, options.set)
        if controls:
            share_base(full[0].folder, controls[0].folder)
            run_recipe("zero-controls.toml", seeds[0], controls[-1], [])
    mean = mean_row(full)
    print(table([*map(row, full), *([mean] if mean else []), *map(row, controls)]))
    print(
        "\nBefore → after RL, held-out problems; what is before a control is the base with the blank. "
        "Seconds: pre-training + RL (controls: RL), evaluations excluded. Peak RSS: of the whole command."
    )


if __name__ == "__main__":
    main()

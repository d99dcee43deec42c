"""A run folder as the report sees it: read-only, and forgiving of whatever is not there yet.

A run that is still going, or was killed in the middle of a line, is a normal guest here: what
cannot be read becomes a sentence in ``Run.notes`` and a gap in a curve. Only a folder that is no
run at all is an error.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liubai.errors import UserError

#: Kinds of stages that learn from rewards; they share their metrics and their charts.
REINFORCED = ("rl", "ppo")
#: Kinds that learn from examples: answers to imitate, or judgements to agree with.
IMITATING, JUDGING = ("sft", "distill"), ("reward_model", "dpo", "process")
#: Kinds that leave no language model behind.
WITHOUT_MODEL = (
    "eval",
    "sample",
    "reward_model",
    "process",
    "bridge",
    "attention",
    "whitebox",
    "hallucination",
    "scaling",
    "thinker",
)

#: What the stages of a kind have found, and in which file: without it they do not show in the report.
RESULTS = {
    "eval": "eval.json",
    "sample": "sample.json",
    "bridge": "bridge.json",
    "attention": "attention.json",
    "whitebox": "whitebox.json",
    "hallucination": "hallucination.json",
    "scaling": "scaling.json",
    "thinker": "thinker.json",
}

_FOLDER = re.compile(r"(\d+)-(.+)")


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric over steps: ``ys[i]`` at ``xs[i]``, ``None`` where nothing was measured."""

    xs: tuple[float, ...]
    ys: tuple[float | None, ...]

    def __bool__(self) -> bool:
        return any(y is not None for y in self.ys)

    @property
    def known(self) -> list[tuple[float, float]]:
        """The points that were measured."""
        return [(x, y) for x, y in zip(self.xs, self.ys, strict=True) if y is not None]


@dataclass(slots=True)
class Stage:
    """One stage: what the recipe says of it, and what its folder holds so far. Of the ``parents`` that it
    comes from, ``parent`` is the one whose weights it takes."""

    name: str
    kind: str
    parent: str
    parents: tuple[str, ...] = ()
    folder: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    result: dict[str, Any] | None = None  #: the file of :data:`RESULTS`
    done: dict[str, Any] | None = None  #: DONE

    @property
    def steps(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def seconds(self) -> float | None:
        """Wall-clock seconds; of an unfinished stage, what its last row says."""
        if self.done is not None:
            return number(self.done.get("seconds"))
        return number(self.rows[-1].get("time")) if self.rows else None

    @property
    def state(self) -> str:
        if self.done is not None:
            return "done"
        return "unfinished" if self.folder is not None else "not started"

    def curve(self, key: str, sparse: bool = False) -> Curve:
        """Metric ``key`` over steps. ``sparse`` drops the steps without it instead of leaving gaps."""
        points = [(float(row["step"]), number(row.get(key))) for row in self.rows]
        if sparse:
            points = [p for p in points if p[1] is not None]
        return Curve(tuple(x for x, _ in points), tuple(y for _, y in points))

    def keys(self, prefix: str = "") -> list[str]:
        """The metrics that were measured at least once, in the order they first appear."""
        found: dict[str, None] = {}
        for row in self.rows:
            found.update((k, None) for k, v in row.items() if number(v) is not None)
        return [k for k in found if k.startswith(prefix)]


@dataclass(slots=True)
class Run:
    """A run folder: stages in the recipe's order. ``damage`` are those of the ``notes`` that say what of a
    finished stage is not there or cannot be read."""

    path: Path
    recipe_text: str
    recipe: dict[str, Any]
    stages: list[Stage]
    notes: list[str]
    environment: dict[str, Any] | None  #: environment.json, when the runner wrote one
    damage: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or self.path.resolve().name)

    def of_kind(self, *kinds: str) -> list[Stage]:
        """The stages of these kinds; "rl" stands for all of :data:`REINFORCED`."""
        wanted = {*kinds, *(REINFORCED if "rl" in kinds else ())}
        return [s for s in self.stages if s.kind in wanted]

    def stage(self, name: str) -> Stage | None:
        return next((s for s in self.stages if s.name == name), None)


def number(value: object) -> float | None:
    """``value`` as a finite float, ``None`` for anything else (null, NaN, ∞, text, bools)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def read_run(path: Path) -> Run:
    """Read the run folder ``path``. Raises ``UserError`` when it is not one."""
    if not path.is_dir():
        raise UserError(f"there is no run folder '{path}'; give the folder that `liubai run` wrote")
    recipe_path = path / "recipe.toml"
    if not recipe_path.is_file():
        raise UserError(f"'{path}' is not a run folder: it has no recipe.toml")
    try:
        text = recipe_path.read_text(encoding="utf-8")
        recipe = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"cannot read '{recipe_path}': {error}") from error
    tables = recipe.get("stages")
    if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
        raise UserError(f"'{recipe_path}' names no stages: it needs [stages.<name>] tables")
    notes: list[str] = []
    folders = {m[2]: p for p in sorted(path.iterdir()) if p.is_dir() and (m := _FOLDER.fullmatch(p.name))}
    damage: list[str] = []
    stages = [_read_stage(name, tables, folders.get(name), notes, damage) for name in tables]
    environment = read_object(path / "environment.json", notes)
    return Run(path, text, recipe, stages, notes, environment, damage)


def _read_stage(
    name: str, tables: dict[str, dict[str, Any]], folder: Path | None, notes: list[str], damage: list[str]
) -> Stage:
    kind = str(tables[name].get("kind", ""))
    origin = tables[name].get("from") or []  # one name, or the resolved recipe's list of names
    parents = tuple(map(str, origin if isinstance(origin, list) else [origin]))
    # stages find their inputs by what they are, in whatever order they are named
    models = [p for p in parents if tables.get(p, {}).get("kind") not in WITHOUT_MODEL]
    stage = Stage(name, kind, next(iter(models or parents), ""), parents, folder)
    if folder is None:
        notes.append(f"The stage “{name}” ({kind}) has not started.")
        return stage
    said: list[str] = []
    stage.rows = _by_step(_read_lines(folder / "metrics.jsonl", said))
    stage.samples = list(_read_lines(folder / "samples.jsonl", said))
    warnings = [str(w.get("message", w)) for w in _read_lines(folder / "warnings.jsonl", said)]
    stage.warnings = list(dict.fromkeys(warnings))
    result = RESULTS.get(kind)
    if result:
        stage.result = read_object(folder / result, said)
    stage.done = read_object(folder / "DONE", said)
    if (folder / "DONE").exists() and stage.done is None:
        stage.done = {}  # an unreadable mark is still a mark
    if stage.done is None:
        so_far = f" {stage.steps} steps so far." if stage.rows else ""
        said.append(f"The stage “{name}” ({kind}) is not finished: running, or interrupted.{so_far}")
    else:
        if result and not (folder / result).exists():
            said.append(f"The stage “{name}” is done but its {result} is missing.")
        elif stage.result == {}:
            said.append(f"The stage “{name}” is done but its {result} is empty.")
        elif kind in ("pretrain", *REINFORCED, *IMITATING, *JUDGING) and not stage.rows:
            said.append(f"The stage “{name}” is done but has no metrics.")
        damage += said
    notes += said
    return stage


def _by_step(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in step order. A step that a resumed run wrote again counts once: as written last."""
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        step = number(row.get("step"))
        if step is not None:
            steps[int(step)] = row
    return [steps[step] for step in sorted(steps)]


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The JSON objects of a .jsonl file; lines that are none (a kill cut them short) are counted."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"Cannot read {path.parent.name}/{path.name}: {error.strerror}.")
        return []
    found, broken = [], 0
    for line in lines:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            broken += 1
    if broken:
        plural = "s were" if broken > 1 else " was"
        notes.append(f"{broken} unreadable line{plural} skipped in {path.parent.name}/{path.name}.")
    return found


def read_object(path: Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        value = None
    if isinstance(value, dict):
        return value
    notes.append(f"Cannot read {path.parent.name}/{path.name}.")
    return None

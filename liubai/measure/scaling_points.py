"""Points for scaling fits: from a file, and from what run folders hold.

Compute is counted by the usual rule, with N parameters: 6N FLOP a token learned from, 2N a token written.
Prompts, graders, attention over long contexts and rewritten activations are not counted, nor PPO's critic,
what a teacher, a reference or a reward model reads, and the answers of ``sample`` stages. Of one run:

- ``pretrain``: loss against compute, averaged in stretches of the run;
- ``rl``, ``ppo``: held-out accuracy, and accuracy of the rollouts, against compute since the stage began;
- ``eval`` by paths: accuracy against tokens an answer, a series a checkpoint and kind of paths; without,
  pass@k against the tokens of k answers: best of k for whoever could tell.

Of several runs also: the last loss over N and D, and each evaluation against the compute of all stages behind
it that learn.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from liubai.errors import UserError
from liubai.files import read_json
from liubai.measure.passk import pass_at_k
from liubai.measure.scaling import Point
from liubai.problems.rows import read_rows

REINFORCED = ("rl", "ppo")
PRACTISED = (*REINFORCED, "distill")  #: learn from what they write: a row has the tokens of its step
CURVED = ("pretrain", *REINFORCED, "eval")  #: kinds that there are points of
TAUGHT = ("pretrain", "sft", "dpo", "reward_model", "process")  #: a row has the tokens read up to there
LEAVES = dict.fromkeys((*PRACTISED, *TAUGHT), "checkpoint")  #: the folder of what has learned
LEAVES |= {"reward_model": "reward_model", "process": "process_model"}
STRETCHES = 16  #: points that a noisy curve is averaged to
WARM = 0.03  #: of pre-training: the first share, where the learning rate still rises
LEAST_EVALS = 4  #: held-out evaluations that make a series
SHARES = {"true": True, "false": False, "none": None, "": None}
KEYS = ("x", "y", "n", "d", "series", "axis", "scores", "share")  #: of a file's rows

Stage = tuple[Path, dict[str, Any]]  #: (folder, table of the recipe)


def of_file(path: str) -> list[Point]:
    """Rows {"x", "y", "n"?, "d"?, "series"?, "axis"?, "scores"?, "share"?}; x may be left out where n and d
    are, and is then 6nd. Raises ``UserError`` with file and line."""
    points = []
    for line, row in read_rows(path):
        unknown = row.keys() - set(KEYS)
        if unknown:
            raise UserError(f"{path}:{line}: '{min(unknown)}' is none of {', '.join(KEYS)}")
        n, d = (None if row.get(key) is None else _number(row, key, path, line) for key in ("n", "d"))
        if (n is None) != (d is None):
            raise UserError(f"{path}:{line}: n and d come together: parameters and tokens")
        if row.get("x") is None and n is not None and d is not None:
            x = 6 * n * d
        else:
            x = _number(row, "x", path, line)
        scores = row.get("scores", [])
        if not isinstance(scores, list) or not all(_finite(score) for score in scores):
            raise UserError(f"{path}:{line}: 'scores' is a list of numbers, one a problem")
        y = sum(scores) / len(scores) if scores and "y" not in row else _number(row, "y", path, line)
        if min(v for v in (x, n, d) if v is not None) <= 0:
            raise UserError(f"{path}:{line}: x, n and d must be above 0: the axes are logarithmic")
        series, axis = str(row.get("series", "")), str(row.get("axis", "x"))
        share = str(row.get("share")).lower()  # true, or "true" in a table's cell
        if share not in SHARES:
            raise UserError(f"{path}:{line}: 'share' is true (y is from 0 to 1) or false (a loss)")
        points.append(Point(x, y, series, n, d, tuple(map(float, scores)), axis, SHARES[share]))
    if not points:
        raise UserError(f'\'{path}\' holds no points; each line is one {{"x": …, "y": …}}')
    return points


def _number(row: Mapping[str, Any], key: str, path: str, line: int) -> float:
    value = row.get(key)
    if isinstance(value, str):  # a table's cell
        try:
            value = float(value)
        except ValueError:
            value = None
    if not _finite(value):
        raise UserError(
            f"{path}:{line}: '{key}' must be a number, not {json.dumps(row.get(key), default=str)[:40]}"
        )
    return float(value)  # type: ignore[arg-type]


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def of_runs(runs: Sequence[Path], names: Iterable[str] | None = None) -> list[Point]:
    """Of all stages of each run, or of those called ``names``. Raises ``UserError`` for a folder that is no
    run, and where there is nothing to draw a curve of."""
    points: list[Point] = []
    for run in runs:
        stages = _stages(run)
        prefix = f"{run.name} · " if len(runs) > 1 else ""
        wanted = set(stages) if names is None else set(names)
        for name, stage in stages.items():
            if name in wanted:
                points += _of_stage(prefix, name, stage, stages)
    if len(runs) > 1:
        points += _across(runs)
    if not points:
        raise UserError(
            f"'{runs[0]}' has no stage with a curve: scaling reads pretrain, rl and ppo stages, and "
            "evaluations"
        )
    return points


def damaged(runs: Sequence[Path], names: Iterable[str] | None = None) -> list[str]:
    """Why finished stages (all, or those called ``names``) have no points, or fewer: a sentence for each file
    that is not there or cannot be read. Raises ``UserError`` for a folder that is no run."""
    wanted = None if names is None else set(names)
    said = []
    for run in runs:
        for name, (folder, table) in _stages(run).items():
            kind = table.get("kind")
            if (folder / "DONE").exists() and (wanted is None or name in wanted):
                if kind == "eval":
                    said += [_lost(folder / "eval.json"), _lost(folder / "scores.json", must=False)]
                elif kind in LEAVES:
                    said += [_lines_lost(folder / "metrics.jsonl")]
                    if not (kept := folder / LEAVES[kind]).is_dir():
                        said += [f"'{kept}' is missing, so the stage's compute is not known"]
    return [sentence for sentence in said if sentence]


def _lost(path: Path, must: bool = True) -> str:
    try:
        return "" if read_json(path) else f"'{path}' is empty"
    except FileNotFoundError:
        return f"'{path}' is missing" if must else ""
    except (OSError, ValueError) as error:
        return f"cannot read '{path}': {error}"


def _lines_lost(path: Path) -> str:
    if not path.is_file():
        return f"'{path}' is missing"
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    broken = len(lines) - sum(_row(line) is not None for line in lines)
    if broken == len(lines):
        return f"'{path}' has no readable line"
    return f"'{path}' has {broken} unreadable line{'s' * (broken > 1)}, left out" if broken else ""


def _stages(run: Path) -> dict[str, Stage]:
    """Those that have a folder, in the recipe's order."""
    recipe = run / "recipe.toml"
    if not run.exists():
        raise UserError(f"there is no '{run}'; name a run folder, or a .jsonl or .csv file of points")
    if not recipe.is_file():
        stage = (run.parent / "recipe.toml").is_file()
        hint = (
            f"It is a stage's; did you mean '{run.parent}'?"
            if stage
            else "Points come from .jsonl or .csv files"
        )
        raise UserError(f"'{run}' is no run folder: it has no recipe.toml. {hint}")
    try:
        tables = tomllib.loads(recipe.read_text(encoding="utf-8"))["stages"]
        kinds = {name: dict(table) for name, table in tables.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read '{recipe}': {error}") from error
    folders = {path.name.partition("-")[2]: path for path in sorted(run.iterdir()) if path.is_dir()}
    return {name: (folders[name], table) for name, table in kinds.items() if name in folders}


def _of_stage(prefix: str, name: str, stage: Stage, stages: Mapping[str, Stage]) -> Iterator[Point]:
    folder, table = stage
    kind = table.get("kind")
    if kind == "eval":
        yield from _of_evaluation(prefix, name, stage, stages)
        return
    if kind not in ("pretrain", *REINFORCED):
        return
    rows, size = _rows(folder), parameters(folder / "checkpoint")
    if not rows or not size:
        return
    if kind == "pretrain":
        axis = "pre-training compute (FLOP)"
        seen = [(6 * size * row["tokens"], row["loss"]) for row in rows if _has(row, "tokens", "loss")]
        warm = WARM * max((x for x, _ in seen), default=0.0)
        for x, y in averaged([pair for pair in seen if pair[0] > warm]):
            yield Point(x, y, f"{prefix}{name}: loss", axis=axis, share=False)
        return
    axis, spent = "RL compute (FLOP)", 0.0
    held, practised = [], []
    for row in rows:
        # a step's answers are those of the weights before it: of the first one no compute had been spent
        if spent and _has(row, "accuracy"):
            practised.append((spent, row["accuracy"]))
        spent += _of_step(row, size)
        if spent and _has(row, "eval/pass@1"):
            held.append((spent, row["eval/pass@1"]))
    if len(held) >= LEAST_EVALS:
        yield from (Point(x, y, f"{prefix}{name}: held-out accuracy", axis=axis, share=True) for x, y in held)
    for x, y in averaged(practised):
        yield Point(x, y, f"{prefix}{name}: accuracy of rollouts", axis=axis, share=True)


def _of_step(row: Mapping[str, Any], size: int) -> float:
    """FLOP of one step that writes and learns from it."""
    return size * float(2 * row.get("step_tokens", 0.0) + 6 * row.get("update_tokens", 0.0))


def averaged(pairs: Sequence[tuple[float, float]], stretches: int = STRETCHES) -> list[tuple[float, float]]:
    """A noisy curve as the means of stretches that are equally long on a logarithmic axis (x: the geometric
    mean); stretches without a point are left out."""
    if len(pairs) <= stretches:
        return list(pairs)
    logs = [math.log(x) for x, _ in pairs]
    low, width = min(logs), (max(logs) - min(logs)) or 1.0
    cells: dict[int, list[int]] = {}
    for i, log in enumerate(logs):
        cells.setdefault(min(stretches - 1, int((log - low) / width * stretches)), []).append(i)
    return [
        (math.exp(sum(logs[i] for i in at) / len(at)), sum(pairs[i][1] for i in at) / len(at))
        for _, at in sorted(cells.items())
    ]


def _of_evaluation(prefix: str, name: str, stage: Stage, stages: Mapping[str, Stage]) -> Iterator[Point]:
    folder = stage[0]
    told = _object(folder / "eval.json")
    y, tokens = told.get("pass@1"), told.get("mean_tokens")
    if not _finite(y) or not _finite(tokens) or not tokens:
        return
    graded = _scores(folder / "scores.json")
    way = told.get("way")
    if isinstance(way, dict):
        parent = next(
            (
                p
                for p in _parents(stage[1])
                if p in stages and LEAVES.get(stages[p][1].get("kind", "")) == "checkpoint"
            ),
            "",
        )
        kind = str(way.get("kind", "paths"))
        if kind == "sample" and (way.get("thinking_budget") is not None or way.get("think_at_least")):
            kind = "length of the thought"
        spent = float(told.get("tokens_spent") or tokens) + float(told.get("tokens_judged") or 0.0)
        means = tuple(sum(row) / len(row) for row in graded) if all(graded) else ()
        series = f"{prefix}{parent}: {kind}"
        yield Point(spent, float(y), series, scores=means, axis="tokens an answer", share=True)  # type: ignore[arg-type]
        return
    k = 1
    most = min(map(len, graded), default=0)
    while k <= most:
        each = tuple(pass_at_k(len(row), sum(score >= 1 for score in row), k) for row in graded)
        label = str(told.get("label", name))
        yield Point(
            k * float(tokens),  # type: ignore[arg-type]
            sum(each) / len(each),
            f"{prefix}{label}: best of k, for whoever could tell",
            scores=each,
            axis="tokens of k answers",
            share=True,
        )
        k *= 2


def _across(runs: Sequence[Path]) -> Iterator[Point]:
    """What only several runs can show."""
    for run in runs:
        stages = _stages(run)
        for name, (folder, table) in stages.items():
            rows, size = _rows(folder), parameters(folder / "checkpoint")
            if table.get("kind") == "pretrain" and rows and size:
                last = [row for row in rows[-max(1, len(rows) // 20) :] if _has(row, "loss", "tokens")]
                if last:
                    loss, tokens = sum(row["loss"] for row in last) / len(last), last[-1]["tokens"]
                    x, series = 6 * size * tokens, f"{name}: last loss"
                    axis = "pre-training compute (FLOP)"
                    yield Point(x, loss, series, float(size), float(tokens), axis=axis, share=False)
            if table.get("kind") == "eval":
                told, spent = _object(folder / "eval.json"), _spent(name, stages)
                if spent and _finite(told.get("pass@1")) and not told.get("way"):
                    label = str(told.get("label", name))
                    axis = "compute of all training (FLOP)"
                    yield Point(spent, float(told["pass@1"]), f"{label}: accuracy", axis=axis, share=True)


def _spent(name: str, stages: Mapping[str, Stage]) -> float:
    """The compute of all that has learned and that stage ``name`` comes from."""
    todo, seen, total = [name], set(), 0.0
    while todo:
        current = todo.pop()
        if current in seen or current not in stages:
            continue
        seen.add(current)
        folder, table = stages[current]
        todo += _parents(table)
        kind = table.get("kind", "")
        if kind not in LEAVES:
            continue
        rows, size = _rows(folder), parameters(folder / LEAVES[kind])
        if kind in PRACTISED:
            total += sum(_of_step(row, size) for row in rows)
        else:
            total += 6 * size * (rows[-1].get("tokens", 0.0) if rows else 0.0)
    return total


def _parents(table: Mapping[str, Any]) -> list[str]:
    origin = table.get("from") or []
    return [origin] if isinstance(origin, str) else [str(parent) for parent in origin]


def parameters(checkpoint: Path) -> int:
    """Of all weights that a checkpoint stores, from the headers of its files; 0 without any."""
    total = 0
    for path in sorted(checkpoint.glob("*.safetensors")) if checkpoint.is_dir() else ():
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 100 << 20:
                raise UserError(f"'{path}' is no safetensors file")
            try:
                header = json.loads(file.read(length))
                total += sum(
                    math.prod(entry["shape"]) for key, entry in header.items() if key != "__metadata__"
                )
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"'{path}' is no safetensors file ({error})") from error
    return total


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Numbers by step; a line that a kill cut short is left out."""
    path = folder / "metrics.jsonl"
    found: dict[int, dict[str, Any]] = {}
    if not path.is_file():
        return []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if row := _row(line):
            found[int(row["step"])] = {key: value for key, value in row.items() if _finite(value)}
    return [found[step] for step in sorted(found)]


def _row(line: str) -> dict[str, Any] | None:
    """``None`` for a line that is no row of a step."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and _finite(row.get("step")) else None


def _has(row: Mapping[str, Any], *keys: str) -> bool:
    return all(key in row for key in keys)


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def _scores(path: Path) -> list[list[float]]:
    rows = _object(path).get("scores")
    if not isinstance(rows, list):
        return []
    try:
        return [[float(score) for score in row] for _, row in rows]
    except (TypeError, ValueError):
        return []

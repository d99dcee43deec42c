"""``liubai scaling``: what more compute buys, and how far that can be foretold."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def scaling(
    what: Annotated[
        list[str], typer.Argument(metavar="POINTS.jsonl|.csv | RUN…", help="Points, or run folders.")
    ],
    series: Annotated[
        list[str] | None, typer.Option(help="Only series whose name has this in it; may be repeated.")
    ] = None,
    after: Annotated[float, typer.Option(min=0.0, help="Leave out points below this x.")] = 0.0,
    draws: Annotated[int, typer.Option(min=20, help="Bootstrap samples.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Decides the bootstrap.")] = 0,
    keep: Annotated[
        bool, typer.Option("--keep", help="Write scaling.json to the run, for its report.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fits of accuracy or loss against compute or tokens, with intervals (docs/scaling.md).

    A line of POINTS.jsonl (in a .csv the columns have these names) is {"x": 1e15, "y": 0.41}, perhaps with
    "series", "n" and "d" (parameters and tokens, for the Chinchilla form), "axis" (what x is) and "scores" (y
    by problem).
    """
    from liubai.errors import UserError
    from liubai.files import write_json
    from liubai.measure.scaling_points import damaged, of_file, of_runs
    from liubai.measure.scaling_verdict import analyse
    from liubai.measure.scaling_verdict import as_json as told
    from liubai.problems.rows import is_rows

    tables = [name for name in what if is_rows(name) and not Path(name).is_dir()]
    runs = [Path(name) for name in what if name not in tables]
    if keep and (tables or len(runs) != 1):
        raise UserError("--keep writes to the folder of one run; name one run, and no file")
    for lost in damaged(runs):
        print(f"liubai: note: {lost}", file=sys.stderr)
    points = [point for name in tables for point in of_file(name)]
    points += of_runs(runs) if runs else []
    if series:
        names = sorted({point.series for point in points})
        points = [point for point in points if any(part in point.series for part in series)]
        if not points:
            raise UserError(
                f"no series has '{series[0][:60]}' in its name; there are: {', '.join(names)[:400]}"
            )
    last = max((point.x for point in points), default=0.0)
    points = [point for point in points if point.x >= after]
    if not points:
        raise UserError(f"--after {after:g} leaves no point: the largest x is {last:.4g}")
    found = analyse(points, draws, seed)
    result: dict[str, Any] = {"series": [told(one) for one in found]}
    if keep:
        write_json(runs[0] / "scaling.json", result)
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
        return
    for one in found:
        print(_words(told(one)))


def _words(told: dict[str, Any]) -> str:
    """A table of one series, and what can be said of it."""
    lines = [f"{told['series'] or 'points'} ({len(told['points'])} points over {told['axis']})"]
    for fit in told["fits"]:
        ends = fit["intervals"]
        numbers = ", ".join(
            f"{name} {value:.4g} [{ends[name][0]:.4g}, {ends[name][1]:.4g}]"
            for name, value in fit["params"].items()
        )
        lines.append(f"  {fit['form']:<10}  {numbers}; AICc {fit['aicc']:.1f}")
    by = told["bootstrap"]
    if told["fits"]:
        lines.append(f"  in brackets: 95 % intervals by a bootstrap over {by}")
    return "\n".join([*lines, *(f"  {sentence}" for sentence in told["words"])])

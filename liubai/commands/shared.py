"""What several commands share: their options, and what a user names on the command line."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liubai.errors import UserError

if TYPE_CHECKING:
    from liubai.cluster.connect import Cluster
    from liubai.stages.config import Compute
    from liubai.stages.view import View

Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint folder, or a hub id.")]
Seed = Annotated[int, typer.Option(min=0, help="Decides every random draw.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
TopP = Annotated[float, typer.Option(min=0.01, max=1.0, help="Keep the likeliest tokens of this mass.")]


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """``--cluster``, ``--actors`` and ``--trainers``. Raises ``UserError`` for what does not fit together."""

    address: str | None
    actors: int | None
    trainers: int

    def __post_init__(self) -> None:
        if self.address is None and (self.actors or self.trainers > 1):
            raise UserError("--actors and --trainers are for a cluster; add --cluster auto, or its HOST:PORT")

    def needs_trainers(self) -> bool:
        """Are there several, and is this process none of them?"""
        return self.trainers > 1 and "RANK" not in os.environ

    def cluster(self, view: View) -> AbstractContextManager[Cluster | None]:
        """None without one, and for the ranks beside the first."""
        from liubai import ranks

        if self.address is None or not ranks.is_main():
            return nullcontext()
        from liubai.cluster.connect import Cluster

        return Cluster(self.address, view, self.actors)


def table(result: dict[str, Any]) -> str:
    rows: list[tuple[str, str]] = []
    for name, value in result.items():
        inner = value.items() if isinstance(value, dict) else [(None, value)]
        for key, number in inner:
            if isinstance(number, (int, float, str)):
                label = name if key is None else f"{name} {key}"
                rows.append((label, f"{number:.4g}" if isinstance(number, float) else str(number)))
    width = max((len(label) for label, _ in rows), default=0)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


def compute_of(device: str) -> Compute:
    from pydantic import ValidationError

    from liubai.stages.config import Compute

    try:
        return Compute(device=device)
    except ValidationError:
        raise UserError(f"--device '{device}': auto, cpu, cuda or cuda:N") from None


def place_for(out: Path, ending: str = "", what: str = "") -> Path:
    """``out``, where a file may be written: asked for before the work whose result it is to hold. Raises
    ``UserError`` for another ending, a folder, or a file in a folder that is not there."""
    if ending and out.suffix.lower() != ending:
        raise UserError(f"'{out}' is to hold {what}: give it a name that ends in {ending}")
    if out.is_dir():
        raise UserError(f"'{out}' is a folder; name a file")
    if not out.parent.is_dir():
        raise UserError(f"there is no folder '{out.parent}' to write {out.name} to")
    return out


def _number(stage: str) -> int:
    """16 of 16-r1."""
    number = stage.partition("-")[0]
    return int(number) if number.isascii() and number.isdecimal() else 0


def checkpoint_folder(path: Path) -> Path:
    """Raises ``UserError`` before anything heavy is imported."""
    from liubai.model.hub import find_folder

    folder = find_folder(path)
    if (folder / "config.json").is_file():
        return folder
    # of a stage, or of the last stage of a run: what else may lie below is nothing to guess at
    pattern = "*/checkpoint/config.json" if (folder / "recipe.toml").is_file() else "checkpoint/config.json"
    inside = [path.parent for path in folder.glob(pattern)]
    last = max(inside, key=lambda path: _number(path.parent.name), default=None)
    hint = f"; did you mean '{last}'?" if last is not None else ""
    raise UserError(f"'{folder}' is not a checkpoint: it has no config.json{hint}")

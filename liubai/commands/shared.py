"""What several commands share: their options, and what a user names on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liubai.errors import UserError

if TYPE_CHECKING:
    from liubai.stages.config import Compute

Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint folder, or a hub id.")]
Seed = Annotated[int, typer.Option(min=0, help="Decides every random draw.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
TopP = Annotated[float, typer.Option(min=0.01, max=1.0, help="Keep the likeliest tokens of this mass.")]


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


def checkpoint_folder(path: Path) -> Path:
    """Raises ``UserError`` before anything heavy is imported."""
    from liubai.model.hub import find_folder

    folder = find_folder(path)
    if (folder / "config.json").is_file():
        return folder
    inside = sorted(path.parent for path in folder.glob("**/checkpoint/config.json"))
    hint = f"; did you mean '{inside[-1]}'?" if inside else ""
    raise UserError(f"'{folder}' is not a checkpoint: it has no config.json{hint}")

"""``liubai check``: are questions fit to train on?"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liubai.errors import UserError

if TYPE_CHECKING:
    from liubai.problems.questions import Question


def check(
    what: Annotated[
        str,
        typer.Argument(metavar="DIR", help="Where recipe.toml is; or a recipe, a file, or gym:NAME."),
    ],
    timeout: Annotated[float, typer.Option(min=0.01, help="Seconds that one verdict may take.")] = 5.0,
    verifier: Annotated[str, typer.Option(help="Of a file's questions that name none.")] = "math",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Are the questions sound? Every gold answer must pass its verifier, every cheap trick must fail."""
    from dataclasses import asdict

    from liubai.measure.findings import describe
    from liubai.measure.soundness import soundness
    from liubai.stages.view import progress_bar

    results = {}
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for name, asked in _asked(what, verifier).items():
        with progress_bar("checking") as progress:
            found = soundness(asked(), timeout_s=timeout, progress=None if as_json else progress)
        results[name] = found
        if not as_json:
            print(describe(name, found, width))
    sound = all(found.sound for found in results.values())
    if as_json:
        print(json.dumps({"sound": sound, "files": {path: asdict(found) for path, found in results.items()}}))
    if not sound:
        raise typer.Exit(2)


def _asked(what: str, verifier: str) -> dict[str, Callable[[], Sequence[Question]]]:
    """What to check: name -> its questions, read when their turn comes."""
    from functools import partial

    from liubai.measure.soundness import drawn
    from liubai.problems import family
    from liubai.problems.gym import PREFIX
    from liubai.problems.questions import Questions, read_questions
    from liubai.problems.rows import is_rows
    from liubai.recipe import load_recipe
    from liubai.stages.config import Brought

    if what.startswith(PREFIX):
        return {what: partial(drawn, family(what))}
    if is_rows(what) and not Path(what).is_dir():
        return {what: partial(read_questions, Questions(path=what, default_verifier=verifier))}
    path = Path(what)
    recipe = load_recipe(path / "recipe.toml" if path.is_dir() else path)
    configs = [stage.config for stage in recipe.stages if isinstance(stage.config, Brought)]
    tables: dict[Questions, str] = {}  # every one that is different, and whose it is first
    for stage in recipe.stages:
        if isinstance(stage.config, Brought) and stage.config.questions:
            tables.setdefault(stage.config.questions, stage.name)
    drawn_from = dict.fromkeys(
        name for c in configs if not c.questions for name in c.families() if name.startswith(PREFIX)
    )
    if not tables and not drawn_from:
        raise UserError(f"no stage of '{recipe.name}' has questions of its own ([stages.NAME.questions])")
    paths = [table.path for table in tables]
    asked: dict[str, Callable[[], Sequence[Question]]] = {
        q.path if paths.count(q.path) == 1 else f"{q.path} (stage {name})": partial(read_questions, q)
        for q, name in tables.items()
    }
    return asked | {name: partial(drawn, family(name)) for name in drawn_from}

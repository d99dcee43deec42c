"""The commands, and nothing else. Heavy imports are inside the commands: ``--help`` must be quick.

A user's mistake is one line on stderr and exit code 2; Ctrl-C is exit code 130, and SIGTERM to a run 143.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from liubai import __version__
from liubai.commands.attention import attention
from liubai.commands.bridge import bridge
from liubai.commands.chat import chat
from liubai.commands.check import check
from liubai.commands.evaluate import evaluate
from liubai.commands.grade import grade
from liubai.commands.hallucination import hallucination
from liubai.commands.plan import plan
from liubai.commands.scaling import scaling
from liubai.commands.serve import serve
from liubai.commands.shared import Elsewhere, checkpoint_folder, place_for, table
from liubai.commands.stopping import TERMINATED, again, heeding_sigterm, under_torchrun
from liubai.commands.whitebox import whitebox
from liubai.errors import UserError
from liubai.model.config import Dtype

if TYPE_CHECKING:
    from liubai.recipe import Recipe

app = typer.Typer(
    help="Bring questions and a way to check answers, get a reasoning model.",
    epilog="Example: liubai run recipes/zero.toml --out runs/first",
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="STAGE.KEY=VALUE", help="Change one key of the recipe; may be repeated."),
]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="The run folder.", show_default="runs/NAME")]
Reuse = Annotated[
    list[Path] | None,
    typer.Option(metavar="RUN", help="Take stages that are the same from this run folder; may be repeated."),
]
Live = Annotated[bool, typer.Option("--live/--no-live", help="A live picture in a terminal.")]
ClusterAt = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="auto|HOST:PORT",
        help="Write and judge answers on Ray: on this machine, or there.",
    ),
]
Actors = Annotated[
    int | None,
    typer.Option(min=1, help="On a cluster: processes that write answers.", show_default="all that fit"),
]
Trainers = Annotated[int, typer.Option(min=1, help="On a cluster: processes that learn together.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"liubai {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: liubai run recipes/zero.toml --set zero.steps=5 --out runs/short")
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="What to do.")],
    overrides: Set = None,
    out: Out = None,
    live: Live = True,
    reuse: Reuse = None,
    cluster: ClusterAt = None,
    actors: Actors = None,
    trainers: Trainers = 1,
) -> None:
    """Run a recipe and write its report. The same command continues a run that was stopped."""
    _run(recipe, overrides or [], out, live, reuse or [], Elsewhere(cluster, actors, trainers))


@app.command(epilog="Example: liubai zero --set seed=1 --out runs/zero-1")
def zero(
    overrides: Set = None,
    out: Out = None,
    live: Live = True,
    cluster: ClusterAt = None,
    actors: Actors = None,
    trainers: Trainers = 1,
) -> None:
    """From nothing to R1-Zero: run recipes/zero.toml."""
    _run(_shipped("zero.toml"), overrides or [], out, live, [], Elsewhere(cluster, actors, trainers))


@app.command(epilog="Example: liubai r1 --set seed=1 --out runs/r1-1")
def r1(
    overrides: Set = None,
    out: Out = None,
    live: Live = True,
    reuse: Reuse = None,
    cluster: ClusterAt = None,
    actors: Actors = None,
    trainers: Trainers = 1,
) -> None:
    """DeepSeek-R1's four stages on a base of its own: run recipes/r1.toml."""
    _run(_shipped("r1.toml"), overrides or [], out, live, reuse or [], Elsewhere(cluster, actors, trainers))


@app.command(epilog="Example: liubai distill --out runs/distill")
def distill(
    overrides: Set = None,
    out: Out = None,
    live: Live = True,
    reuse: Reuse = None,
    cluster: ClusterAt = None,
    actors: Actors = None,
    trainers: Trainers = 1,
) -> None:
    """A small student learns from a teacher, beside RL on the student alone: run recipes/distill.toml."""
    where = Elsewhere(cluster, actors, trainers)
    _run(_shipped("distill.toml"), overrides or [], out, live, reuse or [], where)


def _shipped(name: str) -> Path:
    path = Path(__file__).resolve().parent.parent / "recipes" / name
    if not path.exists():
        raise UserError(
            f"this installation has no recipe '{path}'; clone the repository, or give a recipe of your own: "
            "liubai run RECIPE.toml"
        )
    return path


def _run(
    path: Path,
    overrides: Sequence[str],
    out: Path | None,
    live: bool,
    reuse: Sequence[Path],
    where: Elsewhere,
) -> None:
    from liubai import ranks, recipe

    plan = recipe.load_recipe(path, overrides)
    folder = out or Path("runs") / plan.name
    with heeding_sigterm() as terminated:
        try:
            if not _through(plan, path, overrides, folder, live, reuse, where):
                return
        except KeyboardInterrupt:
            if ranks.is_main():
                said = f"stopped; what was saved is in {folder}; to continue: {again()}"
                print(f"liubai: {said}", file=sys.stderr)
            raise typer.Exit(TERMINATED if terminated() else 130) from None
    _report(folder)


def _report(run: Path) -> None:
    """Write the page; say what the run found, and on stderr what it has lost."""
    from liubai.report import damaged, headline, write_report

    page = write_report(run)
    for note in damaged(run):
        print(f"liubai: note: {note}", file=sys.stderr)
    print(headline(run))
    print(f"report: {page}")


def _through(
    plan: Recipe,
    path: Path,
    overrides: Sequence[str],
    folder: Path,
    live: bool,
    reuse: Sequence[Path],
    where: Elsewhere,
) -> bool:
    """All stages; is it this process that has to write the report?"""
    from liubai import ranks, recipe
    from liubai.stages.view import make_view

    if where.needs_trainers():
        from liubai.cluster.trainers import train

        train(where, plan.threads, path, overrides, folder, reuse)
        return False
    with ranks.joined(), make_view(live and ranks.is_main()) as view, where.cluster(view) as cluster:
        recipe.run(plan, folder, view, reuse, cluster)
        return ranks.is_main()


@app.command(epilog="Example: liubai init mine && liubai check mine")
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
) -> None:
    """Begin a domain of your own: questions, a checker and a recipe to change."""
    from liubai.files import atomic_folder

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"'{folder}' is there already; name a new folder, nothing was changed")
    starter = Path(__file__).parent / "starter"
    with atomic_folder(folder) as new:
        for file in sorted(path for path in starter.iterdir() if path.is_file()):
            (new / file.name).write_bytes(file.read_bytes())
    print(f"wrote {', '.join(sorted(path.name for path in folder.iterdir()))} to {folder}")
    print(f"next: liubai check {folder}; then name your model in {folder / 'recipe.toml'} and liubai run it")


app.command(epilog="Example: liubai check mine, or: liubai check gym:countdown:max_numbers=4")(check)
app.command("eval", epilog="Example: liubai eval runs/zero/3-zero/checkpoint --problems countdown")(evaluate)
app.command(epilog="Example: liubai grade answers.jsonl > verdicts.jsonl")(grade)


@app.command(epilog="Example: liubai export runs/zero/3-zero/checkpoint --to gguf --out zero.gguf")
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint or adapter, or a hub id.")],
    to: Annotated[
        Literal["gguf", "hf"], typer.Option(help="One file for llama.cpp, or a plain Hugging Face folder.")
    ],
    out: Annotated[Path, typer.Option(metavar="PATH", help="The new file or folder.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights.", show_default="its own")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a checkpoint for other programs. An adapter (PEFT's format) is merged into its model.

    Needs `pip install 'liubai[gguf]'` for gguf. What Liubai saves is a Hugging Face folder already:
    transformers and vLLM open it as it is.
    """
    if not (checkpoint / "adapter_config.json").is_file():
        checkpoint = checkpoint_folder(checkpoint)
    from liubai.model.export import export as write

    written = write(checkpoint, to, out, dtype)
    for caveat in written["caveats"]:
        print(f"liubai: note: {caveat}", file=sys.stderr)
    print(json.dumps(written, ensure_ascii=False) if as_json else table(written))


@app.command(epilog="Example: liubai report runs/zero")
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the three curves.")] = None,
) -> None:
    """Write the report of a run again."""
    if not (run / "recipe.toml").is_file():
        raise UserError(f"'{run}' is not a run folder: it has no recipe.toml")
    if png:
        place_for(png, ".png", "a figure")
    _report(run)
    if png:
        from liubai.report import save_figure

        print(f"figure: {save_figure(run, png)}")


app.command(epilog="Example: liubai chat runs/zero/3-zero/checkpoint --no-show-thinking")(chat)
app.command(epilog="Example: liubai serve runs/r1/16-r1/checkpoint --port 8000")(serve)
app.command(epilog="Example: liubai bridge runs/zero/3-zero/checkpoint --problems countdown")(bridge)
app.command(epilog="Example: liubai hallucination runs/r1/16-r1/checkpoint --temperature 1")(hallucination)
app.command(epilog="Example: liubai scaling runs/r1")(scaling)
app.command(epilog="Example: liubai plan recipes/r1.toml --gpus 64 --gpu h100")(plan)
app.command(epilog="Example: liubai attention runs/zero/3-zero/checkpoint --problems countdown")(attention)
app.command(epilog="Example: liubai whitebox runs/crate/5-crate/checkpoint --problems countdown")(whitebox)


def main() -> int:
    """The console script. Every way out is here: a user's mistake is one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        # what a terminal cannot show is spelt out, as JSON would, and never an exception
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            app(prog_name="liubai")
        finally:
            sys.stdout.flush()  # here, where a closed pipe can still be caught
    except UserError as error:
        if _said_by_another():
            return 2
        print(f"liubai{_who()}: " + " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # the reader has gone (| head); nothing is left to say, not even by the interpreter at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # the machine's refusal and no bug: no permission, a read-only file system, no temporary folder
        reason = " ".join((error.strerror or str(error) or type(error).__name__).splitlines())
        place = f": '{error.filename}'" if error.filename is not None else ""
        print(f"liubai: {reason[:1].lower()}{reason[1:]}{place}", file=sys.stderr)
        return 2
    return 0


def _said_by_another() -> bool:
    """Under torchrun, until the ranks look for each other, all of a machine make the same mistake: its first
    says so."""
    from liubai import ranks

    return under_torchrun() and os.environ.get("LOCAL_RANK", "0") != "0" and not ranks.sought()


def _who() -> str:
    """Which of several processes this is, where it is not the one that speaks for all."""
    from liubai import ranks

    return f" (rank {ranks.rank()})" if not ranks.is_main() else ""


if __name__ == "__main__":
    sys.exit(main())

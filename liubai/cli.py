"""The commands, and nothing else. Heavy imports are inside the commands: ``--help`` must be quick.

A user's mistake is one line on stderr and exit code 2; Ctrl-C is exit code 130.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from liubai import __version__
from liubai.commands.attention import attention
from liubai.commands.bridge import bridge
from liubai.commands.chat import chat
from liubai.commands.hallucination import hallucination
from liubai.commands.scaling import scaling
from liubai.commands.serve import serve
from liubai.commands.whitebox import whitebox
from liubai.errors import UserError
from liubai.model.config import Dtype

if TYPE_CHECKING:
    from liubai.problems.questions import Question
    from liubai.stages.config import Compute

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
Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint folder, or a hub id.")]
Seed = Annotated[int, typer.Option(min=0, help="Decides every random draw.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
TopP = Annotated[float, typer.Option(min=0.01, max=1.0, help="Keep the likeliest tokens of this mass.")]


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
) -> None:
    """Run a recipe and write its report. The same command continues a run that was stopped."""
    _run(recipe, overrides or [], out, live, reuse or [])


@app.command(epilog="Example: liubai zero --set seed=1 --out runs/zero-1")
def zero(overrides: Set = None, out: Out = None, live: Live = True) -> None:
    """From nothing to R1-Zero: run recipes/zero.toml."""
    _run(_shipped("zero.toml"), overrides or [], out, live)


@app.command(epilog="Example: liubai r1 --set seed=1 --out runs/r1-1")
def r1(overrides: Set = None, out: Out = None, live: Live = True, reuse: Reuse = None) -> None:
    """DeepSeek-R1's four stages on a base of its own: run recipes/r1.toml."""
    _run(_shipped("r1.toml"), overrides or [], out, live, reuse or [])


@app.command(epilog="Example: liubai distill --out runs/distill")
def distill(overrides: Set = None, out: Out = None, live: Live = True, reuse: Reuse = None) -> None:
    """A small student learns from a teacher, beside RL on the student alone: run recipes/distill.toml."""
    _run(_shipped("distill.toml"), overrides or [], out, live, reuse or [])


def _shipped(name: str) -> Path:
    path = Path(__file__).resolve().parent.parent / "recipes" / name
    if not path.exists():
        raise UserError(
            f"this installation has no recipe '{path}'; clone the repository, or give a recipe of your own: "
            "liubai run RECIPE.toml"
        )
    return path


def _program() -> str:
    """How the user can call this again: by name where the shell finds it, else by its path from here."""
    if shutil.which("liubai") or not Path(sys.argv[0]).is_file():
        return "liubai"
    return os.path.relpath(sys.argv[0])


def _run(
    path: Path, overrides: Sequence[str], out: Path | None, live: bool, reuse: Sequence[Path] = ()
) -> None:
    from liubai import recipe
    from liubai.stages.view import make_view

    plan = recipe.load_recipe(path, overrides)
    folder = out or Path("runs") / plan.name
    try:
        with make_view(live) as view:
            recipe.run(plan, folder, view, reuse)
    except KeyboardInterrupt:
        again = shlex.join([_program(), *sys.argv[1:]])
        print(f"liubai: stopped; what was saved is in {folder}; to continue: {again}", file=sys.stderr)
        raise typer.Exit(130) from None
    from liubai.report import headline, write_report

    page = write_report(folder)
    print(headline(folder))
    print(f"report: {page}")


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


@app.command(epilog="Example: liubai check mine, or: liubai check gym:countdown:max_numbers=4")
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


@app.command("eval", epilog="Example: liubai eval runs/zero/3-zero/checkpoint --problems countdown")
def evaluate(
    checkpoint: Checkpoint,
    problems: Annotated[
        str, typer.Option(help="A family, or a file: all its rows are asked, those trained on, too.")
    ],
    samples: Annotated[int, typer.Option(min=1, help="Answers a problem.")] = 16,
    limit: Annotated[int, typer.Option(min=1, help="How many problems.")] = 200,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 320,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    verifier: Annotated[str, typer.Option(help="Of questions that name none.")] = "math",
    device: Device = "auto",
    paths: Annotated[
        str | None,
        typer.Option(
            metavar="KIND[:N]",
            help="Several paths to each answer: greedy, sample, beam:4, vote:8, best:8, tree:16.",
        ),
    ] = None,
    judge: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="A reward or process model for best and tree; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """How often is a checkpoint right, in one try and in several?"""
    checkpoint = _checkpoint_folder(checkpoint)
    from liubai.stages.by_paths import way_of

    way = way_of(paths, judge or [])
    from liubai.measure.readiness import require_ready
    from liubai.problems.questions import Questions
    from liubai.problems.rows import is_rows
    from liubai.stages.evaluate import evaluate_checkpoint, held_out_of
    from liubai.stages.view import progress_bar

    # a file that is named here is all held out
    asked = Questions(path=problems, default_verifier=verifier, eval_share=1.0) if is_rows(problems) else None
    if asked:
        require_ready(asked)
    held_out = held_out_of(problems, limit, seed, asked)
    with progress_bar("answering") as progress:
        result = evaluate_checkpoint(
            path=checkpoint,
            problems=held_out,
            samples=samples,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            progress=None if as_json else progress,
            compute=_compute(device),
            **({"way": way} if way else {}),
        )
    result = {"problems": problems, **result}
    print(json.dumps(result, ensure_ascii=False) if as_json else _table(result))


def _table(result: dict[str, Any]) -> str:
    rows: list[tuple[str, str]] = []
    for name, value in result.items():
        inner = value.items() if isinstance(value, dict) else [(None, value)]
        for key, number in inner:
            if isinstance(number, (int, float, str)):
                label = name if key is None else f"{name} {key}"
                rows.append((label, f"{number:.4g}" if isinstance(number, float) else str(number)))
    width = max((len(label) for label, _ in rows), default=0)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


def _compute(device: str) -> Compute:
    from pydantic import ValidationError

    from liubai.stages.config import Compute

    try:
        return Compute(device=device)
    except ValidationError:
        raise UserError(f"--device '{device}': auto, cpu, cuda or cuda:N") from None


def _checkpoint_folder(path: Path) -> Path:
    """Raises ``UserError`` before anything heavy is imported."""
    from liubai.model.hub import find_folder

    folder = find_folder(path)
    if (folder / "config.json").is_file():
        return folder
    inside = sorted(path.parent for path in folder.glob("**/checkpoint/config.json"))
    hint = f"; did you mean '{inside[-1]}'?" if inside else ""
    raise UserError(f"'{folder}' is not a checkpoint: it has no config.json{hint}")


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
        checkpoint = _checkpoint_folder(checkpoint)
    from liubai.model.export import export as write

    written = write(checkpoint, to, out, dtype)
    for caveat in written["caveats"]:
        print(f"liubai: note: {caveat}", file=sys.stderr)
    print(json.dumps(written, ensure_ascii=False) if as_json else _table(written))


@app.command(epilog="Example: liubai grade answers.jsonl > verdicts.jsonl")
def grade(
    file: Annotated[str, typer.Argument(metavar="FILE.jsonl", help="Answers to judge; '-' is stdin.")],
    timeout: Annotated[float, typer.Option(min=0.01, help="Seconds that one verdict may take.")] = 5.0,
    workers: Annotated[int, typer.Option(min=1, help="Grading processes.")] = 2,
    checker: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE.py:FUNCTION", help="A checker of your own that lines may name."),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say in words, English and Chinese, what each score is for.")
    ] = False,
) -> None:
    """Judge answers: lines {"verifier", "gold", "response", "meta"?} in, one verdict a line out.

    Verifiers: math, number, exact, choice, regex, json, logic, code, judge, verse, sonnet, countdown, or a
    checker of your own.
    A line: {"verifier": "number", "gold": "5", "response": "<think>2+3</think> <answer>5</answer>"}
    """
    from liubai.grade import grade_lines
    from liubai.grade.answers import read_answers
    from liubai.grade.explain import explain as explained
    from liubai.stages.view import progress_bar

    # every line is read before the first is judged: a bad file must not give half an answer
    items = list(read_answers(file, checker or []))
    with progress_bar("grading") as progress:
        for done, verdict in enumerate(grade_lines(items, timeout_s=timeout, workers=workers), 1):
            line: dict[str, Any] = {
                "correct": verdict.correct,
                "answer": verdict.answer,
                "parts": dict(verdict.parts),
            }
            if verdict.error:
                line["error"] = verdict.error
            words = explained(items[done - 1], verdict) if explain else []
            if words and not sys.stdout.isatty():
                line["explanation"] = {"en": [en for en, _ in words], "zh": [zh for _, zh in words]}
            print(json.dumps(line, ensure_ascii=False))
            if sys.stdout.isatty():  # for a person: below the verdict, and not in it
                for sentence in words:
                    print("".join(f"    {text}\n" for text in sentence), end="")
            if progress:
                progress(done, len(items))


@app.command(epilog="Example: liubai report runs/zero")
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the three curves.")] = None,
) -> None:
    """Write the report of a run again."""
    if not (run / "recipe.toml").is_file():
        raise UserError(f"'{run}' is not a run folder: it has no recipe.toml")
    from liubai.report import headline, save_figure, write_report

    page = write_report(run)
    print(headline(run))
    print(f"report: {page}")
    if png:
        print(f"figure: {save_figure(run, png)}")


app.command(epilog="Example: liubai chat runs/zero/3-zero/checkpoint --no-show-thinking")(chat)
app.command(epilog="Example: liubai serve runs/r1/16-r1/checkpoint --port 8000")(serve)
app.command(epilog="Example: liubai bridge runs/zero/3-zero/checkpoint --problems countdown")(bridge)
app.command(epilog="Example: liubai hallucination runs/r1/16-r1/checkpoint --temperature 1")(hallucination)
app.command(epilog="Example: liubai scaling runs/r1")(scaling)
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
        print("liubai: " + " ".join(str(error).splitlines()), file=sys.stderr)
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


if __name__ == "__main__":
    sys.exit(main())

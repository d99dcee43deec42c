"""``liubai bridge``: what a checkpoint's thoughts are worth to its answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

#: What stands in the place of the thought, in words.
PLACES = {
    "empty": "nothing",
    "own": "the thought",
    "another": "another one",
    "shuffled": "its steps shuffled",
    "foreign": "of another problem",
}


def bridge(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint folder, or a hub id.")],
    problems: Annotated[str, typer.Option(help="A family, or a file: all its rows may be asked.")],
    samples: Annotated[int, typer.Option(min=1, help="Thoughts a problem.")] = 8,
    limit: Annotated[int, typer.Option(min=1, help="How many problems.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 320,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of writing the thoughts; 0 is greedy.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Decides every random draw.")] = 0,
    verifier: Annotated[str, typer.Option(help="Of questions that name none.")] = "math",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Also write the figures and some thoughts.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """How many bits of the right answer does a thought buy, and which of its steps? (docs/bridge.md)"""
    from liubai.commands.shared import checkpoint_folder, compute_of, place_for

    if out:
        place_for(out, ".html", "a page")
    folder = checkpoint_folder(checkpoint)
    from liubai.measure.readiness import require_ready
    from liubai.problems.questions import Questions
    from liubai.problems.rows import is_rows
    from liubai.stages.bridge import measured
    from liubai.stages.evaluate import held_out_of
    from liubai.stages.view import progress_bar

    # a file that is named here is all held out
    asked = Questions(path=problems, default_verifier=verifier, eval_share=1.0) if is_rows(problems) else None
    if asked:
        require_ready(asked)
    held_out = held_out_of(problems, limit, seed, asked)
    with progress_bar("thinking") as progress:
        found = measured(
            folder,
            held_out,
            samples=samples,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            compute=compute_of(device),
            progress=None if as_json else progress,
        )
    result = {"label": _label(folder), "problems": problems, **found.figures}
    print(json.dumps(result, ensure_ascii=False) if as_json else table(result))
    if out:
        from liubai.report.bridge import write_alone

        path = write_alone([result], out)
        if not as_json:
            print(f"figures: {path}")


def _label(folder: Path) -> str:
    """``runs/r1/3-zero/checkpoint`` -> ``3-zero``."""
    whole = folder.resolve()
    return whole.parent.name if whole.name == "checkpoint" else whole.name


def table(result: dict[str, Any]) -> str:
    """What ``liubai bridge`` prints: the answer's cost in every place, and what thoughts and steps buy."""
    n, k, thoughts = result["n_problems"], result["samples"], result["thoughts"]
    about = f"{thoughts} thought{'s' * (thoughts != 1)} about {n} problem{'s' * (n != 1)}"
    told = [
        f"{about} ({result['right']} led to a right answer); "
        f"{result['empty']:.1%} of the {n} × {k} answers came without a thought"
    ]
    if not thoughts:
        return "\n".join([*told, "There was no thought to measure.", *_left_out(result)])
    lines = [
        *told,
        "",
        f"{'bits that a right answer costs after':<38}{'all':>16}{'right':>16}{'wrong':>16}",
    ]
    for name, words in PLACES.items():
        lines.append(_line(f"  {words}", [result["nll"][g][name] for g in ("all", "right", "wrong")]))
    lines.append(_line("bits that the thought buys", list(result["utility"].values())))
    for key, name, words in (
        ("chance", "own", "chance of a right answer after it"),
        ("perplexity", "empty", "perplexity of its tokens after nothing"),
        ("perplexity", "own", "perplexity of its tokens after it"),
    ):
        lines.append(_line(words, [result[key][g][name] for g in ("all", "right", "wrong")]))
    for name, words in (("entropy", "entropy of the thought, bits a token"), ("steps", "steps a thought")):
        lines.append(_line(words, [result["thought"][g][name] for g in ("all", "right", "wrong")]))
    gain, forks = result["gain"], result["forks"]
    steps = [
        f"{words} {_text(gain[key])}"
        for key, words in (
            ("step", "a step buys"),
            ("right_step", "a right one"),
            ("wrong_step", "a wrong one"),
        )
        if gain[key]["mean"] is not None
    ]
    lines += ["", "; ".join(steps) + " bits"]
    if forks["carry"] is not None:
        words = ", ".join(w["word"].strip() or "blank" for w in forks["words"][:8])
        lines.append(f"a fifth of the tokens carry {forks['carry']:.0%} of the entropy; most often: {words}")
    return "\n".join([*lines, *_left_out(result)])


def _left_out(result: dict[str, Any]) -> list[str]:
    """What of the problems there were no right answers to measure by."""
    lines = []
    if own := result["gold"].get("own"):
        lines.append(
            f"of {own} problem{'s' * (own != 1)} only right answers of its own are known: do not compare "
            "with other models"
        )
    if none := result["gold"].get("none"):
        lines.append(f"{none} problem{'s' * (none != 1)} without a known right answer left out")
    return lines


def _line(words: str, cells: list[dict[str, Any]]) -> str:
    return f"{words:<38}" + "".join(f"{_text(cell):>16}" for cell in cells)


def _text(cell: dict[str, Any]) -> str:
    if cell["mean"] is None:
        return "–"
    return f"{cell['mean']:.2f}" + (f" ± {cell['stderr']:.2f}" if cell["stderr"] is not None else "")

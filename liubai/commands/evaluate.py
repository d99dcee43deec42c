"""``liubai eval``: how often a checkpoint is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from liubai.commands.shared import Checkpoint, Device, Seed, TopP, checkpoint_folder, compute_of, table


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
    checkpoint = checkpoint_folder(checkpoint)
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
            compute=compute_of(device),
            **({"way": way} if way else {}),
        )
    result = {"problems": problems, **result}
    print(json.dumps(result, ensure_ascii=False) if as_json else table(result))

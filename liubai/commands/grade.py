"""``liubai grade``: verdicts for answers that somebody has."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer


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

    Verifiers: math, number, exact, choice, regex, json, logic, code, judge, faithful, verse, sonnet,
    countdown, or a checker of your own.
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

"""``liubai hallucination``: how often do a checkpoint's summaries say what the document does not?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def hallucination(
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[CKPT]…", help="Checkpoint folders, or hub ids; none for a file's summaries."
        ),
    ] = None,
    problems: Annotated[
        str, typer.Option(help='The family passage, or a file of {"passage", "prompt"?, "summary"?} rows.')
    ] = "passage",
    limit: Annotated[int, typer.Option(min=1, help="How many documents.")] = 200,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 320,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy, as on the leaderboard.")] = 0.0,
    thinking: Annotated[bool, typer.Option(help="Think before the summary.")] = True,
    scorer: Annotated[Literal["rules", "hhem", "judge"], typer.Option(help="Who judges.")] = "rules",
    hhem: Annotated[Path | None, typer.Option(metavar="DIR", help="HHEM's weights.")] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the Python code in HHEM's folder.")
    ] = False,
    calls: Annotated[int, typer.Option(min=1, help="Most requests to the judge, retries among them.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Decides every random draw.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Write every summary and what was found in it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Summaries of passages: answer rate, hallucination rate, length (docs/hallucination.md).

    The first of several checkpoints is what the others are compared with. The judge is asked at
    LIUBAI_JUDGE_URL for LIUBAI_JUDGE_MODEL with LIUBAI_JUDGE_KEY.
    """
    from liubai.commands.shared import checkpoint_folder, compute_of, place_for
    from liubai.errors import UserError
    from liubai.files import write_text
    from liubai.measure import hallucination as measure
    from liubai.measure.faithful import scorer as scorer_of

    if out:
        place_for(out)
    folders = [checkpoint_folder(path) for path in checkpoints or ()]
    judge = scorer_of(scorer, hhem=hhem, trust_code=trust_code, calls=calls)
    from liubai.problems.rows import is_rows
    from liubai.stages.hallucination import documents, judged, summarised
    from liubai.stages.view import progress_bar

    if not folders and not is_rows(problems):
        raise UserError("name a checkpoint, or --problems FILE.jsonl whose rows have a 'summary'")
    asked = documents(problems, limit, seed)
    found: list[tuple[str, list[measure.Summary]]] = []
    with progress_bar("summarising" if folders else "judging") as progress:
        shown = None if as_json else progress
        for folder in folders:
            written = summarised(
                folder,
                asked,
                judge,
                max_tokens,
                seed,
                temperature,
                thinking=thinking,
                compute=compute_of(device),
                progress=shown,
            )
            found.append((str(folder), written))
        if not folders:
            if not any(document.summary for document in asked):
                raise UserError(
                    f"the rows of '{problems}' have no 'summary'; name a checkpoint to write them"
                )
            said = [measure.Summary(d, measure.said_in(d.summary, d.passage)) for d in asked]
            found.append((problems, judged(said, judge, shown)))
    results: list[dict[str, Any]] = []
    for name, summaries in found:
        told: dict[str, Any] = {"name": name, "problems": problems, "scorer": scorer, "thinking": thinking}
        told |= measure.figures(summaries)
        if results:
            ours, first = ([s.hallucinated for s in some] for some in (summaries, found[0][1]))
            told["compared"] = measure.compare(ours, first, seed)
        results.append(told)
    if out:
        rows = [{"name": name} | measure.record(s) for name, summaries in found for s in summaries]
        write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if as_json:
        print(json.dumps(results[0] if len(results) == 1 else {"results": results}, ensure_ascii=False))
        return
    for told in results:
        print(_words(told))


def _words(told: dict[str, Any]) -> str:
    """A few lines on one checkpoint."""
    answered = f"{told['answered']} of {told['documents']} documents ({told['answer_rate']:.1%})"
    rows = [("answered", answered)]
    if told["rate"] is None:
        rows.append(("hallucination", "nothing could be judged"))
    else:
        low, high = told["interval"]
        said = f"{told['rate']:.1%} of the answered (95 % interval {low:.1%} to {high:.1%})"
        rows.append(("hallucination", f"{said}, {told['rate_all']:.1%} of all"))
    length = f"{told['words']:.1f} words"
    if told["tokens"]:  # of summaries that were there already nobody counted them
        length += f", {told['tokens']:.0f} tokens" + " with the thought" * told["thinking"]
    rows.append(("a summary", f"{length}; {told['copied']:.1%} copied word for word"))
    if told["told"] is not None:
        rows.append(("tells", f"{told['told']:.1%} of what the passage has"))
    if told["kinds"]:
        kinds = ", ".join(f"{kind} {count}" for kind, count in told["kinds"].items())
        rows.append(("what was found", f"{kinds} (summaries with such a finding)"))
    if told["errors"]:
        rows.append(("without verdict", str(told["errors"])))
    if (against := told.get("compared")) and against["worse"] is not None:
        low, high = (100 * end for end in against["interval"])
        both = f"on the {against['documents']} documents that both answered"
        rates = f"{against['rate']:.1%}, the first {against['other']:.1%}"
        change = f"{100 * against['worse']:+.1f} points (95 % interval {low:+.1f} to {high:+.1f})"
        rows.append(("compared", f"{rates}, {both}: {change}"))
    return "\n".join([str(told["name"]), *(f"  {name:<16}  {text}" for name, text in rows)])

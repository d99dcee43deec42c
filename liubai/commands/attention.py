"""``liubai attention``: what the heads of a checkpoint look at."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer


def attention(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint folder, or a hub id.")],
    problems: Annotated[str, typer.Option(help="A family, or a file with questions.")] = "countdown",
    limit: Annotated[int, typer.Option(min=1, help="How many problems it answers.")] = 24,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer that is looked at.")] = 160,
    seed: Annotated[int, typer.Option(min=0, help="Decides which problems.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, patterns and all.")] = False,
) -> None:
    """What each attention head does, and what is lost without it (docs/attention.md)."""
    from liubai.commands.shared import checkpoint_folder
    from liubai.measure.attention import KINDS
    from liubai.problems.questions import Questions
    from liubai.problems.rows import is_rows
    from liubai.stages.attention import atlas
    from liubai.stages.evaluate import held_out_of

    folder = checkpoint_folder(checkpoint)
    asked = Questions(path=problems, eval_share=1.0) if is_rows(problems) else None
    found = atlas(folder, held_out_of(problems, limit, seed, asked), max_tokens=max_tokens)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    print(f"{found['architecture']}: the weight of each head, over {found['readings']} answers of its own")
    print("head   " + "".join(f"{kind:>10}" for kind in KINDS) + "   without it, nats a token (± 2 s.e.)")
    for layer, cells in enumerate(found["ablation"]):
        for head, lost in enumerate(cells):
            error = found["ablation_error"][layer][head]
            told = _row(found["scores"][kind][layer][head] for kind in KINDS)
            print(
                f"{layer + 1}.{head + 1:<4} {told}   {lost:+.3f}" + (f" ± {2 * error:.3f}" if error else "")
            )
    print(f"chance {_row(found['chance'].values())}")
    for kind, b in found["best"].items():
        print(f"{kind}: {KINDS[kind]}, best layer {b['layer'] + 1}, head {b['head'] + 1} ({b['score']:.0%})")


def _row(shares: Iterable[float | None]) -> str:
    return "".join("         –" if share is None else f"{share:10.0%}" for share in shares)

"""``liubai whitebox``: how sparse a checkpoint's layers are, and how far they compress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def whitebox(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint folder, or a hub id.")],
    problems: Annotated[str, typer.Option(help="A family, or a file with questions.")] = "countdown",
    limit: Annotated[int, typer.Option(min=1, help="How many problems it answers.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer that is read.")] = 160,
    seed: Annotated[int, typer.Option(min=0, help="Decides which.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Sparsity and coding rates by layer (docs/white-box.md)."""
    from liubai.commands.shared import checkpoint_folder
    from liubai.problems.questions import Questions
    from liubai.problems.rows import is_rows
    from liubai.stages.evaluate import held_out_of
    from liubai.stages.whitebox import looked_at

    folder = checkpoint_folder(checkpoint)
    asked = Questions(path=problems, eval_share=1.0) if is_rows(problems) else None
    found = looked_at(folder, held_out_of(problems, limit, seed, asked), max_tokens)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    print(f"{found['architecture']}, {found['parameters']:,} parameters; coding rates in nats a token")
    print(f"over {found['tokens']:,} tokens of questions and its own answers")
    print("layer  silent  rate of all   in the subspaces: before, after attention")
    for i, layer in enumerate(found["layers"], 1):
        inside = "–"
        if layer["before"] is not None:
            inside = f"{layer['before']:.3f}, {layer['compressed']:.3f}"
        print(f"{i:5}  {layer['sparsity']:5.1%}  {layer['rate']:11.3f}   {inside}")
        for number, words in enumerate(layer.get("atoms", [])[:3], 1):
            print(f"       atom {number}: {' '.join(words)}")
    if all(layer["before"] is None for layer in found["layers"]):
        print("–: only CRATE's heads have subspaces; silent is below a hundredth of the layer's largest unit")

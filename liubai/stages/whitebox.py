"""A look at the layers of a checkpoint: sparsity and coding rates on held-out problems and its answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field

from liubai.files import write_json
from liubai.measure.whitebox import atoms, white_box
from liubai.model.checkpoint import load
from liubai.seeds import derive
from liubai.stages.attention import written
from liubai.stages.config import Brought, Compute, FamilyName, Shares
from liubai.stages.context import Context
from liubai.stages.evaluate import COMPUTE, held_out_of
from liubai.types import Problem

RESULT = "whitebox.json"
SHOWN = 12  #: atoms of each layer whose words are told


class Config(Brought, Compute):
    problems: FamilyName | Shares = "countdown"
    label: str = ""
    limit: int = Field(64, gt=0, description="held-out problems that it answers; it reads both again")
    max_tokens: int = Field(160, gt=0, description="the longest answer that is read")

    def families(self) -> Iterable[str]:
        return (self.problems,) if isinstance(self.problems, str) else self.problems


def run(config: Config, context: Context) -> None:
    path = context.parent_checkpoint(config.model)
    problems = held_out_of(config.problems, config.limit, derive(context.seed, "eval"), config.questions)
    label = config.label or next(iter(context.inputs), context.stage)
    found = looked_at(path, problems, config.max_tokens, config)
    write_json(context.folder / RESULT, {"label": label, **found})
    context.log(1, 1, {f"sparsity/{i + 1}": layer["sparsity"] for i, layer in enumerate(found["layers"])})


def looked_at(
    path: Path, problems: Sequence[Problem], max_tokens: int = 160, compute: Compute = COMPUTE
) -> dict[str, Any]:
    """The figures of every layer of the checkpoint ``path`` while it reads ``problems`` and its own greedy
    answers, and what some atoms of its dictionaries are about. Raises ``UserError`` for a bad one."""
    model, tokenizer = load(path, dtype=compute.dtype(), device=compute.where())
    texts = [reading.ids for reading in written(model, tokenizer, path, problems, max_tokens)]
    layers = [asdict(f) for f in white_box(model, texts)]
    if model.config.crate:
        for i, layer in enumerate(layers):
            words = [[tokenizer.decode([id]) for id in ids] for ids in atoms(model, i, 6)[:SHOWN]]
            layer["atoms"] = words
    return {
        "architecture": model.config.architecture,
        "parameters": model.count_parameters(),
        "tokens": sum(map(len, texts)),
        "layers": layers,
    }

"""The attention atlas of a checkpoint, and of those that its pre-training kept on the way (``snapshots``)."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from liubai.files import write_json
from liubai.measure.attention import (
    Reading,
    ablation,
    chances,
    division_of_labour,
    head_scores,
    patterns,
    subspaces,
)
from liubai.model.checkpoint import load
from liubai.model.transformer import Transformer
from liubai.rollout.engine import Request, generate
from liubai.rollout.torch_engine import TorchEngine
from liubai.seeds import derive
from liubai.stages.config import Brought, Compute, FamilyName, Shares
from liubai.stages.context import Context
from liubai.stages.evaluate import COMPUTE, held_out_of
from liubai.stages.pretrain import SNAPSHOTS
from liubai.text.template import template_for
from liubai.text.tokenizer import TextTokenizer
from liubai.types import Problem

RESULT = "attention.json"
LONGEST = 96  #: tokens of a text whose pattern is shown


class Config(Brought, Compute):
    problems: FamilyName | Shares = "countdown"
    label: str = ""
    limit: int = Field(24, gt=0, description="held-out problems that it answers")
    max_tokens: int = Field(160, gt=0, description="the longest answer that is looked at")
    shown: int = Field(1, ge=0, description="texts whose patterns are shown whole")

    def families(self) -> Iterable[str]:
        return (self.problems,) if isinstance(self.problems, str) else self.problems


def run(config: Config, context: Context) -> None:
    path = context.parent_checkpoint(config.model)
    problems = held_out_of(config.problems, config.limit, derive(context.seed, "eval"), config.questions)
    earlier = [folder for kept in context.given(SNAPSHOTS) for folder in sorted(kept.iterdir())]

    def progress(done: int, total: int) -> None:
        context.log(done, total, {})

    found = atlas(path, problems, earlier, config.max_tokens, config.shown, config, progress)
    label = config.label or next(iter(context.inputs), context.stage)
    write_json(context.folder / RESULT, {"label": label, **found})


def atlas(
    path: Path,
    problems: Sequence[Problem],
    earlier: Sequence[Path] = (),
    max_tokens: int = 160,
    shown: int = 1,
    compute: Compute = COMPUTE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Everything that is told of the heads of checkpoint ``path``, as JSON values.

    The checkpoints ``earlier`` read the same texts: those that ``path`` wrote, greedily. Raises ``UserError``
    for a bad checkpoint.
    """
    model, tokenizer = load(path, dtype=compute.dtype(), device=compute.where())
    readings = written(model, tokenizer, path, problems, max_tokens)
    progress(1, len(earlier) + 1)
    scores = head_scores(model, readings)
    history = []
    for count, folder in enumerate(earlier, 2):
        younger, _ = load(folder, dtype=compute.dtype(), device=compute.where())
        history.append({"step": int(folder.name), **_figures(younger, head_scores(younger, readings))})
        progress(count, len(earlier) + 1)
    best = {
        kind: {"layer": layer, "head": head, "score": score}
        for kind, (layer, head, score) in division_of_labour(scores).items()
    }
    # those that fit, in their order; after them the shortest, which are cut
    order = sorted(readings, key=lambda reading: max(len(reading.ids), LONGEST))
    lost, error = ablation(model, readings)
    return {
        "architecture": model.config.architecture,
        "readings": len(readings),
        "best": best,
        **_figures(model, scores),
        "chance": {kind: None if math.isnan(c) else round(c, 5) for kind, c in chances(readings).items()},
        "ablation": _plain(lost),
        "ablation_error": _plain(error),
        "history": history,
        "texts": [_text(model, tokenizer, reading) for reading in order[:shown]],
    }


def written(
    model: Transformer, tokenizer: TextTokenizer, path: Path, problems: Sequence[Problem], max_tokens: int
) -> list[Reading]:
    """The model's greedy answers to ``problems``, with their questions, ready to be read again."""
    template = template_for(tokenizer, path)
    prompts = [tuple(template.prompt_ids(p.prompt)) for p in problems]
    room = model.config.max_position_embeddings
    engine = TorchEngine(
        model, eos_ids=tokenizer.eos_ids, max_length=min(room, max(map(len, prompts)) + max_tokens)
    )
    engine.load(model.state_dict(), version=0)
    requests = [
        Request(id=i, prompt_ids=ids, max_tokens=min(max_tokens, room - len(ids)), seed=i, temperature=0.0)
        for i, ids in enumerate(prompts)
    ]
    samples = generate(engine, requests)
    texts = [[tokenizer.decode([i]) for i in prompt] for prompt in prompts]
    return [
        Reading(
            ids=s.prompt_ids + s.completion_ids,
            prompt=len(s.prompt_ids),
            target=target_of(text),
            numbers=frozenset(
                i for i in {*s.prompt_ids, *s.completion_ids} if any(map(str.isdigit, tokenizer.decode([i])))
            ),
        )
        for s, text in zip(samples, texts, strict=True)
    ]


def target_of(tokens: Sequence[str]) -> int | None:
    """What a question aims at: the place of ``->35``, or of the number after ``=``."""
    for at in reversed(range(len(tokens))):
        before = tokens[at - 1].strip() if at else ""
        if tokens[at].strip().startswith("->") or (before == "=" and tokens[at].strip().isdigit()):
            return at
    return None


def _figures(model: Transformer, scores: dict[str, Tensor]) -> dict[str, Any]:
    spaces = {} if model.config.crate else subspaces(model)
    return {
        "scores": {kind: _plain(table) for kind, table in scores.items()},
        "subspaces": {name: _plain(table) for name, table in spaces.items()},
    }


def _plain(table_LH: Tensor) -> list[list[float | None]]:
    return [[None if value != value else round(value, 5) for value in row] for row in table_LH.tolist()]


def _text(model: Transformer, tokenizer: TextTokenizer, reading: Reading) -> dict[str, Any]:
    """The first :data:`LONGEST` of the ``length`` tokens of a text, and every head's pattern on them,
    ``[L, H, T, T]`` in bytes (255 is a weight of 1), packed. No token looks ahead: what is cut changes
    nothing in the rows that are left."""
    ids = reading.ids[:LONGEST]
    weights_LHTT = patterns(model, ids)
    bytes_ = (weights_LHTT * 255).round().to(torch.uint8).numpy().tobytes()
    return {
        "tokens": [tokenizer.decode([i]) or "·" for i in ids],
        "length": len(reading.ids),
        "prompt": reading.prompt,
        "shape": list(weights_LHTT.shape),
        "patterns": base64.b64encode(zlib.compress(bytes_, 9)).decode(),
    }

"""Supervised fine-tuning: learn to write what is in examples. The answers are learned, never the prompts.

Examples come from ``sample`` stages before (``from``), from the user's file (``texts``), and from the careful
writers of the small world's families (``careful``), in shares. Left out on purpose: validation loss — the
evaluations that follow measure what matters.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from liubai.errors import UserError
from liubai.learn.optim import Optimizer, cosine
from liubai.learn.packing import Batch, micro_batches
from liubai.learn.sharded import load_to_share, share_out
from liubai.model.checkpoint import save_checkpoint
from liubai.model.lora import LoraConfig, attach, merged, save_adapter
from liubai.problems import family, problem_at
from liubai.problems.family import CAREFUL
from liubai.problems.texts import Texts, digest_of, read_texts
from liubai.seeds import stream
from liubai.stages.config import Brought, StageConfig, Trained, WrittenShares
from liubai.stages.context import Context
from liubai.stages.records import EXAMPLES, Example, encoded, example_of, read_examples
from liubai.stages.supervised import NextToken, drawn_at, require_room, train
from liubai.text.template import template_for
from liubai.text.tokenizer import THINK


class Config(Brought, Trained):
    epochs: float = Field(2.0, gt=0)
    batch: int = Field(64, gt=0, description="examples a step")
    lr: float = Field(1e-4, gt=0)
    floor: float = Field(0.1, ge=0, le=1, description="share of lr that the cosine decay ends at")
    warmup: float = Field(0.03, ge=0, le=1, description="share of the steps")
    max_norm: float = Field(1.0, gt=0)
    #: the user's own examples
    texts: Texts | None = None
    #: families whose careful writers add examples
    careful: WrittenShares | None = None
    careful_share: float = Field(1 / 3, ge=0, description="careful examples for each of the others")
    rude: float = Field(0.0, ge=0, le=1, description="share of them that do an errand without courtesy")
    limit: int = Field(0, ge=0, description="examples of the stages before, at most; 0: all")
    lora: LoraConfig | None = None
    save_every: int = Field(50, gt=0)

    @field_validator("texts")
    @classmethod
    def _asked(cls, texts: Texts | None) -> Texts | None:
        if texts and texts.plain:
            raise ValueError("examples need a question: plain text is for pretrain")
        return texts

    def located(self, folder: Path) -> StageConfig:
        texts = self.texts.located(folder) if self.texts else None
        return super().located(folder).model_copy(update={"texts": texts})

    def outside(self) -> dict[str, str]:
        return super().outside() | ({self.texts.path: digest_of(self.texts.path)} if self.texts else {})


def run(config: Config, context: Context) -> None:
    parent = context.parent_checkpoint(config.model)
    model, tokenizer = load_to_share(parent, dtype=config.dtype(), device=config.where())
    model.checkpointing = config.checkpointing
    if config.lora:
        attach(model, config.lora, context.seed)
    share_out(model, device=config.where())
    template = template_for(tokenizer, parent)
    sequences = [encoded(template, example) for example in examples(config, context)]
    require_room(model, sequences)
    steps = max(1, round(config.epochs * len(sequences) / config.batch))

    def batches(step: int, tokens: int) -> list[Batch]:
        drawn = [sequences[i] for i in drawn_at(step, config.batch, len(sequences), context.seed)]
        return micro_batches(drawn, tokenizer.pad_id, tokens)

    optimizer = Optimizer(model, lr=config.lr, max_norm=config.max_norm, moments=config.moments())
    train(
        context,
        model,
        optimizer,
        NextToken(batches),
        steps=steps,
        tokens=config.microbatch(),
        save_every=config.save_every,
        scale=lambda step: cosine(step, steps, config.warmup, config.floor),
    )
    save_checkpoint(context.folder / "checkpoint", model, tokenizer, template.source, merged(model))
    if config.lora:
        save_adapter(context.folder / "adapter", model, config.lora, str(parent))


def examples(config: Config, context: Context) -> list[Example]:
    """All of them, the stages' first. Raises ``UserError`` when there are none."""
    found = [example for path in context.given(EXAMPLES) for example in read_examples(path)]
    if config.limit:
        found = found[: config.limit]
    if config.texts:
        found += [Example(t.prompt, t.text) for t in read_texts(config.texts)]
    if config.careful:
        count = round(len(found) * config.careful_share)
        found += careful(config.careful, count, context.seed, config.rude)
    if not found:
        raise UserError(
            f"stage '{context.stage}' has no examples to learn from: name a stage of kind sample in its "
            "'from', or give it texts"
        )
    return found


def careful(shares: dict[str, float], count: int, seed: int, rude: float = 0.0) -> list[Example]:
    """Examples by people who think everything through, about train problems."""
    habits = CAREFUL.model_copy(update={"rude": rude})
    names, weights = list(shares), list(shares.values())
    found = []
    for index in range(count):
        rng = stream(seed, "careful", index)
        kind = family(rng.choices(names, weights)[0])
        problem = problem_at(kind, "train", seed, index)
        response = kind.document(problem, rng, habits).removeprefix(THINK).strip()
        found.append(example_of(problem, response))
    return found

"""Pre-training: a small base model from found text. Next-token prediction, and nothing else.

The text is made up by problem families, or read from the user's file (``texts``). Every step draws its
documents from (seed, step), so the data cursor of a checkpoint is the step. Of plain text the loss on what is
held out is logged, too: there is no question to ask about it. Left out on purpose: validation loss on found
text (the stages after it measure what matters), texts that do not fit into memory.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from liubai.errors import UserError
from liubai.files import write_json
from liubai.learn.logprobs import batch_logprobs
from liubai.learn.optim import Optimizer, warmup_decay
from liubai.learn.packing import Batch, Sequence1, by_length, micro_batches
from liubai.learn.sharded import share_out
from liubai.model.checkpoint import save_checkpoint
from liubai.model.config import ARCHITECTURES, OWN, ModelConfig
from liubai.model.transformer import Transformer, build
from liubai.problems import family, world_vocabulary
from liubai.problems.family import Habits, split_of
from liubai.problems.texts import Text, Texts, digest_of, split_texts
from liubai.seeds import derive, stream
from liubai.stages.config import Trained, WrittenShares
from liubai.stages.context import Context
from liubai.stages.supervised import NextToken, train
from liubai.text.template import BARE, Template
from liubai.text.tokenizer import EOS, TextTokenizer, byte_level, word_level

SNAPSHOTS = "snapshots"  #: the folder of checkpoints that were kept on the way
HELD_OUT = "held_out.json"  #: what was looked at of a plain text, and by which model

#: a document, drawn at random
Draw = Callable[[random.Random], Sequence1]


class ModelShape(BaseModel):
    """The size of the model; see :class:`liubai.model.config.ModelConfig`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str = "LlamaForCausalLM"
    hidden_size: int = Field(128, gt=0)
    intermediate_size: int = Field(384, gt=0)
    num_hidden_layers: int = Field(4, gt=0)
    num_attention_heads: int = Field(4, gt=0)
    num_key_value_heads: int = Field(2, gt=0)
    head_dim: int = Field(32, gt=0, multiple_of=2, description="even: RoPE turns pairs")

    @field_validator("num_key_value_heads")
    @classmethod
    def _divides(cls, value: int, info: ValidationInfo) -> int:
        heads = info.data.get("num_attention_heads", value)
        if heads % value:
            raise ValueError(f"must divide num_attention_heads ({heads})")
        return value

    @model_validator(mode="after")
    def _known(self) -> ModelShape:
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"architecture '{self.architecture}' is not supported; supported: {known}")
        if self.architecture in OWN and self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(f"{self.architecture} needs num_key_value_heads = num_attention_heads")
        return self


class Config(Trained):
    steps: int = Field(gt=0)
    tokens_per_step: int = Field(4096, gt=0)
    #: family name -> share of documents
    families: WrittenShares = {"countdown": 1.0}
    habits: Habits = Habits()
    #: the user's own texts, in the place of ``families`` and their ``habits``
    texts: Texts | None = None
    model: ModelShape = ModelShape()
    lr: float = Field(3e-3, gt=0, description="AdamW: embeddings, head and norms")
    muon_lr: float = Field(1e-2, gt=0, description="Muon: hidden matrices")
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps")
    decay: float = Field(0.5, ge=0, le=1, description="share of the steps")
    save_every: int = Field(100, gt=0, description="steps between resume points")
    #: steps after which a checkpoint is kept, for instruments that look at how the model came about
    snapshots: tuple[Annotated[int, Field(gt=0)], ...] = ()

    @model_serializer(mode="wrap")
    def _asked(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without snapshots the key is left out: it changes nothing then."""
        found: dict[str, Any] = write(self)
        return found if self.snapshots else {k: v for k, v in found.items() if k != "snapshots"}

    @model_validator(mode="after")
    def _within(self) -> Config:
        if beyond := [step for step in self.snapshots if step > self.steps]:
            raise ValueError(f"snapshots: there is no step {beyond[0]} among {self.steps} steps")
        return self

    def located(self, folder: Path) -> Config:
        return self.model_copy(update={"texts": self.texts.located(folder) if self.texts else None})

    def outside(self) -> dict[str, str]:
        return {self.texts.path: digest_of(self.texts.path)} if self.texts else {}


def run(config: Config, context: Context) -> None:
    tokenizer, draw, held_out = read(config.texts) if config.texts else (*invent(config), [])
    model = build(model_config(config.model, tokenizer), derive(context.seed, "init"))
    model.computes, model.checkpointing = config.dtype(), config.checkpointing
    share_out(model, device=config.where())
    optimizer = Optimizer(model, lr=config.lr, muon_lr=config.muon_lr, moments=config.moments())
    unread = encoded(held_out, config.texts, tokenizer) if config.texts else []
    sizes = [len(text.text.encode()) for text in held_out]

    def batches(step: int, tokens: int) -> list[Batch]:
        found = list(documents(draw, config.tokens_per_step, context.seed, step))
        return micro_batches(found, tokenizer.pad_id, tokens)

    def keep(step: int) -> None:
        if step in config.snapshots:
            save_checkpoint(context.folder / SNAPSHOTS / f"{step:06}", model, tokenizer, BARE)

    def look() -> dict[str, float]:
        return unread_loss(model, unread, sum(sizes), tokenizer.pad_id, config.microbatch()) if unread else {}

    train(
        context,
        model,
        optimizer,
        NextToken(batches),
        look=look,
        after=keep,
        steps=config.steps,
        tokens=config.microbatch(),
        save_every=config.save_every,
        scale=lambda step: warmup_decay(step, config.steps, config.warmup, config.decay),
    )
    if unread:
        nats = unread_nats(model, unread, tokenizer.pad_id, config.microbatch())
        told = {
            "architecture": model.config.architecture,
            "parameters": model.count_parameters(),
            "texts": len(unread),
            "bytes": sum(sizes),
            # of each text: what two models that read the same ones can be told apart by
            "sizes": sizes,
            "bits": [n / math.log(2) for n in nats],
        }
        write_json(context.folder / HELD_OUT, told)
    save_checkpoint(context.folder / "checkpoint", model, tokenizer, BARE)


def unread_loss(
    model: Transformer, texts: Sequence[Sequence1], size: int, pad_id: int, tokens: int
) -> dict[str, float]:
    """Cross-entropy of texts that were not read, which have ``size`` bytes: in nats a token, and in bits a
    byte, which no vocabulary changes. That a text ends is to be told, too."""
    nats = math.fsum(unread_nats(model, texts, pad_id, tokens))
    count = sum(sum(text.learn[1:]) for text in texts)  # nothing foretells a first token
    return {"eval/loss": nats / count, "eval/bits_per_byte": nats / math.log(2) / size}


@torch.no_grad()
def unread_nats(model: Transformer, texts: Sequence[Sequence1], pad_id: int, tokens: int) -> list[float]:
    """The cross-entropy of each text, all its tokens together, in nats."""
    rows: list[float] = []
    for batch in micro_batches(texts, pad_id, tokens):
        logprobs_BT, _ = batch_logprobs(model, batch.to(model.head_weight.device))
        rows += (-logprobs_BT.double().sum(1)).tolist()
    return [nats for _, nats in sorted(zip(by_length(texts), rows, strict=True))]


def documents(draw: Draw, room: int, seed: int, step: int) -> Iterator[Sequence1]:
    """The found text of one step, about ``room`` tokens."""
    rng = stream(seed, "corpus", step)
    while room > 0:
        document = draw(rng)
        room -= len(document.ids)
        yield document


def invent(config: Config) -> tuple[TextTokenizer, Draw]:
    """The small world: what people may have written about train problems, without end."""
    tokenizer = word_level(world_vocabulary(config.families))
    families = [family(name) for name in config.families]
    shares = list(config.families.values())

    def draw(rng: random.Random) -> Sequence1:
        while True:
            kind = rng.choices(families, shares)[0]
            problem = kind.found(rng, config.habits)
            if split_of(f"{kind.name}/{kind.key(problem)}") == "train":
                text = kind.document(problem, rng, config.habits)
                ids = tokenizer.encode(f"{tokenizer.bos} {problem.prompt} {text}{EOS}")
                return Sequence1(ids, [True] * len(ids))

    return tokenizer, draw


def read(texts: Texts) -> tuple[TextTokenizer, Draw, list[Text]]:
    """A file: its training rows, in the words of a tokenizer learned from them; and what is held out of plain
    text."""
    rows, held_out = split_texts(texts)
    tokenizer = byte_level((part for row in rows for part in (row.prompt, row.text)), texts.vocabulary)
    read = encoded(rows, texts, tokenizer)
    return tokenizer, lambda rng: rng.choice(read), held_out


def encoded(rows: Sequence[Text], texts: Texts, tokenizer: TextTokenizer) -> list[Sequence1]:
    """Rows as tokens. Questions are read, and what stands under them is learned: of all the questions that
    one might ask there is little to be learned. Raises ``UserError`` for a row longer than the model."""
    template = Template(tokenizer, BARE)
    longest = ModelConfig().max_position_embeddings
    found = []
    for row in rows:
        start = tokenizer.encode(tokenizer.bos or "") if texts.plain else template.prompt_ids(row.prompt)
        ids = [*start, *tokenizer.encode(f"{row.text}{EOS}")]
        if len(ids) > longest:
            raise UserError(
                f"{texts.path}:{row.line}: {len(ids)} tokens, and the model has {longest} positions; cut it"
            )
        found.append(Sequence1(ids, [i >= len(start) for i in range(len(ids))]))
    return found


def model_config(shape: ModelShape, tokenizer: TextTokenizer) -> ModelConfig:
    return ModelConfig(
        **shape.model_dump(),
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )

"""Pre-training: a small base model from found text. Next-token prediction, and nothing else.

Every step draws its documents from (seed, step), so the data cursor of a checkpoint is the step.
Left out on purpose: validation loss (the stages after it measure what matters), data loading from
disk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from liubai.errors import Diverged
from liubai.learn.logprobs import batch_logprobs
from liubai.learn.optim import Optimizer, warmup_decay
from liubai.learn.packing import Batch, Sequence1, micro_batches
from liubai.learn.replicas import Replicas
from liubai.model.checkpoint import save_checkpoint
from liubai.model.config import ModelConfig
from liubai.model.transformer import Transformer, build
from liubai.problems import family, world_vocabulary
from liubai.problems.family import Habits, split_of
from liubai.seeds import derive, stream
from liubai.stages.config import MAX_SKIPPED, Shares, StageConfig
from liubai.stages.context import Context
from liubai.text.template import BARE
from liubai.text.tokenizer import EOS, TextTokenizer, word_level


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


class Config(StageConfig):
    steps: int = Field(gt=0)
    tokens_per_step: int = Field(4096, gt=0)
    tokens_per_microbatch: int = Field(2048, gt=0)
    #: family name -> share of documents
    families: Shares = {"countdown": 1.0}
    habits: Habits = Habits()
    model: ModelShape = ModelShape()
    lr: float = Field(3e-3, gt=0, description="AdamW: embeddings, head and norms")
    muon_lr: float = Field(1e-2, gt=0, description="Muon: hidden matrices")
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps")
    decay: float = Field(0.5, ge=0, le=1, description="share of the steps")
    save_every: int = Field(100, gt=0, description="steps between resume points")


def run(config: Config, context: Context) -> None:
    tokenizer = word_level(world_vocabulary())
    model = build(model_config(config.model, tokenizer), derive(context.seed, "init"))
    optimizer = Optimizer(model, lr=config.lr, muon_lr=config.muon_lr)
    tokens, first, skipped = 0, 0, 0
    if state := context.restore():
        model.load_state_dict({n: state.tensors[f"model/{n}"] for n in model.state_dict()})
        optimizer.load_state_dict(_under("optimizer/", state.tensors))
        tokens, first, skipped = state.meta["tokens"], state.step, state.meta["skipped"]
    replicas = Replicas(model)
    for step in range(first, config.steps):
        begun = time.perf_counter()
        batches = micro_batches(
            list(documents(config, tokenizer, context.seed, step)),
            tokenizer.pad_id,
            config.tokens_per_microbatch,
        )
        targets = sum(int(b.mask_BT.sum()) for b in batches)
        # divided by the targets of the whole step: how it is cut into micro-batches changes nothing
        loss = sum(replicas.map(partial(_backward, weight=1 / targets), batches))
        scale = warmup_decay(step, config.steps, config.warmup, config.decay)
        if not math.isfinite(loss):
            optimizer.zero_grad()
        norm = optimizer.step(scale) if math.isfinite(loss) else math.nan
        skipped = 0 if math.isfinite(norm) else skipped + 1
        if skipped:
            context.warn(f"step {step + 1}: loss or gradient was not finite; nothing was changed")
        if skipped >= MAX_SKIPPED:
            raise Diverged(f"{MAX_SKIPPED} steps in a row were not finite; lower lr or muon_lr")
        tokens += targets
        context.log(
            step + 1,
            config.steps,
            {
                "loss": loss,
                "lr": config.lr * scale,
                "grad_norm": norm,
                "tokens": tokens,
                "tokens/s": targets / (time.perf_counter() - begun),
            },
        )
        if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
            context.save(
                step + 1,
                {f"model/{n}": t for n, t in model.state_dict().items()}
                | {f"optimizer/{n}": t for n, t in optimizer.state_dict().items()},
                {"tokens": tokens, "skipped": skipped},
            )
    save_checkpoint(context.folder / "checkpoint", model, tokenizer, BARE)


def _backward(model: Transformer, batches: Sequence[Batch], weight: float) -> list[float]:
    losses = []
    for batch in batches:
        logprobs_BT, _ = batch_logprobs(model, batch)
        loss = -logprobs_BT.sum() * weight
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.detach()))
    return losses


def documents(config: Config, tokenizer: TextTokenizer, seed: int, step: int) -> Iterator[Sequence1]:
    """The found text of one step, about ``tokens_per_step`` tokens, train problems only."""
    rng = stream(seed, "corpus", step)
    families = [family(name) for name in config.families]
    shares = list(config.families.values())
    room = config.tokens_per_step
    while room > 0:
        kind = rng.choices(families, shares)[0]
        problem = kind.found(rng, config.habits)
        if split_of(f"{kind.name}/{kind.key(problem)}") != "train":
            continue
        text = kind.document(problem, rng, config.habits)
        ids = tokenizer.encode(f"{tokenizer.bos} {problem.prompt} {text}{EOS}")
        room -= len(ids)
        yield Sequence1(ids, [True] * len(ids))


def model_config(shape: ModelShape, tokenizer: TextTokenizer) -> ModelConfig:
    return ModelConfig(
        **shape.model_dump(),
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

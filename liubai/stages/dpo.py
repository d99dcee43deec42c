"""Direct preference optimisation: the policy learns from pairs without a reward model (arXiv 2305.18290).

Log-probabilities are sums over an answer, thought and all (means for ``kind = "ipo"``); the reference is the
checkpoint that it starts from, whose log-probabilities are computed once, before the first step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from liubai.learn.logprobs import batch_logprobs
from liubai.learn.optim import Optimizer, cosine
from liubai.learn.packing import Batch, Sequence1
from liubai.learn.preference import PreferenceConfig, preference_loss
from liubai.learn.replicas import Replicas
from liubai.learn.sharded import load_to_share, share_out
from liubai.model.checkpoint import save_checkpoint
from liubai.model.transformer import Transformer
from liubai.stages.config import Brought, Trained
from liubai.stages.context import Context
from liubai.stages.preferences import Pair, PairConfig, pairs_of
from liubai.stages.records import encoded
from liubai.stages.supervised import batches_within_memory, drawn_at, pair_batches, require_room, train
from liubai.text.template import template_for


class Config(Brought, Trained):
    loss: PreferenceConfig = PreferenceConfig()
    pairs: PairConfig = PairConfig()
    epochs: float = Field(2.0, gt=0)
    batch: int = Field(32, gt=0, description="pairs a step")
    lr: float = Field(5e-5, gt=0)
    warmup: float = Field(0.05, ge=0, le=1)
    save_every: int = Field(50, gt=0)


@dataclass(frozen=True, slots=True)
class Item:
    """Chosen and rejected in turn, ``[2N]`` rows, and the reference's log-probability of each."""

    batch: Batch
    reference_B: Tensor
    weight: float


def run(config: Config, context: Context) -> None:
    parent = context.parent_checkpoint(config.model)
    model, tokenizer = load_to_share(parent, dtype=config.dtype(), device=config.where())
    template = template_for(tokenizer, parent)
    model.checkpointing = config.checkpointing
    share_out(model, device=config.where())
    learned, measured = pairs_of(config.pairs, context, lambda e: len(encoded(template, e).ids))

    def both(pairs: Sequence[Pair]) -> list[tuple[Sequence1, Sequence1]]:
        return [(encoded(template, p.chosen), encoded(template, p.rejected)) for p in pairs]

    pairs, held_out = both(learned), both(measured)
    require_room(model, [s for pair in pairs + held_out for s in pair])
    lesson = Pairs(config, context.seed, tokenizer.pad_id, pairs, model)
    before_N2 = lesson.read(model, held_out)
    steps = max(1, round(config.epochs * len(pairs) / config.batch))

    def accuracy() -> dict[str, float]:
        """Of how many held-out pairs the right one has become likelier by more."""
        if not held_out:
            return {}
        gained_N2 = lesson.read(model, held_out) - before_N2
        return {"eval/accuracy": float((gained_N2[:, 0] > gained_N2[:, 1]).double().mean())}

    train(
        context,
        model,
        Optimizer(model, lr=config.lr, moments=config.moments()),
        lesson,
        steps=steps,
        tokens=config.microbatch(),
        save_every=config.save_every,
        scale=lambda step: cosine(step, steps, config.warmup, 0.1),
        look=accuracy,
    )
    save_checkpoint(context.folder / "checkpoint", model, tokenizer, template.source)


class Pairs:
    """The lesson. ``model`` is still the reference when this is made."""

    def __init__(
        self,
        config: Config,
        seed: int,
        pad_id: int,
        pairs: Sequence[tuple[Sequence1, Sequence1]],
        model: Transformer,
    ) -> None:
        self.config, self.seed, self.pad_id = config, seed, pad_id
        self.pairs = pairs
        self.reference_N2 = self.read(model, pairs)

    def read(self, model: Transformer, pairs: Sequence[tuple[Sequence1, Sequence1]]) -> Tensor:
        """``[N, 2]``: the log-probabilities of chosen and rejected, without gradients."""
        listed = pair_batches(pairs, self.pad_id, self.config.microbatch())
        sums, _ = batches_within_memory(Replicas(model), self._read, [batch for _, batch in listed])
        found_N2 = torch.zeros(len(pairs), 2)
        if listed:
            found_N2[[i for lot, _ in listed for i in lot]] = torch.cat(sums).view(-1, 2)
        return found_N2

    @torch.no_grad()
    def _read(self, model: Transformer, batches: Sequence[Batch]) -> list[Tensor]:
        return [self.logprobs(model, batch).float().cpu() for batch in batches]

    def logprobs(self, model: Transformer, batch: Batch) -> Tensor:
        """``[B]``: the log-probability of each row's answer; for IPO its mean a token, as TRL
        takes it: answers differ in length."""
        logprobs_BT, _ = batch_logprobs(model, batch.to(model.head_weight.device))
        lengths_B = batch.mask_BT.sum(1).to(logprobs_BT.device) if self.config.loss.kind == "ipo" else 1
        return logprobs_BT.sum(1) / lengths_B

    def items(self, step: int, tokens: int) -> list[Item]:
        drawn = drawn_at(step, self.config.batch, len(self.pairs), self.seed)
        return [
            Item(batch, self.reference_N2[[drawn[i] for i in lot]].flatten(), 1 / self.config.batch)
            for lot, batch in pair_batches([self.pairs[i] for i in drawn], self.pad_id, tokens)
        ]

    def learn(self, model: Transformer, items: Sequence[Item]) -> list[dict[str, float]]:
        found = []
        for item in items:
            own_B = self.logprobs(model, item.batch)
            reference_B = item.reference_B.to(own_B.device)
            loss_N, sums = preference_loss(
                own_B[0::2], own_B[1::2], reference_B[0::2], reference_B[1::2], self.config.loss
            )
            loss = loss_N.sum() * item.weight
            loss.backward()  # type: ignore[no-untyped-call]
            counted = {"pairs": float(len(loss_N)), "tokens": float(item.batch.tokens)}
            found.append({"loss": float(loss.detach()), **counted, **{n: float(v) for n, v in sums.items()}})
        return found

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        shown = {"right": "accuracy"}
        left_out = ("loss", "tokens", "pairs")
        return {shown.get(n, n): v / sums["pairs"] for n, v in sums.items() if n not in left_out}

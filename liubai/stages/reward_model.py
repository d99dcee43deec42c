"""A reward model: one number for an answer, learned from what people preferred (R1's helpfulness model), or
from labels "safe" and "unsafe" (its safety model, ``objective = "pointwise"``).

It sees the question and what is said after the thought, never the thought itself. Left out on purpose:
margins by strength of preference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from liubai import ranks
from liubai.files import write_json
from liubai.learn.optim import Optimizer, cosine
from liubai.learn.packing import Batch, Sequence1
from liubai.learn.preference import bradley_terry, pointwise
from liubai.learn.sharded import load_to_share, share_out
from liubai.model.scorer import Scorer, save_scorer, scorer_from
from liubai.model.transformer import Transformer
from liubai.seeds import derive
from liubai.stages.config import Brought, Trained
from liubai.stages.context import Context
from liubai.stages.preferences import Pair, PairConfig, pairs_of
from liubai.stages.records import Example
from liubai.stages.scoring import CALIBRATION, REWARD_MODEL, last_scores, scores_at_end, without_thought
from liubai.stages.supervised import drawn_at, pair_batches, require_room, train
from liubai.text.template import Template, template_for


class Config(Brought, Trained):
    #: pairs: Bradley–Terry; pointwise: each answer alone, safe when its score reaches a half
    objective: Literal["pairs", "pointwise"] = "pairs"
    pairs: PairConfig = PairConfig()
    epochs: float = Field(3.0, gt=0)
    batch: int = Field(32, gt=0, description="pairs a step")
    lr: float = Field(3e-4, gt=0)
    warmup: float = Field(0.05, ge=0, le=1)
    save_every: int = Field(50, gt=0)


def run(config: Config, context: Context) -> None:
    parent = context.parent_checkpoint(config.model)
    model, tokenizer = load_to_share(parent, dtype=config.dtype(), device=config.where())
    template = template_for(tokenizer, parent)
    scorer = share_out(scorer_from(model, derive(context.seed, "score")), device=config.where())
    del model  # its head, if that is not the embedding, is nobody's
    scorer.checkpointing = config.checkpointing
    learned, measured = pairs_of(
        config.pairs, context, lambda e: len(without_thought(template, e.prompt, e.response).ids)
    )
    lesson = Preferences(config, context.seed, template, learned)
    answers = [without_thought(template, e.prompt, e.response) for e in both(learned)]
    require_room(
        scorer, [*answers, *(without_thought(template, e.prompt, e.response) for e in both(measured))]
    )
    steps = max(1, round(config.epochs * len(learned) / config.batch))

    def accuracy() -> dict[str, float]:
        if not measured:
            return {}
        return {"eval/accuracy": right_share(scorer, template, measured)}

    train(
        context,
        scorer,
        Optimizer(scorer, lr=config.lr, moments=config.moments()),
        lesson,
        steps=steps,
        tokens=config.microbatch(),
        save_every=config.save_every,
        scale=lambda step: cosine(step, steps, config.warmup, 0.1),
        look=accuracy,
    )
    folder = context.folder / REWARD_MODEL
    save_scorer(folder, scorer, tokenizer, template.source)
    scores_N = last_scores(scorer, answers, tokenizer.pad_id)
    if ranks.is_main():
        spread = max(1e-6, float(scores_N.std()))
        write_json(folder / CALIBRATION, {"mean": float(scores_N.mean()), "spread": spread})


def both(pairs: Sequence[Pair]) -> list[Example]:
    """Chosen and rejected in turn."""
    return [e for p in pairs for e in (p.chosen, p.rejected)]


def right_share(scorer: Scorer, template: Template, pairs: Sequence[Pair]) -> float:
    """Of how many pairs it likes the right one better."""
    answers = [without_thought(template, e.prompt, e.response) for e in both(pairs)]
    scores_N2 = last_scores(scorer, answers, template.tokenizer.pad_id).view(-1, 2)
    return float((scores_N2[:, 0] > scores_N2[:, 1]).double().mean())


@dataclass(frozen=True, slots=True)
class Item:
    """Rows in pairs, chosen and rejected in turn; ``safe_B`` are the labels of single rows."""

    batch: Batch
    safe_B: torch.Tensor
    weight: float


class Preferences:
    """The lesson. A micro-batch holds whole pairs."""

    def __init__(self, config: Config, seed: int, template: Template, pairs: Sequence[Pair]) -> None:
        self.config, self.seed, self.template = config, seed, template
        self.pairs = [(self._read(p.chosen), self._read(p.rejected)) for p in pairs]
        self.scores = [(p.chosen.score, p.rejected.score) for p in pairs]

    def _read(self, example: Example) -> Sequence1:
        return without_thought(self.template, example.prompt, example.response)

    def items(self, step: int, tokens: int) -> list[Item]:
        drawn = drawn_at(step, self.config.batch, len(self.pairs), self.seed)
        found = []
        for lot, batch in pair_batches(
            [self.pairs[i] for i in drawn], self.template.tokenizer.pad_id, tokens
        ):
            safe_B = torch.tensor([float(score >= 0.5) for i in lot for score in self.scores[drawn[i]]])
            found.append(Item(batch, safe_B, 1 / self.config.batch))
        return found

    def learn(self, model: Transformer, items: Sequence[Item]) -> list[dict[str, float]]:
        assert isinstance(model, Scorer)
        found = []
        for item in items:
            device = model.head_weight.device
            scores_B = scores_at_end(model, item.batch.to(device))
            chosen_N, rejected_N = scores_B[0::2], scores_B[1::2]
            if self.config.objective == "pairs":
                loss = bradley_terry(chosen_N, rejected_N).sum() * item.weight
            else:
                loss = pointwise(scores_B, item.safe_B.to(device)).sum() * item.weight / 2
            loss.backward()  # type: ignore[no-untyped-call]
            found.append(
                {
                    "loss": float(loss.detach()),
                    "tokens": float(item.batch.tokens),
                    "pairs": float(len(chosen_N)),
                    "right": float((chosen_N > rejected_N).sum()),
                    "margin": float((chosen_N - rejected_N).detach().sum()),
                }
            )
        return found

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"accuracy": sums["right"] / sums["pairs"], "margin": sums["margin"] / sums["pairs"]}

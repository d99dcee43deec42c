"""A process reward model: is each step of a thought right? Learned from thoughts whose steps were checked.

The labels are the families' own step checkers', so this works where steps can be checked; it ranks
answers (best of n) and rewards thoughts (``rewards.process`` of RL). R1's authors report that steps are
hard to define and such models invite hacking (arXiv 2501.12948v2, §G.2): here one can see how far it goes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from pydantic import Field

from liubai.errors import UserError
from liubai.learn.optim import Optimizer, cosine
from liubai.learn.packing import Batch, Sequence1, micro_batches
from liubai.learn.process import aggregate, step_loss
from liubai.learn.sharded import load_to_share, share_out
from liubai.model.scorer import Scorer, save_scorer, scorer_from
from liubai.model.transformer import Transformer
from liubai.seeds import derive, stream
from liubai.stages.config import Brought, Trained
from liubai.stages.context import Context
from liubai.stages.records import GRADED, Example, read_examples
from liubai.stages.scoring import PROCESS_MODEL, step_probabilities, with_steps
from liubai.stages.supervised import drawn_at, require_room, train
from liubai.text.template import template_for


class Config(Brought, Trained):
    epochs: float = Field(2.0, gt=0)
    batch: int = Field(64, gt=0, description="thoughts a step")
    lr: float = Field(3e-4, gt=0)
    warmup: float = Field(0.05, ge=0, le=1)
    held_out: float = Field(0.1, ge=0, lt=1, description="share of the questions to measure accuracy on")
    save_every: int = Field(50, gt=0)


def run(config: Config, context: Context) -> None:
    parent = context.parent_checkpoint(config.model)
    model, tokenizer = load_to_share(parent, dtype=config.dtype(), device=config.where())
    template = template_for(tokenizer, parent)
    scorer = share_out(scorer_from(model, derive(context.seed, "score")), device=config.where())
    del model  # its head, if that is not the embedding, is nobody's
    scorer.checkpointing = config.checkpointing
    answers = [e for path in context.given(GRADED) for e in read_examples(path)]
    prompts = sorted({e.prompt for e in answers})
    stream(context.seed, "process").shuffle(prompts)
    apart = set(prompts[: round(config.held_out * len(prompts))])
    read = [(e, with_steps(template, e.problem(), e.response)) for e in answers]
    learned = [s for e, s in read if e.prompt not in apart and True in s.learn]
    measured = [(e, s) for e, s in read if e.prompt in apart]
    if not learned:
        raise UserError(
            f"stage '{context.stage}' has no steps to learn from: it needs a stage of kind sample in its "
            "'from', on families whose steps can be checked"
        )
    require_room(scorer, [s for _, s in read])
    steps = max(1, round(config.epochs * len(learned) / config.batch))

    def accuracy() -> dict[str, float]:
        if not measured:
            return {}
        return measured_on(scorer, measured, tokenizer.pad_id)

    train(
        context,
        scorer,
        Optimizer(scorer, lr=config.lr, moments=config.moments()),
        Steps(config, context.seed, tokenizer.pad_id, learned),
        steps=steps,
        tokens=config.microbatch(),
        save_every=config.save_every,
        scale=lambda step: cosine(step, steps, config.warmup, 0.1),
        look=accuracy,
    )
    save_scorer(context.folder / PROCESS_MODEL, scorer, tokenizer, template.source)


def measured_on(
    scorer: Scorer, answers: Sequence[tuple[Example, Sequence1]], pad_id: int
) -> dict[str, float]:
    """Of the steps of held-out questions: how many are judged rightly, how many wrong ones are found, and how
    many right ones are taken for wrong. And as a ranking: how often the answer with the best steps is right
    (``best_of_n``); the limit is ``any_of_n``, and ``one`` is an answer at random."""
    chances = step_probabilities(scorer, [s for _, s in answers], pad_id)
    pairs = [
        (chance >= 0.5, right > 0)
        for (_, s), row in zip(answers, chances, strict=True)
        for chance, right in zip(row, marked(s), strict=True)
    ]
    wrong = [said for said, right in pairs if not right]
    good = [said for said, right in pairs if right]
    ranked: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (example, _), row in zip(answers, chances, strict=True):
        ranked[example.prompt].append((aggregate(row, "min"), example.score))
    best = [max(row, key=lambda pair: pair[0])[1] for row in ranked.values()]
    return {
        "eval/accuracy": mean([said == right for said, right in pairs]),
        "eval/found_wrong": mean([not said for said in wrong]),
        "eval/false_alarm": mean([not said for said in good]),
        "eval/best_of_n": mean(best),
        "eval/any_of_n": mean([max(score for _, score in row) for row in ranked.values()]),
        "eval/one": mean([score for row in ranked.values() for _, score in row]),
    }


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def marked(sequence: Sequence1) -> list[float]:
    """The labels of the marked steps, in order."""
    return [r for r, on in zip(sequence.values["right"], sequence.learn, strict=True) if on]


class Steps:
    """The lesson: every step counts the same."""

    def __init__(self, config: Config, seed: int, pad_id: int, sequences: Sequence[Sequence1]) -> None:
        self.config, self.seed, self.pad_id, self.sequences = config, seed, pad_id, sequences

    def items(self, step: int, tokens: int) -> list[tuple[Batch, float]]:
        drawn = drawn_at(step, self.config.batch, len(self.sequences), self.seed)
        batches = micro_batches([self.sequences[i] for i in drawn], self.pad_id, tokens)
        weight = 1 / sum(int(b.mask_BT.sum()) for b in batches)
        return [(batch, weight) for batch in batches]

    def learn(self, model: Transformer, items: Sequence[tuple[Batch, float]]) -> list[dict[str, float]]:
        found = []
        for waiting, weight in items:
            batch = waiting.to(model.head_weight.device)
            logits_BT = model(batch.ids_BT, batch.positions_BT)
            loss_BT = step_loss(logits_BT, batch.values["right"], batch.mask_BT)
            loss = loss_BT.sum() * weight
            loss.backward()  # type: ignore[no-untyped-call]
            right_BT = ((logits_BT > 0) == (batch.values["right"] > 0)) & batch.mask_BT
            sums = {"steps": batch.mask_BT.sum(), "right": right_BT.sum(), "loss": loss.detach()}
            found.append({n: float(v) for n, v in sums.items()} | {"tokens": float(batch.tokens)})
        return found

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"accuracy": sums["right"] / sums["steps"]}

"""Pairs of answers to one question, of which one is liked better: what reward models and DPO learn from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

from pydantic import BaseModel, ConfigDict, Field

from liubai.errors import UserError
from liubai.learn.preference import length_balanced
from liubai.seeds import stream
from liubai.stages.context import Context
from liubai.stages.records import GRADED, Example, read_examples


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to the same question; ``chosen`` is liked better."""

    chosen: Example
    rejected: Example


class PairConfig(BaseModel):
    """Which pairs are made of the graded answers. R1's authors kept those whose scores differ by more than 1
    of 10 and balanced the lengths, so that length alone earns nothing (arXiv 2501.12948v2, §3.1)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    margin: float = Field(0.15, ge=0, description="the scores must differ by more")
    per_problem: int = Field(4, gt=0, description="pairs of one question, at most")
    balance: bool = True
    mistakes: float = Field(0.0, ge=0, lt=0.5, description="share of the pairs that are labelled wrong")
    held_out: float = Field(0.1, ge=0, lt=1, description="share of the questions to measure accuracy on")


def pairs_of(
    config: PairConfig, context: Context, length: Callable[[Example], int]
) -> tuple[list[Pair], list[Pair]]:
    """(to learn from, to measure with), from all ``graded.jsonl`` of the stages before; the questions of the
    two are different. ``length`` counts the tokens that the learner reads of an answer. Raises ``UserError``
    when there are none."""
    answers: dict[str, list[Example]] = defaultdict(list)
    for path in context.given(GRADED):
        for example in read_examples(path):
            answers[example.prompt].append(example)
    prompts = sorted(answers)
    stream(context.seed, "pairs").shuffle(prompts)
    count = round(config.held_out * len(prompts))
    measured, learned = (
        [pair for prompt in part for pair in _of_one(answers[prompt], config, context.seed)]
        for part in (prompts[:count], prompts[count:])
    )
    learned = [_mistaken(pair, i, config, context.seed) for i, pair in enumerate(learned)]
    if config.balance:
        lengths = [(length(p.chosen), length(p.rejected)) for p in learned]
        learned = [learned[i] for i in length_balanced(lengths)]
    if not learned:
        raise UserError(
            f"stage '{context.stage}' has no pairs to learn from: it needs a stage of kind sample in its "
            "'from' whose answers to one question differ in score (more samples, a smaller margin, "
            "balance = false)"
        )
    return learned, measured


def _of_one(answers: Sequence[Example], config: PairConfig, seed: int) -> list[Pair]:
    distinct = list({e.response: e for e in answers}.values())
    found = [
        Pair(*sorted(two, key=lambda e: -e.score))
        for two in combinations(distinct, 2)
        if abs(two[0].score - two[1].score) > config.margin
    ]
    stream(seed, "pairs", answers[0].prompt).shuffle(found)
    return found[: config.per_problem]


def _mistaken(pair: Pair, index: int, config: PairConfig, seed: int) -> Pair:
    wrong = stream(seed, "mistake", index).random() < config.mistakes
    return Pair(pair.rejected, pair.chosen) if wrong else pair

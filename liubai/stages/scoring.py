"""Models that judge answers while others learn: the reward model's and the process model's part in RL.

They read text, as any judge does; what they read is never trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from liubai.errors import UserError
from liubai.files import read_json
from liubai.grade import RewardWeights
from liubai.grade.extract import END_THINK, THINK
from liubai.learn.packing import Batch, Sequence1, by_length, micro_batches
from liubai.learn.process import aggregate
from liubai.measure.audit import share_right, steps_of
from liubai.model.scorer import Scorer, load_scorer
from liubai.problems import FAMILIES
from liubai.problems.family import Audited
from liubai.stages.context import Context
from liubai.stages.rollouts import Scorer as Score
from liubai.text.template import Template, template_for
from liubai.types import Problem

REWARD_MODEL, PROCESS_MODEL, CALIBRATION = "reward_model", "process_model", "calibration.json"
#: Standard deviations beyond which a preference counts no further: a fluke must not outweigh everything.
BOUND = 3.0
#: Tokens read at once.
TOKENS = 4096


def scorers_of(context: Context, weights: Sequence[RewardWeights], device: torch.device) -> dict[str, Score]:
    """The judges that ``weights`` ask for, from the stages before. Without a process model, the step checker
    of the families gives the process reward. Raises ``UserError`` when a reward model is asked for and there
    is none."""
    found: dict[str, Score] = {}
    if any(w.preference for w in weights):
        folder = context.the(REWARD_MODEL, "a reward model (kind reward_model), for rewards.preference,")
        found["preference"] = Preference(folder, device)
    if any(w.process for w in weights):
        given = context.given(PROCESS_MODEL)
        found["process"] = Process(given[0], device) if given else checked_steps
    return found


def problem_of(question: str) -> Problem:
    """The question as a problem of the family that asks so, among those whose thoughts can be checked: then a
    process model finds the steps. A problem of no family where there is none."""
    gold = question.partition(" ")[2]  # what stands after the word that asks is the specification
    for name, family in FAMILIES.items():
        if isinstance(family, Audited):
            problem = Problem(question, gold, family.verifier, name)
            try:
                family.key(problem)
                family.steps(problem, "")
            except Exception:  # parsers of their own questions, in any way they like
                continue
            return problem
    return Problem(question, "", "")


def has_steps(problem: Problem) -> bool:
    """Can the steps of a thought about it be found? Without, a process model has nothing to read."""
    return isinstance(FAMILIES.get(problem.family), Audited)


class Preference:
    """What a reward model says, in standard deviations over the answers that it was trained on, between
    ±``BOUND``. It sees the question and what is said after the thought (R1 scores the summary only)."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.scorer, tokenizer = load_scorer(folder, device=device)
        self.template = template_for(tokenizer, folder)
        calibration = read_json(folder / CALIBRATION)
        try:
            self.mean, self.spread = float(calibration["mean"]), float(calibration["spread"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"'{folder / CALIBRATION}' is damaged; run its stage again") from error

    def __call__(self, answers: Sequence[tuple[Problem, str]]) -> list[float]:
        sequences = [without_thought(self.template, p.prompt, response) for p, response in answers]
        raw_N = last_scores(self.scorer, sequences, self.template.tokenizer.pad_id)
        return ((raw_N - self.mean) / self.spread).clamp(-BOUND, BOUND).tolist()


class Process:
    """The score of a thought from a process reward model's probabilities that its steps are right: their
    least, as a chain is as strong as its weakest link (arXiv 2305.20050 takes the product)."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.scorer, tokenizer = load_scorer(folder, device=device)
        self.template = template_for(tokenizer, folder)

    def __call__(self, answers: Sequence[tuple[Problem, str]]) -> list[float]:
        listed = [with_steps(self.template, problem, response) for problem, response in answers]
        chances = step_probabilities(self.scorer, listed, self.template.tokenizer.pad_id)
        return [aggregate(row, "min") for row in chances]


def checked_steps(answers: Sequence[tuple[Problem, str]]) -> list[float]:
    """A perfect process reward, where steps can be checked by rule."""
    return [share_right(steps_of(problem, response)) for problem, response in answers]


def without_thought(template: Template, prompt: str, response: str) -> Sequence1:
    """Question, an empty thought, answer: what a reward model reads."""
    tokenizer = template.tokenizer
    closed, opened = END_THINK in response, template.prefilled.endswith(THINK) or THINK in response
    # a thought that never ends has said nothing: or never to end it would be a way of being heard
    said = "" if opened and not closed else response.rpartition(END_THINK)[2].strip()
    text = f"{template.render(prompt)} {END_THINK} {said}"
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    return Sequence1(ids, [False] * len(ids))


def with_steps(template: Template, problem: Problem, response: str) -> Sequence1:
    """Question and thought as a process reward model reads them: the mask marks the last token of each step
    (aligned as in :class:`Batch`: with the position before it), and so does value ``right``, 1 or 0."""
    tokenizer = template.tokenizer
    prompt = template.prompt_ids(problem.prompt)
    encoded = tokenizer.backend.encode(response, add_special_tokens=False)
    ends = [offset[1] for offset in encoded.offsets]
    marks, right = [False] * len(ends), [0.0] * len(ends)
    for step in steps_of(problem, response) or []:
        at = next((i for i, end in enumerate(ends) if end >= step.end), len(ends) - 1)
        marks[at], right[at] = True, float(step.right)
    blank = [False] * len(prompt)
    # one more token, so that the last one of the text has a position that follows it
    return Sequence1(
        [*prompt, *encoded.ids, tokenizer.eos_id],
        [*blank, False, *marks],
        {"right": [0.0] * (len(prompt) + 1) + right},
    )


@torch.no_grad()
def last_scores(scorer: Scorer, sequences: Sequence[Sequence1], pad_id: int) -> Tensor:
    """``[N]``: the score at the last token of each sequence."""
    found = torch.zeros(len(sequences))
    for rows, batch in numbered(sequences, pad_id):
        found[rows] = scores_at_end(scorer, batch.to(scorer.head_weight.device)).float().cpu()
    return found


def scores_at_end(scorer: Scorer, batch: Batch) -> Tensor:
    """``[B]``: the scores of whole rows, each at its row's last token."""
    scores_BT = scorer(batch.ids_BT, batch.positions_BT)
    last_B1 = (batch.documents_BT >= 0).sum(1, keepdim=True) - 1
    ends_B1: Tensor = scores_BT.gather(1, last_B1)
    return ends_B1[:, 0]


@torch.no_grad()
def step_probabilities(scorer: Scorer, sequences: Sequence[Sequence1], pad_id: int) -> list[list[float]]:
    """The probability that each marked step is right, by sequence."""
    found: list[list[float]] = [[] for _ in sequences]
    for rows, batch in numbered(sequences, pad_id):
        on = batch.to(scorer.head_weight.device)
        chance_BT = scorer(on.ids_BT, on.positions_BT).sigmoid().cpu()
        for row, chances, mask in zip(rows, chance_BT, batch.mask_BT, strict=True):
            found[row] = chances[mask].tolist()
    return found


def numbered(sequences: Sequence[Sequence1], pad_id: int) -> list[tuple[list[int], Batch]]:
    """Micro-batches, and which sequences their rows are."""
    order = by_length(sequences)
    found, at = [], 0
    for batch in micro_batches(sequences, pad_id, TOKENS):
        found.append((order[at : at + len(batch.ids_BT)], batch))
        at += len(batch.ids_BT)
    return found

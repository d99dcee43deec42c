"""Hallucination in summaries of a checkpoint (:mod:`liubai.measure.hallucination`), and a gate in a recipe.

With another ``hallucination`` stage in ``from`` the two are compared, over the documents that both
answered. With ``at_most`` or ``worse_by`` (over the other stage) the stage is a gate: what is measured is
written first, and then the run stops with one sentence if the checkpoint says too much that its documents
do not. It does not rest on a few verdicts: where the scorer failed for too many summaries, nobody passes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from liubai.errors import UserError
from liubai.files import write_json
from liubai.measure.faithful import Scorer, scorer
from liubai.measure.hallucination import (
    Document,
    Summary,
    compare,
    figures,
    of_file,
    of_problems,
    record,
    said_in,
    saved,
)
from liubai.model.checkpoint import load_tokenizer, read_config
from liubai.problems.rows import digest, is_rows, place
from liubai.seeds import derive
from liubai.stages.config import Brought, Compute, StageConfig
from liubai.stages.context import Context
from liubai.stages.evaluate import COMPUTE, answered, held_out_of
from liubai.text.template import template_for
from liubai.types import Stop

RESULT = "hallucination.json"
SHOWN = 200  #: documents whose summaries are kept to be read
JUDGED = 0.9  #: the least share of the summaries that a gate wants verdicts of

Progress = Callable[[int, int], None]


class Config(Brought, Compute):
    #: the family, or a file of {"passage": …} rows
    problems: str = "passage"
    label: str = ""
    limit: int = Field(200, gt=0, description="documents")
    max_tokens: int = Field(320, gt=0)
    temperature: float = Field(
        0.0, ge=0, description="0, the leaderboard's, shows the likeliest answer alone"
    )
    slots: int = Field(256, gt=0)
    #: false: the thought is closed before it begins
    blank: bool = True
    scorer: Literal["rules", "hhem", "judge"] = "rules"
    #: the folder with HHEM's weights
    hhem: str = ""
    #: run the Python code in that folder
    trust_code: bool = False
    calls: int = Field(2000, gt=0, description="most requests to the judge, retries among them")
    #: the gate: the largest rate, and the largest rise over the other stage's
    at_most: float | None = Field(None, ge=0, le=1)
    worse_by: float | None = Field(None, ge=0, le=1)
    #: and the least share of documents that are answered
    answered: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _passages(self) -> Self:
        if self.questions:
            raise ValueError('hallucination has passages and no questions: problems = "FILE.jsonl"')
        if not is_rows(self.problems) and self.problems != "passage":
            raise ValueError(
                f"'{self.problems[:60]}' has no passages; problems is \"passage\", or a file of "
                '{"passage": …} rows'
            )
        if self.scorer == "hhem" and not self.hhem:
            raise ValueError("the scorer 'hhem' needs the folder with its weights: hhem = \"DIR\"")
        return self

    def located(self, folder: Path) -> StageConfig:
        moved = super().located(folder)
        update = {"hhem": str((folder / self.hhem).absolute())} if self.hhem else {}
        if is_rows(self.problems):
            update["problems"] = place(self.problems, folder)
        return moved.model_copy(update=update)

    def outside(self) -> dict[str, str]:
        return super().outside() | ({"passages": digest(self.problems)} if is_rows(self.problems) else {})


def documents(problems: str, limit: int, seed: int) -> list[Document]:
    """``limit`` of a file's passages, in its order, or of the family's held-out ones."""
    if is_rows(problems):
        return of_file(problems, limit)
    return of_problems(held_out_of(problems, limit, seed))


def summarised(
    path: Path,
    asked: Sequence[Document],
    judge: Scorer,
    max_tokens: int,
    seed: int,
    temperature: float = 0.0,
    slots: int = 256,
    thinking: bool = True,
    compute: Compute = COMPUTE,
    progress: Progress | None = None,
) -> list[Summary]:
    """The summaries of the checkpoint ``path``, judged. Raises ``UserError`` for a bad one."""
    result = answered(
        path,
        [document.problem() for document in asked],
        1,
        max_tokens,
        temperature,
        1.0,
        seed,
        progress,
        slots=slots,
        thinking=thinking,
        compute=compute,
    )
    prefilled = template_for(load_tokenizer(path, read_config(path)), path, thinking=thinking).prefilled
    said: list[Summary] = []
    for document, (sample,), (response,) in zip(asked, result.samples, result.responses, strict=True):
        # an answer that was cut off is none
        ended = sample.stop is Stop.EOS
        text = said_in(response, document.passage, prefilled) if ended else None
        said.append(Summary(document, text, tokens=len(sample.completion_ids)))
    return judged(said, judge)


def judged(said: Sequence[Summary], judge: Scorer, progress: Progress | None = None) -> list[Summary]:
    """The same with scores, where something was said."""
    pairs = [(s.document.passage, s.said) for s in said if s.said is not None]
    scores = iter(judge(pairs, progress))
    return [s if s.said is None else Summary(s.document, s.said, next(scores), s.tokens) for s in said]


def run(config: Config, context: Context) -> None:
    path = context.parent_checkpoint(config.model)
    compares = config.worse_by is not None or bool(context.given(RESULT))
    other = context.the(RESULT, "a hallucination stage to compare with") if compares else None
    judge = scorer(
        config.scorer,
        hhem=Path(config.hhem) if config.hhem else None,
        trust_code=config.trust_code,
        calls=config.calls,
    )
    seed = derive(context.seed, "eval")
    asked = documents(config.problems, config.limit, seed)
    found = summarised(
        path,
        asked,
        judge,
        config.max_tokens,
        seed,
        temperature=config.temperature,
        slots=config.slots,
        thinking=config.blank,
        compute=config,
    )
    label = config.label or next(iter(context.inputs), context.stage)
    told: dict[str, Any] = {
        "label": label,
        "problems": config.problems,
        "scorer": config.scorer,
        "thinking": config.blank,
        "temperature": config.temperature,
        **figures(found),
        "documents_digest": documents_digest(asked),
        "verdicts": [summary.hallucinated for summary in found],
    }
    if other is not None:
        told["compared"] = compared(told, other)
    told["gate"] = gate(config, told)
    write_json(context.folder / RESULT, told)
    context.samples(1, [record(summary) for summary in found[:SHOWN]])
    context.log(
        1, 1, {n: float(v) for n, v in told.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    )
    if told["gate"]:
        raise UserError(
            f"stage '{context.stage}': {told['gate']}; what was measured is in '{context.folder}', and the "
            "run stops here. Mend the stage before it, or set the gate otherwise"
        )


def documents_digest(asked: Sequence[Document]) -> str:
    """Of what was asked: only answers to the same are compared."""
    # a passage of the world is its own prompt: once says it
    asked_of = (text for document in asked for text in dict.fromkeys((document.passage, document.prompt)))
    return hashlib.sha256("\0".join(asked_of).encode()).hexdigest()


def compared(told: dict[str, Any], other: Path) -> dict[str, Any]:
    """``told`` beside the result of another stage; ``judged`` is the share of that one's summaries with a
    verdict. Raises ``UserError`` when that had other documents, another scorer or temperature; with a thought
    and without may be compared."""
    theirs = saved(other)
    same = ("documents_digest", "scorer", "temperature")
    if any(theirs.get(key) != told[key] for key in same):
        raise UserError(
            f"stage '{other.parent.name}' judged other documents, by another scorer, or wrote at another "
            "temperature; give both the same problems, limit, scorer and temperature"
        )
    found = compare(told["verdicts"], theirs["verdicts"])
    return {"label": theirs.get("label", other.parent.name), "judged": judged_share(theirs), **found}


def judged_share(told: dict[str, Any]) -> float:
    """Of the summaries of a result, those with a verdict; 1 where there are none to judge."""
    return 1 - told["errors"] / told["answered"] if told["answered"] else 1.0


def gate(config: Config, told: dict[str, Any]) -> str:
    """Why the checkpoint may not pass, or ""."""
    rate, low_high, against = told["rate"], told["interval"], told.get("compared")
    least = max(JUDGED, config.answered)
    if config.at_most is not None or config.worse_by is not None:
        if rate is None:
            return "no summary could be judged, so nothing shows that it passes the gate"
        if judged_share(told) < least:
            return (
                f"{told['errors']} of {told['answered']} summaries have no verdict, and {least:.1%} have to "
                "have one: mend the scorer"
            )
    if config.worse_by is not None and against and against["judged"] < least:
        return (
            f"{against['judged']:.1%} of {against['label']}'s summaries have a verdict, and {least:.1%} have "
            "to: mend the scorer, and run that stage again"
        )
    if told["answer_rate"] < config.answered:
        return (
            f"{told['answer_rate']:.1%} of the documents were answered, and {config.answered:.1%} have to be"
        )
    if config.at_most is not None and rate > config.at_most:
        return (
            f"{rate:.1%} of the summaries say what their passage does not (95 % interval "
            f"{low_high[0]:.1%} to {low_high[1]:.1%}), and at_most is {config.at_most:.1%}"
        )
    if config.worse_by is not None and against and against["worse"] is None:
        return f"no document was answered by both this checkpoint and {against['label']}"
    if config.worse_by is not None and against and against["worse"] > config.worse_by:
        low, high = (100 * end for end in against["interval"])
        return (
            f"of the {against['documents']} summaries of documents that both answered, {against['rate']:.1%} "
            f"say what the passage does not, and {against['other']:.1%} of {against['label']}'s: "
            f"{100 * against['worse']:.1f} points more (95 % interval {low:.1f} to {high:.1f}), and worse_by "
            f"is {config.worse_by:.1%}"
        )
    return ""

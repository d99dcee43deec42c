"""Your own texts for a base model: what people wrote under questions, one row each.

A row whose question is held out is never read: its question's words decide, exactly as they do for
:mod:`liubai.problems.questions`. Left out on purpose: near duplicates; a text under a question that
is almost a held-out one is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from liubai.errors import UserError, nearest
from liubai.problems.rows import Row, place, read_rows
from liubai.problems.words import share_of

#: what a byte-level vocabulary cannot do without: every byte, start and end, and the four tags
SMALLEST = 262


class Texts(BaseModel):
    """A file of texts. ``prompt`` names the column of the question, ``text`` that of what followed it, from
    ``<think>`` to ``</answer>``. ``instruction`` and ``eval_share`` are those of the questions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    prompt: str = "prompt"
    text: str = "text"
    instruction: str = ""
    eval_share: float = Field(0.2, ge=0, le=1)
    vocabulary: int = Field(1024, ge=SMALLEST, description="tokens, at most: of few texts there are fewer")

    def located(self, folder: Path) -> Texts:
        """The same with a path that is relative to ``folder``, where the recipe stands, made absolute."""
        return self.model_copy(update={"path": place(self.path, folder)})


@dataclass(frozen=True, slots=True)
class Text:
    """``prompt`` is the question with its instruction; ``text`` what follows ``<think>``, which the prompt's
    template writes."""

    line: int
    question: str
    prompt: str
    text: str


def read_texts(config: Texts) -> list[Text]:
    """The rows that may be read. Raises ``UserError`` with file and line for one that is no text."""
    found = [_text(row, config, line) for line, row in read_rows(config.path)]
    if not found:
        raise UserError(f"'{config.path}' has no texts")
    read = [text for text in found if share_of(text.question) >= config.eval_share]
    if not read:
        raise UserError(f"all questions of '{config.path}' are held out; lower eval_share")
    return read


def _text(row: Row, config: Texts, line: int) -> Text:
    where = f"{config.path}:{line}"
    for name in (config.prompt, config.text):
        if name not in row:
            raise UserError(f"{where}: there is no column '{name}'; {nearest(name, map(str, row))}")
        if not isinstance(row[name], str) or not row[name].strip():
            raise UserError(f"{where}: '{name}' must be text, and not empty")
    question, text = row[config.prompt], row[config.text].strip()
    if not text.startswith("<think>"):
        raise UserError(f"{where}: '{config.text}' must begin with <think>: after a question comes a thought")
    prompt = f"{config.instruction}\n{question}" if config.instruction else question
    return Text(line, question, prompt, text.removeprefix("<think>"))

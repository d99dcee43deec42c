"""Your own texts for a base model: what people wrote under questions, one row each; or plain text.

A row whose question is held out is never read: its question's words decide, exactly as they do for
:mod:`liubai.problems.questions`. Plain text is the rows' own where ``prompt`` is "", or that of a ``.txt``
file, cut into pieces; there the words of a text itself decide, and those held out can be used to ask how well
a model reads what it has not seen. Left out on purpose: near duplicates; a text under a question that is
almost a held-out one is read, and so is the next piece of a book whose last one is held out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from liubai.errors import UserError, nearest
from liubai.problems.rows import Row, decoded_lines, digest, place, read_rows
from liubai.problems.words import share_of

#: what a byte-level vocabulary cannot do without: every byte, start and end, and the four tags
SMALLEST = 262
#: characters of a piece of a .txt file, at most: three bytes each, they fit a model of 2,048 positions
PIECE = 640
#: plain texts that are held out and looked at, at most
MOST_HELD_OUT = 128


class Texts(BaseModel):
    """A file of texts. ``prompt`` names the column of the question, ``text`` that of what followed it, from
    ``<think>`` to ``</answer>``. ``instruction`` and ``eval_share`` are those of the questions. With
    ``prompt = ""``, or of a .txt file, it is plain text: of any kind, and all of it is learned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    prompt: str = "prompt"
    text: str = "text"
    instruction: str = ""
    eval_share: float = Field(0.2, ge=0, le=1)
    vocabulary: int = Field(1024, ge=SMALLEST, description="tokens, at most: of few texts there are fewer")

    @property
    def plain(self) -> bool:
        return not self.prompt or is_text(self.path)

    def located(self, folder: Path) -> Texts:
        """The same with a path that is relative to ``folder``, where the recipe stands, made absolute."""
        return self.model_copy(update={"path": place(self.path, folder)})


@dataclass(frozen=True, slots=True)
class Text:
    """``prompt`` is the question with its instruction; ``text`` what follows ``<think>``, which the prompt's
    template writes. Plain text has neither question nor prompt."""

    line: int
    question: str
    prompt: str
    text: str


def read_texts(config: Texts) -> list[Text]:
    """The rows that may be read. Raises as :func:`split_texts` does."""
    return split_texts(config)[0]


def split_texts(config: Texts) -> tuple[list[Text], list[Text]]:
    """The rows that may be read; and the plain texts that are held out, at most :data:`MOST_HELD_OUT`: those
    whose words hash lowest. Raises ``UserError`` with file and line for a row that is no text."""
    found = _all(config)
    if not found:
        raise UserError(f"'{config.path}' has no texts")
    shares = [share_of(text.text if config.plain else text.question) for text in found]
    read = [text for text, share in zip(found, shares, strict=True) if share >= config.eval_share]
    if not read:
        raise UserError(f"all questions of '{config.path}' are held out; lower eval_share")
    kept = sorted((share, i) for i, share in enumerate(shares) if config.plain and share < config.eval_share)
    return read, [found[i] for _, i in kept[:MOST_HELD_OUT]]


def is_text(path: str) -> bool:
    """Is this a file of plain text, and not one of rows?"""
    return path.lower().endswith(".txt")


def digest_of(path: str) -> str:
    """Of what is read from ``path``: part of a stage's fingerprint."""
    if not is_text(path):
        return digest(path)
    return blake2b(_whole(path).encode(), digest_size=16).hexdigest()


def pieces(text: str, most: int = PIECE) -> Iterator[str]:
    """``text`` in pieces of at most ``most`` characters. A piece ends in its second half, where a paragraph
    does, else a line, else a word."""
    text, start = text.strip(), 0
    while len(text) - start > most:
        head = text[start : start + most + 1]
        ends = (head.rfind(gap) for gap in ("\n\n", "\n", " "))
        at = next((end for end in ends if end > most // 2), most)
        yield head[:at].rstrip()
        start += at
        while text[start].isspace():  # it ends, for the text does not end with white space
            start += 1
    if start < len(text):
        yield text[start:]


def _all(config: Texts) -> list[Text]:
    if is_text(config.path):
        rows = ((number, {config.text: piece}) for number, piece in enumerate(pieces(_whole(config.path)), 1))
        return [_plain(row, config, number) for number, row in rows]
    read = _plain if config.plain else _text
    return [read(row, config, line) for line, row in read_rows(config.path)]


def _whole(path: str) -> str:
    """Without carriage returns: a blank line is one wherever the file was written."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"'{path}' is not a file" if file.exists() else f"there is no file '{path}'")
    try:
        with open(file, "rb") as binary:
            return "".join(line for _, line in decoded_lines(binary, path)).replace("\r\n", "\n")
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from None


def _plain(row: Row, config: Texts, line: int) -> Text:
    return Text(line, "", "", _string(row, config.text, config, line).strip())


def _text(row: Row, config: Texts, line: int) -> Text:
    question = _string(row, config.prompt, config, line)
    text = _string(row, config.text, config, line).strip()
    if not text.startswith("<think>"):
        raise UserError(
            f"{config.path}:{line}: '{config.text}' must begin with <think>: after a question comes a thought"
        )
    prompt = f"{config.instruction}\n{question}" if config.instruction else question
    return Text(line, question, prompt, text.removeprefix("<think>"))


def _string(row: Row, name: str, config: Texts, line: int) -> str:
    where = f"{config.path}:{line}"
    if name not in row:
        raise UserError(f"{where}: there is no column '{name}'; {nearest(name, map(str, row))}")
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: '{name}' must be text, and not empty")
    return value

"""Rows of a user's file: JSONL, CSV, Parquet, or a Hugging Face data set, one dictionary each.

Every mistake is one ``UserError`` with file and line. Nothing is guessed: not the encoding (UTF-8), not
what a half-written line means. Memory holds one line at a time, and no line of any size.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from liubai.errors import UserError

#: A longer line is not a question (a whole file without line ends, say).
MAX_LINE = 16 << 20  #: bytes
HUB = "hf:"  #: ``hf:org/name``, ``hf:org/name:split`` or ``hf:org/name@configuration:split``

Row = dict[str, Any]

ENDINGS = (".jsonl", ".csv", ".parquet")


def place(path: str, folder: Path) -> str:
    """``path`` as seen from ``folder``, made absolute; a data set of the hub stays what it is."""
    return path if path.startswith(HUB) else str((folder / path).absolute())


def digest(path: str) -> str:
    """Of what the rows of ``path`` hold and on which lines they stand."""
    state = blake2b(digest_size=16)
    for line, row in read_rows(path):
        state.update(f"{line} {json.dumps(row, sort_keys=True, default=str)}\n".encode())
    return state.hexdigest()


def is_rows(path: str) -> bool:
    """Does this name a file of rows (or a data set of the hub), and not a family of problems?"""
    return path.startswith(HUB) or path.lower().endswith(ENDINGS)


def read_rows(path: str) -> Iterator[tuple[int, Row]]:
    """(line, row) of ``path``, which names a file (by its ending) or a data set of the hub."""
    if path.startswith(HUB):
        yield from _hub(path.removeprefix(HUB))
        return
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
        ".jsonl": _jsonl,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    file = Path(path)
    if file.suffix.lower() not in readers:
        raise UserError(f"'{path}': questions are read from .jsonl, .csv or .parquet, or hf:org/name")
    if not file.is_file():  # of a pipe only the first reader would see anything
        raise UserError(f"'{path}' is not a file" if file.exists() else f"there is no file '{path}'")
    try:
        yield from readers[file.suffix.lower()](file)
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with open(file, "rb") as binary:
        yield from decoded_lines(binary, str(file))


def decoded_lines(binary: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines of a stream called ``name``. Raises ``UserError`` with file and line for
    what is not UTF-8 and for a line longer than :data:`MAX_LINE`, of which no more than that is read."""
    number = 0
    while line := binary.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise UserError(f"{name}:{number}: the line is longer than {MAX_LINE >> 20} MB")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}:{number}: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8"
            ) from None


def _jsonl(file: Path) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{number}: not JSON ({broken_json(error)})") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}:{number}: must be a JSON object, one question a line")
        yield number, row


def broken_json(error: Exception) -> str:
    """What is wrong with one line of JSON: without the parser's own "line 1", beside ours another line."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    return f"{error.msg}, column {min(error.pos, len(error.doc.rstrip())) + 1}"


def _csv(file: Path) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(MAX_LINE)
    reader = csv.reader((line for _, line in _lines(file)), strict=True)
    names: list[str] = []
    while True:
        number = reader.line_num + 1  # where the row begins: a quoted cell may go over several lines
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{file}:{number}: not CSV ({error})") from None
        if not cells:
            continue
        if not names:
            names = [name.strip() for name in cells]
            if len(names) == 1 and (other := next((s for s in ";\t" if s in names[0]), "")):
                shown = "tabs" if other == "\t" else f"'{other}'"
                raise UserError(
                    f"{file}:{number}: cells are separated by commas, not by {shown}; save the table as CSV "
                    "with commas"
                )
            if twice := {n for n in names if names.count(n) > 1}:
                raise UserError(f"{file}:{number}: the column '{min(twice)}' is there twice")
            continue
        if len(cells) != len(names):
            raise UserError(f"{file}:{number}: {len(cells)} cells, but {len(names)} columns")
        yield number, dict(zip(names, cells, strict=True))


def _parquet(file: Path) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError("Parquet files need the package pyarrow: pip install 'liubai[data]'") from None
    try:
        with parquet.ParquetFile(file) as opened:  # type: ignore[no-untyped-call]
            number = 0
            for batch in opened.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, ValueError) as error:  # pyarrow's own errors are both
        raise UserError(f"'{file}' is not a whole Parquet file ({str(error).splitlines()[0]})") from None


def _hub(name: str) -> Iterator[tuple[int, Row]]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "data sets of the hub need the package datasets: pip install 'liubai[data]'"
        ) from None
    named, _, split = name.partition(":")
    repository, _, configuration = named.partition("@")
    try:
        rows = datasets.load_dataset(repository, configuration or None, split=split or "train")
    except Exception as error:  # dozens of kinds, its transports' among them
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the hub gave no data set '{repository}' ({reason})") from error
    yield from enumerate(rows, 1)

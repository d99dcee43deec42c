"""What a model's process and the server say to each other, over one socket: frames, no pickle.

A frame is its length (4 bytes), its kind (1 byte) and its body. A *note* is JSON: commands one way, the rare
answers the other way. *Pieces* are what was written since the last frame, of all streams at once, as plain
columns: at 200 streams a frame of JSON would cost more than the tokens in it. Numbers are of this machine's
own byte order: both ends are on it.
"""

from __future__ import annotations

import json
import struct
from array import array
from dataclasses import dataclass, field
from typing import Any

from liubai.types import Stop

NOTE, PIECES = 0, 1
#: The version of weights that never change.
VERSION = 0
_FRAME = struct.Struct("=IB")
_HEAD = struct.Struct("=IIQIIII")
#: Column types: stream numbers, counts, token ids, log-probabilities (the engine's are float32, too).
_STREAM, _COUNT, _ID, _LOGPROB, _CODE = "q", "I", "i", "f", "B"
_STOPS = tuple(Stop)

Alternatives = tuple[tuple[int, float], ...]


@dataclass(slots=True)
class Written:
    """Tokens of one stream; ``alternatives`` has one entry a token where they were asked for, else none."""

    stream: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[Alternatives] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Pieces:
    """One frame: the load at its time, what was written, and which streams ended and why. ``tokens`` counts
    all that the process ever wrote."""

    in_use: int
    waiting: int
    tokens: int
    written: list[Written]
    ended: list[tuple[int, Stop]]


def note(value: Any) -> bytes:
    return _frame(NOTE, json.dumps(value, separators=(",", ":")).encode())


def pack(pieces: Pieces) -> bytes:
    written, ended = pieces.written, pieces.ended
    streams = array(_STREAM, [w.stream for w in written])
    counts = array(_COUNT, [len(w.ids) for w in written])
    ids = array(_ID, [i for w in written for i in w.ids])
    logprobs = array(_LOGPROB, [p for w in written for p in w.logprobs])
    likely = [a for w in written for a in (w.alternatives or [()] * len(w.ids))]
    likely = likely if any(likely) else []  # most of the time nobody asked
    columns = (
        streams, counts, ids, logprobs,
        array(_COUNT, [len(a) for a in likely]),
        array(_ID, [i for a in likely for i, _ in a]),
        array(_LOGPROB, [p for a in likely for _, p in a]),
        array(_STREAM, [stream for stream, _ in ended]),
        array(_CODE, [_STOPS.index(stop) for _, stop in ended]),
    )  # fmt: skip
    head = _HEAD.pack(
        pieces.in_use, pieces.waiting, pieces.tokens, len(written), len(ids), len(likely), len(ended)
    )
    return _frame(PIECES, head + b"".join(column.tobytes() for column in columns))


def unpack(body: bytes) -> Pieces:
    in_use, waiting, tokens, pieces, written, likely, ended = _HEAD.unpack_from(body)
    view, at = memoryview(body), _HEAD.size

    def column(code: str, length: int) -> Any:
        nonlocal at
        found = array(code)
        end = at + length * found.itemsize
        found.frombytes(view[at:end])
        at = end
        return found.tolist()

    streams, counts = column(_STREAM, pieces), column(_COUNT, pieces)
    ids, logprobs = column(_ID, written), column(_LOGPROB, written)
    widths = column(_COUNT, likely)
    likely_ids, likely_logprobs = column(_ID, sum(widths)), column(_LOGPROB, sum(widths))
    endings = list(zip(column(_STREAM, ended), (_STOPS[c] for c in column(_CODE, ended)), strict=True))
    found, start, place = [], 0, 0
    for stream, count in zip(streams, counts, strict=True):
        one = Written(stream, ids[start : start + count], logprobs[start : start + count])
        for width in widths[start : start + count]:
            pairs = zip(
                likely_ids[place : place + width], likely_logprobs[place : place + width], strict=True
            )
            one.alternatives.append(tuple(pairs))
            place += width
        if not any(one.alternatives):
            one.alternatives = []
        found.append(one)
        start += count
    return Pieces(in_use, waiting, tokens, found, endings)


def _frame(kind: int, body: bytes) -> bytes:
    return _FRAME.pack(len(body), kind) + body


class Frames:
    """Bytes as they come in, whole frames as they go out."""

    def __init__(self) -> None:
        self._read = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """The (kind, body) of each frame that is complete now."""
        self._read += data
        found, at = [], 0
        while len(self._read) - at >= _FRAME.size:
            length, kind = _FRAME.unpack_from(self._read, at)
            end = at + _FRAME.size + length
            if len(self._read) < end:
                break
            found.append((kind, bytes(self._read[at + _FRAME.size : end])))
            at = end
        del self._read[:at]
        return found

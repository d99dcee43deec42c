"""A sampled thought as tokens that can be cut, closed and put elsewhere: steps, words, and the frame of an
answer.

The tokens of a thought are those that were sampled. What is written behind them (the end of the thought, the
answer asked for) is new text, in the manner in which the model itself ends its thoughts.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from liubai.grade.extract import ANSWER, BOX, END_ANSWER, END_THINK
from liubai.measure.audit import steps_of
from liubai.measure.reflection import PATTERN, thought_span
from liubai.text.tokenizer import TextTokenizer
from liubai.types import Problem

#: Of a thought with more steps, neighbours count as one.
MOST_STEPS = 48

_LINE = re.compile(r"\n+")
_SENTENCE = re.compile(r"[.!?]+(?=\s|$)|[。！？；]+")
_COMMA = re.compile(r"[,;](?=\s|$)|[，、]")
_TAGGED = re.compile(rf"(\s*){END_THINK}(\s*){ANSWER}(\s*)(?:\S|\S.*?\S)(\s*){END_ANSWER}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Piece:
    """A step of a thought: its text, after how many tokens of the thought it ends, and whether it is right
    (``None`` where nobody checks)."""

    text: str
    cut: int
    right: bool | None = None


@dataclass(frozen=True, slots=True)
class Thought:
    """What was sampled between the tags. The last of ``pieces`` ends with ``ids``; there is none in an empty
    thought. ``words[i]``: does a word begin with token ``i``?"""

    ids: tuple[int, ...]
    pieces: tuple[Piece, ...]
    words: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Frame:
    """How an answer stands behind a thought. ``blanks`` are before ``</think>``, behind it, and inside the
    answer's tags; in a ``box`` the latter do not count."""

    blanks: tuple[str, str, str, str] = (" ", " ", " ", " ")
    box: bool = False

    def around(self, ended: bool) -> tuple[str, str]:
        """What is written before and after the answer. ``ended``: has the thought its blank already?"""
        first, between, left, right = self.blanks
        close = ("" if ended else first) + END_THINK + between
        return (f"{close}{BOX}", "}") if self.box else (f"{close}{ANSWER}{left}", f"{right}{END_ANSWER}")


def frame_of(responses: Sequence[str]) -> Frame:
    """The frame that most of ``responses`` have, that of the small world when none has any."""
    tagged = Counter(m.groups() for r in responses if (m := _TAGGED.search(r)))
    boxed = sum(BOX in r.rpartition(END_THINK)[2] and ANSWER not in r for r in responses if END_THINK in r)
    if boxed > tagged.total():
        return Frame(("\n", "\n\n", "", ""), box=True)
    return Frame(tagged.most_common(1)[0][0]) if tagged else Frame()  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Tail:
    """What closes a thought and gives an answer, up to the token that ends the answer; ``scored`` are the
    answer's tokens and that one, without which 1 would be the beginning of 12."""

    ids: tuple[int, ...]
    scored: tuple[bool, ...]


class Cutter:
    """Thoughts and tails for one tokenizer and one frame; what was cut once is remembered."""

    def __init__(self, tokenizer: TextTokenizer, frame: Frame) -> None:
        self.tokenizer, self.frame = tokenizer, frame
        self._tails: dict[tuple[str, bool], Tail] = {}
        self._lengths: dict[tuple[int, ...], int] = {}

    def tail(self, answer: str, ended: bool = False) -> Tail:
        key = answer, ended
        if key not in self._tails:
            before, after = self.frame.around(ended)
            encoded = self.tokenizer.backend.encode(before + answer + after, add_special_tokens=False)
            a, b = len(before), len(before) + len(answer)
            mine = [i for i, (start, end) in enumerate(encoded.offsets) if start < b and end > a]
            stop = mine[-1] + 2  # and the token that ends it
            scored = tuple(mine[0] <= i for i in range(stop))
            self._tails[key] = Tail(tuple(encoded.ids[:stop]), scored)
        return self._tails[key]

    def known(self, answer: str) -> bool:
        """Can the tokenizer write it?"""
        return bool(answer) and self.tokenizer.unknown_id not in self.tail(answer).ids

    def ends(self, ids: Sequence[int]) -> list[int]:
        """Where each token ends in the decoded text, in characters."""
        found, total = [], 0
        for i in range(len(ids)):
            # a character has at most four bytes, and a byte may be a token
            before = tuple(ids[max(0, i - 3) : i])
            total += self._length((*before, ids[i])) - self._length(before)
            found.append(total)
        if found and found[-1] != len(self.tokenizer.decode(ids)):
            return [len(self.tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
        return found

    def _length(self, ids: tuple[int, ...]) -> int:
        if ids not in self._lengths:
            self._lengths[ids] = len(self.tokenizer.decode(ids)) if ids else 0
        return self._lengths[ids]

    def blank(self, ids: Sequence[int]) -> bool:
        """Does the text of ``ids`` end with a blank?"""
        return self.tokenizer.decode(ids[-4:])[-1:].isspace() if ids else False

    def thought(self, problem: Problem, ids: Sequence[int], opened: bool) -> Thought | None:
        """The thought of a completion without its end token. ``opened``: the template wrote ``<think>``.
        ``None`` when no thought was begun. One that never ends goes to the end."""
        response = self.tokenizer.decode(ids)
        if not opened and "<think>" not in response:
            return None
        start, end = thought_span(response)
        ends = self.ends(ids)
        inside = [i for i, at in enumerate(ends) if start < at <= end]
        if not inside or not response[start:end].strip():
            return Thought((), (), ())
        first, last = inside[0], inside[-1]
        size = last + 1 - first
        checked = steps_of(problem, response)
        marks: list[tuple[int, bool | None]] = (
            [(s.end, s.right) for s in checked]
            if checked
            else [(at, None) for at in cuts(response, start, end)[1:]]
        )
        marks[-1] = end, marks[-1][1]  # mutterings at the end belong to the last step
        pieces: list[Piece] = []
        before = start
        for at, right in marks:
            # the last token that reaches so far: the first may be half of a character
            reaching = bisect_right(ends, ends[min(bisect_left(ends, at), last)])
            cut = min(max(reaching - first, 1), size)
            text, before = response[before:at].strip(), at
            if pieces and cut <= pieces[-1].cut:  # two steps within one token
                last_piece = pieces.pop()
                text, right = f"{last_piece.text} {text}", right and last_piece.right
            pieces.append(Piece(text, cut, right))
        pieces[-1] = Piece(pieces[-1].text, size, pieces[-1].right)
        spans = pairwise([ends[first - 1] if first else 0, *ends[first : last + 1]])
        words = tuple(
            i == 0 or response[a : a + 1].isspace() or response[a - 1 : a].isspace()
            for i, (a, _) in enumerate(spans)
        )
        return Thought(tuple(ids[first : last + 1]), tuple(_fewer(pieces)), words)


def cuts(text: str, start: int, end: int) -> list[int]:
    """Where the steps of ``text[start:end]`` begin and end when nobody knows better: at ends of lines and
    sentences and before words of second thoughts; in a single sentence, at commas."""
    inner = text[start:end]
    places = {m.end() for pattern in (_LINE, _SENTENCE) for m in pattern.finditer(inner)}
    # a blank before a word is a part of the word's token: a place behind it would cut behind the word
    places |= {len(inner[: m.start()].rstrip(" ")) for m in PATTERN.finditer(inner)}
    full = _full(inner, places)
    if len(full) == 2:
        full = _full(inner, {m.end() for m in _COMMA.finditer(inner)})
    return [start + at for at in full]


def _full(inner: str, places: set[int]) -> list[int]:
    """``places`` in order with both ends, so that something stands between any two."""
    found = [0]
    for at in sorted(places - {0}):
        if inner[found[-1] : at].strip():
            found.append(at)
    if inner[found[-1] :].strip() or len(found) == 1:
        return [*found, len(inner)]
    return [*found[:-1], len(inner)]


def _fewer(pieces: Sequence[Piece]) -> list[Piece]:
    each = -(-len(pieces) // MOST_STEPS)
    if each == 1:
        return list(pieces)
    lots = [pieces[i : i + each] for i in range(0, len(pieces), each)]
    return [Piece(" ".join(p.text for p in lot), lot[-1].cut, _all([p.right for p in lot])) for lot in lots]


def _all(right: Sequence[bool | None]) -> bool | None:
    return None if None in right else all(right)


def shuffled(thought: Thought, rng: random.Random) -> tuple[int, ...] | None:
    """The same tokens with the steps in another order; of a single step, the words. ``None`` where no other
    order exists."""
    by_step = [0, *(p.cut for p in thought.pieces)]
    by_word = [*(i for i, begins in enumerate(thought.words) if begins), len(thought.ids)]
    for bounds in (by_step, by_word):
        parts = [thought.ids[a:b] for a, b in pairwise(bounds)]
        # all orders are one where every two parts commute; those that commute with the first do so with
        # each other, for they repeat the same tokens
        if any(part + parts[0] != parts[0] + part for part in parts):
            while True:
                rng.shuffle(parts)
                ids = tuple(id for part in parts for id in part)
                if ids != thought.ids:
                    return ids
    return None

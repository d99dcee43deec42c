"""From tokens as they come to what a client may see: the thought, the answer and calls, apart and without
tags.

Text is given out as soon as it is certain, and never taken back: held back is only what may still become a
character, a tag or a stop text, and white space that may turn out to be the last. However the tokens are cut
into pieces, the same texts come out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from liubai.rollout.thinking import CALL, END_CALL, END_RESPONSE, RESPONSE
from liubai.rollout.writer import Piece
from liubai.serve.toolcalls import Call
from liubai.text.tokenizer import ANSWER, END_ANSWER, END_THINK, THINK, TextTokenizer

#: No character has more bytes, and none of these tokens has fewer than one.
LONGEST_CHARACTER = 4
#: What a decoder writes for bytes that are no character, or none yet.
NO_CHARACTER = "\ufffd"

Kind = Literal["reasoning", "content"]
State = Literal["reasoning", "content", "call", "response"]


@dataclass(frozen=True, slots=True)
class Token:
    """``likely`` are the likeliest (id, log-probability) in its place, best first; ``text`` is what it
    added."""

    id: int
    logprob: float
    likely: tuple[tuple[int, float], ...] = ()
    text: str = ""


@dataclass(frozen=True, slots=True)
class Said:
    """A piece of the thought or of the answer; ``tokens`` are those that begin in it, where they were asked
    for."""

    kind: Kind
    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(slots=True)
class _Place:
    """So many characters of a token; ``None``: it was given out with those before."""

    length: int
    token: Token | None


class Decoder:
    """The text of tokens, a few at a time: ``push`` gives what they add to those ``behind``."""

    def __init__(self, tokenizer: TextTokenizer, behind: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._ids = list(behind[-2 * LONGEST_CHARACTER :])  # the last given out, and those that were not yet
        self._known = len(self._ids)  # how many of them were
        self._text = tokenizer.decode(self._ids) if self._ids else ""  # of those

    def push(self, ids: Sequence[int]) -> str:
        self._ids += ids
        text = ""
        for held in range(LONGEST_CHARACTER):
            whole = len(self._ids) - held
            if whole <= self._known:
                return ""
            text = self.tokenizer.decode(self._ids[:whole])
            if not text.endswith(NO_CHARACTER):
                break
        return self._give(text, whole)  # those that are held for longer are no character

    def end(self) -> str:
        """What was held back, whatever it is."""
        return self._give(self.tokenizer.decode(self._ids), len(self._ids))

    def _give(self, text: str, count: int) -> str:
        fresh = text[len(self._text) :]
        # how a token is written depends on the one before it; what is kept begins and ends with whole
        # characters
        if count > self._known:
            self._ids = self._ids[self._known :]
            self._known = count - self._known
            self._text = self.tokenizer.decode(self._ids[: self._known])
        return fresh


class Speech:
    """One answer. ``prefilled`` is what the template wrote of it; ``None``: a bare text, without tags.

    ``stops`` end the answer (never the thought) where the first of them is complete. ``understand`` is given
    what stands between the tags of a call: a call is given out, anything else is text again. ``tags``: also
    ``<answer>`` and its end are form, not text; ``silent``: calls and their results that nobody understands
    are left out (the model's own, whose results it has read). ``one_call``: the first call that is given out
    is the end. ``single``: tokens are looked at one by one.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prefilled: str | None = None,
        *,
        stops: Sequence[str] = (),
        understand: Callable[[str], Call | None] | None = None,
        tags: bool = False,
        silent: bool = False,
        one_call: bool = False,
        curious: bool = False,
        before: str = "",
        behind: Sequence[int] = (),
    ) -> None:
        self.decoder, self._ends = Decoder(tokenizer, behind), frozenset(tokenizer.eos_ids)
        self.bare, self.one_call = prefilled is None, one_call
        self.single = curious or bool(stops) or one_call
        self.stopped = False  #: by a stop text, or by the one call
        self.ended = False  #: the last that was heard is an end token
        self.tokens = 0  #: heard, up to the stop
        #: of these, in the thought, up to its closing tag; counted where tokens are looked at one by one, as
        #: they are when the stream may end before its path does
        self.thought_tokens = 0
        self.calls: list[Call] = []
        self._understand, self._silent = understand, silent
        self._state: State = "content"
        if prefilled is not None and prefilled.endswith(THINK):
            self._state = "reasoning"
        own = [ANSWER, END_ANSWER] if tags else []
        calls = [CALL] if understand is not None or silent else []
        calls += [RESPONSE] if silent else []
        self._stops = tuple(stops)
        self._marks = {
            "content": (*([] if self.bare else [THINK, END_THINK, *own, *calls]), *stops),
            "reasoning": (END_THINK, THINK),
            "call": (END_CALL,),
            "response": (END_RESPONSE,),
        }
        self._pending = before  # text that was not given out
        self._places = deque([_Place(len(before), None)] if before else [])
        self._begun = {"reasoning": self.bare, "content": self.bare}
        self._gap, self._cut_out = "", False  # white space at the end of what was said, and a tag behind it
        self._inside = ""  # a call as far as it got
        self._out: list[Said | Call] = []

    def hear(self, piece: Piece) -> list[Said | Call]:
        """What is certain by now. After a stop there is nothing more."""
        self.ended = bool(piece.ids) and piece.ids[-1] in self._ends
        if not self.single:
            self.tokens += len(piece.ids)
            self._pending += self.decoder.push([i for i in piece.ids if i not in self._ends])
            self._drain()
            return self._take()
        likely = piece.alternatives or ((),) * len(piece.ids)
        for token, logprob, others in zip(piece.ids, piece.logprobs, likely, strict=True):
            if self.stopped:
                break
            self.tokens += 1
            if token in self._ends:
                continue
            text = self.decoder.push((token,))
            self._pending += text
            self._places.append(_Place(len(text), Token(token, logprob, others, text)))
            self._drain()
        return self._take()

    def end(self) -> list[Said | Call]:
        """What was held back, now that nothing follows."""
        if self.stopped:
            return []
        rest = self.decoder.end()
        self._pending += rest
        if self.single and rest:
            self._places.append(_Place(len(rest), None))
        self._drain()
        if self.stopped:
            return self._take()
        if self._state == "call" and not self._silent:  # it never ended: it is text
            self._say("content", CALL + self._inside + self._pending, ())
        elif self._state in ("reasoning", "content"):
            text = self._pending if self.bare else self._pending.rstrip()
            self._say(self._state, text, self._cut(len(text)))
        self._pending = ""
        return self._take()

    def _take(self) -> list[Said | Call]:
        out, self._out = self._out, []
        return out

    def _drain(self) -> None:
        while not self.stopped:
            state = self._state
            if state in self._begun and not self._begun[state]:
                self._drop(len(self._pending) - len(self._pending.lstrip()))
            found = [
                (at + len(mark), at, mark)
                for mark in self._marks[state]
                if (at := self._pending.find(mark)) >= 0
            ]
            if not found:
                self._release(state)
                return
            _, at, mark = min(found)
            text = self._pending[:at] if self.bare or state == "call" else self._pending[:at].rstrip()
            self._pass(state, text)
            gap = self._pending[: at - len(text)]
            self._drop(len(gap))
            self._drop(len(mark), of_thought=False)
            self._gap, self._cut_out = self._gap or gap, True
            self._meet(mark)

    def _meet(self, mark: str) -> None:
        if mark in self._stops and self._state == "content":
            self.stopped, self._pending = True, ""
        elif self._state == "call":
            call = self._understand(self._inside) if self._understand is not None else None
            if call is not None:
                self.calls.append(call)
                self._out.append(call)
                self.stopped = self.one_call
            elif not self._silent:
                self._say("content", f"{CALL}{self._inside}{END_CALL}", ())
            self._state, self._inside = "content", ""
            if self.stopped:
                self._pending = ""
        elif mark == THINK:
            self._state = "reasoning"
        elif mark in (END_THINK, END_RESPONSE):
            self._state = "content"
        elif mark in (CALL, RESPONSE):
            self._state = "call" if mark == CALL else "response"

    def _release(self, state: State) -> None:
        """All but the beginning of a mark and, before it, white space."""
        text = self._pending
        marks = self._marks[state]
        longest = max(map(len, marks), default=0)
        tail, hold = text[max(0, len(text) - longest + 1) :], 0
        if any(mark[0] in tail for mark in marks):  # most of the time there is none
            lengths = range(len(tail), 0, -1)
            hold = next((n for n in lengths if any(mark.startswith(tail[-n:]) for mark in marks)), 0)
        certain = text[: len(text) - hold]
        self._pass(state, certain if self.bare or state == "call" else certain.rstrip())

    def _pass(self, state: State, text: str) -> None:
        if state == "reasoning" or state == "content":
            self._say(state, text, self._cut(len(text)))
            return
        if state == "call":
            self._inside += text
        self._drop(len(text))

    def _say(self, kind: Kind, text: str, tokens: tuple[Token, ...]) -> None:
        if not text:
            return
        if kind == "reasoning":
            self.thought_tokens += len(tokens)
        if not self._begun[kind]:
            self._begun[kind] = True
        elif self._cut_out and not self.bare:
            # one of the two spaces around what was cut out
            text = self._gap + (text.lstrip() if self._gap else text)
        self._gap, self._cut_out = "", False
        last = self._out[-1] if self._out else None
        if isinstance(last, Said) and last.kind == kind:
            self._out[-1] = Said(kind, last.text + text, last.tokens + tokens)
        else:
            self._out.append(Said(kind, text, tokens))

    def _cut(self, length: int) -> tuple[Token, ...]:
        """Take so much text off, and the tokens that begin in it, or have no text before it."""
        taken = []
        self._pending = self._pending[length:]
        while self._places and length > 0:
            place = self._places[0]
            if place.token is not None:
                taken.append(place.token)
                place.token = None
            length, place.length = length - place.length, max(0, place.length - length)
            if not place.length:
                self._places.popleft()
        return tuple(taken)

    def _drop(self, length: int, of_thought: bool = True) -> None:
        """The same without its tokens, which are ``of_thought`` in a thought; one that reaches beyond it is
        kept."""
        self._pending = self._pending[length:]
        parts: list[_Place] = []  # of the character that comes next
        while self._places and length > 0:
            place = self._places[0]
            if place.length > length:
                place.length -= length
                self._places.extendleft(reversed(parts))
                return
            parts.append(self._places.popleft())
            length -= place.length
            if place.length:
                if of_thought and self._state == "reasoning":
                    self.thought_tokens += sum(part.token is not None for part in parts)
                parts = []

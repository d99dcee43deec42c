"""One path from a question to its answer: a thought of a bounded length, tools in it, then the answer.

    ask = Ask(question=…, template=template, prompt_ids=…, max_tokens=512, seed=0, budget=200)
    path = await one(writer, ask)

What is changed in a thought is changed in its tokens, and writing goes on from them: the next request's
prompt is the question and every token so far, so that nothing is ever encoded twice.

- ``budget``: a thought that has so many tokens is closed, and the answer begins.
- ``at_least``: a thought that ends sooner does not: its end is replaced by a word of second thoughts
  (budget forcing, s1, arXiv 2501.19393, §3.1).
- ``use``: what stands between ``<tool_call>`` and ``</tool_call>`` is given to it, and what it returns
  stands behind the call, where the model reads on.

Tags are found as one token where the tokenizer has one (our own, Qwen3's), and by their text where they
are several. Without a thought (the template wrote an empty one) there is nothing to bound.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TypeVar

from liubai.errors import UserError
from liubai.grade.extract import extract
from liubai.rollout.engine import Request
from liubai.rollout.writer import Heard, Piece, Writer
from liubai.seeds import derive
from liubai.text.template import Template, text_of
from liubai.text.tokenizer import END_THINK, THINK, TextTokenizer
from liubai.types import Sample, Span, Stop

T = TypeVar("T")
CALL, END_CALL = "<tool_call>", "</tool_call>"
RESPONSE, END_RESPONSE = "<tool_response>", "</tool_response>"
RESULT = f"\n{RESPONSE}\n{{}}\n{END_RESPONSE}\n"
#: What closes a thought that has had its budget. A tokenizer of words has no line ends and drops them.
CLOSE = f"\n{END_THINK}\n\n"
#: What stands in the place of an end that came too soon: the first that the tokenizer can write.
AGAIN = {"en": ("\nWait,", "wait"), "zh": ("\n等等，", "等等")}
#: No answer is made to go on, or to call, more often than this; and no result is longer, in tokens.
WAITS, CALLS, LONGEST_RESULT = 64, 16, 512

#: Answers a call by its text; ``None``: it was not for us, and stands as it is.
Use = Callable[[str], Awaitable[str | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What to answer, and how. ``prompt_ids`` are the question as ``template`` writes it, thinking on or
    off; ``question`` is for those who judge. ``max_tokens`` bounds everything behind the prompt."""

    question: str
    template: Template
    prompt_ids: tuple[int, ...]
    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    alternatives: int = 0
    budget: int | None = None
    at_least: int = 0
    use: Use | None = None


@dataclass(frozen=True, slots=True)
class Called:
    """A tool call in a thought, and its result as the model read it."""

    call: str
    result: str


@dataclass(slots=True)
class Spent:
    """Tokens: ``written`` by the model, kept or not; ``read`` as prompts, anew by every request (an engine
    shares much of it); ``judged``, read by the models that judge."""

    written: int = 0
    read: int = 0
    judged: int = 0


@dataclass(frozen=True, slots=True)
class Draft:
    """An answer as far as it got. ``given[i]``: nobody sampled token ``i``. ``stop`` is ``None`` until it
    ends."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    given: tuple[bool, ...] = ()
    stop: Stop | None = None
    version: int = 0
    forced: bool = False
    waits: int = 0
    calls: tuple[Called, ...] = ()

    def wrote(self, sample: Sample) -> Draft:
        n = len(sample.completion_ids)
        return replace(
            self,
            ids=self.ids + sample.completion_ids,
            logprobs=self.logprobs + sample.logprobs,
            given=self.given + (False,) * n,
            version=sample.version,
        )

    def was_given(self, ids: tuple[int, ...]) -> Draft:
        n = len(ids)
        return replace(
            self,
            ids=self.ids + ids,
            logprobs=self.logprobs + (0.0,) * n,
            given=self.given + (True,) * n,
        )

    def cut(self, length: int) -> Draft:
        """Without what comes after the first ``length`` tokens."""
        return replace(
            self, ids=self.ids[:length], logprobs=self.logprobs[:length], given=self.given[:length]
        )

    def sample(self, ask: Ask) -> Sample:
        """As the engine would have returned it; log-probabilities of given tokens are 0."""
        spans = (Span(self.version, len(self.ids)),) if self.ids else ()
        return Sample(ask.prompt_ids, self.ids, self.logprobs, self.stop or Stop.LENGTH, spans)


@dataclass(frozen=True, slots=True)
class Path:
    """A finished draft. ``answer`` is what a grader would read (:mod:`liubai.grade.extract`); ``None`` where
    there is none, and when the path was cut off. ``logprob`` (nats) is the sum over what was sampled.
    ``votes`` and ``score`` are filled in by those who compare paths."""

    sample: Sample
    given: tuple[bool, ...]
    response: str
    thought: str
    content: str
    answer: str | None
    logprob: float
    thought_tokens: int
    forced: bool = False
    calls: tuple[Called, ...] = ()
    votes: int | None = None
    score: float | None = None

    @property
    def tokens(self) -> int:
        return len(self.sample.completion_ids)

    @property
    def ended(self) -> bool:
        return self.sample.stop is Stop.EOS


async def one(writer: Writer, ask: Ask, heard: Heard | None = None, spent: Spent | None = None) -> Path:
    """The whole path. ``heard`` is given its very tokens in order, and nothing that is taken back.

    Where nothing interferes this is one request with ``ask.seed``: the answer that the engine gives to it.
    Raises ``UserError`` when a thought is to go on and the tokenizer has no word for it.
    """
    return path_of(ask, await go_on(writer, ask, Draft(), ask.seed, spent or Spent(), heard=heard))


async def together(jobs: Sequence[Awaitable[T]]) -> list[T]:
    """As ``asyncio.gather``; when one fails, or all are cancelled, none goes on behind the caller's back."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def path_of(ask: Ask, draft: Draft) -> Path:
    sample = draft.sample(ask)
    template = ask.template
    response = text_of(template, sample)
    thought, content = split(template, response)
    answer = extract(response, template.prefilled).answer if sample.stop is Stop.EOS else None
    logprob = sum(p for p, given in zip(draft.logprobs, draft.given, strict=True) if not given)
    tokens = _thought_tokens(template, draft.ids, response)
    return Path(
        sample, draft.given, response, thought, content, answer, logprob, tokens, draft.forced, draft.calls
    )


async def go_on(
    writer: Writer,
    ask: Ask,
    draft: Draft,
    seed: int,
    spent: Spent,
    *,
    step_ids: tuple[int, ...] = (),
    most: int | None = None,
    heard: Heard | None = None,
) -> Draft:
    """``draft`` and what comes next: the rest of the answer or, with ``step_ids``, the next step of the
    thought: two tokens at least, up to one of these or to ``most`` tokens. What follows a thought is not cut
    into steps.

    The seed of each request but the first is derived from ``seed`` and its place.
    """
    template, tokenizer = ask.template, ask.template.tokenizer
    begin = len(draft.ids)
    longest = ask.max_tokens if ask.budget is None else min(ask.max_tokens, ask.budget)  # of a thought
    while draft.stop is None:
        at = len(draft.ids)
        if at >= ask.max_tokens:
            return replace(draft, stop=Stop.LENGTH)
        thinks = is_open(template, tokenizer.decode(draft.ids))
        if thinks and at >= longest:
            draft = _closed(ask, draft, heard)
            continue
        thinks = thinks or (at == 0 and not template.prefilled)  # it may open a thought itself
        stepping = thinks and bool(step_ids)
        if stepping and most is not None and begin + most <= at > begin:
            return draft
        limit = longest if at < longest else ask.max_tokens
        if stepping and most is not None:
            limit = min(limit, begin + most)
        hurried = thinks and at < min(ask.at_least, longest) and draft.waits < WAITS
        calling = ask.use is not None and len(draft.calls) < CALLS
        request = Request(
            id=0,
            prompt_ids=ask.prompt_ids + draft.ids,
            max_tokens=limit - at,
            seed=seed if at == begin else derive(seed, "part", at),
            temperature=ask.temperature,
            top_p=ask.top_p,
            stop_ids=(
                *ask.stop_ids,
                *(step_ids if stepping else ()),
                *(completing(tokenizer, END_THINK) if hurried else ()),
                *(completing(tokenizer, END_CALL) if calling else ()),
            ),
            alternatives=ask.alternatives,
        )
        # what may still be taken back is not yet told: an end tag has no more tokens than letters
        ear = _Ear(heard, len(END_THINK) if hurried else 1 if thinks and draft.waits else 0)
        part = await writer.write(request, ear if heard else None)
        spent.written += len(part.completion_ids)
        spent.read += len(request.prompt_ids)
        draft = draft.wrote(part)
        last = draft.ids[-1]
        ended = part.stop is Stop.EOS and last in (*tokenizer.eos_ids, *ask.stop_ids)
        text = tokenizer.decode(draft.ids[:-1] if ended else draft.ids)
        still = is_open(template, text)
        if hurried and (ended if still else END_THINK in text):
            before = text if still else text[: text.rfind(END_THINK)]
            length = _length_of(tokenizer, before, draft.ids[:-1], at)
            if length < ask.at_least:
                draft = _made_to_go_on(ask, draft, length, before, longest, ear)
                continue
        if ended and still and thinks and draft.waits and last in tokenizer.eos_ids:
            # it was made to think on, and has thought itself out: there is no answer yet
            ear.flush(but=1)
            draft = _closed(ask, draft.cut(len(draft.ids) - 1), heard)
            continue
        ear.flush()
        if ended:
            return replace(draft, stop=Stop.EOS)
        call = _called(text) if calling and last in completing(tokenizer, END_CALL) else None
        if call is not None:
            draft = await _answered(ask, draft, call, heard)
        elif stepping and still and last in step_ids and begin + 1 < len(draft.ids) < longest:
            return draft
    return draft


def split(template: Template, response: str) -> tuple[str, str]:
    """``response`` as (thought, what is said), without the tags: a thought is what stands behind ``<think>``,
    up to ``</think>`` if that comes; where none was opened, there is none to close. (A stream cannot take
    back what it has said, so :class:`liubai.serve.streams.Speech` has no other rule.)"""
    sides, thinks = {True: "", False: ""}, False
    for part in re.split(f"({THINK}|{END_THINK})", _turn(template, response)):
        if part in (THINK, END_THINK):
            thinks = part == THINK
        else:
            said = sides[thinks].rstrip()
            gap = sides[thinks][len(said) :]  # one of the two spaces around what was cut out
            sides[thinks] = said + gap + part.lstrip() if said and gap else sides[thinks] + part
    return sides[True].strip(), sides[False].strip()


def is_open(template: Template, text: str) -> bool:
    """Does ``text`` stand inside a thought?"""
    turn = _turn(template, text)
    return turn.rfind(THINK) > turn.rfind(END_THINK)


@lru_cache(maxsize=64)
def completing(tokenizer: TextTokenizer, tag: str) -> tuple[int, ...]:
    """The tokens with which ``tag`` may be complete: the tag itself where it is one token, else every token
    that begins as the tag ends, or has all of it."""
    own = tokenizer.id_of(tag)
    if own is not None and tokenizer.encode(tag) == [own]:
        return (own,)
    if tokenizer.unknown_id is not None and tokenizer.unknown_id in tokenizer.encode(tag):
        return ()  # words that it does not have cannot be written
    endings = tuple(tag[i:] for i in range(1, len(tag)))
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    return tuple(sorted(i for text, i in vocabulary.items() if text.startswith(endings) or tag in text))


def _turn(template: Template, text: str) -> str:
    return template.prefilled + text


def _closed(ask: Ask, draft: Draft, heard: Heard | None) -> Draft:
    """The thought has had its budget, or has gone on for as long as it could be made to."""
    ids = tuple(ask.template.tokenizer.encode(CLOSE))[: ask.max_tokens - len(draft.ids)]
    _tell(heard, ids, ask.alternatives)
    return replace(draft.was_given(ids), forced=True)


def _length_of(tokenizer: TextTokenizer, before: str, ids: tuple[int, ...], at: int) -> int:
    """How many of ``ids`` are in the text ``before``, wholly; at least the first ``at``."""
    length = len(ids)
    while length > at and not before.startswith(tokenizer.decode(ids[:length])):
        length -= 1
    return length


def _made_to_go_on(ask: Ask, draft: Draft, length: int, before: str, longest: int, ear: _Ear) -> Draft:
    """The end of the thought, or of everything, goes, and a word of second thoughts comes in its place. The
    thought was ``before``, and ``length`` tokens of it are kept."""
    tokenizer = ask.template.tokenizer
    ear.flush(but=len(draft.ids) - length)
    # a token may hold both the end of a sentence and the beginning of the tag
    kept = before.removeprefix(tokenizer.decode(draft.ids[:length]))
    ids = (*(tokenizer.encode(kept) if kept.strip() else ()), *_again(tokenizer, before))
    ids = ids[: longest - length]
    _tell(ear.heard, ids, ask.alternatives)
    return replace(draft.cut(length).was_given(ids), waits=draft.waits + 1)


def _again(tokenizer: TextTokenizer, thought: str) -> tuple[int, ...]:
    """A word of second thoughts, in the language of the thought."""
    chinese = len(re.findall(r"[\u3400-\u9fff]+", thought)) > len(re.findall(r"[A-Za-z]+", thought))
    first, second = ("zh", "en") if chinese else ("en", "zh")
    for word in (*AGAIN[first], *AGAIN[second]):
        ids = tokenizer.encode(word)
        if ids and tokenizer.unknown_id not in ids:
            return tuple(ids)
    raise UserError("this model has no word for 'wait' to think longer with; ask without a least thought")


def _called(text: str) -> str | None:
    """What is called by a ``text`` that has just come to the end of a call."""
    begin, end = text.rfind(CALL), text.rfind(END_CALL)
    if not 0 <= begin < end or text[end + len(END_CALL) :].strip():
        return None
    return text[begin + len(CALL) : end].strip()


async def _answered(ask: Ask, draft: Draft, call: str, heard: Heard | None) -> Draft:
    assert ask.use is not None
    result = await ask.use(call)
    if result is None:
        return draft
    result = result.encode("utf-8", "replace").decode()  # it may quote half a surrogate pair of the call
    tokenizer = ask.template.tokenizer
    room = ask.max_tokens - len(draft.ids)
    longest = max(0, min(LONGEST_RESULT, room // 2))
    ids = tokenizer.encode(RESULT.format(result))
    if len(ids) > longest:  # what does not fit is left out, and the model can see that it was
        frame = len(tokenizer.encode(RESULT.format("…")))
        short = tokenizer.decode(tokenizer.encode(result)[: max(0, longest - frame)])
        result = f"{short}…"
        ids = tokenizer.encode(RESULT.format(result))[:room]
    _tell(heard, tuple(ids), ask.alternatives)
    return replace(draft.was_given(tuple(ids)), calls=(*draft.calls, Called(call, result)))


def _thought_tokens(template: Template, ids: tuple[int, ...], response: str) -> int:
    """How many tokens the thought has, up to its closing tag; one that reaches into the tag is counted."""
    head, closed, _ = response.partition(END_THINK)
    if not closed or not is_open(template, head):
        written = len(ids) - (bool(ids) and ids[-1] in template.tokenizer.eos_ids)
        return written if is_open(template, response) else 0
    low, high = 1, len(ids)  # the first length at which the tag is complete
    while low < high:
        middle = (low + high) // 2
        if END_THINK in template.tokenizer.decode(ids[:middle]):
            high = middle
        else:
            low = middle + 1
    length = _length_of(template.tokenizer, head, ids[: low - 1], 0)
    rest = head.removeprefix(template.tokenizer.decode(ids[:length]))
    return length + bool(rest.strip())


def _tell(heard: Heard | None, ids: tuple[int, ...], alternatives: int) -> None:
    if heard and ids:
        heard(Piece(ids, (0.0,) * len(ids), ((),) * len(ids) if alternatives else ()))


@dataclass(slots=True)
class _Ear:
    """Passes on what is heard, but for the last ``hold`` tokens, until :meth:`flush`."""

    heard: Heard | None
    hold: int
    held: list[Piece] = field(default_factory=list)  #: one token each

    def __call__(self, piece: Piece) -> None:
        if not self.hold:
            self._pass(piece)
            return
        likely = piece.alternatives or ((),) * len(piece.ids)
        self.held += [
            Piece((i,), (p,), (a,) if piece.alternatives else ())
            for i, p, a in zip(piece.ids, piece.logprobs, likely, strict=True)
        ]
        self._release(max(0, len(self.held) - self.hold))

    def flush(self, but: int = 0) -> None:
        """All that is held, but the last ``but`` tokens, which nobody shall hear of."""
        self._release(max(0, len(self.held) - but))
        self.held.clear()

    def _release(self, count: int) -> None:
        out, self.held = self.held[:count], self.held[count:]
        if out:
            self._pass(
                Piece(
                    tuple(p.ids[0] for p in out),
                    tuple(p.logprobs[0] for p in out),
                    tuple(a for p in out for a in p.alternatives),
                )
            )

    def _pass(self, piece: Piece) -> None:
        if self.heard:
            self.heard(piece)

"""Events as OpenAI's objects: chunks of a stream, or one whole answer.

Beside OpenAI's fields there are ``reasoning_content`` and ``reasoning`` (the thought, under DeepSeek's name
and under vLLM's), and ``liubai`` (route, paths, tools; docs/serving.md).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

from liubai.serve.events import ChoiceCalled, ChoiceSaid, Ended, Event, PathSaid, Started, Usage
from liubai.serve.guard import dumps
from liubai.serve.house import Served
from liubai.serve.schema import ChatRequest, CompletionRequest
from liubai.serve.streams import Token
from liubai.text.tokenizer import TextTokenizer

#: JSON has no −∞: what OpenAI writes for it.
NEVER = -9999.0
#: Tokens whose spelling is kept: log-probabilities name the same ones again and again.
SPELLED = 1 << 16
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Reply:
    """The object that all chunks of one answer share."""

    def __init__(self, started: Started, kind: str, prefix: str) -> None:
        self.served, self.route = started.served, started.route
        self.head: dict[str, Any] = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": started.served.name,
            "system_fingerprint": fingerprint(started.served),
        }

    def whole(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self.head, "choices": list(choices), **more}

    def chunk(self, choice: str = "", more: Mapping[str, Any] = NOTHING) -> str:
        """A chunk as JSON, with one ``choice``, or none. Chunks are many and mostly the same: what they share
        is written once."""
        rest = dumps(more)[1:] if more else "}"
        return f'{self.opening},"choices":[{choice}]{"," if more else ""}{rest}'

    @cached_property
    def opening(self) -> str:
        return dumps(self.head)[:-1]


def fingerprint(served: Served) -> str | None:
    return f"liubai-{served.version[:12]}" if served.version else None


def usage_of(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


# ---- chat ----


async def chat_chunks(
    started: Started, events: AsyncIterator[Event], request: ChatRequest
) -> AsyncIterator[str]:
    """The objects of a stream, in order, as JSON."""
    reply = Reply(started, "chat.completion.chunk", "chatcmpl")
    counted = request.stream_options is not None and bool(request.stream_options.include_usage)
    more: dict[str, Any] = {"usage": None} if counted else {}
    tokenizer = started.served.tokenizer

    def chunk(
        index: int,
        delta: str,
        finish: str = "null",
        logprobs: str = "null",
        extra: Mapping[str, Any] = NOTHING,
    ) -> str:
        choice = f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish}}}'
        return reply.chunk(choice, {**more, **extra})

    route: dict[str, Any] = {"liubai": {"route": started.route}} if started.route else {}
    for index in range(request.n or 1):
        yield chunk(index, '{"role":"assistant","content":""}', extra=route)
    async for event in events:
        if isinstance(event, ChoiceSaid):
            thought, text = event.kind == "reasoning", dumps(event.text)
            delta = (
                f'{{"reasoning_content":{text},"reasoning":{text}}}' if thought else f'{{"content":{text}}}'
            )
            logprobs = "null"
            if request.logprobs:
                entries = [entry(tokenizer, token) for token in event.tokens]
                logprobs = dumps(
                    {
                        "content": None if thought else entries,
                        "refusal": None,
                        "reasoning_content": entries if thought else None,
                    }
                )
            yield chunk(event.index, delta, logprobs=logprobs)
        elif isinstance(event, ChoiceCalled):
            call, place = event.call, event.place
            named = {"id": event.id, "type": "function", "function": {"name": call.name, "arguments": ""}}
            yield chunk(event.index, dumps({"tool_calls": [{"index": place, **named}]}))
            rest = {"index": place, "function": {"arguments": call.arguments}}
            yield chunk(event.index, dumps({"tool_calls": [rest]}))
        elif isinstance(event, PathSaid):
            yield reply.chunk(more={**more, "liubai": {"path": event.path, event.kind: event.text}})
        elif isinstance(event, Ended):
            extra = {"liubai": event.summary} if event.summary is not None else {}
            yield chunk(event.index, "{}", f'"{event.finish}"', extra=extra)
            if counted and event.usage is not None:
                yield reply.chunk(more={"usage": usage_of(event.usage)})


@dataclass(slots=True)
class _Message:
    texts: dict[str, str] = field(default_factory=lambda: {"reasoning": "", "content": ""})
    tokens: dict[str, list[Token]] = field(default_factory=lambda: {"reasoning": [], "content": []})
    calls: list[dict[str, Any]] = field(default_factory=list)
    finish: str = "stop"


async def chat_whole(
    started: Started, events: AsyncIterator[Event], request: ChatRequest
) -> tuple[dict[str, Any], Usage]:
    """The answer in one object."""
    reply = Reply(started, "chat.completion", "chatcmpl")
    messages = [_Message() for _ in range(request.n or 1)]
    usage, summary = Usage(started.prompt_tokens, 0, 0), dict[str, Any]()
    async for event in events:
        if isinstance(event, ChoiceSaid):
            messages[event.index].texts[event.kind] += event.text
            messages[event.index].tokens[event.kind] += event.tokens
        elif isinstance(event, ChoiceCalled):
            function = {"name": event.call.name, "arguments": event.call.arguments}
            messages[event.index].calls.append({"id": event.id, "type": "function", "function": function})
        elif isinstance(event, Ended):
            messages[event.index].finish = event.finish
            usage, summary = event.usage or usage, event.summary or summary
    choices = [
        _choice(started.served.tokenizer, i, message, bool(request.logprobs))
        for i, message in enumerate(messages)
    ]
    return reply.whole(choices, usage=usage_of(usage), liubai=summary), usage


def _choice(tokenizer: TextTokenizer, index: int, message: _Message, logprobs: bool) -> dict[str, Any]:
    thought, content = message.texts["reasoning"] or None, message.texts["content"]
    said: dict[str, Any] = {
        "role": "assistant",
        "content": content if content or not message.calls else None,
        "reasoning_content": thought,
        "reasoning": thought,
        "refusal": None,
    }
    if message.calls:
        said["tool_calls"] = message.calls
    entries = None
    if logprobs:
        entries = {
            "content": [entry(tokenizer, token) for token in message.tokens["content"]],
            "refusal": None,
            "reasoning_content": [entry(tokenizer, token) for token in message.tokens["reasoning"]],
        }
    return {"index": index, "message": said, "logprobs": entries, "finish_reason": message.finish}


# ---- bare completions ----


async def text_chunks(
    started: Started, events: AsyncIterator[Event], request: CompletionRequest
) -> AsyncIterator[str]:
    reply = Reply(started, "text_completion", "cmpl")
    counted = request.stream_options is not None and bool(request.stream_options.include_usage)
    more: dict[str, Any] = {"usage": None} if counted else {}
    offsets: dict[int, int] = {}
    async for event in events:
        if isinstance(event, ChoiceSaid):
            start = offsets.get(event.index, 0)
            offsets[event.index] = start + len(event.text)
            logprobs = _columns(started.served.tokenizer, event.tokens, request.logprobs, start)
            choice = {"index": event.index, "text": event.text, "logprobs": logprobs, "finish_reason": None}
            yield reply.chunk(dumps(choice), more)
        elif isinstance(event, Ended):
            ended = {"index": event.index, "text": "", "logprobs": None, "finish_reason": event.finish}
            yield reply.chunk(dumps(ended), more)
            if counted and event.usage is not None:
                yield reply.chunk(more={"usage": usage_of(event.usage)})


async def text_whole(
    started: Started, events: AsyncIterator[Event], request: CompletionRequest
) -> tuple[dict[str, Any], Usage]:
    reply = Reply(started, "text_completion", "cmpl")
    texts: dict[int, str] = {}
    tokens: dict[int, list[Token]] = {}
    finish: dict[int, str] = {}
    usage = Usage(started.prompt_tokens, 0, 0)
    async for event in events:
        if isinstance(event, ChoiceSaid):
            texts[event.index] = texts.get(event.index, "") + event.text
            tokens.setdefault(event.index, []).extend(event.tokens)
        elif isinstance(event, Ended):
            finish[event.index] = event.finish
            usage = event.usage or usage
    choices = [
        {
            "index": i,
            "text": texts.get(i, ""),
            "logprobs": _columns(started.served.tokenizer, tokens.get(i, []), request.logprobs, 0),
            "finish_reason": finish[i],
        }
        for i in sorted(finish)
    ]
    return reply.whole(choices, usage=usage_of(usage)), usage


def _columns(
    tokenizer: TextTokenizer, tokens: Sequence[Token], asked: int | None, start: int
) -> dict[str, Any] | None:
    """The old form of log-probabilities: a list for each thing. Offsets are in characters."""
    if asked is None:
        return None
    names = [_space(tokenizer, token) + spelled(tokenizer, token.id) for token in tokens]
    offsets = []
    for name in names:
        offsets.append(start)
        start += len(name)
    likely = [
        {_space(tokenizer, token) + spelled(tokenizer, i): number(p) for i, p in token.likely}
        for token in tokens
    ]
    return {
        "tokens": names,
        "token_logprobs": [number(token.logprob) for token in tokens],
        "top_logprobs": likely if asked else None,
        "text_offset": offsets,
    }


# ---- tokens ----


def entry(tokenizer: TextTokenizer, token: Token) -> dict[str, Any]:
    """A token as OpenAI shows it, and what else might have stood there."""
    space = _space(tokenizer, token)
    return {
        **_named(tokenizer, token.id, token.logprob, space),
        "top_logprobs": [_named(tokenizer, i, p, space) for i, p in token.likely],
    }


def _named(tokenizer: TextTokenizer, token: int, logprob: float, space: str) -> dict[str, Any]:
    name, codes = _spelling(tokenizer, token)
    if space:
        name, codes = space + name, (*space.encode(), *codes)
    return {"token": name, "logprob": number(logprob), "bytes": codes}


def _space(tokenizer: TextTokenizer, token: Token) -> str:
    """What a tokenizer of words writes between a token and the one before."""
    own = spelled(tokenizer, token.id)
    space = token.text.removesuffix(own)
    return space if own and space.isspace() and len(space) < len(token.text) else ""


def number(logprob: float) -> float:
    return logprob if logprob > NEVER else NEVER  # NaN, too


def spelled(tokenizer: TextTokenizer, token: int) -> str:
    return _spelling(tokenizer, token)[0]


@lru_cache(maxsize=SPELLED)
def _spelling(tokenizer: TextTokenizer, token: int) -> tuple[str, tuple[int, ...]]:
    """The text of a token, and its bytes."""
    return tokenizer.decode([token]), tuple(bytes_of(tokenizer, token))


def bytes_of(tokenizer: TextTokenizer, token: int) -> bytes:
    """What a token adds to the text: also where it is only a part of a character."""
    text = tokenizer.decode([token])
    name = tokenizer.backend.id_to_token(token)
    if "\ufffd" in text and name is not None:
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        if all(letter in _BYTES for letter in name):
            return bytes(_BYTES[letter] for letter in name)
    return text.encode("utf-8", "replace")


def _byte_letters() -> dict[str, int]:
    """How byte-level tokenizers (GPT-2's and all since) write a byte: as itself where it can be seen, the
    others as the letters from U+0100 on, in their order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_letters()

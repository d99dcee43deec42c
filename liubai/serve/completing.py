"""Bare completions: a model goes on with a text as it stands. No template, no thought apart, one path a
choice."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing

from liubai.rollout.engine import Request
from liubai.seeds import derive
from liubai.serve.answering import Choice, Emit, Lull, flow, until_enough
from liubai.serve.asking import beside, most, require_few, top_p
from liubai.serve.errors import bad
from liubai.serve.events import ChoiceSaid, Ended, Event, Started, Usage
from liubai.serve.host import Host
from liubai.serve.house import House, Served
from liubai.serve.schema import CompletionRequest
from liubai.serve.streams import Speech


async def complete(
    house: House, request: CompletionRequest, lull: Lull | None = None
) -> AsyncGenerator[Event]:
    """The prompts' continuations as they are; choice ``n·i + j`` is continuation j of prompt i. With ``echo``
    each begins with its prompt. Raises as :func:`answer`."""
    served, n = house.find(request.model), request.n or 1
    if request.echo and request.logprobs is not None:
        raise bad(
            "this server has no log-probabilities of prompts; leave 'logprobs' or 'echo' out", "logprobs"
        )
    asked = request.prompts()
    prompts = await beside(sum(map(len, asked)), lambda: [_tokens(served, prompt) for prompt in asked])
    if n * len(prompts) > house.limits.answers:
        raise bad(f"this server writes {house.limits.answers} answers at once at most", "n")
    seed = secrets.randbits(62) if request.seed is None else request.seed
    choices = [
        Choice(
            i,
            Speech(
                served.tokenizer,
                stops=request.stops(),
                curious=request.logprobs is not None,
                behind=prompts[i // n],
            ),
        )
        for i in range(n * len(prompts))
    ]

    async def one(choice: Choice, emit: Emit) -> None:
        ids = prompts[choice.index // n]
        wanted = Request(
            id=0,
            prompt_ids=ids,
            max_tokens=most(served, house.limits.max_tokens, len(ids), request),
            seed=derive(seed, "choice", choice.index),
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=top_p(request.top_p),
            alternatives=request.logprobs or 0,
        )
        if request.echo:
            emit(ChoiceSaid(choice.index, "content", served.tokenizer.decode(ids)))

        sample = await until_enough(choice, emit, lambda heard: writer.write(wanted, heard))
        if sample is not None:
            choice.stop = sample.stop
        last = all(other.over for other in choices)
        usage = Usage(sum(map(len, prompts)), sum(c.tokens for c in choices), 0) if last else None
        emit(Ended(choice.index, choice.finish, usage), last)

    longest = max(most(served, house.limits.max_tokens, len(ids), request) for ids in prompts)
    if request.logprobs is not None:
        require_few(len(choices), longest, request.logprobs, "logprobs")
    with served.room(len(choices)) as writer:
        yield Started(served, sum(map(len, prompts)))
        async with aclosing(flow(lambda emit: [one(choice, emit) for choice in choices], lull)) as events:
            async for event in events:
                yield event


def _tokens(served: Served, prompt: str | list[int]) -> tuple[int, ...]:
    """Of a text with what its tokenizer puts in front."""
    backend = served.tokenizer.backend
    ids = prompt if isinstance(prompt, list) else backend.encode(prompt).ids
    vocabulary = backend.get_vocab_size(with_added_tokens=True)
    if isinstance(served.writer, Host):  # a tokenizer may have more tokens than its model
        vocabulary = min(vocabulary, served.writer.config.vocab_size)
    if max(ids, default=0) >= vocabulary:
        raise bad("a token of the prompt is not one of the model's", "prompt")
    if not ids and served.tokenizer.bos_id is not None:
        ids = [served.tokenizer.bos_id]
    if not ids:
        raise bad("the prompt is empty", "prompt")
    return tuple(ids)

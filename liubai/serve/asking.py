"""From a request to what is asked of a model: prompt, bounds, paths. All that can be wrong with it is raised
here."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from liubai.errors import UserError
from liubai.rollout.paths import PathsConfig, judge_of
from liubai.rollout.thinking import AGAIN, Ask
from liubai.seeds import derive
from liubai.serve.errors import bad
from liubai.serve.host import Host
from liubai.serve.house import House, Served
from liubai.serve.router import CALCULATOR, Decision
from liubai.serve.schema import ChatRequest, CompletionRequest
from liubai.serve.streams import Speech
from liubai.serve.toolcalls import begun, for_template, offered, parse_call, text_of_message
from liubai.serve.tools import CALLS, SECONDS, Tools, described
from liubai.stages.by_paths import settled
from liubai.text.template import Objection, Template

T = TypeVar("T")
#: A prompt of so many characters is encoded beside the event loop.
LONG = 20_000
#: Bytes of the keys and values of one beam search, at its longest. While it makes room and puts its rows in a
#: new order, it holds up to three times as many.
BEAMS = 2 << 30
#: A tree may write so many times the answers that one request may have written at once.
SEARCHED = 16
#: Tokens and alternatives whose log-probabilities one request may ask for.
SHOWN = 1 << 17


@dataclass(slots=True, kw_only=True)
class Job:
    """A request that can be answered: by whom, and how. ``before`` stands between the template and the
    answer."""

    served: Served
    ask: Ask
    config: PathsConfig
    choices: int = 1
    stops: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    built: tuple[str, ...] = ()
    before: str = ""
    one_call: bool = False
    curious: bool = False
    route: dict[str, str] | None = None
    seed: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def several(self) -> bool:
        return self.config.kind not in ("greedy", "sample") or self.config.number > 1

    def asked(self, index: int) -> Ask:
        """What is asked for one choice, which has its own random numbers and its own tools."""
        seed = derive(self.seed, "choice", index)
        if not self.built:
            return replace(self.ask, seed=seed)
        number = self.config.at_once
        tools, functions = Tools(self.built, calls=CALLS * number, seconds=SECONDS * number), self.functions

        async def use(text: str) -> str | None:
            return None if parse_call(text, functions) is not None else await tools.answer(text)

        return replace(self.ask, seed=seed, use=use)

    @property
    def answers(self) -> int:
        return self.choices * self.config.at_once

    def speech(self, *, of_path: bool = False) -> Speech:
        names = self.functions
        return Speech(
            self.served.tokenizer,
            self.ask.template.prefilled,
            stops=() if of_path else self.stops,
            understand=(lambda text: parse_call(text, names)) if names else None,
            tags=self.served.tagged,
            silent=bool(self.built),
            one_call=self.one_call and not of_path,
            curious=self.curious and not of_path,
            before=self.before,
        )


def routed(house: House, request: ChatRequest) -> Decision | None:
    """The way that the router chooses, where one was asked for."""
    if request.route is None:
        return None
    if house.router is None:
        raise bad("this server has no router; leave 'route' out", "route")
    said = [{"role": m.role, "content": text_of_message(m)} for m in request.messages]
    # who demands a call of a function gets that, whatever the calculator knows
    return house.router.route(said, route=request.route, tools=() if begun(request) else (CALCULATOR,))


async def prepared(house: House, request: ChatRequest, decision: Decision | None) -> Job:
    """Raises ``Refused`` and ``UserError``."""
    limits = house.limits
    require_sound(house, request)
    served = house.on(None if decision is None else decision.way, request.model)
    tools, before = offered(request), begun(request)
    thinks = request.thinks() if decision is None else decision.way == "think"
    thinks = thinks and not before
    template = served.thinking if thinks else served.plain
    if tools and not template.takes_tools:
        raise bad(
            f"the chat template of '{served.name}' shows no tools to it; leave 'tools' out, or ask a model "
            "whose template has them",
            "tools",
            "tools_unsupported",
        )
    functions = tuple(tool["function"]["name"] for tool in tools)
    built = tuple(request.use_tools or ())
    if built and not served.calls:
        raise bad(
            f"'{served.name}' cannot write tool calls: its tokenizer lacks their signs; leave the tools out",
            "use_tools",
            "tools_unsupported",
        )
    shown = [*tools, *described(built)] if template.takes_tools else []
    behind = (() if thinks else (served.closing,)) + (before,)
    prompt_ids = await _encoded(template, for_template(request.messages), shown, behind)
    question = next(
        (text_of_message(m) for m in reversed(request.messages) if m.role == "user"),
        text_of_message(request.messages[-1]),
    )
    config = _judged(house, served, request.way_of_paths(), question)
    seed = secrets.randbits(62) if request.seed is None else request.seed
    max_tokens = most(served, limits.max_tokens, len(prompt_ids), request)
    alternatives = (request.top_logprobs or 0) if request.logprobs else 0
    answers = (request.n or 1) * config.at_once
    if request.max_tokens is None and request.max_completion_tokens is None:
        max_tokens = min(max_tokens, _longest(served, config) - len(prompt_ids))
        if request.logprobs:
            max_tokens = min(max_tokens, SHOWN // (answers * (1 + alternatives)))
        max_tokens = max(1, max_tokens)
    ask = Ask(
        question=question,
        template=template,
        prompt_ids=prompt_ids,
        max_tokens=max_tokens,
        seed=seed,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=top_p(request.top_p),
        alternatives=alternatives,
        budget=request.budget(served.max_length) if thinks else None,
        at_least=(request.think_at_least or 0) if thinks else 0,
    )
    job = Job(
        served=served,
        ask=ask,
        config=config,
        seed=seed,
        choices=request.n or 1,
        stops=request.stops(),
        functions=functions,
        built=built,
        before=before,
        one_call=request.parallel_tool_calls is False,
        curious=bool(request.logprobs),
        route=way_of(decision),
    )
    _check(job, limits.answers)
    return job


def _judged(house: House, served: Served, paths: PathsConfig, question: str) -> PathsConfig:
    """``paths``, and that who judges them is there."""
    try:
        config = settled(paths, served.writer.judges(), question)
    except UserError as error:
        raise bad(str(error), "paths") from None
    if config.kind == "best":
        try:
            judge_of(served.writer, config.judge)
        except UserError as error:
            raise bad(f"{error}{house.judges_by}", "paths") from None
    if config.kind == "tree" and config.judge not in (None, *served.writer.judges()):
        raise bad(f"'{served.name}' has no process model{house.judges_by}", "paths.judge")
    return config


def way_of(decision: Decision | None) -> dict[str, str] | None:
    """For a client, where a way was asked for."""
    return None if decision is None else {"way": decision.way, "why": decision.why}


def require_sound(house: House, request: ChatRequest) -> None:
    """Raises ``Refused`` for what is wrong whoever answers."""
    limits = house.limits
    if len(request.messages) > limits.messages:
        raise bad(f"this server reads {limits.messages} messages at most", "messages")
    if request.top_logprobs is not None and not request.logprobs:
        raise bad("'top_logprobs' needs 'logprobs': true", "top_logprobs")
    if (request.n or 1) > limits.answers:
        raise bad(f"this server writes {limits.answers} answers at once at most", "n")


def _check(job: Job, answers: int) -> None:
    """What would be found out only when others have begun to listen."""
    ask, config = job.ask, job.config
    if job.several and job.choices > 1:
        raise bad("'paths' has several paths of its own; leave 'n' out, and say 'n' inside 'paths'", "n")
    if config.kind == "beam" and (ask.budget is not None or ask.at_least or job.built):
        raise bad("a beam search has no thinking budget, no least thought and no tools", "paths")
    if (need := len(ask.prompt_ids) + ask.max_tokens) > _longest(job.served, config):
        raise bad(
            f"{config.number} beams of up to {need} tokens take more memory than a search has; lower the "
            "width or 'max_tokens'",
            "paths",
        )
    if ask.temperature == 0 and config.kind not in ("greedy", "beam") and job.several:
        raise bad("several answers at temperature 0 are one and the same", "temperature")
    if job.answers > answers:
        raise bad(f"this server writes {answers} answers at once at most", "paths")
    if config.in_all > SEARCHED * answers:
        raise bad(
            f"this server writes {SEARCHED * answers} answers and steps of one tree at most, this one would "
            f"have {config.in_all}; lower 'simulations', 'branch' or 'rollouts'",
            "paths",
        )
    if job.curious:
        require_few(job.answers, ask.max_tokens, ask.alternatives, "top_logprobs")
    tokenizer = job.served.tokenizer
    if ask.at_least:
        words = [tokenizer.encode(word) for pair in AGAIN.values() for word in pair]
        if not any(ids and tokenizer.unknown_id not in ids for ids in words):
            raise bad(f"'{job.served.name}' has no word with which to think on", "think_at_least")


def require_few(answers: int, max_tokens: int, alternatives: int, param: str) -> None:
    """Raises ``Refused`` for more log-probabilities than an answer may carry: each is an object of its own,
    and all of them are made while others wait."""
    if answers * max_tokens * (1 + alternatives) > SHOWN:
        raise bad(
            f"this server shows {SHOWN} log-probabilities at most, and {answers} answers of {max_tokens} "
            f"tokens with {alternatives} alternatives each may have more; lower 'max_tokens', 'n' or "
            f"'{param}'",
            param,
        )


def _longest(served: Served, config: PathsConfig) -> int:
    """The most tokens of prompt and answer together: those that the model holds, in a beam search also those
    that there is memory for."""
    if config.kind != "beam":
        return served.max_length
    bounds = [served.max_length]
    if served.token_bytes:
        bounds.append(BEAMS // (config.number * served.token_bytes))
    if isinstance(served.writer, Host):
        bounds.append(served.writer.slots * served.max_length // config.number)
    return min(bounds)


def top_p(asked: float | None) -> float:
    return 1.0 if asked is None else max(asked, 1e-6)


def most(served: Served, limit: int | None, prompt: int, request: ChatRequest | CompletionRequest) -> int:
    """The most tokens of one answer: what was asked for, as far as there is room."""
    room = served.max_length - prompt
    if room < 1:
        chat = isinstance(request, ChatRequest)
        earlier = isinstance(request, ChatRequest) and len(request.messages) > 1
        remedy = ", or leave earlier messages out" if earlier else ""
        raise bad(
            f"the question has {prompt} tokens, the model takes {served.max_length}; shorten it{remedy}",
            "messages" if chat else "prompt",
            "context_length_exceeded",
        )
    asked, name = request.max_tokens, "max_tokens"
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        asked, name = request.max_completion_tokens, "max_completion_tokens"
    if limit is not None and asked is not None and asked > limit:
        raise bad(f"this server writes {limit} tokens at most", name)
    if asked is None:
        asked = limit or room
        if isinstance(request, CompletionRequest):
            asked = min(asked, 16)  # OpenAI's default there
    return min(asked, room)


async def _encoded(
    template: Template, messages: list[dict[str, Any]], tools: list[dict[str, Any]], behind: tuple[str, ...]
) -> tuple[int, ...]:
    def encode() -> list[int]:
        ids = template.chat_ids(messages, tools or None)
        return ids + [i for text in behind if text for i in template.tokenizer.encode(text)]

    try:
        ids = await beside(letters(messages, tools), encode)
    except UserError as error:
        said = f": {error.__cause__}"[:200] if isinstance(error.__cause__, Objection) else ""
        raise bad(f"the model's chat template does not take these messages{said}", "messages") from None
    if not ids:
        raise bad("the messages are empty", "messages")
    return tuple(ids)


async def beside(length: int, work: Callable[[], T]) -> T:
    """What ``work`` returns, which encodes ``length`` characters: in a thread where that takes long."""
    return work() if length < LONG else await asyncio.to_thread(work)


def letters(*values: object) -> int:
    """Characters of all texts in JSON, about as they are shown to a model."""
    total, left = 0, list(values)
    while left:
        one = left.pop()
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, dict):
            left += one.keys()
            left += one.values()
        elif isinstance(one, list):
            left += one
        total += 1
    return total

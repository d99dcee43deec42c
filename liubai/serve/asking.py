"""From a request to what is asked of a model: prompt, bounds, paths. All that can be wrong with it is raised
here."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from liubai.errors import UserError
from liubai.rollout.paths import NUMBER, PathsConfig, judge_of
from liubai.rollout.thinking import AGAIN, Ask
from liubai.seeds import derive
from liubai.serve.errors import bad
from liubai.serve.house import House, Served
from liubai.serve.router import Decision
from liubai.serve.schema import ChatRequest, CompletionRequest
from liubai.serve.streams import Speech
from liubai.serve.toolcalls import begun, for_template, offered, parse_call, text_of_message
from liubai.serve.tools import CALLS, SECONDS, Tools, described
from liubai.text.template import Objection, Template
from liubai.text.tokenizer import THINK

#: A prompt of so many characters is encoded beside the event loop.
LONG = 20_000


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
    return house.router.route(said, route=request.route)


async def prepared(house: House, request: ChatRequest, decision: Decision | None) -> Job:
    """Raises ``Refused`` and ``UserError``."""
    served, limits = house.find(request.model), house.limits
    if decision is not None and decision.way == "fast" and house.fast is not None:
        served = house.find(house.fast)
    if len(request.messages) > limits.messages:
        raise bad(f"this server reads {limits.messages} messages at most", "messages")
    if request.top_logprobs is not None and not request.logprobs:
        raise bad("'top_logprobs' needs 'logprobs': true", "top_logprobs")
    config = _config(request)
    tools, before = offered(request), begun(request)
    thinks = request.thinks() if decision is None else decision.way == "think"
    thinks = thinks and not before
    template = served.thinking if thinks else served.plain
    if tools and not template.takes_tools:
        raise bad(f"the chat template of '{served.name}' shows no tools to it", "tools", "tools_unsupported")
    functions = tuple(tool["function"]["name"] for tool in tools)
    built = tuple(request.use_tools or ())
    if built and not served.calls:
        raise bad(f"'{served.name}' cannot write tool calls", "use_tools", "tools_unsupported")
    shown = [*tools, *described(built)] if template.takes_tools else []
    prompt_ids = await _encoded(template, for_template(request.messages), shown, before)
    question = next(
        (text_of_message(m) for m in reversed(request.messages) if m.role == "user"),
        text_of_message(request.messages[-1]),
    )
    seed = secrets.randbits(62) if request.seed is None else request.seed
    budget = request.budget(served.max_length) if thinks else None
    if not thinks and template.prefilled == THINK:
        budget = 0  # a template that always thinks: the thought is closed at once
    ask = Ask(
        question=question,
        template=template,
        prompt_ids=prompt_ids,
        max_tokens=most(served, limits.max_tokens, len(prompt_ids), request),
        seed=seed,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=top_p(request.top_p),
        alternatives=(request.top_logprobs or 0) if request.logprobs else 0,
        budget=budget,
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
        route=None if decision is None else {"way": decision.way, "why": decision.why},
    )
    _check(job, limits.answers)
    return job


def _check(job: Job, answers: int) -> None:
    """What would be found out only when others have begun to listen."""
    ask, config = job.ask, job.config
    if job.several and job.choices > 1:
        raise bad("'paths' has several paths of its own; leave 'n' out, and say 'n' inside 'paths'", "n")
    if config.kind == "best":
        judge_of(job.served.writer, config.judge)
    if config.kind == "tree" and config.judge not in (None, *job.served.writer.judges()):
        raise bad(f"'{job.served.name}' is served without a process model", "paths.judge")
    if config.kind == "beam" and (ask.budget is not None or ask.at_least or job.built):
        raise bad("a beam search has no thinking budget, no least thought and no tools", "paths")
    if ask.temperature == 0 and config.kind not in ("greedy", "beam") and job.several:
        raise bad("several answers at temperature 0 are one and the same", "temperature")
    if job.answers > answers:
        raise bad(f"this server writes {answers} answers at once at most", "paths" if job.several else "n")
    tokenizer = job.served.tokenizer
    words = [tokenizer.encode(word) for pair in AGAIN.values() for word in pair]
    if ask.at_least and not any(ids and tokenizer.unknown_id not in ids for ids in words):
        raise bad(f"'{job.served.name}' has no word with which to think on", "think_at_least")


def _config(request: ChatRequest) -> PathsConfig:
    asked = request.way_of_paths()
    fields: dict[str, Any] = {"kind": asked.kind}
    name = NUMBER[asked.kind][0] if asked.kind in NUMBER else None
    number = asked.width if asked.kind == "beam" and asked.width is not None else asked.n
    if name is not None and number is not None:
        fields[name] = number
    if asked.judge is not None:
        fields["judge"] = asked.judge
    try:
        return PathsConfig.model_validate(fields)
    except ValidationError as error:
        reason = str(error.errors(include_input=False)[0]["msg"]).removeprefix("Value error, ")
        raise bad(f"'paths': {reason}", "paths", "invalid_value") from None


def top_p(asked: float | None) -> float:
    return 1.0 if asked is None else max(asked, 1e-6)


def most(served: Served, limit: int | None, prompt: int, request: ChatRequest | CompletionRequest) -> int:
    """The most tokens of one answer: what was asked for, as far as there is room."""
    room = served.max_length - prompt
    if room < 1:
        raise bad(
            f"the question has {prompt} tokens, the model takes {served.max_length}",
            "messages" if isinstance(request, ChatRequest) else "prompt",
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
    template: Template, messages: list[dict[str, Any]], tools: list[dict[str, Any]], before: str
) -> tuple[int, ...]:
    def encode() -> list[int]:
        ids = template.chat_ids(messages, tools or None)
        return ids + (template.tokenizer.encode(before) if before else [])

    try:
        length = sum(len(message["content"]) for message in messages)
        ids = encode() if length < LONG else await asyncio.to_thread(encode)
    except UserError as error:
        said = f": {error.__cause__}"[:200] if isinstance(error.__cause__, Objection) else ""
        raise bad(f"the model's chat template does not take these messages{said}", "messages") from None
    if not ids:
        raise bad("the messages are empty", "messages")
    return tuple(ids)

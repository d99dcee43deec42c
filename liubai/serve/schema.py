"""What may be asked: OpenAI's requests with our additions, checked strictly, and the sentence for what may
not.

Three kinds of fields: those that are honoured; those that change nothing here and are let pass (``user``,
``store`` …); and those that would change the answer and cannot be honoured, which are refused unless they say
what is done anyhow (``presence_penalty`` 0 …). A name that is none of these is refused, too.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from liubai.errors import nearest
from liubai.serve.errors import Refused, bad

#: Bounds that hold for every server.
CHOICES, STOPS, LIKELIEST, PATHS, TOOLS = 16, 4, 20, 64, 128
SEED = 2**63


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Lenient(Strict):
    """What clients send back of our own answers, with whatever they have put in it."""

    model_config = ConfigDict(extra="ignore")


Text = Annotated[str, Field(max_length=1 << 20)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Stops = StopText | Annotated[list[StopText], Field(max_length=STOPS)]


def _whole(value: Any) -> Any:
    """JSON Schema's integers: 12.0 is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)
Positive = Annotated[int, Field(ge=1, le=1 << 30), Whole]
Natural = Annotated[int, Field(ge=0, le=1 << 30), Whole]
Metadata = Annotated[dict[str, Any], Field(max_length=64)]
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[float, Field(ge=1, le=1)]
Nothing = Annotated[dict[str, Any], Field(max_length=0)]


# ---- messages ----


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: Text


Parts = Annotated[list[TextPart], Field(min_length=1, max_length=256)]


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Text | Parts
    name: Text | None = None


class UserMessage(Strict):
    role: Literal["user"]
    content: Text | Parts
    name: Text | None = None


class CalledFunction(Lenient):
    name: Name
    arguments: Text


class ToolCall(Lenient):
    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Lenient):
    """``reasoning_content`` (or ``reasoning``) is the thought, for templates that want to see it again."""

    role: Literal["assistant"]
    content: Text | Annotated[list[TextPart | RefusalPart], Field(min_length=1, max_length=256)] | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=TOOLS)] | None = None
    function_call: None = None


class ToolMessage(Strict):
    role: Literal["tool"]
    content: Text | Parts
    tool_call_id: Text
    name: Text | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


# ---- tools ----


class Function(Strict):
    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


# ---- ways of answering ----


class Thinking(Strict):
    type: Literal["enabled", "disabled"]
    budget_tokens: Natural | None = None


class TemplateSettings(Strict):
    """What vLLM's clients send to switch the thought on and off."""

    enable_thinking: bool | None = None
    thinking: bool | None = None


Kind = Literal["greedy", "sample", "beam", "vote", "best", "tree"]
Way = Literal["auto", "fast", "think", "tool"]
Built = Literal["calculator", "python"]


class Paths(Strict):
    """``n`` paths, or beams of ``width``; the judge of ``best`` and ``tree`` (docs/paths.md)."""

    kind: Kind
    n: Annotated[int, Field(ge=1, le=PATHS), Whole] | None = None
    width: Annotated[int, Field(ge=1, le=PATHS), Whole] | None = None
    judge: Literal["preference", "process"] | None = None


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]


class _Sampled(Strict):
    """What both kinds of completions share."""

    model: Annotated[str, Field(max_length=256)] | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES), Whole] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stops | None = None
    seed: Annotated[int, Field(ge=-SEED, lt=SEED), Whole] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Positive | None = None
    # let pass
    user: Text | None = None
    # refused but for what is done anyhow
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    repetition_penalty: One | None = None
    logit_bias: Nothing | None = None
    top_k: Literal[-1, 0] | None = None
    min_p: Zero | None = None

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(_Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=LIKELIEST), Whole] | None = None
    tools: Annotated[list[Tool], Field(max_length=TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    # ours, and the names that others have for the same
    thinking: bool | Thinking | None = None
    chat_template_kwargs: TemplateSettings | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    thinking_budget: Natural | None = None
    think_at_least: Natural | None = None
    paths: Kind | Paths | None = None
    route: Way | None = None
    use_tools: Annotated[list[Built], Field(max_length=2)] | None = None
    # let pass
    metadata: Metadata | None = None
    store: bool | None = None
    service_tier: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None
    prediction: dict[str, Any] | None = None
    # refused but for what is done anyhow
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    audio: None = None
    web_search_options: None = None
    verbosity: Literal["medium"] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none"] | None = None

    def thinks(self) -> bool:
        """DeepThink: ``thinking`` says it; else the template's settings; else the effort."""
        if self.thinking is not None:
            return self.thinking if isinstance(self.thinking, bool) else self.thinking.type == "enabled"
        settings = self.chat_template_kwargs
        if settings is not None:
            said = settings.thinking if settings.enable_thinking is None else settings.enable_thinking
            if said is not None:
                return said
        return self.reasoning_effort != "none"

    def budget(self, longest: int) -> int | None:
        """The most thought tokens; ``longest`` are those that the model holds. An effort is a share of
        them."""
        if self.thinking_budget is not None:
            return self.thinking_budget
        if isinstance(self.thinking, Thinking) and self.thinking.budget_tokens is not None:
            return self.thinking.budget_tokens
        shares = {"minimal": 64, "low": 16, "medium": 4}
        if self.reasoning_effort in shares:
            return longest // shares[self.reasoning_effort]
        return None

    def way_of_paths(self) -> Paths:
        if self.paths is None:
            return Paths(kind="sample")
        return Paths(kind=self.paths) if isinstance(self.paths, str) else self.paths


Ids = Annotated[list[Natural], Field(min_length=1, max_length=1 << 18)]


class CompletionRequest(_Sampled):
    """POST /v1/completions: a text, or tokens, that the model goes on with. No template, no thought apart."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=CHOICES)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=CHOICES)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=LIKELIEST), Whole] | None = None
    # refused but for what is done anyhow
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    def prompts(self) -> list[str | list[int]]:
        p = self.prompt
        if isinstance(p, str):
            return [p]
        return [p] if p and isinstance(p[0], int) else list(p)  # type: ignore[list-item, arg-type]


# ---- sentences ----

#: Why a field is refused, where "it is wrong" would not say it.
WHY = {
    "logit_bias": "this server cannot bias tokens; leave 'logit_bias' out",
    "frequency_penalty": "this server has no penalties; leave 'frequency_penalty' out, or 0",
    "presence_penalty": "this server has no penalties; leave 'presence_penalty' out, or 0",
    "repetition_penalty": "this server has no penalties; leave 'repetition_penalty' out, or 1",
    "top_k": "this server samples by 'temperature' and 'top_p' only; leave 'top_k' out",
    "min_p": "this server samples by 'temperature' and 'top_p' only; leave 'min_p' out",
    "response_format": "this server cannot promise a format; leave 'response_format' out",
    "modalities": "this server writes text only; leave 'modalities' out",
    "audio": "this server writes text only; leave 'audio' out",
    "web_search_options": "this server does not search the web; leave 'web_search_options' out",
    "verbosity": "this server has no verbosity; say in a message how long the answer may be",
    "functions": "'functions' is an old form; use 'tools'",
    "function_call": "'function_call' is an old form; use 'tool_choice'",
    "best_of": "this server has no 'best_of'; for the best of several use 'paths' in /v1/chat/completions",
    "suffix": "this server cannot fill in the middle; leave 'suffix' out",
}

R = TypeVar("R", bound=Strict)


def read(kind: type[R], value: dict[str, Any]) -> R:
    """Raises :class:`Refused` (400) with the first thing that is wrong, and its place."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _sentence(kind, value, error) from None


def _sentence(kind: type[Strict], value: dict[str, Any], error: ValidationError) -> Refused:
    errors = error.errors(include_input=False, include_url=False)
    found = [(_place(value, one["loc"], one["type"] == "missing"), one) for one in errors]
    first = found[0][0][:1]
    # of the forms that a field may have, the error that goes deepest is about the form that was meant
    place, one = max(
        (pair for pair in found if pair[0][:1] == first),
        key=lambda pair: (len(pair[0]), not pair[1]["type"].endswith("_type")),
    )
    param = _named(place)
    if place and place[0] in WHY:
        return bad(WHY[str(place[0])], param, "unsupported_parameter")
    if one["type"] == "extra_forbidden":
        name = _named(place[-1:])
        hint = nearest(name, kind.model_fields) if len(place) == 1 else ""
        hint = f"; {hint}" if hint.startswith("did you mean") else ""
        return bad(f"unknown parameter '{param}'{hint}", param, "unknown_parameter")
    if one["type"] == "missing":
        return bad(f"'{param}' is missing", param, "missing_required_parameter")
    if one["type"] == "union_tag_invalid":  # pydantic's sentence quotes the request
        return bad(f"'{param}.role' must be {one['ctx']['expected_tags']}", f"{param}.role", "invalid_value")
    message = str(one["msg"])
    return bad(f"'{param}': {message[:1].lower()}{message[1:]}", param, "invalid_value")


def _place(value: Any, location: tuple[int | str, ...], missing: bool) -> tuple[int | str, ...]:
    """The keys and indices among ``location``, which also names the forms that were tried."""
    place: list[int | str] = []
    for i, step in enumerate(location):
        inside = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
        if step in inside:
            value = value[step]
        elif not (missing and i == len(location) - 1):
            continue
        place.append(step)
    return tuple(place)


def _named(place: tuple[int | str, ...]) -> str:
    """As OpenAI names it: ``messages[0].content``."""
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f"{'.' if text else ''}{step}"
    printable = "".join(letter if letter.isprintable() else "?" for letter in text)
    return printable if len(printable) <= 100 else f"{printable[:99]}…"

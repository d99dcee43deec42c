"""What may be asked: OpenAI's requests with our additions, checked strictly. What may not is refused in one
sentence (:mod:`liubai.serve.sentences`).

Three kinds of fields: those that are honoured; those that change nothing here and are let pass (``user``,
``store`` …); and those that would change the answer and cannot be honoured, which are refused unless they say
what is done anyhow (``presence_penalty`` 0 …). A name that is none of these is refused, too.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema

from liubai.rollout.paths import KINDS, NUMBER, PathsConfig
from liubai.serve.router import Route
from liubai.serve.sentences import sentence
from liubai.serve.tools import TOOLS as BUILT

#: Bounds that hold for every server. Of a list that has many wrong entries the first is enough to know.
CHOICES, STOPS, LIKELIEST, PATHS, TOOLS, MESSAGES = 16, 4, 20, 64, 128, 1 << 12
SEED = 2**63


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _one_is_enough(cls, value: Any) -> Any:
        return _trimmed(value, cls.model_fields)


def _trimmed(value: Any, known: Collection[str]) -> Any:
    """Of the names that are not known, the first alone: each would be an error, and a body holds many."""
    if not isinstance(value, dict) or len(value) <= len(known):
        return value
    names = set(known)
    unknown = next(name for name in value if name not in names)
    return {name: one for name, one in value.items() if name in names or name == unknown}


class Lenient(Strict):
    """What clients send back of our own answers, with whatever they have put in it."""

    model_config = ConfigDict(extra="ignore")


Text = Annotated[str, Field(max_length=1 << 20)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Stops = StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=STOPS)]


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


Parts = Annotated[list[TextPart], Field(fail_fast=True, min_length=1, max_length=256)]


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
    content: (
        Text
        | Annotated[list[TextPart | RefusalPart], Field(fail_fast=True, min_length=1, max_length=256)]
        | None
    ) = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=TOOLS)] | None = None
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


if TYPE_CHECKING:
    Built = str
else:
    Built = Literal[tuple(BUILT)]


def bounded(config: PathsConfig) -> PathsConfig:
    """Raises ``ValueError`` for more than any server writes."""
    if config.number > PATHS:
        name, _ = NUMBER[config.kind]
        raise ValueError(f"'{name}' is {PATHS} at most")
    return config


def _numbered(value: Any) -> Any:
    """Beside what :class:`PathsConfig` reads, ``n`` is the number of any kind: of a beam its width, of a tree
    its simulations."""
    if not isinstance(value, dict):
        return value
    fields = {name: _whole(one) for name, one in _trimmed(value, PathsConfig.model_fields).items()}
    kind = fields.get("kind")
    own = NUMBER[kind][0] if isinstance(kind, str) and kind in NUMBER else None
    if kind in ("greedy", "beam", "tree") and "n" in fields:
        number = fields.pop("n")
        if own is not None and fields.get(own) is None:
            fields[own] = number
        elif number not in (None, 1 if own is None else fields.get(own)):
            fields["n"] = number  # which is refused
    return fields


class _AsText:
    """For the description of the server: paths may be a text, too."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        text = {"type": "string", "pattern": f"^({'|'.join(KINDS)})(:[0-9]{{1,6}}(:[a-z]+)?)?$"}
        return {"anyOf": [text, handler(schema)]}


Paths = Annotated[PathsConfig, BeforeValidator(_numbered), AfterValidator(bounded), _AsText()]


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

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MESSAGES)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=LIKELIEST), Whole] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    # ours, and the names that others have for the same
    thinking: bool | Thinking | None = None
    chat_template_kwargs: TemplateSettings | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    thinking_budget: Natural | None = None
    think_at_least: Natural | None = None
    paths: Paths | None = None
    route: Route | None = None
    use_tools: Annotated[list[Built], Field(fail_fast=True, max_length=len(BUILT))] | None = None
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
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True, max_length=1)] | None = None
    audio: None = None
    web_search_options: None = None
    verbosity: Literal["medium"] | None = None
    functions: Annotated[list[Any], Field(fail_fast=True, max_length=0)] | None = None
    function_call: Literal["none"] | None = None

    @model_validator(mode="after")
    def _means_one_thing(self) -> Self:
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise ValueError(
                "'max_tokens' and 'max_completion_tokens' are two numbers for one thing; give one"
            )
        budget = self.budget(0) if self.reasoning_effort is None else None
        if budget is not None and (self.think_at_least or 0) > budget:
            raise ValueError(
                f"'think_at_least' {self.think_at_least} is more than the most tokens of a thought, {budget}"
            )
        return self

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

    def way_of_paths(self) -> PathsConfig:
        return self.paths or PathsConfig()


Ids = Annotated[list[Natural], Field(fail_fast=True, min_length=1, max_length=1 << 18)]


class CompletionRequest(_Sampled):
    """POST /v1/completions: a text, or tokens, that the model goes on with. No template, no thought apart."""

    prompt: (
        Text
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=CHOICES)]
        | Ids
        | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=CHOICES)]
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


R = TypeVar("R", bound=Strict)


def read(kind: type[R], value: dict[str, Any]) -> R:
    """Raises :class:`Refused` (400) with the first thing that is wrong, and its place."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise sentence(kind, value, error) from None

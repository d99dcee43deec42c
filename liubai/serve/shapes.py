"""The shapes of what is answered, for the OpenAPI description. Answers are made as plain objects (it is
faster); the tests hold them to these shapes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Error(Shape):
    message: str
    type: str
    param: str | None
    code: str | None


class Problem(Shape):
    """OpenAI's error object."""

    error: Error


class Details(Shape):
    reasoning_tokens: int


class Usage(Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: Details


class Route(Shape):
    way: Literal["fast", "think", "tool"]
    why: str


class Thought(Shape):
    tokens: int
    seconds: float
    forced: bool


class PathShape(Shape):
    index: int
    reasoning: str
    content: str
    answer: str | None
    votes: int | None
    score: float | None
    tokens: int
    finish_reason: str


class PathsShape(Shape):
    kind: str
    chosen: int
    tokens: int
    list: list[PathShape]


class Used(Shape):
    name: str
    input: str
    output: str


class Summary(Shape):
    route: Route | None = None
    thinking: Thought
    paths: PathsShape
    tools: list[Used]


class Likely(Shape):
    token: str
    logprob: float
    bytes: list[int]


class TokenShape(Likely):
    top_logprobs: list[Likely]


class Logprobs(Shape):
    content: list[TokenShape] | None
    refusal: None
    reasoning_content: list[TokenShape] | None


class FunctionCall(Shape):
    name: str
    arguments: str


class ToolCallShape(Shape):
    id: str
    type: Literal["function"]
    function: FunctionCall


class MessageShape(Shape):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None
    reasoning: str | None
    refusal: None
    tool_calls: list[ToolCallShape] | None = None


class Choice(Shape):
    index: int
    message: MessageShape
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Shape):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[Choice]
    usage: Usage
    liubai: Summary


class Columns(Shape):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(Shape):
    index: int
    text: str
    logprobs: Columns | None
    finish_reason: Literal["stop", "length"]


class Completion(Shape):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[TextChoice]
    usage: Usage


class Ability(Shape):
    thinking: bool
    max_length: int
    judges: list[str]
    paths: list[str]
    tools: list[str]
    routes: list[str]
    functions: bool


class Model(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    liubai: Ability


class ModelList(Shape):
    object: Literal["list"]
    data: list[Model]


class Health(Shape):
    status: Literal["ok", "waiting", "stopping"]
    models: dict[str, str]

"""What happens while a request is answered, in order: all that streams, whole answers and the terminal know
of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from liubai.serve.house import Served
from liubai.serve.streams import Kind, Token
from liubai.serve.toolcalls import Call

Finish = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Started:
    """``route`` is the way that was taken, where one was asked for."""

    served: Served
    prompt_tokens: int
    route: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class ChoiceSaid:
    index: int
    kind: Kind
    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceCalled:
    """Call number ``place`` of a choice."""

    index: int
    place: int
    id: str
    call: Call


@dataclass(frozen=True, slots=True)
class PathSaid:
    """What one of several paths says, before one is chosen."""

    path: int
    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class Usage:
    prompt: int
    completion: int
    reasoning: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A choice is complete. The last one brings what is said of the whole answer."""

    index: int
    finish: Finish
    usage: Usage | None = None
    summary: dict[str, Any] | None = None


Event = Started | ChoiceSaid | ChoiceCalled | PathSaid | Ended

"""OpenAI's function calling over what models write: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``,
the form of Hermes and Qwen, which their chat templates explain to them.

Nothing makes a model write JSON that fits the parameters of a function: a call is what parses and names a
function that was offered, anything else is text. A call that is demanded (``tool_choice``) is begun for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from liubai.rollout.thinking import CALL
from liubai.serve.errors import Refused, bad
from liubai.serve.limits import _check
from liubai.serve.schema import AssistantMessage, ChatRequest, Message, NamedTool, TextPart, Tool


@dataclass(frozen=True, slots=True)
class Call:
    """``arguments`` is a JSON object, as text."""

    name: str
    arguments: str


def parse_call(text: str, names: Collection[str]) -> Call | None:
    """What stands between the tags; ``None`` when it is no call of any of ``names``."""
    try:
        found = _loads(text.strip())
    except (ValueError, RecursionError):
        return None
    name = found.get("name") if isinstance(found, dict) else None
    if not isinstance(name, str) or name not in names:
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):  # some write it as OpenAI does
        try:
            arguments = _loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))


def _loads(text: str) -> Any:
    """Raises ``ValueError`` for what is no JSON, and for numbers that would become infinite."""
    return json.loads(text, parse_constant=_no_constant, parse_float=_finite)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is too large")
    return number


def offered(request: ChatRequest) -> list[dict[str, Any]]:
    """The functions that the model may call, for its template; none under ``tool_choice`` "none". Raises
    ``Refused`` when one is demanded that is not there."""
    tools = request.tools or []
    choice = request.tool_choice
    if choice == "none":
        return []
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise bad("two of the 'tools' have the same name", "tools")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise bad("'tool_choice' names a function that is not among the 'tools'", "tool_choice.function.name")
    if choice == "required" and not tools:
        raise bad("'tool_choice' demands a call, but there are no 'tools'", "tool_choice")
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    return [_shown(tool) for tool in tools]


def _shown(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.function.name}
    if tool.function.description is not None:
        function["description"] = tool.function.description
    function["parameters"] = tool.function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def begun(request: ChatRequest) -> str:
    """The beginning of the call that ``tool_choice`` demands; empty when the model may choose."""
    if request.tool_choice == "required":
        return f'{CALL}\n{{"name": "'
    if isinstance(request.tool_choice, NamedTool):
        name = json.dumps(request.tool_choice.function.name)
        return f'{CALL}\n{{"name": {name}, "arguments": '
    return ""


def for_template(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as Hugging Face's templates expect them: contents are texts, arguments of calls are objects.

    Raises ``Refused`` for a result that no call asked for, or arguments that are no JSON object."""
    found: list[dict[str, Any]] = []
    open_calls: set[str] = set()
    for i, message in enumerate(messages):
        shown: dict[str, Any] = {"role": message.role, "content": text_of_message(message)}
        if message.role == "developer":
            shown["role"] = "system"
        if isinstance(message, AssistantMessage):
            thought = message.reasoning_content or message.reasoning
            if thought:
                shown["reasoning_content"] = thought
            if message.tool_calls:
                shown["tool_calls"] = [
                    {
                        "id": call.id,
                        "type": "function",
                        "function": {
                            "name": call.function.name,
                            "arguments": _arguments(call.function.arguments, i, j),
                        },
                    }
                    for j, call in enumerate(message.tool_calls)
                ]
                open_calls |= {call.id for call in message.tool_calls}
        elif message.role == "tool":
            if message.tool_call_id not in open_calls:
                raise bad(
                    "a message of a tool must answer a call of the assistant before it",
                    f"messages[{i}].tool_call_id",
                )
            shown["tool_call_id"] = message.tool_call_id
            if message.name:
                shown["name"] = message.name
        found.append(shown)
    return found


def text_of_message(message: Message) -> str:
    content = message.content
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def _arguments(text: str, message: int, call: int) -> dict[str, Any]:
    place = f"messages[{message}].tool_calls[{call}].function.arguments"
    try:
        found = _loads(text or "{}")
    except (ValueError, RecursionError):
        raise bad(f"'{place}' is not JSON", place) from None
    if not isinstance(found, dict):
        raise bad(f"'{place}' must be a JSON object", place)
    try:
        _check(found)
    except Refused as error:
        raise bad(f"'{place}': {error.message}", place) from None
    return found

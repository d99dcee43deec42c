"""The built-in tools that a model may call in its thought: the calculator, and Python in the sandbox.

    tools = Tools(["calculator", "python"])            # of one answer
    used = await tools.use('{"name": "calculator", "arguments": {"expression": "3 * 4"}}')
    used.output                                        # "12", which goes into the thought

A call is written as Hermes and Qwen do, ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, with or
without its tags; or plainly, for small vocabularies, ``<tool> 3 * 4 </tool>``. Whatever a model writes, it
gets text back and never an exception. Code runs in :mod:`liubai.grade.sandbox` or not at all, in a thread
that waits for it, so that no loop is held up.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import warnings
from collections.abc import Awaitable, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from liubai.errors import UserError, nearest
from liubai.grade import sandbox
from liubai.grade.sandbox import Limits
from liubai.serve.calculator import understand
from liubai.serve.exact import Refused

MAX_CALL = 20_000  #: characters of a call
MAX_OUTPUT = 2_000  #: characters of a result
#: Of one program. A model waits for it, and others wait for the model.
PYTHON = Limits(seconds=5.0, memory_mb=256, output_bytes=1 << 16, tmp_mb=4, tasks=4, files=32)
PROGRAMS = 2  #: at a time, in this process
GRACE_S = 2.0  #: for a sandbox to start and to be cleared away
#: Of one answer: a model that calls and calls gets nowhere.
CALLS, SECONDS = 8, 20.0

_TAGGED = re.compile(r"<(tool_call|tool)>(.*?)(?:</\1>|$)", re.DOTALL)
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)\n?```", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """``output`` is the text that the model reads; with ``error`` it says what went wrong. ``name`` is ""
    where no tool could be made out."""

    name: str
    input: str
    output: str
    error: bool = False
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Tool:
    """``takes`` is the one argument, a text, and ``also`` are other names under which models pass it. ``run``
    is given it and the seconds that are left; raises :class:`ToolError`."""

    name: str
    says: str
    takes: str
    means: str
    also: tuple[str, ...]
    run: Callable[[str, float], Awaitable[str]]

    def described(self) -> dict[str, Any]:
        """As the ``tools`` of a chat template and of OpenAI's interface have it."""
        parameters = {
            "type": "object",
            "properties": {self.takes: {"type": "string", "description": self.means}},
            "required": [self.takes],
            "additionalProperties": False,
        }
        function = {"name": self.name, "description": self.says, "parameters": parameters}
        return {"type": "function", "function": function}


class ToolError(Exception):
    """What the model is told instead of a result."""


# ---- the tools ----


async def _calculate(expression: str, left_s: float) -> str:
    try:
        return understand(expression, asked=True).answer  # milliseconds: it needs no thread
    except Refused as error:
        raise ToolError(f"the calculator refuses: {error}") from None


#: Programs wait for each other here. One whose answer is withdrawn ends by its own limits, in its place.
_programs = ThreadPoolExecutor(PROGRAMS, thread_name_prefix="python-tool")
_warned = False


async def _python(code: str, left_s: float) -> str:
    fenced = _FENCE.search(code)
    limits = replace(PYTHON, seconds=min(PYTHON.seconds, left_s))
    running = asyncio.get_running_loop().run_in_executor(
        _programs, _run, fenced[1] if fenced else code, limits
    )
    try:
        return await asyncio.wait_for(running, left_s + GRACE_S)
    except TimeoutError:
        raise ToolError("Python is busy; go on without it") from None


def _run(source: str, limits: Limits) -> str:
    global _warned
    try:
        result = sandbox.run(source.encode(errors="replace").decode(), limits=limits)
    except UserError as error:
        if not _warned:
            _warned = True
            warnings.warn(f"the Python tool is out of use: {error}", stacklevel=2)
        raise ToolError("Python is not available here; go on without it") from None
    except (RuntimeError, ValueError, OSError) as error:
        raise ToolError(
            f"the program could not be started ({type(error).__name__}); go on without it"
        ) from None
    printed = result.stdout.decode(errors="replace").strip()
    if result.why == "ok":
        return printed or "(the program printed nothing; use print)"
    told = {
        "timeout": f"the program was stopped after {limits.seconds:g} seconds",
        "memory": f"the program needed more than {limits.memory_mb} MB",
        "output": "the program printed too much",
        "signal": "the program crashed",
    }.get(result.why)
    last = result.stderr.decode(errors="replace").strip().splitlines()
    raise ToolError(
        "\n".join(part for part in (printed, told or (last[-1] if last else "it failed")) if part)
    )


TOOLS: dict[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool(
            "calculator",
            "Exact arithmetic of any size: + - * / ^, brackets, %, !, sqrt, mod, gcd, lcm, max, min. "
            "Which of several numbers is greater.",
            "expression",
            "what to compute, such as (3 + 4) * 5, 17% of 250, 3.11 or 3.8",
            ("input", "query", "question", "text"),
            _calculate,
        ),
        Tool(
            "python",
            "Runs a Python 3 program without network or files and returns what it prints.",
            "code",
            "the whole program; print what is to be known",
            ("input", "source", "program"),
            _python,
        ),
    )
}


def described(allowed: Collection[str]) -> list[dict[str, Any]]:
    """The JSON schemas of some tools, in the order of :data:`TOOLS`. Raises ``UserError`` for one that there
    is not."""
    check(allowed)
    return [tool.described() for name, tool in TOOLS.items() if name in allowed]


def check(names: Collection[str]) -> None:
    """Raises ``UserError`` unless all of them are built-in tools."""
    for name in names:
        if name not in TOOLS:
            raise UserError(f"there is no tool '{name}'; {nearest(name, TOOLS)}")


# ---- calls ----


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    argument: str


def read_call(text: str, allowed: Collection[str]) -> Call:
    """The call that ``text`` writes. A plain one goes to the calculator; where that is not allowed, to the
    only tool that is. Raises :class:`ToolError` for what is none."""
    if len(text) > MAX_CALL:
        raise ToolError(f"the call is longer than {MAX_CALL} characters")
    tagged = _TAGGED.search(text)
    inner = (tagged[2] if tagged else text).strip()
    if not inner:
        raise ToolError("the call is empty")
    if not inner.startswith("{"):
        name = "calculator" if "calculator" in allowed or len(allowed) != 1 else next(iter(allowed))
        return Call(name, inner.removesuffix("=").strip() or inner)
    try:
        call = json.loads(inner)
        name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
            arguments = json.loads(arguments)  # some write them as OpenAI does, as a text
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ToolError('a call is {"name": …, "arguments": {…}}, in JSON') from None
    if not isinstance(name, str) or name not in TOOLS:
        raise ToolError(
            f"there is no tool {str(name)[:40]!r}; there are: {', '.join(sorted(allowed)) or 'none'}"
        )
    return Call(name, _argument(TOOLS[name], arguments))


def _argument(tool: Tool, arguments: object) -> str:
    if isinstance(arguments, Mapping):
        for key in (tool.takes, *tool.also):
            if isinstance(arguments.get(key), str | int | float):
                return str(arguments[key])
    elif isinstance(arguments, str) and arguments.strip():
        return arguments
    raise ToolError(f"'{tool.name}' takes one argument, '{tool.takes}', a text")


class Tools:
    """Those of one answer, which may use them ``calls`` times and for ``seconds`` altogether; what was used
    is in ``used``. Raises ``UserError`` for a tool that there is not."""

    def __init__(self, allowed: Collection[str], *, calls: int = CALLS, seconds: float = SECONDS) -> None:
        check(allowed)
        self.allowed = frozenset(allowed)
        self.calls, self.seconds = calls, seconds
        self.used: list[ToolUse] = []

    async def use(self, call_text: str) -> ToolUse:
        """Answers a call as the model wrote it. Never raises for any text."""
        spent = sum(use.seconds for use in self.used)
        if len(self.used) >= self.calls:
            told = ToolUse("", _cut(call_text), f"no more than {self.calls} calls; answer now", True)
        elif spent >= self.seconds:
            told = ToolUse("", _cut(call_text), "the time for tools is used up; answer now", True)
        else:
            told = await use(call_text, self.allowed, left_s=self.seconds - spent)
        self.used.append(told)
        return told

    async def answer(self, call_text: str) -> str:
        """The same, as :mod:`liubai.rollout.thinking` asks for it: the text alone."""
        return (await self.use(call_text)).output


async def use(call_text: str, allowed: Collection[str], *, left_s: float = SECONDS) -> ToolUse:
    """One call, without limits over several. Never raises for any text."""
    started = time.monotonic()
    name, argument = "", _cut(call_text)
    try:
        call = read_call(call_text, allowed)
        name, argument = call.name, call.argument
        if call.name not in allowed:
            raise ToolError(f"'{call.name}' may not be used here")
        output, error = await TOOLS[call.name].run(call.argument, left_s), False
    except ToolError as told:
        output, error = str(told), True
    return ToolUse(name, argument, _cut(output), error, time.monotonic() - started)


def _cut(text: str) -> str:
    """Its beginning and its end, where it is too long for a context."""
    if len(text) <= MAX_OUTPUT:
        return text
    half = MAX_OUTPUT // 2
    return f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"

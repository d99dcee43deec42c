"""A server with scripted answers for the page: it speaks the API's HTTP, and each test says what is answered.

A script is a list of steps. Between them a test may hold the stream at a :class:`Gate` and look at the page,
so that nothing depends on how fast anything is. ``python tests/scripted_server.py 8001`` shows a few answers
by hand.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import socket
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse

PAGE = Path(__file__).parent.parent / "liubai" / "serve" / "page"
#: What the real server sends, and Trusted Types on top: then the browser itself refuses to make HTML of text.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
FILES = {".css": "text/css", ".js": "text/javascript", ".html": "text/html"}


@dataclass(frozen=True)
class Delta:
    """A piece of the answer; ``tokens`` are (text, probability, [(other text, its probability), …])."""

    content: str = ""
    reasoning: str = ""
    tokens: tuple[tuple[str, float, list[tuple[str, float]]], ...] = ()
    finish: str | None = None


@dataclass(frozen=True)
class Extra:
    """A chunk without choices that carries our extension."""

    value: dict[str, Any]


@dataclass(frozen=True)
class Gate:
    name: str


@dataclass(frozen=True)
class Pause:
    seconds: float


@dataclass(frozen=True)
class Raw:
    """Bytes of the stream as they are."""

    text: str


@dataclass(frozen=True)
class Break:
    """The connection is cut in the middle of the answer."""


@dataclass(frozen=True)
class Refuse:
    """The whole response, instead of a stream."""

    status: int
    message: str
    headers: dict[str, str] = field(default_factory=dict)


Step = Delta | Extra | Gate | Pause | Raw | Break
Script = list[Step] | Refuse
DONE = Raw("data: [DONE]\n\n")

#: What the small model says of itself.
MODEL = {
    "thinking": True,
    "max_length": 2048,
    "judges": ["preference"],
    "paths": ["greedy", "sample", "beam", "vote", "best", "tree"],
    "tools": ["calculator", "python"],
    "routes": ["auto", "fast", "think", "tool"],
}


def usage(tokens: int) -> Extra:
    return Extra({"usage": {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}})


def simple(content: str, thought: str = "", finish: str = "stop") -> list[Step]:
    steps: list[Step] = [Delta(reasoning=thought)] if thought else []
    return [*steps, Delta(content=content), Delta(finish=finish), usage(12), DONE]


def logprob(token: str, p: float, others: list[tuple[str, float]]) -> dict[str, Any]:
    def one(text: str, chance: float) -> dict[str, Any]:
        return {"token": text, "logprob": math.log(chance), "bytes": list(text.encode())}

    return one(token, p) | {"top_logprobs": [one(text, chance) for text, chance in [(token, p), *others]]}


class ScriptedServer:
    """Starts at ``with``; ``url`` is where. What was asked is in ``asked`` (bodies) and ``keys``."""

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self.reset()
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/chat/completions")(self.answer)
        self.app.get("/{name:path}")(self.file)

    def reset(self) -> None:
        self.plan: deque[Script] = deque()
        self.otherwise: Callable[[dict[str, Any]], Script] = lambda body: simple(
            "fine"
        )  # when the plan is done
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.left = 0  # streams whose client went away
        self.fetched: list[str] = []
        self.key: str | None = None
        self.offered: list[dict[str, Any]] = [{"id": "liubai-small", "liubai": MODEL}]
        self.gates: dict[str, threading.Event] = {}

    def open(self, gate: str) -> None:
        self.gates.setdefault(gate, threading.Event()).set()

    # ---- what is asked

    async def file(self, name: str) -> Response:
        self.fetched.append(name)
        path = PAGE / (name or "index.html")
        if path.parent != PAGE or not path.is_file():
            return Response(status_code=404)
        return FileResponse(
            path,
            media_type=FILES[path.suffix],
            headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-store"},
        )

    def locked(self, request: Request) -> JSONResponse | None:
        sent = request.headers.get("Authorization")
        self.keys.append(sent)
        if self.key is None or sent == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "no such key", "type": "authentication_error"}}, 401)

    async def models(self, request: Request) -> Response:
        return self.locked(request) or JSONResponse({"object": "list", "data": self.offered})

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        if (refused := self.locked(request)) is not None:
            return refused
        self.asked.append(body)
        script = self.plan.popleft() if self.plan else self.otherwise(body)
        if isinstance(script, Refuse):
            error = {"error": {"message": script.message, "type": "error", "code": None}}
            return JSONResponse(error, script.status, script.headers)
        return StreamingResponse(self.stream(script, request), media_type="text/event-stream")

    async def stream(self, script: list[Step], request: Request) -> AsyncIterator[str]:
        try:
            for step in script:
                match step:
                    case Gate(name):
                        gate = self.gates.setdefault(name, threading.Event())
                        while not gate.is_set():
                            if await request.is_disconnected():
                                raise asyncio.CancelledError
                            await asyncio.sleep(0.005)
                    case Pause(seconds):
                        await asyncio.sleep(seconds)
                    case Raw(text):
                        yield text
                    case Break():
                        raise ConnectionResetError
                    case Extra(value):
                        yield event({"choices": []} | value)
                    case Delta():
                        yield event({"choices": [choice(step)]})
        except (asyncio.CancelledError, GeneratorExit):
            self.left += 1
            raise

    # ---- running

    def __enter__(self) -> ScriptedServer:
        self.socket = socket.create_server(("127.0.0.1", self.port))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"
        config = uvicorn.Config(self.app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for gate in self.gates.values():
            gate.set()
        self.server.should_exit = True
        self.thread.join(10)
        self.socket.close()


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps({'object': 'chat.completion.chunk'} | value, ensure_ascii=False)}\n\n"


def choice(step: Delta) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if step.reasoning:
        delta |= {"reasoning_content": step.reasoning, "reasoning": step.reasoning}
    if step.content:
        delta |= {"content": step.content}
    made: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": step.finish}
    if step.tokens:
        part = "reasoning_content" if step.reasoning else "content"
        made["logprobs"] = {part: [logprob(*token) for token in step.tokens]}
    return made


# ---- a few answers to look at

THOUGHT = (
    "We need 9, 6 and 4 to make 33.\n\n9 + 6 = 15, and 15 + 4 = 19: too small, 14 are missing.\n"
    "Wait, a product reaches further. 9 * 4 = 36, and 36 - 6 = 30. Close, but 3 are missing.\n"
    "Wait, 6 * 4 = 24, and 24 + 9 = 33. That is it.\n\nLet me check once more: 6 * 4 = 24, 24 + 9 = 33. "
    "Each number is used once."
)
ANSWER = "Multiply first, then add:\n\n- `6 * 4 = 24`\n- `24 + 9 = 33`\n\nSo the expression is **6 * 4 + 9**."


def pieces(text: str) -> list[str]:
    return re.findall(r"\S+\s*|\s+", text)


def vote(n: int, pause: float = 0.0) -> list[Step]:
    """n paths that grow at once; all but every third find the same answer."""
    ends = ["6 * 4 + 9" if i % 3 != 1 else "( 9 - 6 ) * 4" for i in range(n)]
    steps: list[Step] = []
    words = pieces(THOUGHT)
    for at in range(0, len(words), 3):
        steps += [Extra({"liubai": {"path": i, "reasoning": "".join(words[at : at + 3])}}) for i in range(n)]
        steps.append(Pause(pause))
    steps += [Extra({"liubai": {"path": i, "content": f"So the expression is {ends[i]}."}}) for i in range(n)]
    steps += [Delta(reasoning=THOUGHT), Delta(content=ANSWER), Delta(finish="stop")]
    listed = [
        {
            "index": i,
            "reasoning": THOUGHT,
            "content": ends[i],
            "answer": ends[i],
            "votes": ends.count(ends[i]),
        }
        | {"score": None, "tokens": 96 + 7 * i, "finish_reason": "stop"}
        for i in range(n)
    ]
    steps.append(
        Extra({"liubai": {"paths": {"kind": "vote", "chosen": 0, "tokens": 110 * n, "list": listed}}})
    )
    return [*steps, usage(110 * n), DONE]


def demonstration(body: dict[str, Any]) -> Script:
    asked, paths = body["messages"][-1]["content"], body.get("paths", {})
    if isinstance(paths, dict) and paths.get("kind") in ("vote", "best", "tree"):
        return vote(paths.get("n", 5), 0.05)
    if asked.strip().replace("*", "").replace(" ", "").isdigit():
        tool = {"name": "calculator", "input": asked, "output": "121932631112635269"}
        route = {"way": "tool", "why": "arithmetic with large numbers is computed exactly"}
        summary = Extra({"liubai": {"tools": [tool], "route": route}})
        return [
            Extra({"liubai": {"route": route}}),
            Delta(content="121932631112635269"),
            Delta(finish="stop"),
            summary,
            DONE,
        ]
    steps: list[Step] = [Pause(0.3)]
    for part, text in (("reasoning", THOUGHT if body.get("thinking", True) else ""), ("content", ANSWER)):
        for i, piece in enumerate(pieces(text)):
            p = (0.97, 0.99, 0.71, 0.93, 0.42, 0.98, 0.22, 0.95, 0.06)[i * 7 % 9]
            others = [("Wait", 0.6 * (1 - p)), (" so", 0.3 * (1 - p)), ("\n", 0.1 * (1 - p))]
            tokens = ((piece, p, others),) if body.get("logprobs") else ()
            steps += [Delta(**{part: piece}, tokens=tokens), Pause(0.02)]
    figures = Extra(
        {"liubai": {"thinking": {"tokens": len(pieces(THOUGHT)), "seconds": 2.4, "forced": False}}}
    )
    return [*steps, Delta(finish="stop"), figures, usage(120), DONE]


if __name__ == "__main__":
    with ScriptedServer(int(sys.argv[1]) if len(sys.argv) > 1 else 8001) as scripted:
        scripted.otherwise = demonstration
        print(f"The page with scripted answers is at {scripted.url}; Ctrl+C ends it.")
        threading.Event().wait()

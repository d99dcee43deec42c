"""What the tests of the server share: a writer that says what it is told to, calls without a socket, and a
real server on a real one."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from liubai.rollout.engine import Request
from liubai.rollout.writer import Beams, Heard, Judge, Piece
from liubai.serve import shapes
from liubai.serve.app import create_app
from liubai.serve.house import House, Served
from liubai.serve.limits import Gate, Limits
from liubai.serve.router import Router
from liubai.serve.server import Server, listen
from liubai.text.template import Template
from liubai.text.tokenizer import TextTokenizer, byte_level
from liubai.types import Sample, Span, Stop

#: Turns, functions and a switch for the thought, as Qwen3's template has them.
QWEN3 = (
    "{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n<tools>' }}"
    "{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}"
    "{{- '\\n</tools><|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'tool' %}"
    "{{- '<tool_response>\\n' + message.content + '\\n</tool_response>' }}"
    "{%- else %}{{- message.content }}{%- endif %}"
    "{%- for call in message.tool_calls or [] %}"
    '{{- \'\\n<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}"
    "{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- else %}{{- '<think>\\n' }}{%- endif %}{%- endif %}"
)

TEXTS = [
    "the answer is forty two, 留白 and 等等",
    '{"name": "weather", "arguments": {"city": "Paris"}}',
    "so we wait and think again",
]

HELLO = {"messages": [{"role": "user", "content": "hello"}]}
CHAT = "/v1/chat/completions"
ANSWER = "hm</think>hello"
THOUGHT = "Let me think.</think>\n\nIt is 42."
ASKED: list[Any] = [{"role": "user", "content": "3 7 8 ->13"}]
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def tokenizer() -> TextTokenizer:
    """Byte pairs: one character may be several tokens."""
    return byte_level(TEXTS * 3, 420)


@dataclass
class ScriptedWriter:
    """Writes what ``say`` answers to a prompt (its text), in pieces of ``size`` tokens. ``held`` is awaited
    after the first."""

    tokenizer: TextTokenizer
    say: Callable[[str, Request], str]
    size: int = 3
    held: Callable[[], Coroutine[Any, Any, Any]] | None = None
    scores: Callable[[str, str], float] | None = None
    requests: list[Request] = field(default_factory=list)
    in_use: int = 0
    cancelled: int = 0

    async def write(self, request: Request, heard: Heard | None = None) -> Sample:
        self.requests.append(request)
        text = self.say(self.tokenizer.decode(request.prompt_ids), request)
        ids = (*self.tokenizer.encode(text), self.tokenizer.eos_id)
        stop = Stop.EOS if len(ids) <= request.max_tokens else Stop.LENGTH
        ids = ids[: request.max_tokens]
        for i, token in enumerate(ids):  # the model's own end, or one of the request's
            if token in request.stop_ids:
                ids, stop = ids[: i + 1], Stop.EOS
                break
        self.in_use += 1
        try:
            for start in range(0, len(ids), self.size):
                part = ids[start : start + self.size]
                likely = tuple(((i, -0.5), (0, -1.5))[: request.alternatives] for i in part)
                if heard:
                    heard(Piece(part, (-0.5,) * len(part), likely if request.alternatives else ()))
                await asyncio.sleep(0)
                if self.held is not None and start == 0:
                    await self.held()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_use -= 1
        return Sample(request.prompt_ids, ids, (-0.5,) * len(ids), stop, (Span(0, len(ids)),))

    async def beams(self, request: Request, width: int) -> Beams:
        found = [await self.write(request) for _ in range(width)]
        return Beams(found, max(len(sample.completion_ids) for sample in found))

    async def judge(self, judge: Judge, answers: Sequence[tuple[str, str]]) -> list[float]:
        assert self.scores is not None
        return [self.scores(question, response) for question, response in answers]

    def judges(self) -> frozenset[Judge]:
        return frozenset(("preference",)) if self.scores else frozenset()


def says(*texts: str, **options: Any) -> ScriptedWriter:
    """Answers with these texts in turn, and the last one again and again."""
    left = list(texts)
    return ScriptedWriter(
        tokenizer(), lambda prompt, request: left.pop(0) if len(left) > 1 else left[0], **options
    )


def continues(*parts: str) -> ScriptedWriter:
    """Writes ``parts``, between which the results of tools are read: goes on from where the prompt has got
    to."""

    def say(prompt: str, request: Request) -> str:
        begun = prompt.rpartition("<|im_start|>assistant\n")[2].removeprefix("<think>\n")
        said = re.sub(r"\n<tool_response>\n.*?\n</tool_response>\n", "", begun, flags=re.DOTALL)
        whole = "".join(parts)
        assert whole.startswith(said), (whole, said)
        return whole[len(said) :]

    return ScriptedWriter(tokenizer(), say)


def house_of(
    writer: ScriptedWriter, *, template: str = QWEN3, limits: Limits | None = None, max_length: int = 4096
) -> House:
    thinking = Template(writer.tokenizer, template)
    served = Served("qwen", writer, writer.tokenizer, thinking, max_length, "0123456789abcdef")
    return House([served], limits, router=Router.load())


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json()["error"]
        assert set(found) == {"message", "type", "param", "code"}
        return found

    def chunks(self) -> list[dict[str, Any]]:
        """Of a stream of events, which must end as OpenAI's do."""
        events = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line]
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]


Parts = Sequence[bytes | Coroutine[Any, Any, Any]]


async def call_async(
    app: Any,
    method: str,
    path: str,
    body: bytes | Parts = b"",
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """A request without a socket. ``body`` may be in parts, between which something may be awaited."""
    parts = [body] if isinstance(body, bytes) else list(body)
    named = {"host": "127.0.0.1:8000", "content-type": "application/json", **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), text.encode("latin-1")) for name, text in named.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
        "state": {},
    }
    found = Answer(0, {}, b"")
    over = asyncio.Event()

    async def receive() -> dict[str, Any]:
        while parts and not isinstance(parts[0], bytes):
            await parts.pop(0)  # type: ignore[misc]
        if parts:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
        await over.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            assert not found.status
            found.status = message["status"]
            found.headers = {name.decode(): text.decode("latin-1") for name, text in message["headers"]}
        else:
            found.body += message.get("body", b"")

    await app(scope, receive, send)
    over.set()
    return found


def call(app: Any, method: str, path: str, body: Any = b"", **headers: str) -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return asyncio.run(
        call_async(app, method, path, data, {name.replace("_", "-"): text for name, text in headers.items()})
    )


def chat(app: Any, content: str = "hello", **fields: Any) -> Answer:
    return call(
        app, "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **fields}
    )


def ask(writer: ScriptedWriter, **fields: Any) -> dict[str, Any]:
    """A whole answer, of the shape described."""
    answer = chat(create_app(house_of(writer)), **fields)
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json()
    shapes.ChatCompletion.model_validate(found)
    return found


@dataclass
class Running:
    url: str
    port: int
    server: Server
    loop: asyncio.AbstractEventLoop

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """On the server's own loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)


@contextmanager
def running(
    make: Callable[[], House] | House,
    *,
    before: Callable[[], Coroutine[Any, Any, Any]] | None = None,
    after: Callable[[], Coroutine[Any, Any, Any]] | None = None,
    limits: Limits | None = None,
    **options: Any,
) -> Iterator[Running]:
    """The real server, in a thread. ``before`` and ``after`` run on its loop."""
    place = listen("127.0.0.1", 0)
    ready: threading.Event = threading.Event()
    found: list[Running] = []
    failed: list[BaseException] = []

    async def work() -> None:
        try:
            if before is not None:
                await before()
            house = make if isinstance(make, House) else make()
            gate = Gate(limits or house.limits)
            app = create_app(house, gate, **options)
            server = Server(app, gate, ready.set)
            port = place.getsockname()[1]
            found.append(Running(f"http://127.0.0.1:{port}/v1", port, server, asyncio.get_running_loop()))
            await server.serve([place])
        except BaseException as error:
            failed.append(error)
            raise
        finally:
            ready.set()
            if after is not None:
                await after()

    thread = threading.Thread(target=lambda: asyncio.run(work()), daemon=True)
    thread.start()
    assert ready.wait(60)
    assert not failed, failed
    try:
        yield found[0]
    finally:
        found[0].loop.call_soon_threadsafe(found[0].server.leave)
        found[0].loop.call_soon_threadsafe(found[0].server.leave)
        thread.join(20)
        assert not thread.is_alive()


def raw(port: int, data: bytes, timeout: float = 10.0) -> socket.socket:
    """A connection on which ``data`` was sent."""
    link = socket.create_connection(("127.0.0.1", port), timeout=timeout)
    link.sendall(data)
    return link


def http(path: str, body: Any, **headers: str) -> bytes:
    """The bytes of a POST."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {
        "Host": "127.0.0.1",
        "Content-Type": "application/json",
        "Content-Length": str(len(data)),
        **{name.replace("_", "-"): text for name, text in headers.items()},
    }
    head = "".join(f"{name}: {text}\r\n" for name, text in named.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + data


def events_of(link: socket.socket) -> list[str]:
    """The events of a stream, until the server ends it."""
    link.settimeout(10)
    data = b""
    while part := link.recv(1 << 16):
        data += part
        if data.endswith(b"0\r\n\r\n"):
            break
    return re.findall(r"data: (.*)\n", data.decode())


async def collected(events: AsyncIterator[Any]) -> list[Any]:
    return [event async for event in events]

"""The server as an ASGI application: OpenAI's paths, /health, /metrics and the page.

    app = create_app(house, gate, keys=["…"])

FastAPI finds the way; what comes after is ours: bodies are read within limits and checked strictly, and an
answer ends when its client leaves (:mod:`liubai.serve.limits`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from liubai import __version__
from liubai.serve import replies
from liubai.serve.answering import Lull, answer
from liubai.serve.completing import complete
from liubai.serve.errors import WRONG, Refused, refusal_of
from liubai.serve.events import ChoiceCalled, ChoiceSaid, Ended, Event, PathSaid, Started, Usage
from liubai.serve.guard import Guard, Receive, Scope, Send, dumped, dumps, respond
from liubai.serve.host import Host
from liubai.serve.house import House
from liubai.serve.limits import FAREWELL_S, Gate, Gone, read_body, read_json, require_json
from liubai.serve.metrics import CONTENT_TYPE, Metrics
from liubai.serve.openapi import document
from liubai.serve.schema import ChatRequest, CompletionRequest, read

PAGE = Path(__file__).parent / "page"
#: Seconds of silence after which a stream says that it is still there: proxies close what says nothing.
SILENCE_S = 15.0
#: Seconds that the head of a stream waits for the first words, to go with them.
HEAD_S = 1.0
PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/health",
    "/metrics",
    "/openapi.json",
    "/",
)
SSE = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would keep the tokens until there are enough
]

R = TypeVar("R", ChatRequest, CompletionRequest)
Events = AsyncGenerator[Event]
Chunks = AsyncIterator[str]
Whole = Awaitable[tuple[dict[str, Any], Usage]]


class Answering(Response, Generic[R]):
    """One answer, from the body of the request to its last byte. ``kind`` is the schema of the body;
    ``answer`` makes its events, and ``chunks`` or ``whole`` what is sent of them."""

    def __init__(
        self,
        house: House,
        gate: Gate,
        metrics: Metrics,
        kind: type[R],
        answer: Callable[[House, R, Lull | None], Events],
        chunks: Callable[[Started, AsyncIterator[Event], R], Chunks],
        whole: Callable[[Started, AsyncIterator[Event], R], Whole],
    ) -> None:
        super().__init__()
        self.house, self.gate, self.metrics = house, gate, metrics
        self.kind: type[R] = kind
        self.answer: Callable[[House, R, Lull | None], Events] = answer
        self.chunks: Callable[[Started, AsyncIterator[Event], R], Chunks] = chunks
        self.whole: Callable[[Started, AsyncIterator[Event], R], Whole] = whole
        self.spoke = False  # the first words have come
        self.begun = False  # the head of the stream is sent
        self.held = ""  # of a stream: what waits for what comes with it
        self._sending = asyncio.Lock()  # what is held may be sent by the answer, and by the pulse beside it
        self.sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        try:
            with self.gate.place():
                require_json(headers)
                body = await read_body(receive, headers, self.gate.limits)
                request = read(self.kind, read_json(body))
                await self.gate.watch(receive, self._work(request, send))
        except Gone:
            self.metrics.gone.add()
        except Exception as error:
            refused = refusal_of(error)
            with suppress(TimeoutError):  # who does not read does not learn it
                async with asyncio.timeout(FAREWELL_S):
                    if self.begun:
                        self.metrics.broken.add(code=refused.code or refused.kind)
                        self.held += _event(dumps(refused.body()))
                        await self._flush(send, more=False)
                    else:
                        await respond(send, refused.status, refused.body(), refused.headers)

    async def _work(self, request: R, send: Send) -> None:
        began = time.monotonic()

        async def lull() -> None:
            if self.spoke and self.held:
                await self._flush(send)

        async with aclosing(self.answer(self.house, request, lull if request.stream else None)) as events:
            started = await anext(events)
            assert isinstance(started, Started)
            observed = self._observed(started, events, began)
            if not request.stream:
                value, _ = await self.whole(started, observed, request)
                await respond(send, 200, value)
                return
            async with self._kept_alive(send):
                async for chunk in self.chunks(started, observed, request):
                    self.held += _event(chunk)
            self.held += _event("[DONE]")
            await self._flush(send, more=False)

    async def _flush(self, send: Send, more: bool = True) -> None:
        """What is held goes, and is held until it is gone: whoever waits to send may be cancelled."""
        async with self._sending:
            if not self.begun:
                await send({"type": "http.response.start", "status": 200, "headers": SSE})
                self.begun = True
            held = self.held
            self.sent_at = time.monotonic()
            await send(_body(held.encode("utf-8", "replace"), more))
            self.held = self.held[len(held) :]

    @asynccontextmanager
    async def _kept_alive(self, send: Send) -> AsyncIterator[None]:
        """Whoever waits for long is told that we are there. Most answers are over before: they have no task
        for it."""
        pulse: list[asyncio.Task[None]] = []
        timer = asyncio.get_running_loop().call_later(
            HEAD_S, lambda: pulse.append(asyncio.create_task(self._keep_alive(send)))
        )
        try:
            yield
        finally:
            timer.cancel()
            for task in pulse:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _keep_alive(self, send: Send) -> None:
        if not self.begun:
            await self._flush(send)
        await self._pulse(send)

    async def _pulse(self, send: Send) -> None:
        while True:
            silent_at = self.sent_at + SILENCE_S
            if (left := silent_at - time.monotonic()) > 0:
                await asyncio.sleep(left)
            else:
                await send(_body(b": still here\n\n"))
                self.sent_at = time.monotonic()

    async def _observed(self, started: Started, events: Events, began: float) -> AsyncIterator[Event]:
        """The events as they are, counted."""
        model = started.served.name
        if started.route is not None:
            self.metrics.routes.add(way=started.route["way"])
        async for event in events:
            if not self.spoke and isinstance(event, ChoiceSaid | ChoiceCalled | PathSaid):
                self.spoke = True
                self.metrics.first.add(time.monotonic() - began, model=model)
            if isinstance(event, Ended) and event.usage is not None:
                usage = event.usage
                self.metrics.total.add(time.monotonic() - began, model=model)
                self.metrics.tokens.add(usage.prompt, model=model, kind="prompt")
                self.metrics.tokens.add(usage.completion, model=model, kind="completion")
                self.metrics.tokens.add(usage.reasoning, model=model, kind="reasoning")
            yield event


def _event(data: str) -> str:
    return f"data: {data}\n\n"


def _body(data: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def create_app(
    house: House,
    gate: Gate | None = None,
    *,
    keys: Iterable[str] = (),
    hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
    page: Path = PAGE,
) -> Guard:
    """See :class:`liubai.serve.guard.Guard` for ``keys``, ``hosts`` and ``origins``."""
    gate, metrics = gate or Gate(house.limits), Metrics()
    # no /docs: those pages load their scripts from elsewhere
    app = FastAPI(title="Liubai", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    files = {file.name: file.read_bytes() for file in sorted(page.glob("*")) if file.suffix in TYPES}

    def chat_completions() -> Response:
        return Answering(house, gate, metrics, ChatRequest, answer, replies.chat_chunks, replies.chat_whole)

    def completions() -> Response:
        return Answering(
            house, gate, metrics, CompletionRequest, complete, replies.text_chunks, replies.text_whole
        )

    asked = {"/v1/chat/completions": chat_completions, "/v1/completions": completions}
    for path, make in asked.items():
        app.add_api_route(path, make, methods=["POST"])

    async def front(scope: Scope, receive: Receive, send: Send) -> None:
        """The way to an answer is short: a dozen layers, of which it needs none, cost as much as the rest."""
        made = asked.get(scope["path"]) if scope["method"] == "POST" else None
        if scope["method"] == "HEAD":  # as GET; who writes to the socket leaves the body out
            scope = {**scope, "method": "GET"}
        await (app if made is None else made())(scope, receive, send)

    @app.get("/v1/models")
    async def models() -> Response:
        return _json(
            {"object": "list", "data": [house.described(served) for served in house.models.values()]}
        )

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return _json(house.described(house.find(name)))

    @app.get("/health")
    async def health() -> Response:
        states = {name: _state(served.writer) for name, served in house.models.items()}
        fine = not gate.closing and all(state == "ready" for state in states.values())
        said = "stopping" if gate.closing else "ok" if fine else "waiting"
        return _json({"status": said, "models": states}, 200 if fine else 503)

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(metrics.text(_gauges(house, gate)), headers={"content-type": CONTENT_TYPE})

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return _json(document(house))

    @app.get("/{name}")
    async def file(name: str) -> Response:
        data = files.get(name or "index.html")
        if data is None:
            raise Refused(404, "there is nothing of this name", code="not_found")
        kind = TYPES[Path(name or "index.html").suffix]
        return Response(data, headers={"content-type": kind, "cache-control": "no-cache"})

    @app.get("/")
    async def index() -> Response:
        return await file("index.html")

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return _json(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> Response:
        allowed = (error.headers or {}).get("Allow", "another method")
        code, text = {
            404: ("not_found", "there is nothing of this name"),
            405: ("method_not_allowed", f"this path is for {allowed} only"),
        }.get(error.status_code, (None, "the request cannot be answered"))
        return _json(
            Refused(error.status_code, text, code=code).body(), error.status_code, dict(error.headers or {})
        )

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        # it is raised again for the guard, which logs it
        return _json(Refused(500, WRONG).body(), 500)

    return Guard(front, metrics, keys=keys, hosts=hosts, origins=origins, paths=PATHS)


TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
}


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dumped(value), status, {"content-type": "application/json", **(headers or {})})


def _state(writer: object) -> str:
    return writer.state if isinstance(writer, Host) else "ready"


def _gauges(house: House, gate: Gate) -> dict[str, Any]:
    found: dict[str, Any] = {
        "liubai_requests_in_flight": ("Requests being answered.", [((), gate.inside)]),
    }
    figures = [
        ((("model", name),), served.writer.figures())
        for name, served in house.models.items()
        if isinstance(served.writer, Host)
    ]
    for name, text, key in (
        ("liubai_slots", "Answers that can be written at once.", "slots"),
        ("liubai_slots_in_use", "Answers that are being written.", "in_use"),
        ("liubai_waiting", "Answers that wait for a slot.", "waiting"),
        ("liubai_tokens_per_second", "Tokens written a second, lately.", "tokens_per_s"),
        ("liubai_restarts", "Times that the model's process was started again.", "restarts"),
    ):
        found[name] = (text, [(labels, getattr(one, key)) for labels, one in figures])
    return found

"""What a client may take: bytes, time, places. And JSON that means one thing only.

Everything is counted while it comes in: a client's word about a length is never believed.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from liubai.serve.errors import Refused, bad

Receive = Callable[[], Awaitable[Any]]
T = TypeVar("T")

#: The longest whole number in a request, in digits, and how deep its JSON may be nested.
DIGITS, DEPTH = 40, 64
#: Seconds that those who are inside at the end have to tell their clients so.
FAREWELL_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """``max_tokens`` of one answer (``None``: what the model holds); times are in seconds. ``header_s`` and
    ``body_s`` are how long a request may take to arrive, ``answer_s`` to be answered; ``grace_s`` is what
    open answers get when the server is stopped."""

    max_tokens: int | None = None
    body_bytes: int = 1 << 20
    messages: int = 1024
    answers: int = 16
    requests: int = 1024
    connections: int = 4096
    header_s: float = 15.0
    body_s: float = 30.0
    answer_s: float = 600.0
    grace_s: float = 30.0


class Gone(Exception):
    """The client has left; nobody is there to be told anything."""


class Gate:
    """Who is inside. ``closing``: nobody is let in any more. ``over``: whoever is still inside has waited
    long enough."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.closing, self.over, self.inside = limits, False, False, 0
        self._watchers: set[Callable[[Exception], None]] = set()

    @contextmanager
    def place(self) -> Iterator[None]:
        """For one request. Raises :class:`Refused` with 503 when the server is being stopped, 429 when it is
        full."""
        if self.closing:
            raise stopping()
        if self.inside >= self.limits.requests:
            raise Refused(
                429, "too many requests at once; try again later", code="rate_limit_exceeded", retry_after_s=1
            )
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    async def empty(self, grace_s: float) -> None:
        """Let nobody in, wait ``grace_s`` for those inside, and then end their answers."""
        self.closing = True
        clock = asyncio.get_running_loop().time
        deadline = clock() + grace_s
        while self.inside and not self.over and clock() < deadline:
            await asyncio.sleep(0.02)
        self.end()
        deadline = clock() + FAREWELL_S
        while self.inside and clock() < deadline:
            await asyncio.sleep(0.02)

    def end(self) -> None:
        """Those inside are told that it is over."""
        self.closing = self.over = True
        for give_up in list(self._watchers):
            give_up(stopping())

    async def watch(self, receive: Receive, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``, which ends early when the client leaves (:class:`Gone`) or the server is
        stopped (:class:`Refused`), or when it takes longer than an answer may (``TimeoutError``). The whole
        request must have been received."""
        if self.over:
            work.close()
            raise stopping()
        task, watching = asyncio.current_task(), True
        assert task is not None
        why: Exception | None = None

        def give_up(error: Exception) -> None:
            nonlocal why
            if watching and why is None:
                why = error
                task.cancel()

        left = asyncio.create_task(_left(receive))
        left.add_done_callback(lambda _: give_up(Gone()))
        timer = asyncio.get_running_loop().call_later(self.limits.answer_s, give_up, TimeoutError())
        self._watchers.add(give_up)
        try:
            return await work
        except asyncio.CancelledError:
            # as asyncio.timeout does it: whoever cancelled all of this must hear that it is
            if why is not None and task.uncancel() == 0:
                raise why from None
            raise
        finally:
            watching = False
            self._watchers.discard(give_up)
            timer.cancel()
            left.cancel()


async def _left(receive: Receive) -> None:
    with suppress(Exception):  # who cannot be heard has left, too
        while (await receive())["type"] != "http.disconnect":
            pass


def stopping() -> Refused:
    return Refused(
        503,
        "the server is being stopped",
        code="shutting_down",
        retry_after_s=5,
        headers={"Connection": "close"},
    )


async def read_body(receive: Receive, headers: dict[bytes, bytes], limits: Limits) -> bytes:
    """The whole body. Raises :class:`Refused` (413 too long, 408 too slow), :class:`Gone`."""
    too_long = Refused(
        413,
        f"the request is longer than the {limits.body_bytes} bytes that this server reads",
        code="request_too_large",
        headers={"Connection": "close"},
    )
    length = headers.get(b"content-length", b"")
    if length.isdigit() and (len(length) > 15 or int(length) > limits.body_bytes):
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                body += message.get("body", b"")
                if len(body) > limits.body_bytes:
                    raise too_long
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise Refused(
            408,
            f"the request did not arrive within {limits.body_s:g} seconds",
            code="request_timeout",
            headers={"Connection": "close"},
        ) from None


def require_json(headers: dict[bytes, bytes]) -> None:
    """Raises :class:`Refused` (415). A page of another site cannot send this type without asking first, which
    is half of the protection against it."""
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise Refused(415, "send JSON, with the header 'Content-Type: application/json'")
    if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
        raise Refused(415, "send the body as it is, without a Content-Encoding")


def read_json(body: bytes) -> dict[str, Any]:
    """A JSON object (RFC 8259) in which no name stands twice, every number is finite and every text is one
    that UTF-8 can write. Raises :class:`Refused` (400)."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise bad("the request is not UTF-8 text") from None
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_constant,
        )
    except RecursionError:
        raise bad(f"the JSON is nested deeper than {DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise bad(
            f"the request is not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from None
    if not isinstance(value, dict):
        raise bad("the request must be a JSON object")
    _check(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise bad("a name stands twice in one object of the request")
    return found


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise bad(f"a number in the request has more than {DIGITS} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise bad("a number in the request is too large")
    return number


def _constant(name: str) -> float:
    raise bad(f"{name} is not JSON")


def _check(value: object) -> None:
    """Depth and texts, without recursion."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEPTH:
            raise bad(f"the JSON is nested deeper than {DEPTH} levels")
        below: list[object] = []
        for one in level:
            if isinstance(one, dict):
                below += one.keys()
                below += one.values()
            elif isinstance(one, list):
                below += one
            elif isinstance(one, str):
                _writable(one)
        level = below


def _writable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise bad("a text in the request has half of a surrogate pair, which no character is") from None

"""How much a client may take, and how long: bodies, answers, connections that are slow or never end."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving import (
    ANSWER,
    CHAT,
    HEALTH,
    HELLO,
    Answer,
    call,
    call_async,
    chat,
    events_of,
    house_of,
    http,
    raw,
    running,
    says,
)

from liubai.serve import app as app_module
from liubai.serve import server as server_module
from liubai.serve.app import Answering, create_app
from liubai.serve.errors import Refused
from liubai.serve.limits import Gate, Limits
from liubai.serve.metrics import Metrics
from liubai.serve.schema import ChatRequest
from liubai.serve.server import Door

# ---- how much ----


def test_a_long_body_is_refused_whatever_it_says_of_its_length() -> None:
    writer = says(ANSWER)
    app = create_app(house_of(writer, limits=Limits(body_bytes=2000)))
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 3000}]}).encode()
    for length in (str(len(body)), "10", "", "9" * 40, "-1", "x"):
        answer = call(app, "POST", CHAT, body, content_length=length)
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    parts = [body[:500], body[500:1000], *([b"y" * 500] * 1000)]
    answer = asyncio.run(call_async(app, "POST", CHAT, parts))
    assert answer.status == 413
    assert writer.requests == []


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    app = create_app(house_of(says(ANSWER), limits=Limits(body_s=0.05)))
    answer = asyncio.run(call_async(app, "POST", CHAT, [b'{"mess', asyncio.sleep(30), b'ages":']))
    assert (answer.status, answer.error["code"]) == (408, "request_timeout")


def test_messages_and_answers_are_counted() -> None:
    app = create_app(house_of(says(ANSWER), limits=Limits(messages=3, answers=2)))
    answer = call(app, "POST", CHAT, {"messages": HELLO["messages"] * 4})
    assert (answer.status, answer.error["param"]) == (400, "messages")
    assert chat(app, n=3).status == 400
    assert chat(app, n=2).status == 200


async def _forever() -> None:
    await asyncio.Event().wait()


def test_only_so_many_are_let_in_at_once() -> None:
    app = create_app(house_of(says(ANSWER, held=_forever), limits=Limits(requests=2)))

    async def work() -> Answer:
        body = json.dumps(HELLO).encode()
        inside = [asyncio.create_task(call_async(app, "POST", CHAT, body)) for _ in range(2)]
        await asyncio.sleep(0.05)
        refused = await call_async(app, "POST", CHAT, body)
        assert (await call_async(app, "GET", "/health")).status == 200
        for task in inside:
            task.cancel()
        await asyncio.gather(*inside, return_exceptions=True)
        return refused

    answer = asyncio.run(work())
    assert (answer.status, answer.error["type"]) == (429, "rate_limit_error")
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_may_not_take_for_ever(stream: bool) -> None:
    writer = says(ANSWER, held=_forever)
    app = create_app(house_of(writer, limits=Limits(answer_s=0.1)))
    answer = chat(app, stream=stream)
    assert (writer.in_use, writer.cancelled) == (0, 1)
    if not stream:
        assert (answer.status, answer.error["code"]) == (503, "timeout")
        # it would again: no time to come back is named, and OpenAI's clients do not
        assert "retry-after" not in answer.headers
        assert answer.headers["x-should-retry"] == "false"
        return
    assert answer.status == 200
    last = answer.body.decode().split("\n\n")[-2]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    assert b"[DONE]" not in answer.body


def test_a_silent_stream_is_told_that_we_are_there_when_it_was_silent_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock that only waiting moves: 15 seconds after the last thing sent, whatever that was."""
    now, told = 100.0, list[float]()
    house = house_of(says(ANSWER))
    answering: Answering[ChatRequest] = Answering(
        house,
        Gate(Limits()),
        Metrics(),
        ChatRequest,
        *(lambda *_: None,) * 3,  # type: ignore[arg-type]
    )
    said_at = [105.0, 112.0]  # by the answer itself, while the pulse sleeps

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if said_at:
            answering.sent_at = said_at.pop(0)

    async def send(message: dict[str, Any]) -> None:
        assert message["body"].startswith(b": ")
        told.append(now)
        now_and_then = len(told) == 3
        if now_and_then:
            raise asyncio.CancelledError

    monkeypatch.setattr(app_module, "asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(app_module, "time", SimpleNamespace(monotonic=lambda: now))
    answering.sent_at = 100.0
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(answering._pulse(send))
    assert told == [127.0, 142.0, 157.0]


# ---- over a real socket ----


def until(link: socket.socket, end: bytes) -> bytes:
    """What comes up to ``end``."""
    data = b""
    while end not in data:
        part = link.recv(1 << 16)
        assert part, data
        data += part
    return data


def test_heads_and_bodies_that_come_slowly_are_cut_off() -> None:
    """Slowloris: a connection costs little, but there must not be thousands that never end."""
    with running(house_of(says(ANSWER)), limits=Limits(header_s=0.3, body_s=0.3, connections=20)) as server:
        silent, half, again = (raw(server.port, data) for data in (b"", b"POST /v1/ch", b""))
        for letter in b"GET /health HT":  # a letter now and then does not help
            time.sleep(0.03)
            try:
                again.sendall(bytes([letter]))
            except OSError:
                break
        for link in (silent, half, again):
            link.settimeout(5)
            with suppress(ConnectionResetError):
                assert link.recv(1000) == b""
        slow = raw(server.port, http(CHAT, b"x" * 100)[:-50])
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        # one that has asked may ask again
        kept = raw(server.port, HEALTH)
        assert until(kept, b"}}").startswith(b"HTTP/1.1 200")
        time.sleep(0.5)
        kept.sendall(HEALTH)
        assert until(kept, b"}}").startswith(b"HTTP/1.1 200")
        many = [raw(server.port, b"") for _ in range(40)]
        time.sleep(0.1)
        cut_off = 0
        for link in many:
            link.setblocking(False)
            try:
                cut_off += link.recv(1) == b""
            except BlockingIOError:
                pass
            except ConnectionResetError:
                cut_off += 1
        assert cut_off >= 20


def ended(link: socket.socket) -> bool:
    """Does the server end it within some seconds?"""
    link.settimeout(8)
    try:
        while link.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


#: Heads of requests that are answered before their body has come.
EARLY = {
    401: b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n",
    404: b"POST /v1/nothing HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer k\r\n",
    405: b"POST /health HTTP/1.1\r\nHost: localhost\r\n",
    415: b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer k\r\n",
    421: b"POST /v1/chat/completions HTTP/1.1\r\nHost: evil.example\r\n",
    200: b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
}


def test_a_body_that_nobody_reads_is_not_waited_for_either() -> None:
    """Answered before the body came, a connection lived for as long as a byte of it comes now and then."""
    options: dict[str, Any] = {"keys": ["k"], "hosts": Door().hosts}
    with running(house_of(says(ANSWER)), limits=Limits(body_s=0.4, header_s=0.4), **options) as server:
        for length in (b"Content-Length: 100\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n64\r\n"):
            links = []
            for status, head in EARLY.items():
                link = raw(server.port, head + length)
                assert until(link, b"}").startswith(b"HTTP/1.1 %d" % status)
                links.append(link)
            for link in links:
                link.sendall(b"x")
            assert all(map(ended, links))
        # one that sends its body after all may ask again
        for head in EARLY.values():
            link = raw(server.port, head + b"Content-Length: 100\r\n\r\n")
            until(link, b"}")
            link.sendall(b"x" * 60)
            link.sendall(b"x" * 40 + HEALTH)
            assert until(link, b"}}").startswith((b"HTTP/1.1 200", b"}"))
        link = raw(server.port, EARLY[401] + b"Content-Length: 100\r\n\r\n")
        until(link, b"}")
        link.sendall(b"x" * 100)
        assert ended(link)  # but must come to the point, too


MUCH = 16 << 20  #: bytes: more than a socket holds


def asks_for_much(port: int) -> socket.socket:
    """A client with room for little."""
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 15)
    link.connect(("127.0.0.1", port))
    link.sendall(b"GET /much.js HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return link


def test_who_does_not_read_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "LOOK_S", 0.2)
    (tmp_path / "much.js").write_bytes(b"x" * MUCH)
    with running(house_of(says(ANSWER)), page=tmp_path) as server:
        connections = server.server.server_state.connections
        deaf, closing = asks_for_much(server.port), asks_for_much(server.port)
        deadline = time.monotonic() + 8
        while sum(one.flow.write_paused for one in list(connections)) < 2:  # type: ignore[union-attr]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        closing.shutdown(socket.SHUT_WR)  # what is left would keep a connection that is being closed
        while connections:
            assert time.monotonic() < deadline, "it is still there"
            time.sleep(0.02)
        assert raw(server.port, HEALTH).recv(100).startswith(b"HTTP/1.1 200")
        deaf.close()
        closing.close()


def test_who_reads_slowly_gets_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "LOOK_S", 0.3)  # of which a busy machine leaves the reader a part
    (tmp_path / "much.js").write_bytes(b"x" * MUCH)
    with running(house_of(says(ANSWER)), page=tmp_path) as server:
        connections, got, held_up = server.server.server_state.connections, 0, 0
        slow = asks_for_much(server.port)
        slow.settimeout(8)
        got = len(until(slow, b"\r\n\r\n").partition(b"\r\n\r\n")[2])
        while got < MUCH:
            part = slow.recv(1 << 17)
            assert part, "it was cut off"
            got += len(part)
            held_up += any(one.flow.write_paused for one in list(connections))  # type: ignore[union-attr]
            time.sleep(0.002)
        slow.close()
    assert got == MUCH
    assert held_up > 10


def test_what_is_no_http_does_not_stop_the_server() -> None:
    with running(house_of(says(ANSWER))) as server:
        for data in (
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"GET / HTTP/9.9\r\n\r\n",
            b"\r\n" * 1000,
            b"GET " + b"a" * 100_000 + b" HTTP/1.1\r\n",
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        ):
            link = raw(server.port, data)
            link.settimeout(0.5)
            with suppress(TimeoutError, ConnectionResetError):
                assert b" 500 " not in link.recv(1000)
            link.close()
        fine = raw(server.port, http(CHAT, HELLO))
        assert fine.recv(1000).startswith(b"HTTP/1.1 200")


def stopped(held: Callable[[], Any], grace: float, times: int = 1) -> tuple[list[str], bytes, float]:
    """A stream that is open when the server is stopped: its events, what a newcomer gets, and the seconds."""
    writer = says(ANSWER, held=held)
    limits = Limits(grace_s=grace)
    with running(house_of(writer, limits=limits)) as server:
        link = raw(server.port, http(CHAT, {**HELLO, "stream": True}))
        late = raw(server.port, b"")
        assert b"200" in link.recv(15)
        while not writer.in_use:
            time.sleep(0.01)
        began = time.monotonic()
        for _ in range(times):
            server.loop.call_soon_threadsafe(server.server.leave)
        late.sendall(http(CHAT, HELLO))
        late.settimeout(10)
        told = late.recv(4000)
        events = events_of(link)
        return events, told, time.monotonic() - began


def test_open_streams_finish_when_the_server_is_stopped() -> None:
    async def a_little() -> None:
        await asyncio.sleep(0.5)

    events, told, _ = stopped(a_little, 20.0)
    assert events[-1] == "[DONE]"
    assert told.startswith(b"HTTP/1.1 503")
    assert b"retry-after" in told


@pytest.mark.parametrize(("grace", "times"), [(0.3, 1), (60.0, 2)])
def test_streams_that_take_too_long_are_told_so(grace: float, times: int) -> None:
    events, _, seconds = stopped(_forever, grace, times)
    assert json.loads(events[-1])["error"]["code"] == "shutting_down"
    assert "[DONE]" not in events
    assert seconds < 15


def test_a_gate_that_is_over_lets_nothing_go_on() -> None:
    async def work() -> None:
        gate = Gate(Limits())
        gate.end()
        with pytest.raises(Refused, match="being stopped"):
            await gate.watch(_forever, _forever())
        with pytest.raises(Refused, match="being stopped"), gate.place():
            pass

    asyncio.run(work())


def test_threads_are_not_left_behind() -> None:
    before = set(threading.enumerate())
    long = {"messages": [{"role": "user", "content": "hello " * 5000}]}  # encoded beside the loop
    with running(house_of(says(ANSWER), max_length=1 << 16)) as server:
        assert until(raw(server.port, http(CHAT, long)), b"}").startswith(b"HTTP/1.1 200")
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) <= before

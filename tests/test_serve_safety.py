"""What a client may not do: come in without a key, take too much, wait for ever, learn what it should not."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import tiny_config, tiny_model
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from serving import Answer, call, call_async, chat, house_of, http, raw, running, says

from liubai import cli
from liubai.commands import serve as command
from liubai.errors import UserError
from liubai.model.checkpoint import save_checkpoint
from liubai.problems import world_vocabulary
from liubai.serve import app as app_module
from liubai.serve import server as server_module
from liubai.serve import shapes
from liubai.serve.app import Answering, create_app
from liubai.serve.errors import Refused, refusal_of
from liubai.serve.guard import host_of
from liubai.serve.limits import DEPTH, Gate, Limits, read_json
from liubai.serve.load import Busy, HostDied, Unavailable
from liubai.serve.metrics import Metrics
from liubai.serve.schema import ChatRequest
from liubai.serve.server import Door, listen
from liubai.text.template import BARE
from liubai.text.tokenizer import word_level

ROOT = Path(__file__).parent.parent
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
CHAT = "/v1/chat/completions"
ANSWER = "hm</think>hello"


# ---- the key ----


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearer wrong", 401),
        ("Bearer right-key", 200),
        ("bearer right-key", 200),
        ("Basic right-key", 401),
        ("Bearer right-keyx", 401),
        ("right-key", 401),
        ("Bearer schlüssel", 401),
        ("Bearer other", 200),
    ],
)
def test_a_key_opens_the_api(header: str | None, status: int) -> None:
    app = create_app(house_of(says(ANSWER)), keys=["right-key", "other"])
    headers = {} if header is None else {"authorization": header}
    for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/v1/nothing")):
        answer = call(app, method, path, **headers)
        assert answer.status == (404 if status == 200 and "nothing" in path else status)
    answer = call(app, "POST", CHAT, HELLO, **headers)
    assert answer.status == status
    if status == 401:
        assert answer.error["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert call(app, "GET", "/health").status == 200  # what a load balancer asks
    assert call(app, "GET", "/").status == 200  # the page asks for the key itself


def test_a_key_may_be_of_any_letters() -> None:
    app = create_app(house_of(says(ANSWER)), keys=["schlüssel"])
    given = "schlüssel".encode().decode("latin-1")  # as it goes over the wire
    assert call(app, "GET", "/v1/models", authorization=f"Bearer {given}").status == 200
    assert call(app, "GET", "/v1/models", authorization="Bearer schlussel").status == 401


def test_other_machines_need_a_key() -> None:
    with pytest.raises(
        UserError, match=r"--host 0\.0\.0\.0 opens the server to other machines and needs a key"
    ):
        Door(host="0.0.0.0")
    assert Door(host="0.0.0.0", keys=("k",)).hosts == ()
    assert "localhost" in Door().hosts
    assert Door(names=("api.example.com",)).hosts[-1] == "api.example.com"


def test_keys_of_option_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIUBAI_API_KEY", raising=False)
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert command.keys_of(None, None) == ()
    assert command.keys_of("zero", file) == ("zero", "one", "two")
    monkeypatch.setenv("LIUBAI_API_KEY", "three")
    assert command.keys_of(None, None) == ("three",)
    assert command.keys_of(None, file) == ("one", "two")
    for wrong in ("", "  ", " x", "a\nb"):
        with pytest.raises(UserError, match="an API key must"):
            command.keys_of(wrong, None)
    monkeypatch.setenv("LIUBAI_API_KEY", "")
    with pytest.raises(UserError, match="an API key must"):  # set, and not to nothing by mistake
        command.keys_of(None, None)
    with pytest.raises(UserError, match="cannot read the keys"):
        command.keys_of(None, tmp_path / "nope")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="there is no key in"):
        command.keys_of(None, tmp_path / "empty")


# ---- names, sites, headers ----


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8000", 200),
        ("chat.example.com", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost@evil.example", 421),
        ("", 421),
    ],
)
def test_a_server_on_this_machine_has_no_other_name(header: str, status: int) -> None:
    """A page of another site can have its name lead here; its own name gives it away."""
    app = create_app(house_of(says(ANSWER)), hosts=Door(names=("chat.example.com",)).hosts)
    for path in ("/v1/models", "/", "/health"):
        assert call(app, "GET", path, host=header).status == status


@given(st.text(max_size=30))
def test_no_host_header_breaks_the_check(text: str) -> None:
    assert isinstance(host_of(text.encode("utf-8", "replace")), str)


def test_pages_of_other_sites_are_kept_out_unless_named() -> None:
    closed = create_app(house_of(says(ANSWER)))
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    answer = asyncio.run(call_async(closed, "OPTIONS", CHAT, b"", preflight))
    assert answer.status == 405
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert (
        "access-control-allow-origin"
        not in call(closed, "GET", "/v1/models", origin="https://a.example").headers
    )
    opened = create_app(house_of(says(ANSWER)), keys=["k"], origins=["https://a.example"])
    answer = asyncio.run(call_async(opened, "OPTIONS", CHAT, b"", preflight))
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (204, "https://a.example")
    assert answer.headers["access-control-allow-headers"] == "authorization, content-type"
    # what OpenAI's client in a browser sends, and what it does not
    wanted = (
        "Authorization, x-stainless-os,X-Stainless-Retry-Count , openai-project, x-stainless-\xe9, cookie"
    )
    asks = {**preflight, "access-control-request-headers": wanted}
    allowed = asyncio.run(call_async(opened, "OPTIONS", CHAT, b"", asks)).headers
    assert allowed["access-control-allow-headers"] == (
        "authorization, content-type, x-stainless-os, x-stainless-retry-count, openai-project"
    )
    refused = call(opened, "POST", CHAT, HELLO, origin="https://a.example")
    assert refused.status == 401
    assert (
        refused.headers["access-control-allow-origin"] == "https://a.example"
    )  # so that the page can read why
    other = {**preflight, "origin": "https://b.example"}
    answer = asyncio.run(call_async(opened, "OPTIONS", CHAT, b"", other))
    assert (answer.status, "access-control-allow-origin" in answer.headers) == (403, False)


def test_a_form_of_another_site_cannot_ask() -> None:
    """What a browser sends without asking first is no JSON."""
    writer = says(ANSWER)
    app = create_app(house_of(writer))
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert call(app, "POST", CHAT, HELLO, content_type=kind).status == 415
    assert call(app, "POST", CHAT, HELLO, content_type="application/json; charset=utf-8").status == 200
    assert len(writer.requests) == 1


def test_the_page_may_do_nothing_but_talk_to_its_server() -> None:
    app = create_app(house_of(says(ANSWER)))
    for path in ("/", "/page.css", "/page.js", "/v1/models", "/nothing"):
        answer = call(app, "GET", path)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in policy
    for path in ("/../errors.py", "/..%2ferrors.py", "/.hidden", "/page", "/guard.py", "/etc/passwd"):
        assert call(app, "GET", path).status == 404


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


def test_a_pulse_that_fails_is_nobodys_task(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def a_little() -> None:
        await asyncio.sleep(0.2)

    async def failing(self: Answering[ChatRequest], send: Any) -> None:
        raise Secret("sesame")

    monkeypatch.setattr(Answering, "_pulse", failing)
    monkeypatch.setattr(app_module, "HEAD_S", 0.01)
    answer = chat(create_app(house_of(says(ANSWER, held=a_little))), stream=True)
    gc.collect()
    assert answer.chunks()[-1]["choices"][0]["finish_reason"] == "stop"
    assert caplog.text == ""


# ---- JSON that is none, or means two things ----


@pytest.mark.parametrize(
    ("body", "says_"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b"[1]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "more than 40 digits"),
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b'{"x": {"a": 1, "\\u0061": 2}}', "stands twice"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'{"a": [{"b": "x\\ud83d"}]}', "surrogate"),
        (b'{"a": ' * 65 + b"1" + b"}" * 65, "nested deeper"),
        (b"[" * 200_000, "nested deeper"),
        (b'{"a":' * 200_000, "nested deeper"),
        (b'\xef\xbb\xbf{"a": 1}', "not JSON"),
    ],
)
def test_what_is_no_json_of_one_meaning(body: bytes, says_: str) -> None:
    with pytest.raises(Refused) as refused:
        read_json(body)
    assert refused.value.status == 400
    assert says_ in refused.value.message


def test_what_is_json_is_read() -> None:
    text = '{"a": [1, -2.5, 1e10, true, null, "\\ud83d\\ude42 \\u0000 留"], "": {}}'
    assert read_json(text.encode()) == json.loads(text)
    deep: Any = 1
    for _ in range(DEPTH - 1):
        deep = {"a": deep}
    assert read_json(json.dumps(deep).encode()) == deep


def mutants(seed: int, count: int) -> list[bytes]:
    """Requests with something wrong in them, most of them hardly."""
    draw = random.Random(seed)
    values = [
        None,
        True,
        -1,
        0,
        1e308,
        "",
        "x",
        [],
        {},
        [[]],
        "\u0000",
        2**70,
        "留",
        [None],
        {"a": {"b": []}},
    ]
    base: dict[str, Any] = {
        "model": "qwen",
        "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": None}],
        "temperature": 0.5, "n": 1, "stop": ["x"], "logprobs": True, "top_logprobs": 1, "seed": 1,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "auto",
        "thinking": {"type": "enabled", "budget_tokens": 5}, "paths": {"kind": "sample", "n": 1},
        "stream_options": {"include_usage": True}, "use_tools": ["calculator"], "max_tokens": 5,
    }  # fmt: skip

    def change(value: Any) -> Any:
        if draw.random() < 0.15 or not isinstance(value, dict | list) or not value:
            return draw.choice(values)
        if isinstance(value, dict):
            key = draw.choice(list(value))
            return {**value, draw.choice([key, key, key, "é", "__class__", key + "x"]): change(value[key])}
        at = draw.randrange(len(value))
        return [*value[:at], change(value[at]), *value[at + 1 :]]

    found = []
    for _ in range(count):
        body = json.dumps(change(base), allow_nan=True).encode()
        kind = draw.random()
        if kind < 0.5:
            at = draw.randrange(len(body))
            cut = draw.choice([b"", b'"', b"\xff", b"{", b"]", b"\\", b"\x00", b"NaN", b",", b"9" * 50])
            body = body[:at] + cut + body[at + draw.randrange(3) :]
        elif kind < 0.6:
            body = body[: draw.randrange(len(body))]
        elif kind < 0.65:
            body = bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
        found.append(body)
    return found


def test_no_malformed_body_is_more_than_refused() -> None:
    """Whatever is sent: an answer, or a 4xx of OpenAI's shape. (bench/malformed.py sends ten thousand.)"""
    app = create_app(house_of(says(ANSWER)))

    async def work() -> list[tuple[bytes, Answer]]:
        return [
            (body, await call_async(app, "POST", path, body))
            for path, seed in ((CHAT, 1), ("/v1/completions", 2))
            for body in mutants(seed, 500)
        ]

    statuses: dict[int, int] = {}
    for body, answer in asyncio.run(work()):
        statuses[answer.status] = statuses.get(answer.status, 0) + 1
        if answer.status != 200:
            assert 400 <= answer.status < 500, (body, answer)
            assert answer.status != 422
            shapes.Problem.model_validate(answer.json())
            assert "Traceback" not in answer.body.decode()
    assert statuses[400] > 500


# ---- what a client may not learn ----


class Secret(Exception):
    pass


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_ours_tells_nothing(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    def broken(prompt: str, request: Any) -> str:
        raise Secret(f"/home/user/model: {prompt}")

    writer = says("x")
    writer.say = broken
    app = create_app(house_of(writer))
    with caplog.at_level(logging.DEBUG):
        answer = chat(app, "open sesame", stream=stream)
    assert answer.status == 500  # also of a stream: nothing was sent before
    told = answer.body.decode()
    assert answer.error == {
        "message": "the server had an error while it answered; the fault is not yours",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    logged = caplog.text
    assert "Secret" in logged  # the kind of error, for whoever runs the server
    for hidden in ("sesame", "/home/user", "Traceback"):
        assert hidden not in told
        assert hidden not in logged


def test_nothing_of_a_question_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(house_of(says("</think>the answer is xyzzy")))
    with caplog.at_level(logging.DEBUG):
        chat(app, "open sesame")
        call(app, "POST", CHAT, b'{"messages": "open sesame"}')
        chat(app, "open sesame", model="open sesame")
    assert "sesame" not in caplog.text
    assert "xyzzy" not in caplog.text


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (Busy("'x' at /path is full", 2.5), 429, "3"),
        (HostDied("/path died", 0.1), 503, "1"),
        (Unavailable("/path is broken", 7.0), 503, "7"),
        (TimeoutError("/path"), 503, None),
        (UserError("say it differently"), 400, None),
        (KeyError("/path"), 500, None),
        (MemoryError(), 500, None),
    ],
)
def test_what_a_client_may_know_of_an_error(error: Exception, status: int, retry: str | None) -> None:
    refused = refusal_of(error)
    assert refused.status == status
    assert refused.headers.get("Retry-After") == retry
    assert "/path" not in json.dumps(refused.body())
    shapes.Problem.model_validate(refused.body())


# ---- over a real socket ----


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


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
    monkeypatch.setattr(server_module, "LOOK_S", 0.1)
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


def events_of(link: socket.socket) -> list[str]:
    """The events of a stream, until the server ends it."""
    link.settimeout(10)
    data = b""
    while part := link.recv(1 << 16):
        data += part
        if data.endswith(b"0\r\n\r\n"):
            break
    return re.findall(r"data: (.*)\n", data.decode())


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


# ---- the command ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "3-zero" / "checkpoint"
    words = word_level(world_vocabulary())
    config = tiny_config(vocab_size=words.vocab_size, max_position_embeddings=256, eos_token_id=words.eos_id)
    save_checkpoint(folder, tiny_model(0, config), words, BARE)
    return folder


def liubai(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; from liubai.cli import main; sys.exit(main())", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", **environment},
    )


def test_serve_says_where_it_is_and_ends_cleanly(checkpoint: Path) -> None:
    process = liubai("serve", str(checkpoint), "--port", "0", "--device", "cpu", "--grace", "0.2")
    assert process.stdout is not None
    assert process.stdout.readline() == "loading zero\n"
    ready = process.stdout.readline()
    found = re.fullmatch(r"serving zero at http://127\.0\.0\.1:(\d+) \(Ctrl-C stops it\)\n", ready)
    assert found is not None
    port = int(found[1])
    assert raw(port, HEALTH).recv(100).startswith(b"HTTP/1.1 200")
    link = raw(port, http(CHAT, {**HELLO, "stream": True, "max_tokens": 200, "think_at_least": 200}))
    assert b"200 OK" in link.recv(20)
    process.send_signal(signal.SIGTERM)
    events = events_of(link)
    assert events[-1] == "[DONE]" or "shutting_down" in events[-1]
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    # the answer may have been quicker than the signal
    assert out in ("", "stopping in 0.2 s at most (open requests: 1); Ctrl-C again: at once\n")


def test_a_port_in_use_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        number = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["liubai", "serve", str(checkpoint), "--port", str(number)])
        assert cli.main() == 2
    said = f"liubai: port {number} is in use; choose another with --port, or --port 0 for a free one\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "needs a key"),
        (["--cors", "example.com"], "an origin is like https://example.com"),
        (["--name", "a", "--name", "b"], "2 --name for 1 checkpoints"),
        (["--fast", "nope"], "there is no model 'nope' here"),
        (["--host", "no.such.host.invalid"], "needs a key"),
        (["--device", "gpu"], "--device 'gpu'"),
        (["--reward-model", "nope"], "'nope' is no model that judges; give a reward_model folder"),
        (["--max-length", "100000"], "max_length must be"),
    ],
)
def test_mistakes_of_serve_are_one_line(
    checkpoint: Path,
    options: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("LIUBAI_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["liubai", "serve", str(checkpoint), "--port", "0", *options])
    assert cli.main() == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "calibrated", "option", "said"),
    [
        ("LlamaForCausalLM", True, "--reward-model", "is a language model"),
        (
            "LlamaForSequenceClassification",
            False,
            "--reward-model",
            "is a process model; give a reward_model",
        ),
        (
            "LlamaForSequenceClassification",
            True,
            "--process-model",
            "is a reward model; give a process_model",
        ),
    ],
)
def test_a_judge_of_another_kind_is_refused_at_the_start(
    checkpoint: Path,
    tmp_path: Path,
    kind: str,
    calibrated: bool,
    option: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"architectures": [kind], "num_labels": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if calibrated:
        (tmp_path / "calibration.json").write_text('{"mean": 0.0, "spread": 1.0}')
    monkeypatch.setattr(
        sys, "argv", ["liubai", "serve", str(checkpoint), "--port", "0", option, str(tmp_path)]
    )
    assert cli.main() == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert str(tmp_path) in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""  # no model was loaded


def test_without_the_extra_serve_says_what_to_install(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["liubai", "serve", str(checkpoint)])
    assert cli.main() == 2
    assert (
        capsys.readouterr().err == "liubai: serving needs FastAPI and uvicorn: pip install 'liubai[serve]'\n"
    )


# ---- the description of itself ----


def test_schemathesis_finds_no_error_of_the_server() -> None:
    """Requests made from the description, right and wrong ones: no 5xx, and answers of the shapes
    described."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis: install liubai[dev]")
    answered: Counter[str] = Counter()
    refused: dict[str, set[str]] = defaultdict(set)
    with running(house_of(says(ANSWER))) as server:
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
        checks = [
            schemathesis.checks.not_a_server_error,
            *map(
                schemathesis.checks.CHECKS.get_one,
                ("status_code_conformance", "content_type_conformance", "response_schema_conformance"),
            ),
        ]
        for found in schema.get_all_operations():
            for mode in schemathesis.GenerationMode:

                @settings(
                    max_examples=60 if found.ok().method == "post" else 5,
                    derandomize=True,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                @given(found.ok().as_strategy(generation_mode=mode))
                def one(case: Any) -> None:
                    status = case.call_and_validate(checks=checks).status_code
                    answered[case.path] += status == 200
                    if status == 400:
                        refused[case.path].add(repr(case.body))

                try:
                    one()
                except Unsatisfiable:  # nothing can be wrong with a request that has no parts
                    assert found.ok().method == "get"
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert answered[path] >= 10
        assert len(refused[path]) >= 20


def test_threads_are_not_left_behind() -> None:
    before = set(threading.enumerate())
    long = {"messages": [{"role": "user", "content": "hello " * 5000}]}  # encoded beside the loop
    with running(house_of(says(ANSWER), max_length=1 << 16)) as server:
        assert until(raw(server.port, http(CHAT, long)), b"}").startswith(b"HTTP/1.1 200")
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) <= before

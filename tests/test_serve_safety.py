"""What a client may not do: come in without a key or from another site's page, learn what it should not."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import ANSWER, CHAT, HELLO, call, call_async, chat, house_of, says

from liubai.commands import serve as command
from liubai.errors import UserError
from liubai.serve import app as app_module
from liubai.serve import shapes
from liubai.serve.app import Answering, create_app
from liubai.serve.errors import refusal_of
from liubai.serve.guard import host_of
from liubai.serve.load import Busy, HostDied, Unavailable
from liubai.serve.schema import ChatRequest
from liubai.serve.server import Door

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
    for wrong in ("", "  ", " x", "a\nb", "schlüssel"):  # no browser and no client of OpenAI's can send ü
        with pytest.raises(UserError, match="an API key is made of ASCII"):
            command.keys_of(wrong, None)
    monkeypatch.setenv("LIUBAI_API_KEY", "")
    with pytest.raises(UserError, match="an API key is made of ASCII"):  # set, and not to nothing by mistake
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

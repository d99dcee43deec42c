"""What a stream costs: few writes, none of which keeps anybody waiting, and nothing that is lost for it."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable
from typing import Any

import pytest
from serving import ScriptedWriter, call_async, house_of, says

from liubai.serve import app as app_module
from liubai.serve import replies
from liubai.serve.answering import Choice, answer
from liubai.serve.app import Answering, create_app
from liubai.serve.limits import Gate, Gone, Limits
from liubai.serve.load import HostDied
from liubai.serve.metrics import Metrics
from liubai.serve.schema import ChatRequest
from liubai.serve.server import COLLECTED, Corked, uncollected

CHAT = "/v1/chat/completions"
ANSWER = "we wait and think again</think>the answer is forty two"


async def sent(
    writer: ScriptedWriter, heard: Callable[[str], None] = lambda body: None, **fields: Any
) -> list[str]:
    """The bodies of a stream, one a write; ``heard`` is told of each."""
    bodies: list[str] = []
    app = create_app(house_of(writer))

    async def noted(scope: Any, receive: Any, send: Any) -> None:
        async def send_on(message: Any) -> None:
            if message["type"] == "http.response.body":
                bodies.append(message["body"].decode())
                heard(bodies[-1])
            await send(message)

        await app(scope, receive, send_on)

    asked = {"messages": [{"role": "user", "content": "x"}], "stream": True, **fields}
    await call_async(noted, "POST", CHAT, json.dumps(asked).encode())
    return bodies


def events(body: str) -> list[Any]:
    found = [event.removeprefix("data: ") for event in body.split("\n\n") if event]
    return [event if event == "[DONE]" else json.loads(event) for event in found]


def said(bodies: list[str]) -> str:
    deltas = [
        c["delta"] for body in bodies for e in events(body) if e != "[DONE]" for c in e.get("choices", ())
    ]
    return "|".join("".join(d.get(kind) or "" for d in deltas) for kind in ("reasoning", "content"))


def test_what_comes_at_once_is_written_once() -> None:
    options = {"stream_options": {"include_usage": True}}
    (body,) = asyncio.run(sent(says(ANSWER, size=1000), **options))
    found = events(body)
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert found[-1] == "[DONE]"
    assert found[-2]["usage"]["completion_tokens"] > 0
    assert found[-3]["choices"][0]["finish_reason"] == "stop"
    assert said([body]) == ANSWER.replace("</think>", "|")


def test_every_piece_is_a_write_and_the_last_one_goes_with_the_end() -> None:
    writer = says(ANSWER, size=2)
    bodies = asyncio.run(sent(writer))
    pieces = -(-len(writer.tokenizer.encode(f"{ANSWER}{writer.tokenizer.eos}")) // 2)
    assert 3 < len(bodies) <= pieces
    assert all(body.endswith("\n\n") for body in bodies)
    assert events(bodies[-1])[-1] == "[DONE]"
    assert said(bodies[-1:]) not in ("", "|")  # the end is not by itself
    assert said(bodies) == ANSWER.replace("</think>", "|")


def test_the_first_words_wait_for_nothing() -> None:
    free, heard = asyncio.Event(), list[str]()
    writer = says(ANSWER, size=4, held=free.wait)

    def hear(body: str) -> None:
        heard.append(body)
        free.set()

    asyncio.run(asyncio.wait_for(sent(writer, hear), 10))
    assert said(heard[:1]).startswith("we")


def test_a_silent_stream_begins_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "HEAD_S", 0.01)
    free, heard = asyncio.Event(), list[str]()
    writer = says(ANSWER, size=4)
    write = writer.write

    async def late(*given: Any) -> Any:
        await free.wait()
        return await write(*given)

    writer.write = late  # type: ignore[method-assign]

    def hear(body: str) -> None:
        heard.append(body)
        free.set()

    asyncio.run(asyncio.wait_for(sent(writer, hear), 10))
    (opening,) = events(heard[0])
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert said(heard) == ANSWER.replace("</think>", "|")


def test_what_was_said_before_an_error_is_told_with_it() -> None:
    writer = says(ANSWER)

    async def broken(request: Any, heard: Any = None) -> Any:
        writer.size = 4
        task = asyncio.create_task(ScriptedWriter.write(writer, request, heard))
        await asyncio.sleep(0)  # the first piece is heard
        task.cancel()
        raise RuntimeError

    writer.write = broken  # type: ignore[method-assign]
    bodies = asyncio.run(sent(writer))
    assert said(bodies).startswith("we")
    assert events(bodies[-1])[-1]["error"]["type"] == "server_error"


async def answered(
    writer: ScriptedWriter, send: Callable[[Any], Any], metrics: Metrics, leaves_s: float | None = None
) -> Answering[ChatRequest]:
    """An answer that is sent through ``send``; it may take so many seconds."""
    limits = Limits() if leaves_s is None else Limits(answer_s=leaves_s)
    house = house_of(writer, limits=limits)
    found = Answering(
        house, Gate(limits), metrics, ChatRequest, answer, replies.chat_chunks, replies.chat_whole
    )
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True}).encode()
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return parts.pop() if parts else await _forever()

    await found({"headers": [(b"content-type", b"application/json")]}, receive, send)
    return found


def test_a_stream_that_fails_before_its_first_byte_has_the_status_of_its_error() -> None:
    async def broken(request: Any, heard: Any = None) -> Any:
        raise HostDied("gone", 3.0)

    writer = says(ANSWER)
    writer.write = broken  # type: ignore[method-assign]
    metrics, sent_ones = Metrics(), list[Any]()

    async def send(message: Any) -> None:
        sent_ones.append(message)

    asyncio.run(answered(writer, send, metrics))
    head, body = sent_ones
    assert head["status"] == 503
    assert (b"retry-after", b"3") in [(name.lower(), text) for name, text in head["headers"]]
    assert json.loads(body["body"])["error"]["code"] == "model_unavailable"
    assert metrics.broken.value(code="model_unavailable") == 0


def test_a_stream_that_breaks_is_counted() -> None:
    metrics, sent_ones = Metrics(), list[Any]()

    async def send(message: Any) -> None:
        sent_ones.append(message)

    asyncio.run(answered(says(ANSWER, held=_forever), send, metrics, leaves_s=0.1))
    assert sent_ones[0]["status"] == 200
    assert metrics.broken.value(code="timeout") == 1
    assert 'liubai_broken_streams_total{code="timeout"} 1' in metrics.text({})


@pytest.mark.parametrize("stuck", [0, 1, 2])  # which message: the head, the first words, what comes then
def test_what_was_not_sent_is_held(stuck: int) -> None:
    """The client does not read when the answer's time is over, and then it does."""
    passed = list[Any]()
    tried = 0

    async def send(message: Any) -> None:
        nonlocal tried
        tried += 1
        if tried == stuck + 1:
            await _forever()
        passed.append(message)

    asyncio.run(answered(says(ANSWER, size=4), send, Metrics(), leaves_s=0.2))
    assert passed[0]["type"] == "http.response.start"
    if stuck == 0:  # nothing had been said yet
        assert [m["status"] for m in passed if "status" in m] == [503]
        return
    assert [m["status"] for m in passed if "status" in m] == [200]
    bodies = [m["body"].decode() for m in passed[1:]]
    assert events(bodies[0])[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert said(bodies).startswith("we")
    assert events(bodies[-1])[-1]["error"]["code"] == "timeout"
    assert [m["more_body"] for m in passed[1:]][-1] is False


def test_two_who_send_at_once_send_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pulse is about to send the head when the first words come."""
    monkeypatch.setattr(app_module, "HEAD_S", 0.01)
    passed = list[Any]()

    async def slow() -> None:
        await asyncio.sleep(0.03)

    async def send(message: Any) -> None:
        await slow()
        passed.append(message)

    writer = says(ANSWER, size=4)
    write = writer.write

    async def late(*given: Any) -> Any:
        await asyncio.sleep(0.02)
        return await write(*given)

    writer.write = late  # type: ignore[method-assign]
    asyncio.run(answered(writer, send, Metrics()))
    assert [m["type"] for m in passed].count("http.response.start") == 1
    bodies = [m["body"].decode() for m in passed[1:]]
    assert said(bodies) == ANSWER.replace("</think>", "|")
    assert events("".join(bodies))[-1] == "[DONE]"


def test_others_are_heard_while_many_paths_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, at = 0, list[int]()
    take = Choice.take

    def noted(self: Choice, path: Any) -> None:
        at.append(turns)
        take(self, path)

    async def story() -> None:
        nonlocal turns
        asked = {"messages": [{"role": "user", "content": "x"}], "paths": "vote:12"}
        app = create_app(house_of(says(ANSWER)))
        answering = asyncio.create_task(call_async(app, "POST", CHAT, json.dumps(asked).encode()))
        while not answering.done():
            turns += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(Choice, "take", noted)
    asyncio.run(story())
    assert len(set(at[:12])) == 12


def test_chunks_are_json_whatever_is_said() -> None:
    text = 'a "b" \\ \n\t\u2028 留白 🙂 \x7f {"c": 1}'
    assert said(asyncio.run(sent(says(f"hm</think>{text}", size=2)))) == f"hm|{text}"


# ---- one write a turn ----


class Wire(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    def write(self, data: Any) -> None:
        self.told.append(bytes(data))

    def close(self) -> None:
        self.told.append("close")

    def abort(self) -> None:
        self.told.append("abort")

    def get_write_buffer_size(self) -> int:
        return 100


def test_what_is_written_in_one_turn_goes_as_one() -> None:
    async def work() -> list[list[Any]]:
        found = []
        for end in ("", "close", "abort"):
            wire = Wire()
            corked = Corked(wire, asyncio.get_running_loop())
            corked.write(b"a")
            corked.write(bytearray(b"bc"))
            assert wire.told == []
            assert corked.get_write_buffer_size() == 103
            if end:
                getattr(corked, end)()
            await asyncio.sleep(0)
            if not end:
                corked.write(b"d")
                await asyncio.sleep(0)
            found.append(wire.told)
        return found

    assert asyncio.run(work()) == [[b"abc", b"d"], [b"abc", "close"], ["abort"]]


def test_the_collector_leaves_what_stays_alone() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    with uncollected():
        assert gc.get_threshold() == COLLECTED
        assert gc.get_freeze_count() > frozen
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, 0)


# ---- who watches over an answer ----


async def _forever() -> Any:
    await asyncio.Event().wait()


async def _leaves() -> Any:
    return {"type": "http.disconnect"}


@pytest.mark.parametrize(
    ("receive", "limit", "error"),
    [(_leaves, 60.0, Gone), (_forever, 0.01, TimeoutError)],
)
def test_an_answer_is_cut_off_and_may_clear_away(receive: Any, limit: float, error: type[Exception]) -> None:
    cleared: list[bool] = []

    async def answer() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            cleared.append(True)

    async def work() -> str:
        gate = Gate(Limits(answer_s=limit))
        with pytest.raises(error):
            await gate.watch(receive, answer())
        assert gate._watchers == set()
        await asyncio.sleep(0.05)  # nothing of it reaches what comes after
        return "done"

    assert asyncio.run(work()) == "done"
    assert cleared == [True]


def test_who_leaves_as_the_answer_ends_disturbs_nobody() -> None:
    async def work() -> str:
        left = asyncio.Event()

        async def receive() -> Any:
            await left.wait()
            return {"type": "http.disconnect"}

        async def answer() -> str:
            left.set()
            await asyncio.sleep(0)  # now it is known, and not yet heard
            return "answer"

        found = await Gate(Limits()).watch(receive, answer())
        for _ in range(5):
            await asyncio.sleep(0)
        return found

    assert asyncio.run(work()) == "answer"


def test_an_end_from_outside_is_none_of_ours() -> None:
    async def work() -> None:
        gate = Gate(Limits())
        task = asyncio.create_task(gate.watch(_forever, _forever()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert gate._watchers == set()

    asyncio.run(work())

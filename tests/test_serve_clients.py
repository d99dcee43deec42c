"""A second client whose connections, streams and errors are its own: Hugging Face's InferenceClient, which is
made for other servers of this interface. OpenAI's package cannot be imported while it asks."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from serving import QWEN3, Running, ScriptedWriter, continues, house_of, running, says

from liubai.text.template import Template

pytest.importorskip("uvicorn", reason="clients are tested against a server: install liubai[serve]")

import huggingface_hub as hub
from huggingface_hub import constants, errors

THOUGHT = "Let me think.</think>\n\nIt is 留白, and 等等 🙂 too."
ANSWER = "It is 留白, and 等等 🙂 too."
ASKED: list[Any] = [{"role": "system", "content": "be short"}, {"role": "user", "content": "what is it?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests are kept away from the hub by a switch that also keeps this client away from this machine."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setitem(sys.modules, "openai", None)


def client_of(server: Running, key: str = "any") -> Any:
    return hub.InferenceClient(base_url=server.url, api_key=key, timeout=30)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.005)


def test_a_whole_answer_and_what_it_was_asked_with() -> None:
    writer = continues(THOUGHT)
    with running(house_of(writer)) as server:
        found = client_of(server).chat_completion(
            ASKED, model="qwen", max_tokens=90, seed=5, temperature=0.3, top_p=0.7, stop=["never"],
            extra_body={"think_at_least": 2},
        )  # fmt: skip
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content) == ("assistant", ANSWER)
    assert choice.message.reasoning == "Let me think."
    assert (choice.finish_reason, found.model, found.object) == ("stop", "qwen", "chat.completion")
    request = writer.requests[0]
    template = Template(writer.tokenizer, QWEN3)
    assert list(request.prompt_ids) == template.chat_ids(ASKED)
    assert (request.max_tokens, request.temperature, request.top_p) == (90, 0.3, 0.7)
    written = len(writer.tokenizer.encode(THOUGHT)) + 1  # and the end
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(request.prompt_ids), written)
    assert found.usage.total_tokens == len(request.prompt_ids) + written
    assert found["liubai"]["thinking"]["tokens"] == len(writer.tokenizer.encode("Let me think."))


def test_a_stream_is_the_whole_answer_in_pieces() -> None:
    with running(house_of(says(THOUGHT, size=1))) as server:
        client = client_of(server)
        whole = client.chat_completion(ASKED, model="qwen", seed=5)
        chunks = list(
            client.chat_completion(
                ASKED, model="qwen", seed=5, stream=True, stream_options={"include_usage": True}
            )
        )
    said = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(one.delta.reasoning or "" for one in said) == "Let me think."
    pieces = [one.delta.content for one in said if one.delta.content]
    assert "".join(pieces) == ANSWER
    assert len(pieces) > 5
    assert {one.index for one in said} == {0}
    assert [one.finish_reason for one in said if one.finish_reason] == ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert [dict(chunk.usage) for chunk in chunks if chunk.usage] == [dict(whole.usage)]
    assert not chunks[-1].choices


def test_the_likeliest_tokens() -> None:
    writer = says(THOUGHT)
    with running(house_of(writer)) as server:
        found = client_of(server).chat_completion(ASKED, model="qwen", logprobs=True, top_logprobs=2)
    entries = found.choices[0].logprobs.content
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode().strip() == ANSWER
    assert all(entry.logprob == -0.5 for entry in entries)
    assert all([one.logprob for one in entry.top_logprobs] == [-0.5, -1.5] for entry in entries)
    assert writer.requests[0].alternatives == 2


def test_several_answers() -> None:
    with running(house_of(says("a</think>one", "b</think>two", "c</think>three"))) as server:
        found = client_of(server).chat_completion(ASKED, model="qwen", n=3)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert [choice.message.content for choice in found.choices] == ["one", "two", "three"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_is_called_and_its_result_read(stream: bool) -> None:
    """The client sends back the message that it was given, as its own object."""
    call = 'Hm.</think><tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    writer = says(call, "So.</think>It rains.")
    with running(house_of(writer)) as server:
        client = client_of(server)
        options: Any = {"model": "qwen", "tools": [WEATHER], "tool_choice": "auto"}
        message: Any
        if stream:
            deltas = [chunk.choices[0] for chunk in client.chat_completion(ASKED, **options, stream=True)]
            parts = [part for one in deltas for part in one.delta.tool_calls or []]
            assert {part.index for part in parts} == {0}
            arguments = "".join(part.function.arguments for part in parts)
            function = {"name": parts[0].function.name, "arguments": arguments}
            called = {"id": parts[0].id, "type": parts[0].type, "function": function}
            message, finish = {"role": "assistant", "tool_calls": [called]}, deltas[-1].finish_reason
        else:
            choice = client.chat_completion(ASKED, **options).choices[0]
            message, finish, called = choice.message, choice.finish_reason, choice.message.tool_calls[0]
        assert finish == "tool_calls"
        assert called["function"]["name"] == "weather"
        assert called["function"]["arguments"] == '{"city": "Paris"}'
        result = {"role": "tool", "tool_call_id": called["id"], "content": "rain"}
        found = client.chat_completion([*ASKED, message, result], **options)
    assert found.choices[0].message.content == "It rains."
    prompt = writer.tokenizer.decode(writer.requests[1].prompt_ids)
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>' in prompt
    assert prompt.index("<tool_response>\nrain\n</tool_response>") > prompt.index("</tool_call>")


def test_refusals_are_the_clients_errors() -> None:
    writer = says(THOUGHT)
    with running(house_of(writer), keys=["secret"]) as server:
        for key, options, status, code in (
            ("wrong", {}, 401, "invalid_api_key"),
            ("secret", {"model": "nope"}, 404, "model_not_found"),
            ("secret", {"presence_penalty": 1.0}, 400, "unsupported_parameter"),
            ("secret", {"stream": True, "extra_body": {"temprature": 1}}, 400, "unknown_parameter"),
        ):
            with pytest.raises(errors.HfHubHTTPError) as refused:
                client_of(server, key).chat_completion(ASKED, **{"model": "qwen", **options})
            assert refused.value.response.status_code == status
            assert refused.value.response.json()["error"]["code"] == code
        assert writer.requests == []
        assert client_of(server, "secret").chat_completion(ASKED, model="qwen").choices


def test_a_stream_that_fails_is_no_whole_answer() -> None:
    async def broken() -> None:
        raise RuntimeError("secret of the house")

    heard = ""
    with running(house_of(says("</think>" + "so it goes " * 9, size=12, held=broken))) as server:
        client = client_of(server)  # which closes its streams when nobody holds it
        stream = client.chat_completion(ASKED, model="qwen", stream=True)
        with pytest.raises(errors.TextGenerationError) as failed:  # noqa: PT012
            for chunk in stream:
                heard += chunk.choices[0].delta.content or ""
    assert heard.startswith("so it goes")
    assert "secret" not in str(failed.value)


def test_who_leaves_a_stream_frees_the_writer() -> None:
    """The client for event loops, and one that does not read to the end."""

    async def forever() -> None:
        await asyncio.Event().wait()

    writer: ScriptedWriter = says("</think>" + "so it goes " * 9, size=12, held=forever)

    async def leave(server: Running) -> str:
        async with hub.AsyncInferenceClient(base_url=server.url, api_key="any", timeout=30) as client:
            async for chunk in await client.chat_completion(ASKED, model="qwen", stream=True):
                if chunk.choices[0].delta.content:
                    assert writer.in_use == 1
                    return str(chunk.choices[0].delta.content)
        raise AssertionError("nothing was said")

    with running(house_of(writer)) as server:
        assert asyncio.run(leave(server)).startswith("so it goes")
        until(lambda: writer.cancelled == 1 and writer.in_use == 0)
        until(lambda: server.server.gate.inside == 0)

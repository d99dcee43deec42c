"""Real clients on a real socket ask a real model, and leave it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from conftest import tiny_config, tiny_model
from serving import ASKED, Running, http, raw, running
from typer.testing import CliRunner

from liubai.cli import app as cli
from liubai.model.checkpoint import load, save_checkpoint
from liubai.problems import world_vocabulary
from liubai.rollout import paths as ways
from liubai.rollout.local import LocalWriter, run
from liubai.rollout.thinking import Ask
from liubai.rollout.torch_engine import TorchEngine
from liubai.seeds import derive
from liubai.serve.host import Host
from liubai.serve.house import House, Served
from liubai.serve.router import Router
from liubai.serve.schema import ChatRequest, read
from liubai.text.template import BARE
from liubai.text.tokenizer import word_level

# ---- real clients, a real socket, a real model ----


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The small world's words and a tiny model that has learned nothing."""
    folder = tmp_path_factory.mktemp("served") / "checkpoint"
    words = word_level(world_vocabulary())
    config = tiny_config(
        vocab_size=words.vocab_size,
        max_position_embeddings=512,
        bos_token_id=words.bos_id,
        eos_token_id=words.eos_id,
    )
    save_checkpoint(folder, tiny_model(0, config, scale=2.5), words, BARE)
    return Host("tiny", folder, slots=16, waiting=16, device="cpu", threads=1)


@pytest.fixture(scope="module")
def server(host: Host) -> Iterator[Running]:
    with running(
        lambda: House([Served.by(host)], router=Router.load()), before=host.start, after=host.stop
    ) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Any:
    openai = pytest.importorskip("openai", reason="needs the OpenAI client: install liubai[dev]")
    return openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)


def test_the_openai_client_asks_a_real_model(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    options: Any = {
        "model": "tiny",
        "messages": ASKED,
        "seed": 3,
        "max_tokens": 60,
        "extra_body": {"thinking_budget": 20},
    }
    one = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    again = client.chat.completions.create(**options)
    message = one.choices[0].message
    assert (message.content, message.reasoning_content) == (
        again.choices[0].message.content,
        again.choices[0].message.reasoning_content,
    )
    assert message.reasoning_content
    assert one.usage.completion_tokens_details.reasoning_tokens <= 20
    entries = one.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries).strip() == message.content
    assert all(len(entry.top_logprobs) == 3 for entry in entries)
    texts = {"content": "", "reasoning_content": ""}
    for chunk in client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            for name in texts:
                texts[name] += getattr(choice.delta, name, None) or ""
        usage = chunk.usage
    assert texts == {"content": message.content, "reasoning_content": message.reasoning_content}
    assert usage == again.usage
    other = client.chat.completions.create(**{**options, "seed": 4})
    assert other.choices[0].message.reasoning_content != message.reasoning_content


def test_the_openai_client_completes_and_is_refused(client: Any) -> None:
    import openai

    found = client.completions.create(model="tiny", prompt="3 + 4", max_tokens=8, n=2, seed=1, logprobs=1)
    assert len({choice.text for choice in found.choices}) == 2
    assert all(len(choice.logprobs.tokens) == 8 for choice in found.choices)
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=ASKED)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=ASKED, logit_bias={"1": 5})
    assert bad.value.param == "logit_bias"


@pytest.mark.parametrize(
    "paths", ["greedy", {"kind": "vote", "n": 3}, {"kind": "beam", "width": 2}, "tree:2:rollouts"]
)
def test_paths_of_a_real_model(client: Any, host: Host, paths: Any) -> None:
    """They are the very paths that the same model writes in this process."""
    found = client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=24, seed=1, extra_body={"paths": paths}
    )
    told = found.model_extra["liubai"]["paths"]
    model, words = load(host.folder)
    engine = TorchEngine(model, eos_ids=words.eos_ids, slots=16, max_length=host.max_length)
    engine.load(model.state_dict(), 0)
    writer = LocalWriter(engine, eos_ids=words.eos_ids)
    ask = Ask(
        question=ASKED[0]["content"],
        template=host.template,
        prompt_ids=tuple(host.template.prompt_ids(ASKED[0]["content"])),
        max_tokens=24,
        seed=derive(1, "choice", 0),
    )
    config = read(ChatRequest, {"messages": ASKED, "paths": paths}).way_of_paths()
    [wanted] = run(writer, [ways.answer(writer, ask, config)])
    assert (told["kind"], told["chosen"], told["tokens"]) == (
        config.kind,
        wanted.chosen,
        wanted.spent.written,
    )
    assert [(one["reasoning"], one["content"], one["answer"], one["votes"]) for one in told["list"]] == [
        (path.thought, path.content, path.answer, path.votes) for path in wanted.paths
    ]
    assert [one["score"] for one in told["list"]] == [
        path.score if path.score is None else pytest.approx(path.score, abs=1e-4) for path in wanted.paths
    ]
    message = found.choices[0].message
    assert ((message.reasoning_content or ""), message.content) == (wanted.best.thought, wanted.best.content)


def test_langchain_asks_a_real_model(server: Running) -> None:
    models = pytest.importorskip("langchain_openai", reason="needs langchain-openai: install liubai[dev]")
    model = models.ChatOpenAI(
        model="tiny", base_url=server.url, api_key="any", max_retries=0, seed=3, max_tokens=40,
        extra_body={"thinking_budget": 8}, stream_usage=True,
    )  # fmt: skip
    said = model.invoke("3 7 8 ->13")
    assert said.usage_metadata["output_tokens"] > 0
    assert "".join(part.content for part in model.stream("3 7 8 ->13")) == said.content


def test_many_clients_at_once_get_their_own_answers(server: Running, host: Host) -> None:
    """More than there are slots, each the answer that it gets alone. (The seeds are not among the few for
    which the rounding of a bigger batch decides.)"""
    httpx = pytest.importorskip("httpx")

    async def one(client: Any, seed: int) -> str:
        body = {"messages": ASKED, "seed": seed, "max_tokens": 30, "stream": True}
        text = ""
        async with client.stream("POST", f"{server.url}/chat/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        text += choice["delta"].get("reasoning") or choice["delta"].get("content") or ""
        return text

    async def all_of_them() -> tuple[list[str], list[str]]:
        async with httpx.AsyncClient(timeout=60) as client:
            alone = [await one(client, 10 + seed) for seed in range(4)]
            together = await asyncio.gather(*(one(client, 10 + seed % 4) for seed in range(28)))
        return alone, list(together)

    alone, together = asyncio.run(all_of_them())
    assert together == [alone[seed % 4] for seed in range(28)]
    assert len(set(alone)) == 4
    server.run(_until(lambda: (host.figures().in_use, host.figures().open, host._places) == (0, 0, 0)))


def test_who_is_too_many_is_told_when_to_come_back(server: Running, host: Host) -> None:
    places = server.run(_admitted(host, 31))
    try:
        link = raw(server.port, http("/v1/chat/completions", {"messages": ASKED, "n": 2}))
        answer = b""
        while b'"error"' not in answer:
            answer += link.recv(1 << 16)
    finally:
        server.run(_left(places))
    assert answer.startswith(b"HTTP/1.1 429")
    assert b"retry-after: " in answer
    assert b'"rate_limit_error"' in answer


async def _admitted(host: Host, answers: int) -> Any:
    places = host.admit(answers)
    places.__enter__()
    return places


async def _left(places: Any) -> None:
    places.__exit__(None, None, None)


@pytest.mark.parametrize("more", [b"", b"x", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 20])
def test_a_client_that_leaves_frees_its_slot_at_once(server: Running, host: Host, more: bytes) -> None:
    """In the middle of a stream, and while it waits for a whole answer; whatever it sent behind its
    request."""
    for stream in (True, False):
        before = host.figures().cancelled
        body = {"messages": ASKED, "n": 4, "max_tokens": 480, "stream": stream, "think_at_least": 400}
        link = raw(server.port, http("/v1/chat/completions", body))
        if stream:
            assert b"200 OK" in link.recv(100)
        server.run(_until(lambda: host.figures().in_use == 4))
        if more:
            link.sendall(more)
            server.run(asyncio.sleep(0.05))
        link.close()
        server.run(_until(lambda: host.figures().open == 0 and host.figures().in_use == 0))
        assert host.figures().cancelled > before
        assert host._places == 0


def test_who_sends_on_and_on_while_it_waits_is_cut_off(server: Running, host: Host) -> None:
    before = host.figures().cancelled
    body = {"messages": ASKED, "max_tokens": 480, "think_at_least": 400}
    with raw(server.port, http("/v1/chat/completions", body)) as link:
        server.run(_until(lambda: host.figures().in_use == 1))
        with suppress(ConnectionError):
            for _ in range(16):
                link.sendall(b"x" * 4096)
                server.run(asyncio.sleep(0.001))
        server.run(_until(lambda: host.figures().in_use == 0))
        with suppress(ConnectionError):
            assert link.recv(1) == b""
    assert host.figures().cancelled > before


def test_what_comes_behind_a_request_is_answered_after_it(server: Running) -> None:
    body = {"messages": ASKED, "max_tokens": 20}
    with raw(server.port, http("/v1/chat/completions", body) * 3) as link:
        got = b""
        while got.count(b'"object":"chat.completion"') < 3:
            got += (more := link.recv(1 << 16))
            assert more


async def _until(true: Any) -> None:
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to be")


# ---- the command ----


def test_the_command_names_the_models_of_both_ways(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    async def serve(hosts: Any, door: Any, limits: Any, **more: Any) -> int:
        told.update(more, names=[one.name for one in hosts])
        return 0

    monkeypatch.setattr("liubai.serve.server.serve", serve)
    folder = str(host.folder)
    asked = ["serve", folder, folder, "--name", "a", "--name", "b", "--fast", "a", "--think", "b"]
    result = CliRunner().invoke(cli, [*asked, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert (told["names"], told["fast"], told["think"]) == (["a", "b"], "a", "b")

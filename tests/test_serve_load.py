"""A crowd of clients at the command's own server: everybody gets the answer that he would get alone, and when
they have gone nothing of them is left. The sockets, the processes and the model (a tiny one) are real."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config, tiny_model
from serving import http as post

from liubai.model.checkpoint import save_checkpoint
from liubai.problems import world_vocabulary
from liubai.text.template import BARE
from liubai.text.tokenizer import word_level

pytest.importorskip("uvicorn", reason="the server needs uvicorn: install liubai[serve]")
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")

ROOT = Path(__file__).parent.parent
CLIENTS, ROUNDS, SLOTS = 40, 5, 8
GONE = "liubai_disconnected_total"
#: Questions, with seeds for which every draw falls at least 4 · 10⁻⁵ from the border between two tokens:
#: within some 10⁻⁷ of it, the rounding of a bigger batch decides.
ASKED = {
    "3 7 8 ->13": (6, 11, 15),
    "9 6 4 ->33": (8, 11, 24),
    "3 + 4": (4, 8, 21),
    "5 5 5 ->15": (12, 20, 24),
}
BODIES: list[dict[str, Any]] = [
    {
        "messages": [{"role": "user", "content": question}],
        "seed": seed,
        "max_tokens": 60,
        "think_at_least": 25,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    for question, seeds in ASKED.items()
    for seed in seeds
]


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    """Its port, and the number of its process."""
    folder = tmp_path_factory.mktemp("served") / "checkpoint"
    words = word_level(world_vocabulary())
    config = tiny_config(
        vocab_size=words.vocab_size,
        max_position_embeddings=256,
        bos_token_id=words.bos_id,
        eos_token_id=words.eos_id,
    )
    save_checkpoint(folder, tiny_model(0, config, scale=2.5), words, BARE)
    options = ["--port", "0", "--device", "cpu", "--slots", str(SLOTS), "--waiting", "120", "--name", "tiny"]
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from liubai.cli import main; sys.exit(main())", "serve",
         str(folder), *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading tiny\n"
        found = re.match(r"serving tiny at http://127\.0\.0\.1:(\d+) ", process.stdout.readline())
        assert found is not None
        yield int(found[1]), process.pid
    finally:
        process.terminate()
        out, _ = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "")


class Client:
    """Asks again and again on one connection, until it hangs up; then on a new one."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.link: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: dict[str, Any], leave_after: int | None = None, abort: bool = False) -> str:
        """All that was said, in one text that only grows. ``leave_after`` so many characters of it the client
        hangs up: it closes the connection, or resets it."""
        if self.link is None:
            self.link = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.link
        writer.write(post("/v1/chat/completions", body))
        status = await reader.readline() if leave_after != 0 else b""
        assert status in (b"", b"HTTP/1.1 200 OK\r\n"), status
        told, last = "", ""
        while leave_after is None or len(told) < leave_after:
            line = (await reader.readline()).rstrip(b"\n")
            assert line or not reader.at_eof(), "the stream was cut off"
            if line == b"data: [DONE]":
                await reader.readuntil(b"0\r\n\r\n")
                return told
            if not line.startswith(b"data: "):
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                for kind in ("reasoning", "content"):
                    if piece := choice["delta"].get(kind):
                        told += piece if kind == last else f"<{kind}>{piece}"
                        last = kind
                if choice["finish_reason"]:
                    told += f"<{choice['finish_reason']}>"
            if chunk["usage"]:
                told += f"<{chunk['usage']['completion_tokens']} tokens>"
        await self.leave(abort)
        return told

    async def leave(self, abort: bool = False) -> None:
        if self.link is None:
            return
        (_, writer), self.link = self.link, None
        if abort:
            writer.transport.abort()
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


def measured(port: int) -> dict[str, float]:
    """Of /metrics, those without labels and those of the one model."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    link.request("GET", "/metrics", headers={"Connection": "close"})
    lines = link.getresponse().read().decode().splitlines()
    link.close()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name.partition("{")[0]: float(value) for name, value in pairs}


def left_open(pid: int) -> dict[str, int]:
    """Of the server: open files and threads; of the process of its model: open files."""
    (model,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
        "files of the model": len(os.listdir(f"/proc/{model}/fd")),
    }


def idle(port: int, pid: int) -> dict[str, int]:
    """What is open once nobody is inside any more: the same twice in a row."""
    names = ("liubai_slots_in_use", "liubai_waiting", "liubai_requests_in_flight")
    deadline, before = time.monotonic() + 60, dict[str, int]()
    while True:
        now, figures = left_open(pid), measured(port)
        if now == before and not any(figures[name] for name in names):
            return now
        assert time.monotonic() < deadline, (now, {name: figures[name] for name in names})
        before = now
        time.sleep(0.2)


async def crowd(port: int, alone: list[str]) -> tuple[int, float]:
    """How many hung up, and the most that waited at a time. Every odd client hangs up, each time somewhere
    else; it must have heard the beginning of the answer, everybody else the whole of it."""
    hung_up, waiting, over = 0, 0.0, False

    async def one(number: int) -> None:
        nonlocal hung_up
        client, draw = Client(port), random.Random(number)
        for _ in range(ROUNDS):
            which = draw.randrange(len(BODIES))
            whole = alone[which]
            leave = draw.randrange(len(whole)) if number % 2 else None
            told = await client.ask(BODIES[which], leave, abort=draw.random() < 0.5)
            assert whole.startswith(told) if number % 2 else whole == told, (BODIES[which], told, whole)
            hung_up += number % 2
        await client.leave()

    async def watch() -> None:
        nonlocal waiting
        while not over:
            waiting = max(waiting, (await asyncio.to_thread(measured, port))["liubai_waiting"])
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*map(one, range(CLIENTS)))
    over = True
    await watching
    return hung_up, waiting


def test_a_crowd_gets_its_answers_and_leaves_nothing_behind(serving: tuple[int, int]) -> None:
    port, pid = serving

    async def one_by_one() -> list[str]:
        client = Client(port)
        found = [await client.ask(body) for body in BODIES]
        await client.leave()
        return found

    alone = asyncio.run(one_by_one())
    assert len(set(alone)) == len(BODIES)
    assert all(text.endswith(" tokens>") and len(text) > 60 for text in alone)
    before, gone = idle(port, pid), measured(port).get(GONE, 0)
    hung_up, waiting = asyncio.run(crowd(port, alone))
    assert hung_up == CLIENTS // 2 * ROUNDS
    assert waiting > 0  # there were more of them than slots
    assert idle(port, pid) == before
    # an answer may have been written to its end before the server heard that nobody listens
    assert 0 < measured(port)[GONE] - gone <= hung_up
    assert asyncio.run(one_by_one()) == alone

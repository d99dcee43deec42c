"""``python -m bench.serve CHECKPOINT``: many streaming clients against ``liubai serve``, over real sockets.

A closed loop: each client always has one streamed answer open. Every answer is checked: it must end with
its finish reason and ``[DONE]``, and be, word for word, what the engine alone writes to the same question
with the same seed. Memory is that of all the server's processes.

``--llama SERVER`` runs the same clients against llama.cpp's ``llama-server`` with the exported checkpoint, at
growing numbers of clients, each side at its better number of threads.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.job import environment
from bench.serve_host import PROMPTS, Load, measured, processor_time, quantile

PAIRS = 256  #: different questions with their seeds
STEP = 57  #: from a client's question to its next: by and by all of them, and each of the prompts as often
PATIENCE_S = 10.0  #: that a stream may be silent


@dataclass(slots=True)
class Seen:
    """What the clients of one run saw. Times in seconds."""

    answers: int = 0
    tokens: int = 0
    pieces: int = 0
    first: list[float] = field(default_factory=list)
    expected: dict[int, list[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    counting: bool = False
    heard: dict[int, float] = field(default_factory=dict)  #: when each client last heard anything


async def client(port: int, number: int, max_tokens: int, seen: Seen, exact: bool) -> None:
    """One after the other, for ever."""
    at = number
    while True:
        pair, at = at % PAIRS, at + STEP
        body = json.dumps(
            {
                "model": "default",
                "messages": [{"role": "user", "content": PROMPTS[pair % len(PROMPTS)]}],
                "stream": True,
                "stream_options": {"include_usage": True},
                "seed": pair,
                "temperature": 1.0,
                "max_tokens": max_tokens,
                # llama.cpp's own defaults would cut the distribution
                **({} if exact else {"top_k": 0, "top_p": 1.0, "min_p": 0.0}),
            }
        ).encode()
        asked = seen.heard[number] = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        try:
            writer.write(head.encode() + body)
            thought, answer, done, finish, tokens = "", "", False, None, 0
            if b" 200 " not in (status := await reader.readline()):
                seen.wrong.append(f"{status.decode(errors='replace').strip()} {await reader.read(400)!r}")
                await asyncio.sleep(0.1)
                continue
            async for line in reader:
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    done = True
                    continue
                seen.heard[number] = time.perf_counter()
                part = json.loads(line[6:])
                silent = not thought and not answer
                tokens = (part.get("usage") or {}).get("completion_tokens", tokens)
                for choice in part["choices"]:
                    delta = choice["delta"]
                    thought += delta.get("reasoning_content") or ""
                    answer += delta.get("content") or ""
                    finish = choice["finish_reason"] or finish
                if silent and (thought or answer) and seen.counting:
                    seen.first.append(time.perf_counter() - asked)
                seen.pieces += seen.counting
            said = words(f"{thought} {answer}")
            if not done or finish not in ("stop", "length"):
                seen.wrong.append(f"an answer broke off: {finish} {answer[-80:]!r}")
            elif seen.expected and said != seen.expected[pair]:
                seen.wrong.append(f"not what the engine writes:\n{seen.expected[pair]!r}\n{said!r}")
            if seen.counting:
                seen.answers += 1
                seen.tokens += tokens
        finally:
            writer.close()


@contextlib.contextmanager
def running(command: list[str], threads: int, ready: str) -> Iterator[subprocess.Popen[str]]:
    """A server that has said that it is ready."""
    env = {**environment(threads), "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, text=True)
        try:
            for _ in range(1200):
                log.seek(0)
                if re.search(ready, said := log.read()):
                    break
                if process.poll() is not None:
                    sys.exit(f"bench: the server ended: {said[-2000:]}")
                time.sleep(0.1)
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def memory_mb(pid: int) -> float:
    """Resident megabytes of a process and its children."""
    return sum(map(resident_mb, [pid, *below(pid)]))


def resident_mb(pid: int) -> float:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return 0.0


def below(pid: int) -> list[int]:
    """The processes that it has started, and those that these have."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        found.append(one)
    return found[1:]


def spent(pid: int) -> tuple[float, float, float]:
    """Seconds of a processor so far: of a server's own process, of those below it (its model), and ours."""
    with contextlib.suppress(OSError):
        return processor_time(pid), sum(map(processor_time, below(pid))), time.process_time()
    return 0.0, 0.0, time.process_time()


async def load(
    port: int,
    pid: int,
    clients: int,
    seconds: float,
    max_tokens: int,
    exact: bool,
    expected: dict[int, list[str]],
) -> dict[str, float]:
    seen = Seen(expected=expected)
    tasks = [asyncio.create_task(client(port, i, max_tokens, seen, exact)) for i in range(clients)]
    await asyncio.sleep(min(10.0, seconds / 4))
    seen.counting, began, memory, before = True, time.perf_counter(), [memory_mb(pid)], spent(pid)
    while time.perf_counter() - began < seconds:
        await asyncio.sleep(min(5.0, seconds / 10))
        memory.append(memory_mb(pid))
    passed = time.perf_counter() - began
    http, model, ours = (after - cpu for after, cpu in zip(spent(pid), before, strict=True))
    broken = [task for task in tasks if task.done()]
    now = time.perf_counter()
    stalled = sum(now - heard > PATIENCE_S for heard in seen.heard.values())
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            seen.wrong.append(repr(result))
    for what in seen.wrong[:5]:
        print("WRONG:", what, file=sys.stderr)
    third = max(1, len(memory) // 3)
    return {
        "tokens_per_s": seen.tokens / passed,
        "answers": seen.answers,
        "wrong": len(seen.wrong) + len(broken),
        "stalled": stalled,
        "pieces_per_answer": seen.pieces / max(1, seen.answers),
        "http_s_per_1000_answers": 1000 * http / max(1, seen.answers),
        "http_s_per_1000_tokens": 1000 * http / max(1, seen.tokens),
        "model_s_per_1000_tokens": 1000 * model / max(1, seen.tokens),
        "http_cores": http / passed,
        "model_cores": model / passed,
        "client_cores": ours / passed,
        "first_p50_s": quantile(seen.first, 50) if len(seen.first) > 1 else float("nan"),
        "first_p95_s": quantile(seen.first, 95) if len(seen.first) > 1 else float("nan"),
        "memory_mb": statistics.fmean(memory[:third]),
        "memory_grew_mb": statistics.fmean(memory[-third:]) - statistics.fmean(memory[:third]),
    }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def command_of(checkpoint: str, port: int, clients: int, max_tokens: int, threads: int) -> list[str]:
    command = [sys.executable, "-m", "liubai.cli", "serve", checkpoint, "--name", "default"]
    command += ["--port", str(port), "--threads", str(threads), "--slots", str(max(clients, 8))]
    return [*command, "--max-length", str(max_tokens + 100)]


def ours(
    checkpoint: str,
    clients: int,
    seconds: float,
    max_tokens: int,
    threads: int,
    expected: dict[int, list[str]],
) -> dict[str, float]:
    port = free_port()
    command = command_of(checkpoint, port, clients, max_tokens, threads)
    with running(command, threads, f"127.0.0.1:{port}") as server:
        return asyncio.run(load(port, server.pid, clients, seconds, max_tokens, True, expected))


def theirs(
    binary: str, gguf: str, clients: int, seconds: float, max_tokens: int, threads: int
) -> dict[str, float]:
    port = free_port()
    command = [binary, "-m", gguf, "--port", str(port), "-np", str(clients), "-t", str(threads)]
    command += [
        "-c",
        str(clients * (max_tokens + 100)),
        "--jinja",
        "--reasoning-format",
        "none",
        "--no-webui",
    ]
    with running(command, threads, "server is listening|listening on") as server:
        return asyncio.run(load(port, server.pid, clients, seconds, max_tokens, False, {}))


def offline_answers(checkpoint: str, max_tokens: int) -> dict[int, list[str]]:
    """What the engine writes by itself: in a process of its own, for it imports torch."""
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from bench.serve import PAIRS, PROMPTS\n"
        "from liubai.model.checkpoint import load\n"
        "from liubai.rollout.engine import Request, generate\n"
        "from liubai.rollout.torch_engine import TorchEngine\n"
        "from liubai.seeds import derive\n"
        "from liubai.text.template import template_for\n"
        "folder, most = Path(sys.argv[1]), int(sys.argv[2])\n"
        "model, tokenizer = load(folder)\n"
        "template = template_for(tokenizer, folder)\n"
        "prompts = [tuple(template.prompt_ids(PROMPTS[i % len(PROMPTS)])) for i in range(PAIRS)]\n"
        "engine = TorchEngine(model, eos_ids=tokenizer.eos_ids, slots=128, max_length=most + 100)\n"
        "engine.load(model.state_dict(), 0)\n"
        "requests = [Request(id=i, prompt_ids=p, max_tokens=most, seed=derive(i, 'choice', 0))\n"
        "            for i, p in enumerate(prompts)]\n"
        "samples = generate(engine, requests)\n"
        "print(json.dumps([tokenizer.decode(s.completion_ids, skip_special=True) for s in samples]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, checkpoint, str(max_tokens)],
        env=environment(1), stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return {pair: words(text) for pair, text in enumerate(json.loads(done.stdout))}


def words(text: str) -> list[str]:
    """Without tags and spaces, which the API takes away."""
    return re.sub(r"</?(think|answer)>", " ", text).split()


def show(name: str, result: dict[str, float]) -> None:
    print(f"{name:24}", "  ".join(f"{key} {value:,.4g}" for key, value in result.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--served", action="store_true", help="without the engine alone beside it")
    parser.add_argument("--llama", metavar="SERVER", help="the program llama-server")
    parser.add_argument("--at", default="1,4,16,64", help="numbers of clients beside llama.cpp")
    given = parser.parse_args()
    if given.llama:
        beside_llama(given)
        return
    expected = offline_answers(given.checkpoint, given.max_tokens)
    if given.served:
        result = ours(
            given.checkpoint, given.clients, given.seconds, given.max_tokens, given.threads, expected
        )
        show(f"served, {given.threads} threads", result)
        return
    alone: dict[int, list[float]] = {1: [], 2: []}

    def offline() -> None:
        for threads, rates in alone.items():
            result = measured(
                Load(given.checkpoint, given.clients, 20.0, given.max_tokens, threads), "offline"
            )
            show(f"offline, {threads} threads", result)
            rates.append(result["tokens_per_s"])

    offline()
    result = ours(given.checkpoint, given.clients, given.seconds, given.max_tokens, given.threads, expected)
    show(f"served, {given.threads} threads", result)
    offline()
    for threads, rates in alone.items():
        ratio = result["tokens_per_s"] / statistics.fmean(rates)
        print(f"served / offline with {threads} threads: {ratio:.3f} ({given.clients} clients)")


def beside_llama(given: argparse.Namespace) -> None:
    from liubai.model.export import export

    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "model.gguf"
        export(given.checkpoint, "gguf", gguf)
        for clients in map(int, given.at.split(",")):
            best: dict[str, float] = {}
            for threads in (1, 2):
                mine = ours(given.checkpoint, clients, given.seconds, given.max_tokens, threads, {})
                other = theirs(given.llama, str(gguf), clients, given.seconds, given.max_tokens, threads)
                show(f"liubai {clients}, {threads} threads", mine)
                show(f"llama.cpp {clients}, {threads}", other)
                best["liubai"] = max(best.get("liubai", 0.0), mine["tokens_per_s"])
                best["llama.cpp"] = max(best.get("llama.cpp", 0.0), other["tokens_per_s"])
            print(f"| {clients} | {best['liubai']:,.0f} | {best['llama.cpp']:,.0f} |", flush=True)


if __name__ == "__main__":
    main()

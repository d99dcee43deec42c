"""``python -m bench.serve_host CHECKPOINT``: what it costs to stream to many clients at once.

The same closed loop twice: CLIENTS always have an answer open, and ask for the next when it ends. *Offline*
they are requests of an engine in one process; *streamed* they are coroutines that listen to a
:class:`liubai.serve.host.Host`, token by token. Both are measured over the same seconds with the same number
of threads, in turns, so that a machine that grows warm or busy does so for both. HTTP is not part of it.

``tokens_per_cpu_s`` is by the processor time of the process that has the model; ``server_cpu`` are the cores
that the other one takes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.job import environment

PROMPTS = ("make 3 8 9 ->29", "total a 3 b 7 c 2 d 9", "solve 3 * x + 2 = 23", "17.36 or 17.9")


@dataclass(frozen=True, slots=True)
class Load:
    checkpoint: str
    clients: int
    seconds: float
    max_tokens: int
    threads: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("offline", "streamed", "silent"), help="one measurement, as JSON")
    given = parser.parse_args()
    load = Load(given.checkpoint, given.clients, given.seconds, given.max_tokens, given.threads)
    if given.only == "offline":
        print(json.dumps(offline(load)))
    elif given.only:
        print(json.dumps(asyncio.run(streamed(load, given.only == "streamed"))))
    else:
        compare(load, given.rounds)


def compare(load: Load, rounds: int) -> None:
    rates: dict[str, list[float]] = {"offline": [], "streamed": []}
    for number in range(rounds):
        for kind in rates if number % 2 == 0 else reversed(rates):
            result = measured(load, kind)
            rates[kind].append(result["tokens_per_s"])
            print(kind, " ".join(f"{name} {value:,.4g}" for name, value in result.items()), flush=True)
    offline_rate, streamed_rate = (statistics.median(rates[kind]) for kind in ("offline", "streamed"))
    print(f"streamed / offline: {streamed_rate / offline_rate:.3f} ({load.clients} clients)")


def measured(load: Load, kind: str) -> dict[str, float]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(load).items()][1:]
    command = [sys.executable, "-m", "bench.serve_host", load.checkpoint, *options, "--only", kind]
    # the same for both: threads that wait do not spin
    env = {**environment(load.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def offline(load: Load) -> dict[str, float]:
    import torch

    from liubai.model.checkpoint import load as load_model
    from liubai.rollout.engine import Request
    from liubai.rollout.torch_engine import TorchEngine
    from liubai.text.template import template_for

    torch.set_num_threads(load.threads)
    folder = Path(load.checkpoint)
    model, tokenizer = load_model(folder)
    template = template_for(tokenizer, folder)
    prompts = [tuple(template.prompt_ids(text)) for text in PROMPTS]
    longest = max(map(len, prompts)) + load.max_tokens
    engine = TorchEngine(model, eos_ids=tokenizer.eos_ids, slots=load.clients, max_length=longest)
    engine.load(model.state_dict(), 0)
    asked = tokens = 0
    cpu = 0.0

    def more(count: int) -> None:
        nonlocal asked
        for _ in range(count):
            prompt = prompts[asked % len(prompts)]
            engine.submit([Request(id=asked, prompt_ids=prompt, max_tokens=load.max_tokens, seed=asked)])
            asked += 1

    more(load.clients)
    settled, started = time.perf_counter(), 0.0
    while True:
        ended = engine.step()
        more(len(ended))
        now = time.perf_counter()
        if not started and now - settled > load.seconds / 10:
            started, cpu = now, time.process_time()
        elif started:
            tokens += engine.in_use + len(ended)  # a token for each that was being written
            if now - started > load.seconds:
                cpu = time.process_time() - cpu
                return {"tokens_per_s": tokens / (now - started), "tokens_per_cpu_s": tokens / cpu}


async def streamed(load: Load, listens: bool) -> dict[str, float]:
    from liubai.rollout.engine import Request
    from liubai.rollout.writer import Piece
    from liubai.serve.host import Host

    folder = Path(load.checkpoint)
    host = Host("bench", folder, slots=load.clients, max_length=load.max_tokens + 100, threads=load.threads)
    await host.start()
    prompts = [tuple(host.template.prompt_ids(text)) for text in PROMPTS]
    first: list[float] = []  # seconds to the first token
    gaps: list[float] = []  # seconds between pieces
    pieces = asked = 0

    async def client() -> None:
        nonlocal asked, pieces
        while True:
            seed, asked = asked, asked + 1
            before = time.perf_counter()
            heard_any = False

            def heard(_: Piece) -> None:
                nonlocal before, heard_any, pieces
                now = time.perf_counter()
                (gaps if heard_any else first).append(now - before)
                heard_any, before = True, now
                pieces += 1

            prompt = prompts[seed % len(prompts)]
            request = Request(id=0, prompt_ids=prompt, max_tokens=load.max_tokens, seed=seed)
            await host.write(request, heard if listens else None)

    tasks = [asyncio.create_task(client()) for _ in range(load.clients)]
    await asyncio.sleep(load.seconds / 10)
    first.clear()
    gaps.clear()
    pieces, tokens, cpu = 0, host.figures().tokens, time.process_time()
    assert host._process is not None
    theirs = processor_time(host._process.pid)
    started = time.perf_counter()
    await asyncio.sleep(load.seconds)
    passed = time.perf_counter() - started
    tokens, cpu = host.figures().tokens - tokens, time.process_time() - cpu
    theirs = processor_time(host._process.pid) - theirs
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await host.stop()
    found = {"tokens_per_s": tokens / passed, "tokens_per_cpu_s": tokens / theirs}
    found |= {"pieces_per_s": pieces / passed, "server_cpu": cpu / passed}
    if first and gaps:
        found |= {"first_p50_s": quantile(first, 50), "first_p95_s": quantile(first, 95)}
        found |= {"gap_p50_s": quantile(gaps, 50), "gap_p95_s": quantile(gaps, 95)}
    return found


def processor_time(pid: int) -> float:
    """Seconds that another process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def quantile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

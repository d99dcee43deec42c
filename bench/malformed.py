"""``python -m bench.malformed URL [--count 10000]``: malformed requests to a server; only 4xx may come back.

URL is that of ``liubai serve``, for example http://127.0.0.1:8000. Requests are mutants of good ones by a
seeded generator: a byte cut out or put in, another type in some place, half a body, noise. A mutant that is
still a good request is answered (with one token); everything else must be refused with OpenAI's error object.
The server must be as healthy afterwards as before, and its memory is shown where /proc has it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PATHS = ("/v1/chat/completions", "/v1/completions")
WRONG = [
    None,
    True,
    -1,
    0,
    1e308,
    2**70,
    "",
    "x",
    "\u0000",
    "留",
    [],
    {},
    [[]],
    [None],
    {"a": {"b": []}},
    ["x"] * 50,
]
CUTS = [
    b"",
    b'"',
    b"\xff",
    b"\xed\xa0\x80",
    b"{",
    b"]",
    b"\\",
    b"\\ud800",
    b"\x00",
    b"NaN",
    b",",
    b"9" * 50,
    b"[" * 900,
]


def good(path: str) -> dict[str, Any]:
    shared = {"temperature": 0.5, "n": 1, "stop": ["x"], "seed": 1, "max_tokens": 1, "user": "u"}
    if path == "/v1/completions":
        return {"prompt": "3 4 5", "logprobs": 1, "echo": False, **shared}
    return {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "3 4 5"}]},
            {"role": "assistant", "content": None},
            {"role": "user", "content": "3 4 5"},
        ],
        "logprobs": True,
        "top_logprobs": 1,
        "stream_options": {"include_usage": True},
        "thinking": {"type": "enabled", "budget_tokens": 1},
        "paths": {"kind": "sample", "n": 1},
        "metadata": {"a": "b"},
        **shared,
    }


def changed(value: Any, draw: random.Random) -> Any:
    """One place of it made wrong."""
    if draw.random() < 0.15 or not isinstance(value, dict | list) or not value:
        return draw.choice(WRONG)
    if isinstance(value, dict):
        key = draw.choice(list(value))
        name = draw.choice([key, key, key, key + "x", "é", "__class__", ""])
        return {**value, name: changed(value[key], draw)}
    at = draw.randrange(len(value))
    return [*value[:at], changed(value[at], draw), *value[at + 1 :]]


def mutant(path: str, draw: random.Random) -> bytes:
    value = good(path)
    for _ in range(draw.randint(0, 3)):
        value = changed(value, draw)
        if not isinstance(value, dict):
            break
    body = json.dumps(value).encode()
    kind = draw.random()
    if kind < 0.45:
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(body) + 1)
            body = body[:at] + draw.choice(CUTS) + body[at + draw.randrange(3) :]
    elif kind < 0.55:
        body = body[: draw.randrange(len(body) + 1)]
    elif kind < 0.6:
        body = draw.randbytes(draw.randrange(300))
    return body


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.malformed")
    parser.add_argument("url")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--key", default=os.environ.get("LIUBAI_API_KEY"))
    parser.add_argument("--pid", type=int, help="of the server, to watch its memory")
    options = parser.parse_args()
    at = urlsplit(options.url)
    draw = random.Random(options.seed)
    headers = {"Content-Type": "application/json"}
    if options.key:
        headers["Authorization"] = f"Bearer {options.key}"
    statuses: Counter[int] = Counter()
    wrong = 0
    link = http.client.HTTPConnection(at.hostname or "127.0.0.1", at.port, timeout=60)
    before, started = memory(options.pid), time.monotonic()
    for _ in range(options.count):
        path = draw.choice(PATHS)
        body = mutant(path, draw)
        try:
            link.request("POST", path, body, headers)
            response = link.getresponse()
            data = response.read()
        except (http.client.HTTPException, OSError):
            link.close()  # the server may close after an error; ask again on a new connection
            link.request("POST", path, body, headers)
            response = link.getresponse()
            data = response.read()
        statuses[response.status] += 1
        if response.status != 200 and not (400 <= response.status < 500 and fine(data)):
            wrong += 1
            print(f"{response.status} for {body[:200]!r}: {data[:200]!r}", file=sys.stderr)
    link.request("GET", "/health", headers=headers)
    healthy = link.getresponse().status == 200
    seconds = time.monotonic() - started
    told = ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items()))
    print(f"{options.count} requests in {seconds:.1f} s: {told}; wrong: {wrong}; healthy after: {healthy}")
    if options.pid:
        print(f"memory of the server: {before:.0f} MB before, {memory(options.pid):.0f} MB after")
    return 0 if healthy and not wrong else 1


def fine(data: bytes) -> bool:
    """Is it OpenAI's error object, and nothing else?"""
    try:
        error = json.loads(data)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return set(error) == {"message", "type", "param", "code"} and b"Traceback" not in data


def memory(pid: int | None) -> float:
    """Resident, in MB."""
    if pid is None:
        return 0.0
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    sys.exit(main())

"""``python -m bench.malformed URL [--count 10000]``: malformed requests, until so many were refused.

URL is that of ``liubai serve``, for example http://127.0.0.1:8000. Requests are mutants of good ones by a
seeded generator: a byte cut out or put in, another type in some place, half a body, noise; one in 200 is
nearly as long as a server reads, of a form that is slow for whoever looks at it twice. A mutant that is still
a good request may be answered (with one token) and is not counted; everything else must be refused with
OpenAI's error object. The server must be as healthy afterwards as before; the slowest reply and, where /proc
has it, the server's memory are shown.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PATHS = ("/v1/chat/completions", "/v1/completions")
#: Bytes of a large body: nearly all that a server reads if nobody says otherwise (1 MiB).
LARGE, SELDOM = 1_000_000, 200
#: So many wrong replies are enough to see.
ENOUGH = 50
WRONG: list[Any] = [
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


#: What a good request has, always; and what it may have, in groups that need each other.
NEEDED: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "3 4 5", "max_tokens": 1},
    "/v1/chat/completions": {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "3 4 5"}]},
            {"role": "assistant", "content": None},
            {"role": "user", "content": "3 4 5"},
        ],
        "max_tokens": 1,
    },
}
SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0.5, "top_p": 0.9},
    {"n": 1, "seed": 1},
    {"stop": ["x"]},
    {"user": "u", "model": None},
    {"stream": False},
    {"stream": True, "stream_options": {"include_usage": True}},
]
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [*SAMPLED, {"logprobs": 1}, {"echo": False}],
    "/v1/chat/completions": [
        *SAMPLED,
        {"logprobs": True, "top_logprobs": 1},
        {"thinking": {"type": "enabled", "budget_tokens": 1}},
        {"thinking_budget": 1, "think_at_least": 1},
        {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": True}},
        {"paths": {"kind": "sample", "n": 1}},
        {"paths": "greedy"},
        {"metadata": {"a": "b"}},
        {"route": "auto"},
        {"use_tools": ["calculator"]},
        {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "auto"},
        {
            "messages": [
                {"role": "user", "content": "3 4 5"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c", "content": "r"},
            ]
        },
    ],
}


def good(path: str, draw: random.Random) -> dict[str, Any]:
    """With a few of the options: a server that has no tools, say, refuses only those that ask for them."""
    made = dict(NEEDED[path])
    for group in draw.sample(OPTIONS[path], draw.randint(0, 4)):
        made |= group
    return made


def _asks(content: str, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 1, **options}


def _says(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "content": None, **fields}], "max_tokens": 1}


#: Bodies of nearly ``LARGE`` bytes, by what they are made of.
HUGE: dict[str, Callable[[], dict[str, Any]]] = {
    "newlines": lambda: _asks("\n" * (LARGE // 2), route="auto"),
    "tags": lambda: _asks("<think></think><tool_call></tool_call>" * (LARGE // 40), route="auto"),
    "backslashes": lambda: _asks('\\"' * (LARGE // 4)),
    "parts": lambda: {"messages": [{"role": "user", "content": [{"type": "text"}] * (LARGE // 18)}]},
    "messages of numbers": lambda: {"messages": [1] * (LARGE // 2)},
    "empty messages": lambda: {"messages": [{}] * (LARGE // 3)},
    "prompts of nothing": lambda: {"prompt": [None] * (LARGE // 5)},
    "prompts of nobody": lambda: {"prompt": [[-1]] * (LARGE // 5)},
    "unknown names": lambda: _asks("3 4 5", **{f"x{i}": 1 for i in range(LARGE // 13)}),
    "stops": lambda: _asks("3 4 5", stop=["x"] * (LARGE // 4)),
    "thoughts": lambda: _says(reasoning_content="3 4 5 " * (LARGE // 7)),
    "calls": lambda: _says(
        tool_calls=[{**CALL, "function": {"name": "f", "arguments": "[" * (LARGE - 200)}}]
    ),
    "functions": lambda: _asks(
        "3 4 5",
        tools=[{"type": "function", "function": {**FUNCTION, "description": "d " * (LARGE // 2 - 200)}}],
    ),
}


def large(draw: random.Random) -> tuple[str, str, bytes]:
    """What it is made of, its path, and the body."""
    what = draw.choice(list(HUGE))
    body = HUGE[what]()
    return what, PATHS["prompt" in body], _packed(body)


def _packed(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


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
    value: Any = good(path, draw)
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
    parser.add_argument("--count", type=int, default=10_000, help="of requests that are refused")
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
    sent = refused = wrong = 0
    slowest = (0.0, "none")
    link = http.client.HTTPConnection(at.hostname or "127.0.0.1", at.port, timeout=60)
    before, started = memory(options.pid), time.monotonic()
    while refused < options.count and wrong < ENOUGH:
        what, path = "a mutant", draw.choice(PATHS)
        if draw.randrange(SELDOM):
            body = mutant(path, draw)
        else:
            what, path, body = large(draw)
        asked = time.monotonic()
        try:
            status, data = post(link, path, body, headers)
        except (http.client.HTTPException, OSError) as error:
            status, data = 0, repr(error).encode()
        slowest = max(slowest, (time.monotonic() - asked, what))
        sent += 1
        statuses[status] += 1
        if status in (401, 429, 503):
            print(f"the server does not read requests: {status}, {data[:200]!r}", file=sys.stderr)
            return 1
        refused += 400 <= status < 500 and fine(data)
        if not (whole(data) if status == 200 else 400 <= status < 500 and fine(data)):
            wrong += 1
            print(f"{status} for {what}, {body[:200]!r}: {data[:200]!r}", file=sys.stderr)
    seconds = time.monotonic() - started
    healthy = False
    try:
        link.request("GET", "/health", headers=headers)
        healthy = link.getresponse().status == 200
    except (http.client.HTTPException, OSError) as error:
        print(f"no answer to /health: {error!r}", file=sys.stderr)
    told = ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items()))
    print(f"{refused} refused of {sent} requests in {seconds:.1f} s: {told}; wrong: {wrong}")
    print(f"slowest reply: {slowest[0]:.2f} s ({slowest[1]}); healthy after: {healthy}")
    if options.pid:
        print(f"memory of the server: {before:.0f} MB before, {memory(options.pid):.0f} MB after")
    return 0 if healthy and not wrong else 1


def post(
    link: http.client.HTTPConnection, path: str, body: bytes, headers: dict[str, str]
) -> tuple[int, bytes]:
    """Status and body of the response. A server may close the connection after an error: then once more on a
    new one."""
    for last in (False, True):
        try:
            link.request("POST", path, body, headers)
            response = link.getresponse()
            return response.status, response.read()
        except TimeoutError:
            link.close()
            raise
        except (http.client.HTTPException, OSError):
            link.close()
            if last:
                raise
    raise AssertionError


def whole(data: bytes) -> bool:
    """Is it an answer, in one object or as a stream that came to its end?"""
    if data.startswith(b"data: "):
        return data.endswith(b"data: [DONE]\n\n")
    try:
        return bool(json.loads(data)["choices"])
    except (ValueError, KeyError, TypeError):
        return False


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

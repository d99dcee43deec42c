"""Who may come in, and what every response carries: the outermost layer of the server.

Nothing that goes wrong further inside gets past it: a client is told that there was an error, the log which
kind of error and where.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any

from liubai.serve.errors import Refused, refusal_of
from liubai.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: The page may load its own files and talk to its own server, and nothing else; text is never made HTML.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
#: Headers with which OpenAI's own clients say who they are. A browser asks for each of them.
CLIENT = re.compile(r"x-stainless-[a-z-]{1,32}|openai-(?:organization|project)|idempotency-key")
#: The names under which a server on this machine is called by this machine.
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Guard:
    """``keys``: one of them opens /v1 and /metrics (none: everybody may). ``hosts``: the only names that the
    Host header may have (none: any), without which a page of another site could reach a server on this
    machine under a name of its own (DNS rebinding). ``origins``: the sites whose pages may read answers."""

    def __init__(
        self,
        app: App,
        metrics: Metrics,
        *,
        keys: Iterable[str] = (),
        hosts: Sequence[str] = (),
        origins: Sequence[str] = (),
        paths: Iterable[str] = (),
    ) -> None:
        self.app, self.metrics = app, metrics
        self.keys = [key.encode() for key in keys]
        self.hosts = frozenset(host.lower() for host in hosts)
        self.origins = frozenset(origins)
        self.paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # no sockets of other kinds
        headers = dict(scope["headers"])
        path, started = scope["path"], False
        extra = [*HEADERS, (b"x-request-id", secrets.token_hex(8).encode()), *self._cors(headers)]

        async def told(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
                self._count(path, message["status"])
            await send(message)

        try:
            self._admit(scope, headers)
            asks = scope["method"] == "OPTIONS" and b"access-control-request-method" in headers
            if asks and self.origins:
                await self._preflight(headers, told)
            else:
                self._authorize(path, headers)
                await self.app(scope, receive, told)
        except Exception as error:
            refused = refusal_of(error)
            if not started:
                await respond(told, refused.status, refused.body(), refused.headers)

    def _count(self, path: str, status: int) -> None:
        known = next((name for name in self.paths if path == name or path.startswith(f"{name}/")), "other")
        self.metrics.requests.add(path=known, status=str(status))

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if self.hosts and host_of(headers.get(b"host", b"")) not in self.hosts:
            raise Refused(
                421,
                "this server is not called by this name; start it with --allow-host NAME",
                code="host_not_allowed",
            )

    def _authorize(self, path: str, headers: dict[bytes, bytes]) -> None:
        if not self.keys or not (path == "/metrics" or path == "/v1" or path.startswith("/v1/")):
            return
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        given = given.strip()
        # all are compared, each in the same time whatever was given
        fits = [hmac.compare_digest(given, key) for key in self.keys]
        if kind.lower() != b"bearer" or not any(fits):
            raise Refused(
                401,
                "a valid API key is needed: send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _cors(self, headers: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        if not self.origins:
            return []
        origin = headers.get(b"origin", b"").decode("latin-1")
        found = [(b"vary", b"Origin")]
        if "*" in self.origins or origin in self.origins:
            allowed = b"*" if "*" in self.origins else origin.encode("latin-1")
            found += [
                (b"access-control-allow-origin", allowed),
                (b"access-control-expose-headers", b"retry-after, x-request-id, x-should-retry"),
            ]
        return found

    async def _preflight(self, headers: dict[bytes, bytes], send: Send) -> None:
        origin = headers.get(b"origin", b"").decode("latin-1")
        if "*" not in self.origins and origin not in self.origins:
            raise Refused(403, "pages of other sites may not use this server", code="origin_not_allowed")
        asked = headers.get(b"access-control-request-headers", b"").decode("latin-1").lower()
        told = [name for name in map(str.strip, asked.split(",")) if CLIENT.fullmatch(name)]
        allowed = {
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": ", ".join(["authorization", "content-type", *told]),
            "Access-Control-Max-Age": "600",
        }
        await respond(send, 204, None, allowed)


def host_of(header: bytes) -> str:
    """The name in a Host header, without the port."""
    text = header.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


async def respond(send: Send, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
    """A whole response, of JSON where there is a ``value``."""
    body = b"" if value is None else dumped(value)
    named = {"content-type": "application/json", **(headers or {})} if body else dict(headers or {})
    if status != 204:
        named["content-length"] = str(len(body))
    lines = [(name.lower().encode(), text.encode("latin-1")) for name, text in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})


#: A value as JSON; what UTF-8 cannot write is still in it.
dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def dumped(value: Any) -> bytes:
    return dumps(value).encode("utf-8", "replace")

"""The server as a process: a socket, its models, and a clean end.

SIGTERM or Ctrl-C: nobody new is let in (503), open answers go on for as long as they may and are then told
that the server stops. Once more: at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import math
import signal
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from liubai.errors import UserError
from liubai.serve.app import create_app
from liubai.serve.guard import LOOPBACK, App
from liubai.serve.host import Host
from liubai.serve.house import House, Served
from liubai.serve.limits import Gate, Limits
from liubai.serve.load import HostDied
from liubai.serve.router import Router

#: Seconds that an idle connection is kept, and that uvicorn waits at the end (we have waited before).
IDLE_S, LAST_S = 30, 3
#: Bytes of a request's head, and of what a client may send while it waits for an answer.
HEAD = 32 << 10
#: A client that has not taken ``SLOWEST`` bytes between two looks, so many seconds apart, reads no more.
LOOK_S, SLOWEST = 15.0, 16 << 10
#: Objects that are made before the collector looks for garbage among the new ones, and how often it does
#: before it looks among those that were there the last time, or all the others. (A connection is garbage that
#: only it finds: asyncio's transport refers to itself.)
COLLECTED = (20_000, 5, 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """Where the server listens and who may come. ``names``: beside this machine's own, what it may be
    called."""

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.local and not self.keys:
            raise UserError(
                f"--host {self.host} opens the server to other machines and needs a key: "
                "--api-key-file FILE, or LIUBAI_API_KEY in the environment"
            )

    @property
    def local(self) -> bool:
        return self.host in LOOPBACK

    @property
    def hosts(self) -> tuple[str, ...]:
        """The Host headers that are let in; none: all."""
        return (*LOOPBACK, *self.names) if self.local or self.names else ()


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ``UserError`` when the address is in use, or is none of this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host '{host}': {error.strerror}") from error
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} is in use; choose another with --port, or --port 0 for a free one"
            ) from error
        raise UserError(f"cannot listen at {host}, port {port}: {error.strerror}") from error
    return found


class Corked(asyncio.Transport):
    """A transport that writes once what is written to it in one turn of the loop: the head of a response, its
    events and its end would each be a packet, and packets are the dearest part of a short answer."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.inner, self.loop = transport, loop
        self._written: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._written:
            self.loop.call_soon(self._flush)
        self._written.append(bytes(data))

    def _flush(self) -> None:
        written, self._written = self._written, []
        if written:
            self.inner.write(written[0] if len(written) == 1 else b"".join(written))

    def close(self) -> None:
        self._flush()
        self.inner.close()

    def abort(self) -> None:
        self._written = []
        self.inner.abort()

    def is_closing(self) -> bool:
        return self.inner.is_closing()

    def get_write_buffer_size(self) -> int:
        return sum(map(len, self._written)) + self.inner.get_write_buffer_size()

    def pause_reading(self) -> None:
        self.inner.pause_reading()

    def resume_reading(self) -> None:
        self.inner.resume_reading()


def protocol(limits: Limits) -> type[H11Protocol]:
    """HTTP/1.1 that does not wait for ever: the head of a request must have come after ``header_s`` seconds,
    the rest of a body that was answered unread after ``body_s``; a client must read what it is sent
    (:data:`LOOK_S`); and there are only so many connections."""

    class Patient(H11Protocol):
        _waiting: asyncio.TimerHandle | None = None  # for the head, or for the rest of an unread body
        _for_what: object = None  # which of them
        _looking: asyncio.TimerHandle | None = None  # while there is something that the client has to take
        _untaken = math.inf  # bytes of it at the last look

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.transport = Corked(transport, self.loop)
            # "paused" is then: the client has not taken all, also what is left when the connection is closed
            transport.set_write_buffer_limits(high=0)
            if len(self.connections) > limits.connections:
                transport.abort()
                return
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._listen()
            self._watch()

        def _listen(self) -> None:
            """uvicorn reads no further when something comes behind a request, and would not see that the
            client leaves. What comes is kept for later, up to ``HEAD`` bytes."""
            if self.conn.their_state is not h11.DONE or self.cycle.response_complete:
                return
            if len(self.conn.trailing_data[0]) > HEAD:
                self.transport.abort()
            else:
                self.flow.resume_reading()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            # a next request is waited for by uvicorn, until its first byte
            if self.conn.their_state is h11.SEND_BODY:
                self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._waiting, self._looking):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._untaken = math.inf
            self._looking = self.loop.call_later(LOOK_S, self._look)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._looking is not None:
                self._looking.cancel()

        def _look(self) -> None:
            left = self.transport.get_write_buffer_size()
            if self._untaken - left < SLOWEST:
                self.transport.abort()
                return
            self._untaken = left
            self._looking = self.loop.call_later(LOOK_S, self._look)

        def _watch(self) -> None:
            state = self.conn.their_state
            seconds = None
            if state is h11.IDLE:
                seconds = limits.header_s
            elif state is h11.SEND_BODY and self.cycle.response_complete:
                seconds = limits.body_s
            for_what = None if seconds is None else state
            if for_what is self._for_what:  # a letter now and then does not put it off
                return
            if self._waiting is not None:
                self._waiting.cancel()
            self._waiting = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)
            self._for_what = for_what

    return Patient


class Server(uvicorn.Server):
    """uvicorn, with an end of our own. ``ready`` is called when it listens; ``said`` tells whoever stops it
    what is waited for."""

    def __init__(
        self,
        app: App,
        gate: Gate,
        ready: Callable[[], None] = lambda: None,
        said: Callable[[str], Any] = lambda text: None,
    ) -> None:
        config = uvicorn.Config(
            app,
            http=protocol(gate.limits),
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=LAST_S,
            h11_max_incomplete_event_size=HEAD,
            backlog=1024,
        )
        super().__init__(config)
        self.gate, self.ready, self.said = gate, ready, said
        self.hurried = False
        self._leaving: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        taken = []
        for number in signals:
            with contextlib.suppress(ValueError, RuntimeError):  # only the main thread hears signals
                loop.add_signal_handler(number, self.leave)
                taken.append(number)
        try:
            yield
        finally:
            for number in taken:
                loop.remove_signal_handler(number)

    def leave(self) -> None:
        """Let nobody in and wait for those inside; the second time, do not wait."""
        if self._leaving is not None:
            self.hurried = True
            self.gate.end()
            self.force_exit = True
            return
        if self.gate.inside:
            open_ones, grace = self.gate.inside, self.gate.limits.grace_s
            self.said(f"stopping in {grace:g} s at most (open requests: {open_ones}); Ctrl-C again: at once")
        self._leaving = asyncio.get_running_loop().create_task(self._leave())

    async def _leave(self) -> None:
        await self.gate.empty(self.gate.limits.grace_s)
        self.should_exit = True


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """What is there when serving begins stays, so the collector need not look at it again and again: a third
    of a million objects, and a quarter of a second in which nobody is heard."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.collect()  # all are looked at again when there are a quarter more than the last time: than none
    gc.set_threshold(*COLLECTED)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


async def serve(
    hosts: Sequence[Host],
    door: Door,
    limits: Limits,
    *,
    fast: str | None = None,
    think: str | None = None,
    router: Router | None = None,
    said: Callable[[str], Any] = print,
) -> int:
    """Until it is stopped; the exit code. Raises ``UserError`` for a model that cannot be loaded or an
    address that cannot be had."""
    place = listen(door.host, door.port)
    port = place.getsockname()[1]
    try:
        house = House([Served.by(host) for host in hosts], limits, router=router, fast=fast, think=think)
        for host in hosts:
            said(f"loading {host.name}")
            try:
                await host.start()
            except HostDied as error:
                raise UserError(f"'{host.name}' could not be started: {error}") from error
        gate = Gate(limits)
        app = create_app(house, gate, keys=door.keys, hosts=door.hosts, origins=door.origins)
        shown = f"[{door.host}]" if ":" in door.host else door.host
        names = ", ".join(house.models)
        server = Server(
            app, gate, lambda: said(f"serving {names} at http://{shown}:{port} (Ctrl-C stops it)"), said
        )
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # its lines may quote requests
        with uncollected():
            await server.serve([place])
        return 130 if server.hurried else 0
    finally:
        place.close()
        await asyncio.gather(*(host.stop() for host in hosts), return_exceptions=True)

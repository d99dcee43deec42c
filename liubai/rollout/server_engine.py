"""Answers by an unmodified ``vllm serve``, over HTTP: tokens in, tokens out.

The server has to be started so (``VLLM_ALLOW_RUNTIME_LORA_UPDATING`` for ``transport = "lora"`` alone; DTYPE
is the trainer's, and N has room for prompt and max_tokens)::

    VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve CHECKPOINT --enable-scale-out \\
        --logprobs-mode processed_logprobs --generation-config vllm --dtype DTYPE --max-model-len N

Its development endpoints change weights and are open to whoever reaches them: keep it on a network of your
own. A key, if it wants one, is in VLLM_API_KEY.

New weights arrive while it is paused: ``/pause`` ends all answers with what they said so far, then come the
weights, an empty prefix cache and the version's name, then ``/resume``, and the answers are asked for again
from there; so are those that somebody else aborts. An answer names the version that wrote it; one under
another name, or none, ends the run. Left out on purpose: more than one server (actors are for that), streams
(a message a token and answer would keep both sides busy), and going on when the server dies: a new one has
its first weights, and no one would notice.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import resource
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from liubai.errors import UserError
from liubai.rollout.outside import Begun, Heard, OutsideEngine, require_supported
from liubai.rollout.transport import Receiver, Transport

GENERATE = "/inference/v1/generate"
#: every vLLM server knows it, and is asked for it first
VERSION = "/version"
#: What a server lacks that does not know a path, or has it switched off.
SWITCHES = {
    GENERATE: "--enable-scale-out",
    "/v1/load_lora_adapter": "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
    "/v1/unload_lora_adapter": "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
}
DEVELOPMENT = "VLLM_SERVER_DEV_MODE=1"
#: Seconds that ``step`` waits for an answer to end, and that small questions may take.
PATIENCE, SHORT = 0.1, 30.0
#: Files that a run has open beside its connections, generously.
OTHERS = 256


class Refused(UserError):
    """The server's own error."""


class Server:
    """A server's endpoints. Every call is a connection of its own: one that was kept may have been closed,
    and to ask again would be to ask twice. ``timeout``: seconds for an answer and for a transfer."""

    def __init__(self, url: str, timeout: float = 1800.0) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout
        parts = urlsplit(self.url)
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname or "", parts.port
        self._root = parts.path
        self.model: str | None = None  # the adapter that answers are written with

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        **query: str,
    ) -> Any:
        """What the server says, as JSON; None where it says nothing. Raises ``UserError``."""
        timeout = timeout or self.timeout
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=timeout)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        try:
            data = None if body is None else json.dumps(body)
            connection.request(
                method, self._root + path + (f"?{urlencode(query)}" if query else ""), data, headers
            )
            response = connection.getresponse()
            status, text = response.status, response.read()
        except TimeoutError:
            raise UserError(
                f"{self.url}{path} has not answered for {timeout:.0f} s; see the server's log. If it only "
                "needs longer, raise engine.timeout"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            why = str(error) or type(error).__name__
            raise UserError(
                f"the vLLM server at {self.url} does not answer ({why}); start it, then give the same "
                "command again: the run goes on from its last resume point"
            ) from error
        finally:
            connection.close()
        try:
            said = json.loads(text) if text.strip() else None
        except ValueError:
            said = text.decode(errors="replace")  # some say a sentence
        if path == VERSION and (status == 404 or (status < 400 and not isinstance(said, dict))):
            raise UserError(
                f"no vLLM server there, at {self.url} (status {status}); is the url right? It is the root, "
                "without /v1"
            )
        if status in (403, 404) and (switch := self._switch(path, said)):
            raise UserError(f"the server at {self.url} has no {path}: start it with {switch}")
        if status >= 400:
            raise Refused(f"{self.url}{path}: {_reason(said) or f'status {status}'}")
        return said

    def _switch(self, path: str, said: Any) -> str | None:
        """What the server has to be started with to know ``path``, if that is why it refuses. Where the
        path is there and the thing that was asked for is not, it says which."""
        missing = isinstance(said, dict) and said.get("detail") == "Not Found"
        disabled = path == GENERATE and "scale-out" in json.dumps(said)
        return SWITCHES.get(path, DEVELOPMENT) if missing or disabled else None

    def require(self, max_length: int) -> None:
        """Raises ``UserError`` unless it can do all that will be asked of it, and is of a version that was
        tried."""
        version = str((self.call("GET", VERSION, timeout=SHORT) or {}).get("version", "unknown"))
        require_supported(version, f"the vLLM server at {self.url}")
        for card in self.call("GET", "/v1/models", timeout=SHORT)["data"]:
            room = card.get("max_model_len")
            if room is not None and room < max_length:
                raise UserError(
                    f"the server at {self.url} holds {room} tokens, prompt and answer may have {max_length}; "
                    f"start it with --max-model-len {max_length}, or lower max_tokens"
                )
        if self.call("GET", "/is_paused", timeout=SHORT)["is_paused"]:
            self.call("POST", "/resume", timeout=SHORT)  # a run was killed during a transfer

    def workers(self, replicas: bool = True) -> int:
        """Processes that have a part of the model: of one engine, or of all its ``replicas``."""
        said = self.call("GET", "/get_world_size", timeout=SHORT, include_dp=str(replicas).lower())
        return int(said["world_size"])

    def on_cpu(self) -> bool:
        """Does it say so? One that says nothing is taken for one on GPUs."""
        with suppress(Refused):
            return "device_config=cpu" in str(self.call("GET", "/server_info"))
        return False

    # ---- the receiver of a transfer ----

    def reload(self, folder: Path) -> None:
        self.call(
            "POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        )

    def load_adapter(self, name: str, number: int, folder: Path) -> None:
        self.call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        self.model = name

    def unload_adapter(self, name: str, number: int) -> None:
        self.call("POST", "/v1/unload_lora_adapter", {"lora_name": name}, timeout=SHORT)

    def adapters(self) -> list[str]:
        cards = self.call("GET", "/v1/models", timeout=SHORT)["data"]
        return [str(card["id"]) for card in cards if card.get("parent")]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.call("POST", "/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self.call("POST", "/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.call("POST", "/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.call(
            "POST", "/finish_weight_update", {"weight_version": weight_version} if weight_version else None
        )


class ServerEngine(OutsideEngine):
    """``slots`` answers are asked for at once of each of the server's engines, each by a thread that waits
    for it."""

    late = True

    def __init__(
        self, server: Server, transport: Transport, *, eos_ids: Sequence[int], slots: int, max_length: int
    ) -> None:
        super().__init__(transport, eos_ids=eos_ids, max_length=max_length)
        server.require(max_length)
        self.server = server
        self.slots = connections(slots * server.workers() // server.workers(replicas=False))
        self._name = secrets.token_hex(8)  # tells its answers from those of another run
        self._label = ""  # of the weights in use
        self._lock = threading.Condition()
        self._waiting: dict[str, dict[str, Any]] = {}  # not yet taken by a thread
        self._flying: set[str] = set()
        self._said: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._early: deque[tuple[str, Any]] = deque()  # ended while others were called back
        self._threads: list[threading.Thread] = []
        self._closed = False

    @property
    def receiver(self) -> Receiver:
        return self.server

    def _begin(self, asked: Mapping[str, Begun]) -> None:
        with self._lock:
            for key, begun in asked.items():
                self._waiting[key] = {
                    "request_id": f"{self._name}-{key}",
                    "token_ids": [*begun.request.prompt_ids, *begun.ids],
                    "sampling_params": self.sampling(begun),
                    **({"model": self.server.model} if self.server.model else {}),
                }
            while len(self._threads) < min(self.slots, len(self._waiting) + len(self._flying)):
                thread = threading.Thread(target=self._ask, daemon=True)
                self._threads.append(thread)
                thread.start()
            self._lock.notify_all()

    def _ask(self) -> None:
        """A thread's life: take a request, wait for its answer, lay it down."""
        while True:
            with self._lock:
                while not self._waiting and not self._closed:
                    self._lock.wait()
                if self._closed:
                    return
                key = next(iter(self._waiting))
                body = self._waiting.pop(key)
                self._flying.add(key)
            said: Any
            try:
                said = self.server.call("POST", GENERATE, body)
            except Exception as error:  # raised where somebody listens
                said = error
            with self._lock:
                self._flying.discard(key)
            self._said.put((key, said))

    def _hear(self) -> list[Heard]:
        found = []
        try:
            found.append(self._early.popleft() if self._early else self._said.get(timeout=PATIENCE))
            while True:
                found.append(self._early.popleft() if self._early else self._said.get_nowait())
        except queue.Empty:
            return [self._heard(key, said) for key, said in found]

    def _heard(self, key: str, said: Any) -> Heard:
        if isinstance(said, Exception):
            raise said
        try:
            choice = said["choices"][0]
            ids = [int(token) for token in choice["token_ids"] or ()]
            told = (choice["logprobs"] or {}).get("content") or ()
            logprobs = [float(entry["logprob"]) for entry in told]
            aborted, spans = choice["finish_reason"] == "abort", choice.get("weight_versions") or ()
            labels = {str(span["version"]) for span in spans}
            most = self._out[key].request.alternatives
            others = [_likeliest(entry["top_logprobs"], most) for entry in told] if most else ()
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"the server at {self.server.url} gave no answer that can be read "
                f"({type(error).__name__}: {error})"
            ) from error
        if len(logprobs) != len(ids):
            raise UserError(
                f"the server at {self.server.url} gave {len(ids)} tokens and {len(logprobs)} log-probs"
            )
        if ids and not labels:
            raise UserError(
                f"the server at {self.server.url} does not say which weights wrote an answer "
                "(weight_versions is empty)"
            )
        if labels - {self._label}:
            raise UserError(
                f"the server at {self.server.url} wrote with weights '{min(labels - {self._label})}', not "
                f"with version {self._label} that it was given: it was started again, or somebody else gives "
                "it weights"
            )
        return Heard(key, ids, logprobs, True, others, aborted)

    def _stop(self, keys: Sequence[str]) -> list[Heard]:
        wanted = set(keys)
        with self._lock:
            for key in wanted & self._waiting.keys():
                del self._waiting[key]
                wanted.discard(key)
        heard = [(key, said) for key, said in self._early if key in wanted]
        self._early = deque(item for item in self._early if item[0] not in wanted)
        wanted -= {key for key, _ in heard}
        deadline = time.monotonic() + self.server.timeout
        while wanted:
            # again and again: one that was on its way is not known there until it has arrived
            self._abort(wanted)
            try:
                while wanted:
                    key, said = self._said.get(timeout=PATIENCE)
                    (heard if key in wanted else self._early).append((key, said))
                    wanted.discard(key)
            except queue.Empty:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"the server at {self.server.url} has not let go of {len(wanted)} answers in "
                        f"{self.server.timeout:.0f} s; see its log"
                    ) from None
        return [self._heard(key, said) for key, said in heard]

    def _abort(self, keys: Iterable[str]) -> None:
        """By name, for others may have theirs written there; vLLM puts something before it."""
        names = [f"{self._name}-{key}" for key in sorted(keys)]
        ids = [id for name in names for id in (name, f"generate-tokens-{name}")]
        self.server.call("POST", "/abort_requests", {"request_ids": ids}, timeout=SHORT)

    def _pause(self) -> None:
        self.server.call("POST", "/pause", mode="abort")

    def _go_on(self, version: int) -> None:
        if not self.server.call("POST", "/reset_prefix_cache")["success"]:
            raise UserError(f"the server at {self.server.url} has not emptied its prefix cache; see its log")
        self._label = str(version)
        self.server.call("POST", "/update_weight_version", {"new_version": self._label}, timeout=SHORT)
        self.server.call("POST", "/resume", timeout=SHORT)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._waiting.clear()
            self._lock.notify_all()
        if self._out:
            with suppress(UserError):  # it may be why the run ends
                self._abort(self._out)
        self.transport.close()


def connections(wanted: int) -> int:
    """As many as wanted, or as many as the system lets this process have open. Programs are begun with room
    for 1,024 files, and may ask for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY in (soft, hard):
        return wanted
    if soft < wanted + OTHERS:
        soft = min(wanted + OTHERS, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(wanted, soft - OTHERS))


def _likeliest(entries: Sequence[Mapping[str, Any]], most: int) -> tuple[tuple[int, float], ...]:
    best = sorted(entries, key=lambda entry: -entry["logprob"])[:most]
    return tuple((int(entry["token_id"]), float(entry["logprob"])) for entry in best)


def _reason(said: Any) -> str:
    """The sentence in an error of the server's."""
    if isinstance(said, dict):
        inner = said.get("error", said.get("detail", said.get("message")))
        said = inner.get("message") if isinstance(inner, dict) else inner
    if str(said or "").lstrip().startswith("<"):
        return ""  # a page of somebody in between, for people with a browser
    return " ".join(str(said or "").split())[:300]

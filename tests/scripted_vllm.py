"""A server that speaks vLLM's endpoints, around a tiny model of ours: what it does wrong, each test says.

Answers are written token by token, as far as ``allowed`` lets them, so that a test knows how far they are
when new weights come. Nothing here depends on how fast anything is.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch

from liubai.model.checkpoint import read_weights, to_hf_name
from liubai.model.lora import load_adapter
from liubai.model.transformer import Transformer
from liubai.rollout.sampling import sample, uniform


@dataclass
class Script:
    """What it is, and what is wrong with it."""

    model: Transformer
    version: str = "0.32.0"
    max_model_len: int = 256
    device: str = "cuda"
    replicas: int = 1  #: engines, of two workers each
    missing: set[str] = field(default_factory=set)  #: paths that it does not know
    scale_out: bool = True
    hang: set[str] = field(default_factory=set)  #: paths that it never answers
    broken: dict[str, str] = field(default_factory=dict)  #: path -> the sentence of an error 500
    pages: dict[str, int] = field(default_factory=dict)  #: path -> the status of a page for people
    deaf: bool = False  #: takes new weights and goes on with the old ones
    raw: bool = False  #: gives log-probabilities at temperature 1
    sticky: bool = False  #: keeps its prefix cache
    nonsense: bool = False  #: answers without log-probabilities
    unlabelled: bool = False  #: does not say which weights wrote an answer
    short: bool = False  #: ends answers before their last token
    allowed: int = 1_000_000  #: tokens an answer, for now


class ScriptedVLLM:
    def __init__(self, script: Script) -> None:
        self.script = script
        self.base = copy.deepcopy(script.model)
        self.adapters: dict[str, Transformer] = {}
        self.label = "default"
        self.paused = False
        self.calls: list[str] = []  #: in order, without those that ask for answers
        self.asked: list[dict[str, Any]] = []
        self.receiving: str | None = None  #: how far a native transfer is; None before the first
        self.aborted: set[str] = set()
        self.writing: dict[str, int] = {}  #: answers under way -> tokens so far
        self.changed = threading.Condition()
        self.closed = False

    def allow(self, tokens: int) -> None:
        with self.changed:
            self.script.allowed = tokens
            self.changed.notify_all()

    def abort_all(self) -> None:
        """As somebody else's ``/abort_requests`` with ``{}`` does."""
        with self.changed:
            self.aborted |= self.writing.keys()
            self.changed.notify_all()

    def wait_until(self, count: int, tokens: int) -> None:
        """So many answers are under way, and each has so many tokens."""
        with self.changed:
            assert self.changed.wait_for(
                lambda: len(self.writing) == count and set(self.writing.values()) == {tokens}, timeout=30
            )

    # ---- the endpoints ----

    def post(self, path: str, query: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/inference/v1/generate":
            self.asked.append(body)
            return self.generate(body)
        self.calls.append(path + (f"?mode={query['mode']}" if "mode" in query else ""))
        with self.changed:
            match path:
                case "/pause":
                    self.paused = True
                    if query["mode"] == "abort":
                        self.aborted |= self.writing.keys()
                case "/resume":
                    self.paused = False
                case "/abort_requests":
                    # an id that is not known (yet) is passed over, as vLLM does
                    self.aborted |= {i for i in body.get("request_ids") or self.writing if i in self.writing}
                case "/reset_prefix_cache":
                    self.changed.notify_all()
                    return 200, {"success": not self.script.sticky}
                case "/update_weight_version":
                    self.label = body["new_version"]
                case "/collective_rpc":
                    assert body["method"] == "reload_weights"
                    self.reload(Path(body["kwargs"]["weights_path"]))
                case "/v1/load_lora_adapter":
                    name, model = body["lora_name"], copy.deepcopy(self.base)
                    if name in self.adapters:
                        return refused(400, f"The lora adapter '{name}' has already been loaded.")
                    load_adapter(body["lora_path"], model)
                    self.adapters[name] = model
                case "/v1/unload_lora_adapter":
                    if body["lora_name"] not in self.adapters:
                        return refused(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
                    del self.adapters[body["lora_name"]]
                case "/init_weight_transfer_engine":
                    assert body["init_info"] == {"master_address": "h", "master_port": 1, "world_size": 3}
                    self.receiving = "idle"
                case "/start_weight_update":
                    assert self.receiving == "idle"
                    self.receiving = "begun"
                case "/update_weights":
                    assert self.receiving == "begun"
                    self.receive(body["update_info"])
                case "/finish_weight_update":
                    assert self.receiving == "begun"
                    self.receiving = "idle"
                    self.label = body.get("weight_version") or self.label
            self.changed.notify_all()
        return 200, {}

    def get(self, path: str, query: dict[str, str]) -> tuple[int, Any]:
        engines = 1 if query.get("include_dp") == "false" else self.script.replicas
        cards: list[dict[str, Any]] = [
            {"id": "model", "max_model_len": self.script.max_model_len, "parent": None},
            *({"id": name, "max_model_len": None, "parent": "model"} for name in self.adapters),
        ]
        return 200, {
            "/version": {"version": self.script.version},
            "/v1/models": {"data": cards},
            "/is_paused": {"is_paused": self.paused},
            "/server_info": {"vllm_config": f"model='x', device_config={self.script.device}, seed=0"},
            "/get_world_size": {"world_size": 2 * engines},
        }[path]

    def reload(self, folder: Path) -> None:
        assert (folder / "STABLE").exists() or not folder.name.startswith("step-")
        weights = read_weights(folder, self.base, torch.float32, torch.device("cpu"))
        if not self.script.deaf:
            self.base.load_state_dict(weights)

    def receive(self, tensors: dict[str, Any]) -> None:
        """Numbers in the place of what goes over NCCL, under Hugging Face's names."""
        ours = {to_hf_name(name): tensor for name, tensor in self.base.state_dict().items()}
        if not self.script.deaf:
            for name, numbers in tensors.items():
                ours[name].copy_(torch.tensor(numbers))

    def generate(self, body: dict[str, Any]) -> tuple[int, Any]:
        if not self.script.scale_out:
            message = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out"
            return refused(403, message)
        key, params = body["request_id"], body["sampling_params"]
        assert params["ignore_eos"]
        assert params["top_p"] == 1.0
        prompt, ids, told = list(body["token_ids"]), list[int](), list[dict[str, Any]]()
        versions: list[dict[str, Any]] = []
        reason = "length"
        with self.changed:
            self.writing[key] = 0
            self.changed.notify_all()
            while len(ids) < params["max_tokens"] - self.script.short:
                self.changed.wait_for(
                    lambda: (
                        self.closed
                        or key in self.aborted
                        or (not self.paused and len(ids) < self.script.allowed)
                    )
                )
                if self.closed or key in self.aborted:
                    reason = "abort"
                    break
                entry = self.next(body.get("model"), prompt + ids, params, len(ids))
                if not versions or versions[-1]["version"] != self.label:
                    versions.append({"version": self.label, "start": len(ids), "end": len(ids)})
                ids.append(entry["token_id"])
                told.append(entry)
                versions[-1]["end"] = self.writing[key] = len(ids)
                self.changed.notify_all()
                if ids[-1] in params["stop_token_ids"]:
                    reason = "stop"
                    break
            del self.writing[key]
            self.aborted.discard(key)
            self.changed.notify_all()
        choice = {
            "index": 0,
            "finish_reason": reason,
            "token_ids": ids,
            "weight_versions": None if self.script.unlabelled else versions,
            "logprobs": None if self.script.nonsense else {"content": told},
        }
        return 200, {"request_id": f"generate-tokens-{key}", "choices": [choice]}

    @torch.no_grad()
    def next(self, name: str | None, ids: list[int], params: dict[str, Any], index: int) -> dict[str, Any]:
        model = self.adapters[name] if name else self.base
        logits_1V = model(torch.tensor([ids]))[:, -1]
        heat = torch.tensor([params["temperature"]])
        number = uniform(torch.tensor([params["seed"]]), torch.tensor([index]))
        token, logprob = sample(logits_1V.clone(), number, heat)
        scale = 1.0 if self.script.raw else params["temperature"] or 1.0
        full_V = (logits_1V[0] / scale).log_softmax(-1)
        best = full_V.topk(params["logprobs"]) if params["logprobs"] else None
        others = zip(best.values.tolist(), best.indices.tolist(), strict=True) if best else ()
        entry = {"token_id": int(token), "logprob": float(full_V[token] if self.script.raw else logprob)}
        return {**entry, "top_logprobs": [entry, *({"token_id": i, "logprob": p} for p, i in others)]}


def refused(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "code": status}}


@contextmanager
def serving(script: Script) -> Iterator[tuple[ScriptedVLLM, str]]:
    """The server, and its address, for the length of the block."""
    program = ScriptedVLLM(script)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({})

        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.answer(json.loads(text) if text else {})

        def answer(self, body: dict[str, Any]) -> None:
            parts = urlsplit(self.path)
            path = parts.path
            if path in script.hang:
                with program.changed:
                    program.changed.wait_for(lambda: program.closed)
                return
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            if path in script.missing:
                status, said = 404, {"detail": "Not Found"}
            elif path in script.broken:
                status, said = refused(500, script.broken[path])
            elif self.command == "GET":
                status, said = program.get(path, query)
            else:
                status, said = program.post(path, query, body)
            data = json.dumps(said).encode()
            if path in script.pages:
                status, data = script.pages[path], b"<!DOCTYPE HTML><html><p>Nothing here.</html>"
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None: ...

    class Listener(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    listener = Listener(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield program, f"http://127.0.0.1:{listener.server_address[1]}"
    finally:
        with program.changed:
            program.closed = True
            program.changed.notify_all()
        listener.shutdown()
        listener.server_close()
        thread.join(10)

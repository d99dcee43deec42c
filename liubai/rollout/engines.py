"""Which engine writes the answers of a stage that learns from them: the recipe's key ``engine``, and its
making.

The default is the embedded engine around the trainer's own weights: one copy in memory, nothing that could
fail to arrive, and bits that repeat. The others take the weights by a transport, and a canary looks after
each transfer::

    engine = "vllm"                          # vLLM in this process

    [stages.zero.engine]                     # or a server, on another GPU or machine
    kind = "server"
    url = "http://10.0.0.2:8000"
    transport = "folder"                     # "lora" for a stage with lora, "native" for NCCL between GPUs
    folder = "/shared/weights"               # on a disk that both see; the run has a folder of its own there
"""

from __future__ import annotations

import importlib.util
import socket
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import urlsplit

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from liubai import ranks
from liubai.errors import UserError
from liubai.model.lora import LoraConfig
from liubai.model.transformer import Transformer
from liubai.rollout.canary import Canaries, Canary, scores
from liubai.rollout.engine import Engine
from liubai.rollout.outside import OutsideEngine
from liubai.rollout.torch_engine import TorchEngine
from liubai.rollout.transport import FolderTransport, LoraTransport, Transport, own_folder

if TYPE_CHECKING:
    from liubai.cluster.connect import Cluster

#: mean |Δ log-probability| that arithmetic alone explains: in the embedded engine, which shares the
#: trainer's code, and in another program (vLLM and an untrained model of 0.6 B in bfloat16: 0.04, the worst
#: that was seen). Weights that are many versions old make 0.2 (trl#5312); of those that are one small update
#: old, only the canary's memory tells.
BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.05}
OUTSIDE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class EngineConfig(BaseModel):
    """``"torch"`` is the embedded engine; ``"vllm"`` in this process; ``"server"`` is ``vllm serve`` at
    ``url``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Literal["torch", "vllm", "server"] = "torch"
    url: str = ""
    transport: Literal["folder", "lora", "native"] = "folder"
    #: where ``folder`` and ``lora`` make a folder for weights: in the stage's own unless told otherwise
    folder: str = ""
    #: where this process is found by a server's GPUs, for ``native``: HOST or HOST:PORT
    address: str = ""
    #: vllm: the share of each GPU that it takes; the trainer is on the same one
    gpu_memory_utilization: float = Field(0.4, gt=0, le=1)
    tensor_parallel: int = Field(1, gt=0, description="GPUs that vllm shares the model out over")
    #: vllm: further arguments of vllm.LLM
    options: dict[str, bool | int | float | str] = {}
    timeout: float = Field(1800.0, gt=0, description="seconds for an answer of a server, and for a transfer")
    canary: int = Field(4, ge=0, description="requests that are asked after every transfer; 0: none")
    #: mean |Δ log-probability| above which engine and trainer disagree; by precision unless told otherwise
    bound: float | None = Field(None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, raw: Any) -> Any:
        return {"kind": raw} if isinstance(raw, str) else raw

    @model_validator(mode="after")
    def _fits(self) -> Self:
        mine = {
            "vllm": {"gpu_memory_utilization", "tensor_parallel", "options"},
            "server": {"url"},
        }
        of_others = set().union(*(keys for kind, keys in mine.items() if kind != self.kind))
        if self.kind == "torch":
            of_others = set(type(self).model_fields) - {"kind"}
        for name in sorted(of_others):
            # a resolved recipe spells the defaults out
            if getattr(self, name) != type(self).model_fields[name].get_default():
                raise ValueError(f"{name} is not for an engine of kind '{self.kind}'")
        if self.kind == "server" and _scheme(self.url) not in ("http", "https"):
            raise ValueError(
                f"an engine of kind 'server' needs its url, such as http://127.0.0.1:8000, not '{self.url}'"
            )
        if self.address and ("/" in self.address or _scheme(f"//{self.address}") is None):
            raise ValueError(f"address is HOST or HOST:PORT, not '{self.address}'")
        return self

    def tolerance(self, dtype: torch.dtype) -> float:
        """mean |Δ log-probability| that is put up with, where the trainer computes in ``dtype``."""
        return self.bound or (BOUND if self.kind == "torch" else OUTSIDE)[dtype]

    def located(self, folder: Path) -> EngineConfig:
        return (
            self.model_copy(update={"folder": str((folder / self.folder).absolute())})
            if self.folder
            else self
        )

    def require(self, lora: LoraConfig | None) -> None:
        """What can be known before anything happens. Raises ``UserError``."""
        if self.transport == "lora" and not lora:
            raise UserError('engine.transport = "lora" is for stages that train an adapter; set lora, too')
        if self.kind == "vllm" and ranks.world() > 1:  # it would take part in their process group
            from liubai.cluster.connect import joined

            if not joined():  # where it is in processes of its own
                raise UserError(
                    'engine "vllm" is for one process; of several, kind = "server" writes the answers, or '
                    "the actors of a cluster (--cluster)"
                )
        needs_vllm = self.kind == "vllm" or (self.kind == "server" and self.transport == "native")
        if needs_vllm and importlib.util.find_spec("vllm") is None:
            raise UserError(
                "this engine needs vLLM, which is not installed: pip install 'liubai[vllm]', or use "
                'kind = "server" with transport = "folder"'
            )


def engine_for(
    config: EngineConfig,
    model: Transformer,
    *,
    parent: Path,
    eos_ids: Sequence[int],
    slots: int,
    max_length: int,
    folder: Path,
    stack: ExitStack,
    lora: LoraConfig | None = None,
    cluster: Cluster | None = None,
    inflight: bool = False,
    max_staleness: int | None = None,
    device: torch.device | None = None,
    compile: bool = False,
) -> Engine:
    """The engine of a stage that trains ``model``, which began as the checkpoint ``parent``. Weights are
    put into ``folder``, unless the config says where; ``stack`` lets go of it. With a ``cluster``, engines of
    this kind are its actors'; these decode on a ``device`` like the trainer's, by torch.compile where
    ``compile`` says so. Raises ``UserError`` for what is not there or does not fit."""
    device = device or model.head_weight.device
    if device.type == "cuda" and device.index is None:  # another thread would begin with the first
        device = torch.device("cuda", torch.cuda.current_device())
    if cluster and config.kind != "server":
        if config.kind != "torch":  # a name of their own, wherever on its node each actor puts it
            folder = own_folder(Path(config.folder or tempfile.gettempdir()).absolute(), folder, stack)
        remote = cluster.engine_for(
            config,
            model.config,
            dtype=model.dtype,
            device=device.type,
            compile=compile,
            parent=parent,
            folder=folder,
            eos_ids=eos_ids,
            slots=slots,
            max_length=max_length,
            lora=lora,
            inflight=inflight,
            max_staleness=max_staleness,
        )
        stack.callback(remote.close)
        return remote
    if config.kind == "torch":
        return TorchEngine(model, eos_ids=eos_ids, slots=slots, max_length=max_length)
    config.require(lora)
    root = own_folder(Path(config.folder).absolute(), folder, stack) if config.folder else folder.absolute()
    if config.kind == "server":
        from liubai.rollout.server_engine import Server, ServerEngine

        server = Server(config.url, config.timeout)
        transport = _transport(config, root, parent, lora, server.workers, device)
        engine: OutsideEngine = ServerEngine(
            server, transport, eos_ids=eos_ids, slots=slots, max_length=max_length
        )
        stack.callback(engine.close)
        if config.transport != "lora" and model.config.tie_word_embeddings and server.on_cpu():
            raise UserError(
                f"the server at {config.url} is vLLM's CPU build, which goes on with its old head where the "
                'head is the embedding, as here: transport = "lora", engine = "vllm", or a server on a GPU'
            )
        return engine
    from liubai.rollout.vllm_engine import HANDOVER, VLLMEngine

    alone = config.tensor_parallel == 1
    workers = None if alone else lambda: config.tensor_parallel
    transport = _transport(config, root, parent, lora, workers, device)
    engine = VLLMEngine(
        parent,
        transport,
        eos_ids=eos_ids,
        slots=slots,
        max_length=max_length,
        dtype=model.dtype,
        lora=lora if config.transport == "lora" else None,
        backend=(HANDOVER if alone else "nccl") if config.transport == "native" else None,
        gpu_memory_utilization=config.gpu_memory_utilization,
        tensor_parallel=config.tensor_parallel,
        options=config.options,
    )
    stack.callback(engine.close)
    return engine


def _transport(
    config: EngineConfig,
    root: Path,
    parent: Path,
    lora: LoraConfig | None,
    workers: Callable[[], int] | None,
    device: torch.device,
) -> Transport:
    """``workers`` says how many processes have a part of the engine's model; None: this one has it.
    ``device`` is the trainer's."""
    if config.transport == "folder":
        return FolderTransport(root, parent, lora)
    if config.transport == "lora":
        assert lora is not None  # asked in ``require``
        return LoraTransport(root, parent.absolute(), lora, used=config.kind == "server")
    from liubai.rollout.vllm_engine import Handover, NativeTransport, nccl

    if workers is None:
        return NativeTransport(lambda: Handover(rank=0), lora)
    here = urlsplit(f"//{config.address}")
    return NativeTransport(
        lambda: nccl(
            here.hostname or socket.gethostbyname(socket.gethostname()), here.port or _free_port(), workers()
        ),
        lora,
        config.timeout,
        device,
    )


def canary_for(
    config: EngineConfig,
    engine: object,
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float,
    max_tokens: int,
    seed: int,
) -> Canary | Canaries | None:
    """For an engine that has its own copy of the weights, or several. ``model`` is the trainer's."""
    ask = getattr(engine, "ask", None)
    if config.kind == "torch" or ask is None or not config.canary:
        return None  # of our own engine, wherever it is, ``update`` looks at every token
    first = ""
    if config.kind == "server":  # vLLM has bfloat16 for a checkpoint in float32 unless told otherwise
        here = str(model.dtype).removeprefix("torch.")
        first = (
            f"This trainer computes in {here}, and the server has to, too: start it with --dtype {here}, or "
            "set the stage's precision to the server's"
        )
    canary = Canary(
        list(prompts)[: config.canary],
        ask,
        lambda samples: scores(model, samples, temperature),
        bound=config.tolerance(model.dtype),
        temperature=temperature,
        seed=seed,
        max_tokens=max_tokens,
        first=first,
    )
    each = getattr(engine, "ask_each", None)
    return Canaries(canary, each) if each else canary


def _scheme(url: str) -> str | None:
    """None where there is no host, or a port that is not one."""
    try:
        parts = urlsplit(url)
        return parts.scheme if parts.hostname and parts.port != 0 else None
    except ValueError:
        return None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])

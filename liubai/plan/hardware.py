"""Accelerators: what a roofline has to know of them, and this machine, measured on the spot.

The figures of GPUs are their data sheets', dense and without tricks; how much of that a program sees is a few
``shares`` from what others report. None of them was measured by this project. Those of "cpu" are measured
when they are asked for, in about two seconds. Left out on purpose: 8-bit and 4-bit arithmetic.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from liubai.errors import UserError

#: bytes of a number
SIZES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """``flops`` a second of matrix products by type; memory in bytes; ``bandwidth`` of the memory, ``link``
    to another device of the same node and ``network`` to another node in bytes a second, one way."""

    name: str
    memory: float
    flops: dict[str, float]
    bandwidth: float
    link: float
    network: float
    source: str
    node: int = 8  #: devices in a node
    dtype: str = "bfloat16"  #: what training uses unless told otherwise
    #: of the memory, what a program may fill: the rest is the driver's, and holes
    usable: float = 0.9
    holes: float = 0.0  #: what malloc keeps beside, a share of what comes and goes
    #: of ``flops``, what training and the reading of prompts see (Llama 3 on H100s: 0.38–0.43,
    #: arXiv 2407.21783, table 4), and of ``bandwidth``, what decoding sees
    training: float = 0.4
    reading: float = 0.5
    streaming: float = 0.7
    #: are weights read for a product of few rows while others are multiplied? A CPU was seen to do one after
    #: the other
    overlaps: bool = True
    #: times that training walks over what a layer keeps, beside its products; 0 where ``training`` counts it
    walks: float = 0.0
    #: seconds that a decoding step costs whoever takes part, and a layer of it: launches, the scheduler
    step_seconds: float = 1e-3
    layer_seconds: float = 3e-5
    #: seconds in which Python starts what a layer computes of a micro-batch, forward and backward: about a
    #: hundred kernels at 5 µs, which is what an eager PyTorch needs at least; 0 where there are none to start
    launch_seconds: float = 5e-4
    #: seconds of one all-reduce of a few rows inside a node
    hop_seconds: float = 1e-5

    @property
    def gpu(self) -> bool:
        return self.name != "cpu"

    def speed(self, dtype: str) -> float:
        return self.flops[dtype]

    def between(self, devices: int) -> float:
        """Bytes a second that each of so many can send to the others."""
        return self.link if devices <= self.node else self.network


#: what glibc's malloc was seen to keep (bench/plan.py)
MALLOC_HOLES = 0.3
#: of a CPU, chosen to agree with what bench/plan.py measured on one
TRAINING, WALKS = 0.75, 10.0
MOST = 150  #: repetitions of a measurement
#: InfiniBand NDR as in DGX H100 (400 Gb/s for each GPU); 200 Gb/s for A100; 100 Gb/s where there is no such
#: network
NDR, HDR, ETHERNET = 50e9, 25e9, 12.5e9
#: PCIe 4.0 x16, one way
PCIE4 = 32e9

DEVICES = {
    "h100": Device(
        name="h100", memory=80e9, flops={"bfloat16": 989e12, "float32": 67e12}, bandwidth=3.35e12,
        link=450e9, network=NDR, source="NVIDIA H100 Tensor Core GPU data sheet, SXM",
    ),
    "h200": Device(
        name="h200", memory=141e9, flops={"bfloat16": 989e12, "float32": 67e12}, bandwidth=4.8e12,
        link=450e9, network=NDR, source="NVIDIA H200 Tensor Core GPU data sheet, SXM",
    ),
    "a100": Device(
        name="a100", memory=80e9, flops={"bfloat16": 312e12, "float32": 19.5e12}, bandwidth=2.039e12,
        link=300e9, network=HDR, source="NVIDIA A100 Tensor Core GPU data sheet, 80 GB SXM",
    ),
    "l40s": Device(
        name="l40s", memory=48e9, flops={"bfloat16": 362e12, "float32": 91.6e12}, bandwidth=0.864e12,
        link=PCIE4, network=ETHERNET, source="NVIDIA L40S data sheet",
    ),
    "4090": Device(
        name="4090", memory=24e9, flops={"bfloat16": 165.2e12, "float32": 82.6e12}, bandwidth=1.008e12,
        link=PCIE4, network=ETHERNET,
        source="NVIDIA Ada GPU architecture white paper, appendix A: RTX 4090, sums in float32",
    ),
}  # fmt: skip


def known(name: str) -> str:
    """A name as it is written here, whatever its case. Raises ``UserError`` for an unknown one."""
    if (found := name.strip().lower()) in (*DEVICES, "cpu"):
        return found
    raise UserError(f"--gpu '{name}' is not known; valid: {', '.join([*DEVICES, 'cpu'])}")


def device(name: str, threads: int = 0) -> Device:
    """By name; "cpu" is this machine with ``threads`` threads (0: as many as PyTorch takes), measured now.
    Raises ``UserError`` for an unknown one."""
    found = known(name)
    return this_cpu(threads) if found == "cpu" else DEVICES[found]


def this_cpu(threads: int = 0) -> Device:
    """The speed of a product of training's size, of memory too large for the caches, and of a decoding step
    of a model that has next to no weights."""
    import torch

    before = torch.get_num_threads()
    try:
        if threads:
            torch.set_num_threads(threads)
        return _measured(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)


def _measured(threads: int) -> Device:
    import torch

    from liubai.model.matmul import product

    a, b = torch.ones(2048, 1024), torch.ones(1024, 1024)
    seconds = _best(lambda: product(a, b))
    speed = 2 * 2048 * 1024 * 1024 / seconds
    wide, one = torch.ones(8192, 8192), torch.ones(8192)
    bandwidth = wide.nbytes / _best(lambda: torch.mv(wide, one))
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    cpu = Device(
        name="cpu", memory=memory, flops={"float32": speed, "bfloat16": speed}, bandwidth=bandwidth,
        link=bandwidth, network=1e9, node=1, dtype="float32", holes=MALLOC_HOLES,
        overlaps=False, training=TRAINING, walks=WALKS,
        source=f"this machine, measured now with {threads} thread{'s' if threads > 1 else ''}",
    )  # fmt: skip
    # one thread does these: there is nothing to share out
    few, many = _step_of(2), _step_of(10)
    layer = max(0.0, (many - few) / 8)
    return replace(
        cpu, step_seconds=max(0.0, few - 2 * layer), layer_seconds=layer, launch_seconds=0.0, hop_seconds=0.0
    )


def _step_of(layers: int) -> float:
    """Seconds of a decoding step of a model of so many layers and next to no weights."""
    import torch

    from liubai.model.config import ModelConfig
    from liubai.model.transformer import build
    from liubai.rollout.engine import Request
    from liubai.rollout.torch_engine import TorchEngine

    shape = ModelConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, max_position_embeddings=256,
    )  # fmt: skip
    model = build(shape, 0)
    engine = TorchEngine(model, eos_ids=[], slots=1, max_length=200)
    engine.load(model.state_dict(), version=0)
    engine.submit([Request(id=0, prompt_ids=(1,), max_tokens=199, seed=0)])
    engine.step()
    return _best(engine.step, seconds=0.1, least=40) * torch.get_num_threads()


def _best(work: Callable[[], object], seconds: float = 0.25, least: int = 3) -> float:
    """Of several repetitions the shortest, in seconds of the processor by thread: what the machine can do,
    whoever else is busy on it."""
    import torch

    work()
    taken: list[float] = []
    ends = time.perf_counter() + seconds
    while len(taken) < least or (time.perf_counter() < ends and len(taken) < MOST):
        begun = time.process_time()
        work()
        taken.append(time.process_time() - begun)
    return min(taken) / torch.get_num_threads()

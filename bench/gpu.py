"""``python -m bench.gpu``: one GPU, and what ``liubai plan`` foretells of it, side by side.

For models of Qwen3's shapes, untrained, in bfloat16: tokens/s that the embedded engine writes, by the number
of answers at once, eager and compiled; an update's tokens/s and its peak of memory, with and without
checkpointing; a whole step of R1-Zero; the folder of weights that a transfer writes; and, where vLLM is
installed, transfers into it in this process, by folder and native, and its own tokens/s. Every figure is
from a process of its own, with a limit of time: what fails or takes too long is said, and the rest goes on.

``--device cpu --shapes 3M`` tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.plan import ANSWER, PROMPT, SHAPES, groups_of

#: beside those of bench.plan, Qwen3-1.7B's and 4B's
QWEN = {
    "596M": SHAPES["596M"],
    "1.7B": {**SHAPES["596M"], "hidden_size": 2048, "intermediate_size": 6144},
    "4B": {**SHAPES["596M"], "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
           "num_attention_heads": 32},
}  # fmt: skip
BATCHES = (1, 16, 64, 256)
#: answers of an update, and seconds that a figure may take
ANSWERS, LIMIT = 256, 150


def opened(shape: str, device: str) -> tuple[Any, Any]:
    """A model whose layers do something, and the roofline's view of it."""
    import torch

    from liubai.model.config import ModelConfig
    from liubai.model.transformer import build
    from liubai.plan.memory import sizes
    from liubai.plan.roofline import Model

    dtype = "float32" if device == "cpu" else "bfloat16"
    config = ModelConfig(
        architecture="Qwen3ForCausalLM", dtype=dtype, eos_token_id=1, tie_word_embeddings=True,
        **(QWEN | SHAPES)[shape],
    )  # fmt: skip
    model = build(config, 0)
    generator = torch.Generator().manual_seed(0)
    for block in model.layers:  # zero in a new model
        block.self_attn.o_proj.weight.data.normal_(0, 0.02, generator=generator)
        block.mlp.down_proj.weight.data.normal_(0, 0.02, generator=generator)
    model.head_weight.data.mul_(3)  # or every token would be as likely as any other
    return model.to(device, getattr(torch, dtype)), Model(config=config, size=sizes(config), dtype=dtype)


def known(name: str, device: str) -> Any:
    from liubai.plan import hardware

    return hardware.this_cpu() if device == "cpu" else hardware.device(name)


def settled(device: str) -> float:
    """The clock, when the device has done what it was given."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def requests(answers: int, turn: int) -> list[Any]:
    from liubai.rollout.engine import Request

    return [
        Request(id=i, prompt_ids=tuple(range(i // 8, i // 8 + PROMPT)), max_tokens=ANSWER,
                seed=turn * answers + i)
        for i in range(answers)
    ]  # fmt: skip


def write(shape: str, device: str, gpu: str, answers: int, compiled: int) -> dict[str, float]:
    from liubai.plan import roofline
    from liubai.rollout.engine import generate
    from liubai.rollout.torch_engine import TorchEngine

    model, seen = opened(shape, device)
    if compiled:
        model.compile_decoding()
    engine = TorchEngine(model.eval(), eos_ids=[], slots=answers, max_length=PROMPT + ANSWER)
    engine.load(model.state_dict(), version=0)
    taken = []
    for turn in range(3):
        began = settled(device)
        generate(engine, requests(answers, turn))
        taken.append(settled(device) - began)
    work = roofline.Work(
        groups=max(1, answers // 8), samples=min(8, answers), prompt=PROMPT, tokens=ANSWER, longest=ANSWER
    )
    foretold = roofline.at_once(seen, known(gpu, device), work, engines=1, slots=answers)
    return {"tokens/s": work.written / min(taken[1:]), "foretold": work.written / foretold.seconds}


def learn(shape: str, device: str, gpu: str, checkpointing: int, tokens: int) -> dict[str, float]:
    import torch

    from liubai.learn.losses import LossConfig
    from liubai.learn.optim import Optimizer
    from liubai.learn.update import UpdateConfig, update
    from liubai.plan import memory, roofline

    model, seen = opened(shape, device)
    model.checkpointing = bool(checkpointing)
    optimizer = Optimizer(model, lr=1e-6)
    config = UpdateConfig(
        loss=LossConfig(aggregation="token-mean"), advantage="grpo", minibatches=1, max_tokens=ANSWER,
        temperature=1.0, tokens_per_microbatch=tokens,
    )  # fmt: skip
    groups = groups_of(model, ANSWERS if device != "cpu" else 32)
    taken = []
    for _ in range(3):
        began = settled(device)
        update(model, optimizer, groups, config, version=1, pad_id=0)
        taken.append(settled(device) - began)
    work = roofline.Work(
        groups=len(groups), samples=8, prompt=PROMPT, tokens=ANSWER, longest=ANSWER,
        checkpointing=bool(checkpointing), microbatch=tokens,
    )  # fmt: skip
    how = memory.Training(
        dtype=seen.dtype, checkpointing=bool(checkpointing), prompt=PROMPT, answer=ANSWER,
        tokens=memory.microbatch(tokens, 8, ANSWER, PROMPT),
    )  # fmt: skip
    foretold = sum(roofline.update(seen, known(gpu, device), work).values())
    return {
        "tokens/s": work.written / min(taken[1:]),
        "foretold": work.written / foretold,
        "GB": torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else 0.0,
        "GB foretold": sum(memory.training(seen.config, seen.size, how).values()) / 1e9,
    }


def step(shape: str, device: str, gpu: str) -> dict[str, float]:
    """A step as ``rl`` makes it: weights, answers, an update; the answers' rewards are made up."""
    from liubai.learn.losses import LossConfig
    from liubai.learn.optim import Optimizer
    from liubai.learn.update import UpdateConfig, update
    from liubai.rollout.engine import generate
    from liubai.rollout.torch_engine import TorchEngine
    from liubai.types import Group, Problem, Reward

    model, _ = opened(shape, device)
    answers = 256 if device != "cpu" else 32
    engine = TorchEngine(model, eos_ids=[], slots=answers, max_length=PROMPT + ANSWER)
    optimizer = Optimizer(model, lr=1e-6)
    config = UpdateConfig(
        loss=LossConfig(aggregation="token-mean"), advantage="grpo", minibatches=1, max_tokens=ANSWER,
        temperature=1.0, tokens_per_microbatch=16384, tolerance=0.05,
    )  # fmt: skip
    found: dict[str, float] = {}
    for version in range(3):
        began = settled(device)
        engine.load(model.state_dict(), version)
        said = generate(engine, requests(answers, version))
        written = settled(device)
        rewards = tuple(Reward({}, float(i % 2)) for i in range(8))
        groups = [
            Group(Problem("", "", "exact"), tuple(said[i : i + 8]), rewards) for i in range(0, answers, 8)
        ]
        seen = update(model, optimizer, groups, config, version=version, pad_id=0)
        found = {
            "seconds writing": written - began,
            "seconds learning": settled(device) - written,
            "gap": seen["logprob_gap/fresh"],
        }
    return found


def folder(shape: str, device: str, gpu: str) -> dict[str, float]:
    from liubai.rollout.transport import write_folder

    model, _ = opened(shape, device)
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "about").mkdir()
        began = time.perf_counter()
        for version in range(2):
            began = settled(device)
            write_folder(Path(name) / f"{version}", model.state_dict(), Path(name) / "about", version)
        return {"GB": model.count_parameters() * 2e-9, "seconds": time.perf_counter() - began}


def vllm(shape: str, device: str, gpu: str, transport: Any) -> dict[str, float]:
    """Three transfers, the canary after each, and tokens/s of 256 answers."""
    from liubai.rollout.engine import generate
    from liubai.rollout.engines import EngineConfig, canary_for, engine_for
    from liubai.rollout.transport import write_folder

    model, _ = opened(shape, device)
    answers = 256 if device != "cpu" else 8
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        root = Path(name)
        (root / "about").mkdir()
        (root / "about" / "config.json").write_text(json.dumps(model.config.to_hf()))
        write_folder(root / "base", model.state_dict(), root / "about", 0)
        config = EngineConfig(kind="vllm", transport=transport, options={"skip_tokenizer_init": True})
        engine = engine_for(
            config, model, parent=root / "base", eos_ids=(), slots=answers, max_length=PROMPT + ANSWER,
            folder=root / "weights", stack=stack,
        )  # fmt: skip
        prompts = [list(range(i, i + PROMPT)) for i in range(4)]
        canary = canary_for(config, engine, model, prompts, temperature=1.0, max_tokens=16, seed=0)
        assert canary is not None
        found: dict[str, float] = {}
        for version in range(3):
            for p in model.parameters():
                p.data.mul_(1.001)
            began = settled(device)
            engine.load(model.state_dict(), version)
            sent = settled(device)
            canary.look(version)
            looked = settled(device)
            generate(engine, requests(answers, version))
            found = {
                "seconds": sent - began,
                "canary": looked - sent,
                "gap": canary.gap,
                "tokens/s": answers * ANSWER / (settled(device) - looked),
            }
        return found


FIGURES: dict[str, Callable[..., dict[str, float]]] = {
    "write": write,
    "learn": learn,
    "step": step,
    "folder": folder,
    "vllm": vllm,
}


def own_process(limit: int, what: str, *arguments: object) -> str:
    """Its figures in words, or what went wrong."""
    command = [sys.executable, "-m", "bench.gpu", "--one", what, *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"not within {limit} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["?"])[-1][:150]
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    return ", ".join(f"{name} {value:,.4g}" for name, value in figures.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gpu", default="h200", help="as liubai plan calls it")
    parser.add_argument("--shapes", default="596M,1.7B,4B", help="comma-separated")
    parser.add_argument("--only", default=",".join(FIGURES), help="comma-separated")
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds a figure")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        what, shape, device, gpu, *more = asked.one
        numbers = [int(one) if one.isdigit() else one for one in more]
        print(json.dumps(FIGURES[what](shape, device, gpu, *numbers)))
        return
    only = asked.only.split(",")
    variants: dict[str, list[tuple[object, ...]]] = {
        "write": [(n, compiled) for compiled in (0, 1) for n in BATCHES],
        "learn": [(again, tokens) for again in (0, 1) for tokens in (4096, 16384)],
        "step": [()],
        "folder": [()],
        "vllm": [("folder",), ("native",)],
    }
    for shape in asked.shapes.split(","):
        for what in only:
            for more in variants[what]:
                said = own_process(asked.limit, what, shape, asked.device, asked.gpu, *more)
                print(f"| {shape} | {what} {' '.join(map(str, more))} | {said} |", flush=True)


if __name__ == "__main__":
    main()

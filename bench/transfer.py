"""``python -m bench.transfer``: what it costs to bring new weights to an engine, and how well it then agrees.

The folder of a Qwen3-0.6B-shaped model in bfloat16 (1.2 GB) is written as a transfer writes it and read
again, beside ``cp`` of the same file; the two take turns. With ``--vllm``, from an environment that has
vLLM (``make .venv-vllm/ready``), real transfers of the same model into vLLM by folder and by hand, and for
each the mean |Δ log-probability| between vLLM's tokens and the trainer. A disk has moods: give it a quiet
machine and believe the medians.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench.large import LARGE, SMALL
from liubai.model.config import ModelConfig
from liubai.model.transformer import Transformer, build
from liubai.rollout.transport import write_folder


def model_of(shape: dict[str, Any], dtype: str) -> Transformer:
    """Untrained, with nothing at zero."""
    config = ModelConfig(architecture="Qwen3ForCausalLM", dtype=dtype, eos_token_id=1, **shape)
    model = build(config, 0)
    generator = torch.Generator().manual_seed(0)
    for block in model.layers:
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            layer.weight.data.normal_(0, 0.02, generator=generator)
    model.head_weight.data.mul_(3)  # or every token would be as likely as any other
    return model.to(getattr(torch, dtype)).eval()


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def disk(folder: Path, rounds: int) -> None:
    from safetensors.torch import load_file

    model = model_of(LARGE, "bfloat16")
    weights = model.state_dict()
    about = folder / "about"
    about.mkdir()
    (about / "config.json").write_text(json.dumps(model.config.to_hf()))
    size = sum(t.numel() * t.element_size() for t in weights.values())
    target, source, copy = folder / "step", folder / "source.safetensors", folder / "copy.safetensors"
    write_folder(target, weights, about, 0)
    (target / "model.safetensors").rename(source)
    ways: dict[str, Callable[[], object]] = {
        "written": lambda: write_folder(target, weights, about, 0),
        "cp": lambda: subprocess.run(["cp", str(source), str(copy)], check=True),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    read = []
    for turn in range(rounds):
        # whoever comes second waits for what the first has left to the disk: by turns, and with a rest
        for name in sorted(ways, reverse=turn % 2 == 1):
            shutil.rmtree(target, ignore_errors=True)
            copy.unlink(missing_ok=True)
            rest()
            began = seconds(ways[name])
            times[name].append((began, began + seconds(lambda: subprocess.run(["sync"], check=True))))
            if name == "written":
                read.append(
                    seconds(lambda: [t.sum() for t in load_file(target / "model.safetensors").values()])
                )
    print(f"{size / 1e9:.2f} GB, medians of {rounds}; in brackets until it is on disk")
    for name, taken in times.items():
        alone, settled = (statistics.median(column) for column in zip(*taken, strict=True))
        print(f"{name} {alone:.2f} s ({settled:.2f} s)")
    print(f"read again {statistics.median(read):.2f} s")


def rest() -> None:
    subprocess.run(["sync"], check=True)
    time.sleep(3)


def with_vllm(folder: Path, shape: dict[str, Any], dtype: str, transport: Any, transfers: int) -> None:
    from liubai.rollout.canary import scores
    from liubai.rollout.engine import Request, generate
    from liubai.rollout.engines import EngineConfig, canary_for, engine_for
    from liubai.seeds import derive

    model = model_of(shape, dtype)
    base = folder / f"{transport}-{dtype}"
    (folder / "plain").mkdir(exist_ok=True)
    (folder / "plain" / "config.json").write_text(json.dumps(model.config.to_hf()))
    write_folder(base, model.state_dict(), folder / "plain", 0)
    config = EngineConfig(kind="vllm", transport=transport, options={"skip_tokenizer_init": True})
    generator = torch.Generator().manual_seed(1)
    asked = [torch.randint(0, shape["vocab_size"], (24,), generator=generator).tolist() for _ in range(16)]
    with ExitStack() as stack:
        engine = engine_for(
            config,
            model,
            parent=base,
            eos_ids=(),
            slots=16,
            max_length=64,
            folder=folder / "weights",
            stack=stack,
        )
        canary = canary_for(config, engine, model, asked, temperature=1.0, max_tokens=16, seed=0)
        assert canary is not None
        times, looks, gaps = [], [], []
        for version in range(transfers):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn(p.shape, generator=generator).to(p.dtype), alpha=1e-3)
            weights = model.state_dict()
            times.append(seconds(lambda v=version, w=weights: engine.load(w, v)))
            looks.append(seconds(lambda v=version: canary.look(v)))
            requests = [
                Request(id=i, prompt_ids=tuple(ids), max_tokens=32, seed=derive(version, i))
                for i, ids in enumerate(asked)
            ]
            samples = generate(engine, requests)
            gaps += [
                abs(a - b)
                for s, row in zip(samples, scores(model, samples, 1.0), strict=True)
                for a, b in zip(s.logprobs, row, strict=True)
            ]
    print(
        f"vLLM, {model.count_parameters() / 1e6:.0f} M parameters, {dtype}, {transport}: transfer "
        f"{statistics.median(times):.2f} s, canary {statistics.median(looks):.2f} s, mean |Δ log-prob| of "
        f"{len(gaps)} tokens {statistics.mean(gaps):.1e}, largest {max(gaps):.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm", action="store_true", help="real transfers, too")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="on the disk that is meant; a temporary one else")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        disk(Path(name), options.rounds)
        if options.vllm:
            small = {**SMALL, "vocab_size": 4096}
            for transport in ("folder", "native"):
                with_vllm(Path(name), small, "float32", transport, 3)
                with_vllm(Path(name), small, "bfloat16", transport, 3)
                with_vllm(Path(name), LARGE, "bfloat16", transport, 3)


if __name__ == "__main__":
    main()

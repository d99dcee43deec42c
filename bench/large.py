"""``python -m bench.large``: a GRPO step of a Qwen3-0.6B-shaped, untrained model; what memory grows with.

Each figure is from a process of its own, by its peak resident size. The step: 8 answers of 256 tokens,
written by the engine on the trainer's own weights, made-up rewards, one AdamW update, float32. The slopes:
the forward and backward pass of a small model whose vocabulary or number of tokens grows.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

#: Qwen3-0.6B's shape
LARGE = {
    "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1e6,
}  # fmt: skip
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip


def peak() -> float:
    """The largest resident size so far, 10⁹ bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def step(samples: int, tokens: int, checkpointing: int, moments: int) -> None:
    import torch

    from liubai.learn.losses import LossConfig
    from liubai.learn.optim import Optimizer
    from liubai.learn.update import UpdateConfig, update
    from liubai.model.config import ModelConfig
    from liubai.model.transformer import build
    from liubai.rollout.engine import Request, generate
    from liubai.rollout.torch_engine import TorchEngine
    from liubai.types import Group, Problem, Reward

    model = build(ModelConfig(architecture="Qwen3ForCausalLM", **LARGE), 0)
    generator = torch.Generator().manual_seed(0)
    for block in model.layers:  # zero in a new model: nothing could be wrong in it
        block.self_attn.o_proj.weight.data.normal_(0, 0.02, generator=generator)
        block.mlp.down_proj.weight.data.normal_(0, 0.02, generator=generator)
    model.checkpointing = bool(checkpointing)
    optimizer = Optimizer(model, lr=1e-6, moments={16: torch.bfloat16, 32: torch.float32}[moments])
    engine = TorchEngine(model, eos_ids=[LARGE["vocab_size"] - 1], slots=samples, max_length=tokens + 128)
    engine.load(model.state_dict(), version=0)
    began = time.perf_counter()
    prompt = tuple(range(100, 164))
    found = generate(
        engine, [Request(id=i, prompt_ids=prompt, max_tokens=tokens, seed=i) for i in range(samples)]
    )
    written, before = time.perf_counter(), peak()
    rewards = tuple(Reward({}, float(i % 2)) for i in range(samples))
    config = UpdateConfig(
        loss=LossConfig(aggregation="token-mean"), advantage="grpo", minibatches=1, max_tokens=tokens,
        temperature=1.0, tokens_per_microbatch=512,
    )  # fmt: skip
    group = Group(Problem("", "", "exact"), tuple(found), rewards)
    metrics = update(model, optimizer, [group], config, version=0, pad_id=0)
    ended = time.perf_counter()
    count = sum(len(s.completion_ids) for s in found)
    print(
        f"{model.count_parameters() / 1e6:.0f} M parameters, {count} completion tokens, "
        f"checkpointing {bool(checkpointing)}, moments of {moments} bits: "
        f"written in {written - began:.0f} s, update {ended - written:.0f} s, "
        f"gap {metrics['logprob_gap/fresh']:.1e} nats, peak {peak():.2f} GB ({before:.2f} until the update)"
    )


def slope(vocabulary: int, tokens: int) -> None:
    import torch

    from liubai.learn.logprobs import token_logprobs
    from liubai.model.config import ModelConfig
    from liubai.model.transformer import build, causal

    model = build(ModelConfig(architecture="Qwen3ForCausalLM", vocab_size=vocabulary, **SMALL), 0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # what is there anyway is not a slope
    before = peak()
    ids_BT = torch.randint(vocabulary, (tokens // 256, 256))
    hidden = model.hidden(ids_BT, torch.arange(256).expand_as(ids_BT), causal())
    logprobs, _ = token_logprobs(hidden.flatten(0, 1), model.head_weight, ids_BT.flatten())
    logprobs.sum().backward()
    print(f"{peak() - before:.3f}")


def own_process(*arguments: object) -> str:
    command = [sys.executable, "-m", "bench.large", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    one = "step SAMPLES TOKENS 0|1 16|32 (checkpointing, bits of the moments), or slope VOCABULARY TOKENS"
    parser.add_argument("one", nargs="*", help=f"one figure: {one}")
    asked = parser.parse_args().one
    if asked:
        {"step": step, "slope": slope}[asked[0]](*map(int, asked[1:]))
        return
    print("GB above the model and its gradient, by vocabulary (rows) and tokens:")
    sizes = (2048, 4096, 8192, 16384)
    print("vocabulary", *sizes, sep="\t")
    for vocabulary in (16_000, 64_000, 256_000):
        print(vocabulary, *(own_process("slope", vocabulary, tokens) for tokens in sizes), sep="\t")
    for checkpointing, moments in ((1, 32), (0, 32), (1, 16)):
        print(own_process("step", 8, 256, checkpointing, moments))


if __name__ == "__main__":
    main()

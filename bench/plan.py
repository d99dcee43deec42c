"""``python -m bench.plan``: what ``liubai plan`` foretells of this machine's CPU, against what is measured
here.

Memory: the peak resident size of an update, above what the interpreter had before the model was built. Speed:
tokens/s that the embedded engine writes, by the number of answers at once, and tokens/s of an update. Every
figure is from a process of its own, which measures the machine's own speed (``liubai.plan.hardware``) first.
The machine may be shared: of speeds the best of ``--rounds`` counts, and seconds are the processor's, by
thread. Four sizes (FITTED) were in view when the shares of a CPU's speed were chosen; the others were
measured afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    # R1-Zero's of recipes/zero.toml
    "0.8M": {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "7M": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
           "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32},
    "20M": {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 10,
            "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64},
    "3M": {"vocab_size": 1000, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 8,
           "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 32},
    "35M": {"vocab_size": 12_000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    "61M": {"vocab_size": 16384, "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 12,
            "num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 64},
    # Qwen3-0.6B's
    "596M": {"vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
             "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
#: sizes that the shares of :mod:`liubai.plan.hardware` were chosen on
FITTED = ("0.8M", "7M", "20M", "61M")
PROMPT, ANSWER = 48, 80
#: (size, answers, checkpointing, bits of the moments, tokens of a micro-batch)
MEMORY = (
    ("7M", 64, 0, 32, 2048), ("20M", 64, 0, 32, 4096), ("20M", 64, 1, 32, 4096), ("61M", 32, 0, 32, 2048),
    ("61M", 32, 1, 32, 2048), ("61M", 32, 1, 16, 2048), ("3M", 64, 0, 32, 2048), ("35M", 64, 0, 32, 2048),
    ("35M", 64, 1, 16, 2048),
)  # fmt: skip
LARGE = (("596M", 8, 1, 32, 512), ("596M", 8, 0, 32, 512), ("596M", 8, 1, 16, 512))
BATCHES = {"0.8M": (1, 16, 64, 256), "7M": (1, 16, 64, 256), "20M": (1, 16, 64), "61M": (1, 8, 32),
           "3M": (1, 16, 64, 256), "35M": (1, 16, 64)}  # fmt: skip
UPDATES = {"0.8M": 256, "7M": 96, "20M": 48, "61M": 16, "3M": 128, "35M": 24}


def resident() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def model_of(name: str) -> Any:
    """A model of a size, whose layers do something, and the roofline's view of it."""
    import torch

    from liubai.model.config import ModelConfig
    from liubai.model.transformer import build
    from liubai.plan.memory import sizes
    from liubai.plan.roofline import Model

    config = ModelConfig(architecture="Qwen3ForCausalLM", **SHAPES[name])  # type: ignore[arg-type]
    model = build(config, 0)
    generator = torch.Generator().manual_seed(0)
    for block in model.layers:  # zero in a new model
        block.self_attn.o_proj.weight.data.normal_(0, 0.02, generator=generator)
        block.mlp.down_proj.weight.data.normal_(0, 0.02, generator=generator)
    return model, Model(config=config, size=sizes(config), dtype="float32")


def groups_of(model: Any, answers: int, samples: int = 8) -> list[Any]:
    """Made-up answers with the model's own log-probabilities left out: the update is asked not to compare."""
    import random

    from liubai.types import Group, Problem, Reward, Sample, Span, Stop

    rng, top = random.Random(0), model.config.vocab_size - 1

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(top) for _ in range(count))

    found = []
    for _ in range(answers // samples):
        prompt = ids(PROMPT)
        written = tuple(
            Sample(prompt, ids(ANSWER), (-5.0,) * ANSWER, Stop.EOS, (Span(0, ANSWER),))
            for _ in range(samples)
        )
        found.append(
            Group(Problem("", "", "exact"), written, tuple(Reward({}, float(i % 2)) for i in range(samples)))
        )
    return found


def learn(
    name: str, answers: int, checkpointing: int, moments: int, tokens: int, rounds: int
) -> dict[str, float]:
    """An update's peak of memory and its best speed, measured and foretold."""
    import torch

    from liubai.learn.losses import LossConfig
    from liubai.learn.optim import Optimizer
    from liubai.learn.update import UpdateConfig, update
    from liubai.plan import memory, roofline
    from liubai.plan.hardware import MALLOC_HOLES, this_cpu

    config = UpdateConfig(
        loss=LossConfig(aggregation="token-mean"), advantage="grpo", minibatches=1, max_tokens=ANSWER,
        temperature=1.0, tokens_per_microbatch=tokens,
    )  # fmt: skip
    # what the libraries take when they are used first is not the model's
    small, _ = model_of("0.8M")
    update(small, Optimizer(small, lr=1e-6), groups_of(small, 16), config, version=1, pad_id=0)
    cpu = this_cpu() if rounds else None
    before = resident()
    model, seen = model_of(name)
    model.checkpointing = bool(checkpointing)
    bits = {16: (torch.bfloat16, "bfloat16"), 32: (torch.float32, "float32")}
    optimizer = Optimizer(model, lr=1e-6, moments=bits[moments][0])
    groups = groups_of(model, answers)
    taken = []
    for _ in range(max(1, rounds)):
        begun = time.process_time()
        update(model, optimizer, groups, config, version=1, pad_id=0)
        taken.append((time.process_time() - begun) / torch.get_num_threads())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    threads = torch.get_num_threads()
    how = memory.Training(
        dtype="float32", moments=bits[moments][1], checkpointing=bool(checkpointing), prompt=PROMPT,
        tokens=memory.microbatch(tokens, 8, ANSWER, PROMPT), answer=ANSWER,
        replicas=memory.replicas(seen.size, threads),
        holes=MALLOC_HOLES,
    )  # fmt: skip
    parts = memory.training(seen.config, seen.size, how)
    found = {"memory": peak, "memory foretold": sum(parts.values())}
    if cpu:
        work = roofline.Work(
            groups=len(groups), samples=8, prompt=PROMPT, tokens=ANSWER, longest=ANSWER,
            checkpointing=bool(checkpointing), moments=bits[moments][1], microbatch=tokens,
        )  # fmt: skip
        foretold = sum(roofline.update(seen, cpu, work).values())
        found |= {"speed": work.written / min(taken), "speed foretold": work.written / foretold}
    return found


def write(name: str, answers: int, rounds: int) -> dict[str, float]:
    """Tokens/s of the embedded engine with so many answers at once, measured and foretold."""
    import torch

    from liubai.plan import roofline
    from liubai.plan.hardware import this_cpu
    from liubai.rollout.engine import Request, generate
    from liubai.rollout.torch_engine import TorchEngine

    model, seen = model_of(name)
    engine = TorchEngine(model, eos_ids=[], slots=answers, max_length=PROMPT + ANSWER)
    engine.load(model.state_dict(), version=0)
    cpu, taken = this_cpu(), []
    for turn in range(rounds + 1):
        asked = [
            Request(
                id=i,
                prompt_ids=tuple(range(i // 8, i // 8 + PROMPT)),
                max_tokens=ANSWER,
                seed=turn * answers + i,
            )
            for i in range(answers)
        ]
        begun = time.process_time()
        generate(engine, asked)
        taken.append((time.process_time() - begun) / torch.get_num_threads())
    work = roofline.Work(
        groups=max(1, answers // 8), samples=min(8, answers), prompt=PROMPT, tokens=ANSWER, longest=ANSWER
    )
    foretold = roofline.at_once(seen, cpu, work, engines=1, slots=answers)
    return {"speed": work.written / min(taken[1:]), "speed foretold": work.written / foretold.seconds}


def own_process(*arguments: object) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.plan", *map(str, arguments)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(printed)  # type: ignore[no-any-return]


class Errors:
    """Foretold over measured, of sizes that were fitted to and of the others."""

    def __init__(self) -> None:
        self.ratios: dict[tuple[str, bool], list[float]] = {}

    def add(self, what: str, name: str, measured: float, foretold: float) -> str:
        self.ratios.setdefault((what, name in FITTED), []).append(foretold / measured)
        return f"{foretold / measured - 1:+.0%}"

    def words(self) -> str:
        lines = []
        for (what, fitted), ratios in sorted(self.ratios.items()):
            off = [max(r, 1 / r) - 1 for r in ratios]
            kind = "sizes that the shares were chosen on" if fitted else "other sizes"
            lines.append(
                f"{what}, {kind}: off by {statistics.fmean(off):.0%} on the mean of {len(off)}, "
                f"{max(off):.0%} at worst"
            )
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "one",
        nargs="*",
        help="one figure: learn SIZE ANSWERS 0|1 16|32 TOKENS ROUNDS, or write SIZE ANSWERS ROUNDS",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--large", action="store_true", help="also the memory of a model of 596 M parameters: 12 GB, minutes"
    )
    parser.add_argument("--only", default="memory,update,write", help="comma-separated")
    asked = parser.parse_args()
    if asked.one:
        what, name, *numbers = asked.one
        print(json.dumps({"learn": learn, "write": write}[what](name, *map(int, numbers))))
        return
    only, errors = asked.only.split(","), Errors()
    if "memory" in only:
        print("| memory of an update | measured, MB | foretold, MB | error |\n| --- | ---: | ---: | ---: |")
        for name, answers, checkpointing, moments, tokens in MEMORY + (LARGE if asked.large else ()):
            found = own_process("learn", name, answers, checkpointing, moments, tokens, 0)
            a, b = found["memory"], found["memory foretold"]
            label = name + (", checkpointing" if checkpointing else "")
            label += ", moments of 16 bits" if moments == 16 else ""
            print(
                f"| {label} | {a / 1e6:,.0f} | {b / 1e6:,.0f} | {errors.add('memory', name, a, b)} |",
                flush=True,
            )
    if "update" in only:
        print("\n| update | measured, tokens/s | foretold | error |\n| --- | ---: | ---: | ---: |")
        for name, answers in UPDATES.items():
            for checkpointing in (0, 1):
                found = own_process("learn", name, answers, checkpointing, 32, 2048, asked.rounds)
                a, b = found["speed"], found["speed foretold"]
                label = f"{name}{', checkpointing' if checkpointing else ''}"
                print(f"| {label} | {a:,.0f} | {b:,.0f} | {errors.add('update', name, a, b)} |", flush=True)
    if "write" in only:
        print(
            "\n| writing | answers at once | measured, tokens/s | foretold | error |\n"
            "| --- | ---: | ---: | ---: | ---: |"
        )
        for name, batches in BATCHES.items():
            for answers in batches:
                found = own_process("write", name, answers, asked.rounds)
                a, b = found["speed"], found["speed foretold"]
                print(
                    f"| {name} | {answers} | {a:,.0f} | {b:,.0f} | {errors.add('writing', name, a, b)} |",
                    flush=True,
                )
    print("\n" + errors.words())


if __name__ == "__main__":
    main()

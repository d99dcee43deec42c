"""What is computed on one process and on several, to be compared; and how several are started.

A job is a function of a folder for its files that returns tensors. Here it runs as it is, or, by
:func:`on_ranks`, in several new processes that find each other as those of torchrun do.
"""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Killed, Silent, random_sample, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from liubai import ranks
from liubai.errors import UserError
from liubai.learn import sharded
from liubai.learn.losses import LossConfig
from liubai.learn.optim import Optimizer
from liubai.learn.packing import Batch, Sequence1, micro_batches
from liubai.learn.replicas import Replicas
from liubai.learn.update import UpdateConfig, update
from liubai.model.lora import LoraConfig, attach
from liubai.model.scorer import scorer_from
from liubai.model.transformer import Transformer
from liubai.rollout.torch_engine import TorchEngine
from liubai.stages import policy, shards
from liubai.stages.context import Context
from liubai.types import Group, Problem, Reward

Job = Callable[[Path], dict[str, Tensor]]
JOBS: dict[str, Job] = {}
REPOSITORY = Path(__file__).resolve().parent.parent


def job(function: Job) -> Job:
    JOBS[function.__name__] = function
    return function


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": paths}
    return {**os.environ, **where, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(command: Sequence[str], world: int) -> list[subprocess.Popen[str]]:
    """As torchrun would."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(rank, world, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


def on_ranks(names: Sequence[str], folder: Path, world: int = 2) -> dict[str, list[dict[str, Tensor]]]:
    """What the jobs return, on each rank."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = start(["-m", "rank_jobs", str(folder), *names], world)
    try:
        said = [p.communicate(timeout=240)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    assert [p.returncode for p in processes] == [0] * world, "\n".join(said)
    return {
        name: [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(world)] for name in names
    }


# ---- jobs ----


def groups(count: int = 4) -> list[Group]:
    """Groups of four answers of 1 to 90 tokens, of unlike lengths."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for g in range(count):
        lengths = torch.randint(1, 40, (4,), generator=generator).tolist()
        lengths[g % 4] = 60 + 10 * g
        samples = [random_sample(generator, prompt=3 + 5 * g, completion=n, version=7) for n in lengths]
        samples = [replace(s, prompt_ids=samples[0].prompt_ids) for s in samples]
        totals = torch.randn(4, generator=generator).tolist()
        rewards = tuple(Reward({}, total) for total in totals)
        found.append(Group(Problem("", "", "exact"), tuple(samples), rewards))
    return found


def learned(
    model: Transformer,
    *,
    layered: bool,
    muon_lr: float | None = None,
    steps: int = 2,
    minibatches: int = 2,
    share_from: int = 1,
    **loss: Any,
) -> dict[str, Tensor]:
    """Some updates; what is left of the model, and what there was to log."""
    reference = tiny_model(5, model.config)
    sharded.share_out(model, layered)
    # with this eps a step is nearly proportional to the gradient: rounding stays rounding
    optimizer = Optimizer(model, lr=1e-2, muon_lr=muon_lr, weight_decay=0.1, eps=1.0)
    config = UpdateConfig(
        loss=LossConfig(aggregation="token-mean", **loss),
        advantage="grpo",
        minibatches=minibatches,
        max_tokens=100,
        temperature=0.9,
        tokens_per_microbatch=128,
        share_from=share_from,
    )
    found: dict[str, Tensor] = {}
    for step in range(steps):
        seen = update(model, optimizer, groups(), config, version=step, pad_id=0, reference=reference)
        smaller = config.tokens_per_microbatch >> int(seen.get("halvings", 0))
        config = replace(config, tokens_per_microbatch=smaller)
        found |= {f"log/{step}/{n}": torch.tensor(v, dtype=torch.float64) for n, v in seen.items()}
    return found | of(model, optimizer)


def of(model: Transformer, optimizer: Optimizer) -> dict[str, Tensor]:
    """All of both, on every rank."""
    sharded.settle(model)
    weights = {f"model/{n}": ranks.whole(p.detach()).clone() for n, p in model.named_parameters()}
    return weights | {f"optimizer/{n}": ranks.whole(t).clone() for n, t in optimizer.state_dict().items()}


@job
def gradient(folder: Path) -> dict[str, Tensor]:
    """One step: the first moments are a tenth of the gradient."""
    return learned(tiny_model(0), layered=False, steps=1, minibatches=1)


@job
def gradient_in_layers(folder: Path) -> dict[str, Tensor]:
    return learned(tiny_model(0), layered=True, steps=1, minibatches=1)


@job
def reference(folder: Path) -> dict[str, Tensor]:
    return learned(tiny_model(0), layered=False, kl=0.1)


@job
def reference_in_layers(folder: Path) -> dict[str, Tensor]:
    return learned(tiny_model(0), layered=True, kl=0.1)


@job
def muon(folder: Path) -> dict[str, Tensor]:
    return learned(tiny_model(0), layered=False, muon_lr=1e-2)


@job
def ratios(folder: Path) -> dict[str, Tensor]:
    """Old log-probabilities are read before the first step."""
    model = tiny_model(1, tiny_config("Qwen3ForCausalLM", tie_word_embeddings=True))
    return learned(model, layered=True, importance="truncate", entropy_bonus=0.01)


@job
def lora(folder: Path) -> dict[str, Tensor]:
    model = tiny_model(2)
    attach(model, LoraConfig(rank=3), seed=0)
    model.checkpointing = True
    return learned(model, layered=False)


@job
def crate(folder: Path) -> dict[str, Tensor]:
    config = tiny_config("CrateAlphaForCausalLM", num_key_value_heads=4)
    return learned(tiny_model(3, config), layered=True)


@job
def halves(folder: Path) -> dict[str, Tensor]:
    """Rank 1 alone, and in one process the only one, runs out of memory in the middle of a backward pass."""
    hidden, left = Transformer.hidden, [3]

    def bounded(self: Transformer, ids: Tensor, *args: Any) -> Tensor:
        out = hidden(self, ids, *args)
        if torch.is_grad_enabled() and ranks.rank() == ranks.world() - 1 and ids.numel() > 1:
            left[0] -= 1
            if left[0] == 0:
                out.register_hook(_dry)
        return out

    Transformer.hidden = bounded  # type: ignore[method-assign]
    try:
        return learned(tiny_model(0), layered=False, steps=1)
    finally:
        Transformer.hidden = hidden  # type: ignore[method-assign]


def _dry(grad: Tensor) -> Tensor:
    raise RuntimeError("out of memory")


@job
def not_finite(folder: Path) -> dict[str, Tensor]:
    """A gradient that one rank alone sees as not finite changes nothing on any."""
    model = sharded.share_out(tiny_model(0), layered=False)
    optimizer = Optimizer(model, lr=1e-2)

    def work(model: Transformer, items: Sequence[float]) -> list[float]:
        for item in items:
            (model.head_weight.sum() * item).backward()
        return list(items)

    said = Replicas(model).map(work, [1.0, math.nan, 2.0])
    norm = optimizer.step()
    again = Replicas(model).map(work, [1.0, 2.0, 3.0])
    return {
        "norm": torch.tensor([norm, optimizer.step()]),
        "said": torch.tensor(said + again),
        **of(model, optimizer),
    }


@job
def scores(folder: Path) -> dict[str, Tensor]:
    """Three micro-batches of a model that is called as a whole: one rank has more of them."""
    scorer = sharded.share_out(scorer_from(tiny_model(0), seed=1), layered=False)
    optimizer = Optimizer(scorer, lr=1e-2, eps=1.0)
    sequences = [Sequence1(range(2, 2 + n), [True] * n) for n in (9, 7, 5)]

    def work(model: Transformer, items: Sequence[Batch]) -> list[float]:
        found = []
        for batch in items:
            loss = model(batch.ids_BT, batch.positions_BT).square().sum()
            loss.backward()
            found.append(float(loss.detach()))
        return found

    said = []
    for _ in range(2):
        with torch.no_grad():  # all ranks look at all of it, between two updates
            said += [float(scorer(b.ids_BT).sum()) for b in micro_batches(sequences, 0, 1)]
        said += Replicas(scorer).map(work, micro_batches(sequences, 0, 1))
        optimizer.step()
    return {"said": torch.tensor(said), **of(scorer, optimizer)}


@job
def parts(folder: Path) -> dict[str, Tensor]:
    """How many numbers of weights, gradients and moments stay on a rank."""
    model = sharded.share_out(tiny_model(0), layered=True)
    optimizer = Optimizer(model, lr=1e-2)

    def work(model: Transformer, items: Sequence[Batch]) -> list[None]:
        for batch in items:
            model(batch.ids_BT).square().sum().backward()
        return [None] * len(items)

    Replicas(model).map(work, micro_batches([Sequence1(range(2, 9), [True] * 7)], 0, 1))
    parameters = list(model.parameters())
    held = {
        "weights": [ranks.local(p) for p in parameters],
        "gradients": [ranks.local(p.grad) for p in parameters if p.grad is not None],
        "moments": list(optimizer.state.values()),
    }
    return {name: torch.tensor(sum(t.numel() for t in tensors)) for name, tensors in held.items()}


@job
def in_bfloat16(folder: Path) -> dict[str, Tensor]:
    """Sums are in float32 on ranks, too."""
    model = tiny_model(0).to(torch.bfloat16)
    found = learned(model, layered=True, steps=1, minibatches=1)
    return {n: t for n, t in found.items() if n.startswith("optimizer/") and n.endswith("/first")}


@job
def small_steps(folder: Path) -> dict[str, Tensor]:
    """How far ten steps of 1e-6 have moved weights that are computed with in bfloat16; and, on ranks, the
    types of parameters and gradients."""
    model = sharded.share_out(tiny_model(0).to(torch.bfloat16), layered=False)
    optimizer = Optimizer(model, lr=1e-6)
    before = {n: ranks.whole(t).clone() for n, t in optimizer.weights().items()}
    assert {t.dtype for t in before.values()} == {torch.float32}

    def work(model: Transformer, items: Sequence[Batch]) -> list[bool]:
        narrow = []
        for batch in items:
            logits = model(batch.ids_BT)
            narrow.append(logits.dtype == torch.bfloat16 and model.head_weight.dtype == torch.bfloat16)
            logits.float().square().sum().backward()
        return narrow

    sequences = [Sequence1(range(2, 2 + n), [True] * n) for n in (9, 7, 5)]
    for _ in range(10):
        assert all(Replicas(model).map(work, micro_batches(sequences, 0, 1)))
        if ranks.world() > 1:
            kept = [(ranks.local(p).dtype, ranks.local(p.grad).dtype) for p in model.parameters()]  # type: ignore[arg-type]
            assert set(kept) == {(torch.float32, torch.float32)}
        optimizer.step()
    return {n: ranks.whole(t) - before[n] for n, t in optimizer.weights().items()}


@job
def unlike(folder: Path) -> dict[str, Tensor]:
    """The model fits one rank's device alone: all take the way of the others."""
    room, sharded.ROOM = sharded.ROOM, 0 if ranks.rank() else sharded.ROOM
    try:
        return {"layered": torch.tensor(sharded.in_layers(sharded.share_out(tiny_model(0))))}
    finally:
        sharded.ROOM = room


@job
def memory(folder: Path) -> dict[str, Tensor]:
    """How often a stage's micro-batches are halved, a step each, where no more than 70 tokens fit."""
    from test_stages import run

    hidden = Transformer.hidden

    def bounded(self: Transformer, ids: Tensor, *args: Any) -> Tensor:
        if torch.is_grad_enabled() and ids.numel() > 70:
            raise RuntimeError("out of memory")
        return hidden(self, ids, *args)

    out = own(folder) / "memory"
    Transformer.hidden = bounded  # type: ignore[method-assign]
    try:
        run("ppo", folder / "wide", out, steps=3, groups=6, lr=1e-5, critic_warmup=0)
    finally:
        Transformer.hidden = hidden  # type: ignore[method-assign]
    return {}


@job
def full_disk(folder: Path) -> dict[str, Tensor]:
    """Rank 1 finds no room for its part of a resume point: all say so, and the one before stays."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter  # type: ignore[attr-defined]

    write = HuggingFaceStorageWriter.write_data

    def full(self: Any, *args: Any) -> Any:
        if ranks.rank() == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, *args)

    context, model = point_of(folder / "full")
    context.save(1, model, {})
    HuggingFaceStorageWriter.write_data = full
    try:
        with pytest.raises(UserError, match="no space left on"):
            context.save(2, model, {})
    finally:
        HuggingFaceStorageWriter.write_data = write
    state = context.restore(model)
    assert state is not None
    left = [path.name for path in (folder / "full").iterdir()]
    return {"step": torch.tensor(state.step), "left": torch.tensor(left == ["state"])}


@job
def unseen(folder: Path) -> dict[str, Tensor]:
    """Rank 1 has another disk under the same name."""
    listed, exists, lag = Path.glob, Path.exists, shards.LAG

    def elsewhere(path: Path) -> Path:
        return Path(str(path).replace("first-disk", "second-disk")) if ranks.rank() else path

    context, model = point_of(folder / "first-disk")
    Path.glob = lambda self, *a, **o: listed(elsewhere(self), *a, **o)  # type: ignore[method-assign,assignment]
    Path.exists = lambda self, *a, **o: exists(elsewhere(self), *a, **o)  # type: ignore[method-assign]
    shards.LAG = 0.0
    try:
        with pytest.raises(UserError, match=r"rank 1 does not see .* on a disk that all machines see"):
            context.save(1, model, {})
    finally:
        Path.glob, Path.exists, shards.LAG = listed, exists, lag  # type: ignore[method-assign]
    return {}


def point_of(folder: Path) -> tuple[Context, dict[str, Tensor]]:
    """A stage's context, and tensors for its resume points."""
    here = folder if ranks.is_main() else folder.parent / "others" / folder.name
    model = sharded.share_out(tiny_model(0), layered=False)
    return Context(here, 0, {}, Silent()), Optimizer(model, lr=1e-2).weights()


@job
def patient(folder: Path) -> dict[str, Tensor]:
    """What the first rank does alone may take longer than ranks wait for each other."""
    from torch import distributed

    group = distributed.distributed_c10d._get_default_group()
    group._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(seconds=1))

    def slow() -> int:
        time.sleep(2.5)
        return 7

    return {"said": torch.tensor(ranks.by_main(slow))}


@job
def stages(folder: Path) -> dict[str, Tensor]:
    """Every stage that learns; only the first rank's files stay."""
    from test_stages import STAGES, run

    for name in STAGES:
        run(name, folder / "wide", own(folder) / "whole" / name)
    return {}


@job
def layers(folder: Path) -> dict[str, Tensor]:
    """Stages whose models are too large to come together."""
    from test_stages import run

    room, sharded.ROOM = sharded.ROOM, 0
    try:
        for name in IN_LAYERS:
            run(name, folder / "wide", own(folder) / "layers" / name)
    finally:
        sharded.ROOM = room
    return {}


class Elsewhere:
    """An embedded engine that is not taken for one."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


@job
def told(folder: Path) -> dict[str, Tensor]:
    """The first rank alone has an engine, with a copy of the weights."""
    from test_stages import run

    def engine_for(config: Any, model: Transformer, **options: Any) -> Any:
        engine = TorchEngine(
            copy.deepcopy(model), **{n: options[n] for n in ("eos_ids", "slots", "max_length")}
        )
        return engine if ranks.rank() else Elsewhere(engine)

    usual, policy.engine_for = policy.engine_for, engine_for
    try:
        for name in ("language", "ppo in flight"):
            run(name, folder / "wide", own(folder) / "told" / name)
    finally:
        policy.engine_for = usual
    return {}


@job
def interrupted(folder: Path) -> dict[str, Tensor]:
    """Stages that end after their first resume point, and go on."""
    for name in RESUMED:
        interrupt(name, folder, own(folder) / "same")
        go_on(name, folder, own(folder) / "same")
        interrupt(name, folder, own(folder) / "fewer")  # goes on in one process
    return {}


@job
def more(folder: Path) -> dict[str, Tensor]:
    """They go on from a resume point of one process."""
    for name in RESUMED:
        go_on(name, folder, own(folder) / "more")
    return {}


IN_LAYERS = ("sft", "dpo", "process model", "ppo", "distill")
NARROW = ("sft in bfloat16", "ppo in bfloat16")
RESUMED = ("pretrain", "sft with lora", "ppo", "ppo in flight", *NARROW)


def own(folder: Path) -> Path:
    return folder / "others" if ranks.rank() else folder


def go_on(name: str, folder: Path, out: Path) -> None:
    """The groups of a stage that writes answers are noted down: those that were taken, and what is open."""
    from test_stages import HABITS, POLICY, SHAPE, STAGES, run

    from liubai.stages import ppo, pretrain, sft

    options = {"steps": 4, "tokens_per_step": 512, "save_every": 2, "model": SHAPE, "habits": HABITS}
    STAGES["pretrain"] = (pretrain, options, (), ())
    # a step of 1e-6 is lost in the rounding of bfloat16
    narrow: dict[str, Any] = {"precision": "bfloat16", "lr": 1e-6}
    options = {"epochs": 1.5, "batch": 16, "careful": {"errand": 1.0}, "save_every": 2}
    STAGES["sft in bfloat16"] = (sft, options | narrow, ("base", "answers"), ())
    options = POLICY | {"critic_warmup": 0}
    STAGES["ppo in bfloat16"] = (ppo, options | narrow, ("base",), ())
    write, save = policy.Policy.write, policy.Policy.save

    def note(what: Mapping[str, Any]) -> None:
        if ranks.is_main():
            with open(out / f"{name}.jsonl", "a") as file:
                file.write(json.dumps(what) + "\n")

    def noted(self: policy.Policy, *args: Any) -> Any:
        graded = write(self, *args)
        note({"taken": [g.index for g in graded]})
        return graded

    def ended(self: policy.Policy) -> None:
        state = self.rollouts.state()
        begun = sorted(set(range(state["next_index"])) - set(state.get("missing", ())))
        note({"open": sorted(map(int, state["open"])), "begun": begun})
        save(self)

    out.mkdir(parents=True, exist_ok=True)
    policy.Policy.write, policy.Policy.save = noted, ended  # type: ignore[method-assign]
    try:
        run(name, folder / "wide", out / name)
    finally:
        policy.Policy.write, policy.Policy.save = write, save  # type: ignore[method-assign]


def interrupt(name: str, folder: Path, out: Path) -> None:
    save = Context.save

    def last(self: Context, *args: Any) -> None:
        save(self, *args)
        raise Killed

    Context.save = last  # type: ignore[method-assign]
    try:
        go_on(name, folder, out)
    except Killed:
        return
    finally:
        Context.save = save  # type: ignore[method-assign]
    raise AssertionError(f"{name} made no resume point")


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    Context._tensorboard = lambda self, step, metrics: None  # type: ignore[method-assign]
    with ranks.joined():
        for name in names:
            found = {n: t.contiguous() for n, t in JOBS[name](folder).items()}
            save_file(found, folder / f"{name}-{ranks.rank()}.safetensors")


if __name__ == "__main__":
    main()

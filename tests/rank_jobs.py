"""What is computed on one process and on several, to be compared: stages and resume points here, updates in
``rank_updates``.

A job is a function of a folder for its files that returns tensors. Here it runs as it is, or, by
:func:`on_ranks`, in several new processes.
"""

from __future__ import annotations

import copy
import errno
import gc
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Killed, Silent, tiny_model
from rank_processes import JOBS, job
from rank_processes import on_ranks as on_ranks
from rank_updates import small_steps as small_steps  # with it all its jobs are in JOBS
from safetensors.torch import save_file
from torch import Tensor

from liubai import ranks
from liubai.errors import UserError
from liubai.learn import sharded
from liubai.learn.optim import Optimizer
from liubai.model.checkpoint import load, save_checkpoint
from liubai.model.lora import LoraConfig, attach
from liubai.model.scorer import scorer_from
from liubai.model.transformer import Transformer, build
from liubai.rollout.torch_engine import TorchEngine
from liubai.stages import policy, sampler, shards
from liubai.stages.context import Context


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


@contextmanager
def elsewhere() -> Iterator[None]:
    """Stages have an engine of ours with weights of its own, which the first rank alone asks."""

    def engine_for(config: Any, model: Transformer, **options: Any) -> TorchEngine:
        assert ranks.is_main()
        how = {n: options[n] for n in ("eos_ids", "slots", "max_length")}
        return TorchEngine(copy.deepcopy(model), **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "engine_for", engine_for)
        patch.setattr(policy, "is_elsewhere", lambda *_: True)
        yield


@job
def told(folder: Path) -> dict[str, Tensor]:
    from test_stages import run

    with elsewhere():
        for name in TOLD:
            run(name, folder / "wide", own(folder) / "told" / name)
    return {}


@job
def light(folder: Path) -> dict[str, Tensor]:
    """What a rank holds in the middle of a stage with a KL penalty, for an engine elsewhere; in sizes of the
    model."""
    from test_stages import POLICY

    from liubai.stages import rl

    found, log = list[float](), policy.Policy.log
    before = held()

    def weighed(self: policy.Policy, *args: Any) -> None:
        found.append((held() - before) / (4 * self.model.count_parameters()))
        log(self, *args)

    config = rl.Config(**rl.Config.filled(POLICY | {"steps": 2, "loss": {"kl": 0.1}}))
    context = Context(own(folder) / "light", 0, {"base": folder / "wide" / "base"}, Silent(), stage="light")
    with elsewhere(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "ROOM", 0)
        patch.setattr(policy.Policy, "log", weighed)
        rl.run(config, context)
    context.close()
    return {"held": torch.tensor(found)}


def held() -> int:
    """Bytes of all tensors."""
    gc.collect()
    plain = (o for o in gc.get_objects() if type(o) in (Tensor, torch.nn.Parameter) and not o.is_meta)
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in plain)}.values())


@job
def mapped(folder: Path) -> dict[str, Tensor]:
    """By how much a rank's own memory grows when a checkpoint in float32 is opened, and what it holds when
    that has been shared out, in sizes of the checkpoint; by the precision that it computes in."""

    def grown(dtype: torch.dtype) -> list[float]:
        before, empty = own_memory(), held()
        model, _ = sharded.load_to_share(folder / "large", dtype=dtype, device=torch.device("cpu"))
        opened, size = own_memory() - before, 4 * model.count_parameters()
        sharded.share_out(model)
        assert torch.isfinite(model.head_weight.sum())
        return [opened / size, (held() - empty) / size]

    # first what would be converted: it would find room where the other one was
    return {"grown": torch.tensor([grown(torch.bfloat16), grown(torch.float32)])}


@job
def rounded(folder: Path) -> dict[str, Tensor]:
    """A scorer, and a model with adapters, that compute in another precision than their checkpoint has: what
    was read and what was drawn are as in one process."""
    same = []
    names = ("wide/base/checkpoint", "half", "untrue")
    for name, dtype in itertools.product(names, (torch.float32, torch.bfloat16)):
        model, _ = sharded.load_to_share(folder / name, dtype=dtype, device=torch.device("cpu"))
        plain, _ = load(folder / name, dtype=dtype)
        scorers = scorer_from(model, seed=1), scorer_from(plain, seed=1)
        for one in (model, plain):
            attach(one, LoraConfig(rank=2), seed=3)
        for ours, theirs in (scorers, (model, plain)):
            sharded.share_out(ours)
            own, whole = dict(ours.named_parameters()), dict(theirs.named_parameters())
            assert own.keys() == whole.keys()
            assert ours.dtype == theirs.dtype == dtype
            assert {ranks.local(p).dtype for p in own.values()} == {torch.float32}
            same += [torch.equal(ranks.whole(p), whole[name].float()) for name, p in own.items()]
        read, _ = sharded.load_to_share(folder / name, dtype=dtype, device=torch.device("cpu"))
        sharded.share_out(read, learns=False)
        assert {ranks.local(p).dtype for p in read.parameters()} == {dtype}
    return {"same": torch.tensor(same)}


def write_checkpoints(folder: Path) -> None:
    """A large one of 75 MB, and one in bfloat16."""
    base, tokenizer = load(folder / "wide" / "base" / "checkpoint")
    save_checkpoint(folder / "half", build(replace(base.config, dtype="bfloat16"), 0), tokenizer, None)
    # a description that is not true: the file has float32
    copied = shutil.copytree(folder / "wide" / "base" / "checkpoint", folder / "untrue")
    described = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(described | {"dtype": "bfloat16"}))
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    save_checkpoint(folder / "large", build(replace(base.config, **wide), 0), tokenizer, None)


def own_memory() -> int:
    """Bytes, without what is a file's."""
    gc.collect()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line)
    return 1024 * int(line.split()[1])


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
TOLD = ("language", "ppo in flight", "rl with lora")
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

"""One model over several ranks: FSDP2 (``fully_shard``), layer by layer.

Each rank keeps a part of the rows of every parameter, in float32, and the optimizer's numbers for them. For
an update the weights come together (in bfloat16 where the model computes so), each rank goes through its
share of the micro-batches, and gradients are *summed* on the way back to their parts: the weights of tokens
are those of the whole update, so loss and gradient are those of one process. A checkpoint is read the same
way: :func:`load_to_share` maps it, and :func:`share_out` takes each rank's part, a layer at a time. No rank
ever holds a whole model that way.

Two ways, by size. A model whose weights and gradients fit every device **comes together once** an update: no
rank waits for another before its share is done, shares may differ in number, shared prompts work, and a rank
that runs out of memory lets all begin again with smaller micro-batches. A larger one comes together **layer
by layer**, twice a micro-batch, and its gradients leave after each: all ranks go through the same number of
micro-batches, some of which are empty.

Left out on purpose: tensor and pipeline parallelism, CPU offload.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from liubai import ranks
from liubai.errors import UserError, is_out_of_memory
from liubai.learn.packing import Batch
from liubai.model.checkpoint import load
from liubai.model.lora import trained
from liubai.model.transformer import Transformer, causal
from liubai.text.tokenizer import TextTokenizer

Model = TypeVar("Model", bound=Transformer)
Item = TypeVar("Item")
Result = TypeVar("Result")

#: A GPU has room for weights and gradients of this share of its memory beside what it computes.
SHARE = 1 / 3
#: On a CPU, so many bytes.
ROOM = 8 << 30


def load_to_share(
    path: str | Path, *, dtype: torch.dtype, device: torch.device
) -> tuple[Transformer, TextTokenizer]:
    """:func:`liubai.model.checkpoint.load` of a model that is shared out next: of several ranks none has more
    of it in memory, on its device or beside it, than it looks at: it is as the file has it until then."""
    if ranks.world() == 1:
        return load(path, dtype=dtype, device=device)
    model, tokenizer = load(path, dtype="stored", mapped=True)
    model.computes = dtype
    return model, tokenizer


def share_out(
    model: Model, layered: bool | None = None, *, device: torch.device | None = None, learns: bool = True
) -> Model:
    """``model``, of which this rank keeps its part on ``device`` from now on, unless told otherwise where it
    is; with one process the model as it is. All ranks must have the same weights. One that ``learns`` keeps
    them in float32. ``layered`` is decided by size unless told: by the smallest device's."""
    if ranks.world() == 1:
        return model.to(device, model.dtype)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    dtype, device = model.dtype, device or model.head_weight.device
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        raise UserError(f'device = "{device}" would put all ranks on one GPU; leave device out')
    if layered is None:
        size = model.count_parameters() * (dtype.itemsize + (4 if learns else 0))
        # GPUs may be unlike, and each way has collectives of its own: all ranks must go the same
        layered = any(ranks.gather(size > _room(device)))
    if not learns:
        model.requires_grad_(False)
    computes = dtype if learns and dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=computes, reduce_dtype=torch.float32)
    mesh = ranks.mesh(device.type)
    # a layer at a time: there is never more than one whole on the device, or in float32
    for part in [*model.layers, model]:
        for p in part.parameters():
            if not hasattr(p, "to_local"):  # of a layer before
                p.data = p.data.to(device, dtype).to(torch.float32 if learns else dtype)
        # None: layers are given back after their forward pass, what is beside them after the backward pass
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=None if layered else False)
    register_fsdp_forward_method(model, "hidden")
    # ``model(ids)`` calls ``hidden``: with hooks of its own the model would be given back between the two
    for hooks in (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs, model._forward_hooks):
        hooks.clear()
    # nothing here works in place on what a layer returns
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for part in _parts(model):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    root: Any = model
    root.set_reduce_scatter_unused_params(True)  # an empty micro-batch leaves the head out
    if not layered:
        _keep_together(root, True)
    root.layered, model.computes = layered, dtype
    # a rank that has no share of the first update must know its way back from one that fails, too
    _empty(model, learns=False)
    settle(model)
    return model


def is_shared_out(model: torch.nn.Module) -> bool:
    return hasattr(model, "layered")


def in_layers(model: torch.nn.Module) -> bool:
    """Does it come together layer by layer?"""
    return getattr(model, "layered", False)


def settle(model: torch.nn.Module) -> None:
    """Give back what has come together of it: its parameters are its parts again."""
    for part in _parts(model):
        part.reshard()


def _parts(model: torch.nn.Module) -> list[Any]:
    return [part for part in model.modules() if hasattr(part, "reshard")]


def _room(device: torch.device) -> int:
    if device.type != "cuda":
        return ROOM
    return int(torch.cuda.get_device_properties(device).total_memory * SHARE)


def _keep_together(root: Any, keep: bool) -> None:
    root.set_reshard_after_backward(not keep)
    root.set_requires_gradient_sync(not keep)


# ---- the micro-batches of an update over the ranks ----


def over_ranks(
    model: Transformer, work: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item], learns: bool
) -> list[Result]:
    """``work(items)``, each rank on its share; all results, in the order of ``items``, on every rank. With
    ``learns`` the gradients of all of them are in the parameters' parts then. Raises on all ranks the
    ``RuntimeError`` of memory that ran out on any of them."""
    shares = balanced([max(1, tokens_of(item)) for item in items], ranks.world())
    mine = [items[i] for i in shares[ranks.rank()]]
    if in_layers(model):
        found = _in_step(model, work, mine, max(map(len, shares)), learns)
    else:
        found = _at_once(model, lambda: work(mine) if mine else [], learns)
    results: dict[int, Result] = {}
    for numbers, said in zip(shares, ranks.gather(found), strict=True):
        results |= zip(numbers, said, strict=True)
    return [results[i] for i in range(len(items))]


def _at_once(model: Transformer, work: Callable[[], list[Result]], learns: bool) -> list[Result]:
    """``work`` on all of the model, which comes together for it; a model that is not shared out is whole."""
    if not is_shared_out(model):
        return ranks.agreed(work)
    settle(model)
    with _no_way_back():
        for part in _parts(model):
            part.unshard()
    try:
        found = ranks.agreed(work)
    except RuntimeError as error:
        if is_out_of_memory(error):  # on all ranks now, of any
            _forget(model)
        raise
    if learns:
        _reduce(model)
    settle(model)
    return found


def _forget(model: Transformer) -> None:
    """Half a gradient must not turn up in a later one. What FSDP keeps in float32 leaves it with a sum."""
    root: Any = model
    for p in model.parameters():
        p.grad = None
    root.reset_iter_state()
    if any(p.requires_grad for p in model.parameters()):
        _reduce(model)
    settle(model)
    for p in model.parameters():
        p.grad = None


def _reduce(model: Transformer) -> None:
    """An empty micro-batch of weight 0 carries the sums of all others to the parameters' parts."""
    _keep_together(model, False)
    with _no_way_back():
        _empty(model, learns=True)
    _keep_together(model, True)


def _in_step(
    model: Transformer,
    work: Callable[[Sequence[Item]], list[Result]],
    mine: Sequence[Item],
    passes: int,
    learns: bool,
) -> list[Result]:
    """One item after the other, each a forward (and a backward) pass that all ranks make at the same time."""
    settle(model)
    found: list[Result] = []
    with _no_way_back():
        for number in range(passes):
            if number < len(mine):
                found += work([mine[number]])
            else:
                _empty(model, learns)
    settle(model)
    return found


@contextmanager
def _no_way_back() -> Iterator[None]:
    """Memory that runs out while the others wait for this rank in the middle of a layer ends the run."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ranks.RankLost(
            f"memory ran out on rank {ranks.rank()}; lower tokens_per_microbatch, or set checkpointing = "
            "true, and give the same command again"
        ) from error


def _empty(model: Transformer, learns: bool) -> None:
    nothing_11 = torch.zeros(1, 1, dtype=torch.long, device=model.head_weight.device)
    with torch.set_grad_enabled(learns):
        hidden_11D = model.hidden(nothing_11, nothing_11, causal())
        if learns:
            hidden_11D.backward(torch.zeros_like(hidden_11D))


def balanced(costs: Sequence[int], shares: int) -> list[list[int]]:
    """Which of the items each share has: the dearest first, each to the share that has cost least so far."""
    found: list[list[int]] = [[] for _ in range(shares)]
    spent = [0] * shares
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = spent.index(min(spent))
        found[least].append(i)
        spent[least] += costs[i]
    return [sorted(numbers) for numbers in found]


def tokens_of(item: object) -> int:
    """The tokens, padding too, of whatever holds micro-batches."""
    if isinstance(item, Batch):
        return item.ids_BT.numel()
    if is_dataclass(item):
        return sum(tokens_of(getattr(item, field.name)) for field in fields(item))
    if isinstance(item, list | tuple):
        return sum(map(tokens_of, item))
    return 0


@torch.no_grad()
def bring(weights: Mapping[str, Tensor], into: torch.nn.Module | None, dtype: torch.dtype) -> None:
    """Copy ``weights`` into a model of this ``dtype``, a tensor at a time, whichever of the two is shared
    out. All ranks call this; one without a model helps the others."""
    own = dict(into.named_parameters()) if into else {}
    for name, tensor in weights.items():
        whole = ranks.whole(tensor.to(dtype))  # in float32 twice as much would travel
        if into:
            ranks.local(own[name]).copy_(ranks.rows_of(whole, own[name]))


def refresh(copy: torch.nn.Module | None, model: Transformer) -> None:
    """Bring a whole copy of a model that is shared out, where this rank has one, up to date."""
    settle(model)
    bring(trained(model), copy, model.dtype)  # nothing else has changed

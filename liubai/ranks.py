"""Several processes that learn together: which one this is, and how they talk.

Every process runs the very same stage code (SPMD). ``torchrun``, or whoever sets RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT as it does, starts them::

    torchrun --nproc-per-node 2 -m liubai.cli run recipes/zero.toml

Rank 0 alone writes files and talks to the terminal. With one process every function here is the identity, and
torch.distributed is not imported. What processes say to each other goes over torch.distributed's object
collectives, between processes of one run; nothing of it comes from a file or goes to one.

Whoever waits in a collective waits for PATIENCE at most. What rank 0 alone does may take as long as it likes:
the others look into the store until it is done (:func:`hear`). The store is of torchrun, which ends them when
rank 0 dies, or of rank 0 itself, and gone with it.

Left out on purpose: how a model is shared out (:mod:`liubai.learn.sharded`), and who starts the processes.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from liubai.errors import UserError, is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

Value = TypeVar("Value")

#: Minutes that the others may take to get to where this process waits for them, and what sets others.
PATIENCE, PATIENCE_VARIABLE = 30.0, "LIUBAI_RANK_TIMEOUT_MINUTES"
#: What the libraries say when the process at the other end is gone, or does not come.
GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "imed out",
    "imeout",
    "failed to recv",
    "failed to send",
    "remote process exited",
)

_rank, _world = 0, 1
_sought = False
_meshes: dict[str, DeviceMesh] = {}
_told = 0  # tasks that rank 0 has told, or that this process has heard


class RankLost(UserError):
    """Another process of this run is gone, or has failed."""


def rank() -> int:
    """This process's number; 0 is the one that writes."""
    return _rank


def world() -> int:
    """How many processes learn together."""
    return _world


def is_main() -> bool:
    return _rank == 0


def sought() -> bool:
    """Has this process begun to look for the others?"""
    return _sought


# ---- beginning and end ----


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that the environment speaks of, until the end of the block.

    Raises ``UserError`` when the others do not come, :class:`RankLost` when one of them is gone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or _world > 1:
        yield
        return
    _join(count)
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in GONE):
            raise
        raise RankLost(
            f"another process of this run has ended, or kept rank {_rank} of {_world} waiting for more than "
            f"{_patience().total_seconds() / 60:g} minutes ({PATIENCE_VARIABLE}); its own message says why. "
            f"The same command goes on from the last resume point. Heard here: {_first_line(error)}"
        ) from error
    _leave()  # not after an error: the others may never come to where one takes leave


def _join(count: int) -> None:
    import torch
    from torch import distributed

    global _rank, _world, _sought
    _sought = True
    patience = _patience()
    gpu = torch.cuda.is_available()
    if gpu:
        # whoever starts them may show each its own GPU alone
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=patience)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the {count} processes of this run did not find each other ({_first_line(error)}); start them "
            "all at once: torchrun --nproc-per-node N -m liubai.cli run RECIPE.toml"
        ) from error
    _rank, _world = distributed.get_rank(), count


def _patience() -> timedelta:
    said = os.environ.get(PATIENCE_VARIABLE, str(PATIENCE))
    try:
        minutes = float(said)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < 1e6:
        raise UserError(f"{PATIENCE_VARIABLE} is a number of minutes, such as {PATIENCE:g}, and not '{said}'")
    return timedelta(minutes=minutes)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _leave() -> None:
    from torch import distributed

    global _rank, _world, _told
    gather(None)  # nobody goes while another still listens
    distributed.destroy_process_group()
    _rank, _world, _told = 0, 1, 0
    _meshes.clear()


@contextmanager
def alone() -> Iterator[None]:
    """The first rank works and the others wait to :func:`hear` of it: in this block it is one process."""
    global _world
    before, _world = _world, 1
    try:
        yield
    finally:
        _world = before


def on_this_machine() -> int:
    """How many of them share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", _world)) if _world > 1 else 1


def mesh(device: str) -> DeviceMesh:
    """All of them in a row, on their ``device`` of this kind. For more than one. Raises ``UserError`` when
    two have the same GPU."""
    if device not in _meshes:
        from torch.distributed.device_mesh import init_device_mesh

        if device == "cuda":
            _require_own_gpus(gather(_gpu()))
        _meshes[device] = init_device_mesh(device, (_world,))
    return _meshes[device]


def _gpu() -> tuple[str, str]:
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return socket.gethostname(), str(properties.uuid)


def _require_own_gpus(places: Sequence[tuple[str, str]]) -> None:
    """``places``: machine and GPU of each rank. NCCL does not join two ranks on one GPU."""
    for number, place in enumerate(places):
        if (first := places.index(place)) != number:
            raise UserError(
                f"ranks {first} and {number} are on the same GPU of {place[0]}; start as many processes on a "
                'machine as it has GPUs (--nproc-per-node), or set device = "cpu"'
            )


# ---- what all say at the same place of the program ----


def gather(value: Value) -> list[Value]:
    """What each of them says, in the order of their numbers."""
    if _world == 1:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * _world
    distributed.all_gather_object(found, value)
    return found


def total(value: float) -> float:
    """The sum over all, the same everywhere to the last bit."""
    return value if _world == 1 else sum(gather(value))


def by_main(work: Callable[[], Value]) -> Value:
    """What ``work`` returns on rank 0, everywhere, however long it takes; a ``UserError`` of its is one
    everywhere."""
    if _world == 1:
        return work()
    from torch import distributed

    said: list[Any] = [None, None]
    failed: UserError | None = None
    if is_main():
        try:
            said[0] = work()
        except UserError as error:
            failed, said[1] = error, str(error)
        tell({"done": True})
    else:
        hear()
    distributed.broadcast_object_list(said)
    if failed:
        raise failed
    if said[1] is not None:
        raise RankLost(f"rank 0: {said[1]}")
    return said[0]  # type: ignore[no-any-return]


def agreed(work: Callable[[], Value]) -> Value:
    """What ``work`` returns here, once it is done everywhere. An error on one rank is one on all: a
    ``RuntimeError`` of memory that ran out, or :class:`RankLost`. ``work`` must not wait for others."""
    if _world == 1:
        return work()
    value: Any = None
    failed: Exception | None = None
    dry = False
    try:
        value = work()
    except Exception as error:
        dry = isinstance(error, RuntimeError) and is_out_of_memory(error)
        # the error's frames hold the tensors that memory ran out with
        failed = None if dry else error
    said = gather(("out of memory" if dry else "", (str(failed) or type(failed).__name__) if failed else ""))
    if failed:
        raise failed
    for number, (_, message) in enumerate(said):
        if message:
            raise RankLost(f"rank {number}: {message}")
    for number, (out_of_memory, _) in enumerate(said):
        if out_of_memory:
            raise RuntimeError(f"{out_of_memory} on rank {number}")
    return value  # type: ignore[no-any-return]


# ---- what rank 0 tells the others while they have nothing to do ----


def tell(task: Mapping[str, Any]) -> None:
    """Let the others :func:`hear` a JSON object. With ``failed``, rank 0 has stopped, and this is why."""
    global _told
    if _world > 1:
        _store().set(f"liubai/{_told}", json.dumps(task))
        _told += 1


def hear() -> dict[str, Any]:
    """The next that rank 0 tells. Until then it may work alone for as long as it likes. Raises
    :class:`RankLost` when it has stopped."""
    global _told
    store, key = _store(), f"liubai/{_told}"
    while not store.check([key]):
        time.sleep(0.02)
    _told += 1
    found: dict[str, Any] = json.loads(store.get(key))
    if found.get("failed"):
        raise RankLost(f"rank 0 has stopped: {found['failed']}")
    return found


def _store() -> Any:
    from torch import distributed

    return distributed.distributed_c10d._get_default_store()


# ---- shares ----


def own(items: Sequence[Value]) -> list[Value]:
    """Every ``world()``-th of them, beginning with that of this rank's number."""
    return list(items[_rank::_world])


def dealt(shares: Sequence[Sequence[Value]]) -> list[Value]:
    """The inverse: what all ranks made of their :func:`own` items, in the order of the items."""
    count = sum(map(len, shares))
    return [shares[i % len(shares)][i // len(shares)] for i in range(count)]


def portion(tokens: int, most: int) -> int:
    """The size of micro-batches, of ``most`` tokens at most, that gives every rank two of ``tokens``."""
    return most if _world == 1 else max(1, min(most, -(-tokens // (2 * _world))))


def halvings(tokens: int, most: int) -> int:
    """How often ``most`` has to be halved to be no more than the :func:`portion`."""
    count = 0
    while most >> count > portion(tokens, most):
        count += 1
    return count


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be shared out. All ranks ask for the same ones, in the same order."""
    full = getattr(tensor, "full_tensor", None)
    return full() if full else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor that may be shared out, in the same memory."""
    part = getattr(tensor, "to_local", None)
    return part() if part else tensor


def shared_as(part: Tensor, like: Tensor) -> Tensor:
    """``part`` as this rank's rows of a tensor that is shared out as ``like`` is."""
    if not hasattr(like, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def rows_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's rows of a whole ``tensor``, as ``like`` is shared out: equal parts, the last smaller."""
    if not hasattr(like, "to_local"):
        return tensor
    size = -(-len(tensor) // _world)
    return tensor[_rank * size : (_rank + 1) * size]

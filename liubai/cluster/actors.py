"""The crew on Ray: a rollout actor is a process with an engine of its own.

Messages between our own processes are Ray's, which are pickled; nothing is read from a file that way.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from liubai import __version__
from liubai.cluster.crew import Lost, Report, Written, written
from liubai.errors import UserError
from liubai.model.config import ModelConfig
from liubai.model.lora import LoraConfig, attach
from liubai.model.transformer import Transformer
from liubai.rollout.engine import Engine, Partial
from liubai.rollout.engines import EngineConfig, engine_for

if TYPE_CHECKING:
    from liubai.cluster.placement import Places

#: Answers that end within so many seconds of each other come home together.
HOLD = 0.05
#: Seconds after which an actor says that it lives, whatever it has to report.
HEARTBEAT = 5.0
#: Seconds that actors have to clear up before they are ended.
FAREWELL = 5.0
#: Seconds that Ray has to find out whether a node is gone, of which it takes a quarter of a minute.
UNSURE = 60.0

#: Makes the engine of the actor of a place, there; the stack lets go of it.
Build = Callable[[int, ExitStack], Engine]
#: Tensors as Ray shares them without a copy: (dtype, shape, bytes as a numpy array).
Packed = dict[str, tuple[str, tuple[int, ...], Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBuild:
    """A :data:`Build` of an engine as a stage wants it (:mod:`liubai.rollout.engines`); the weights come by
    ``load``. ``device`` is the actor's. For another engine than ours, ``parent`` must be there on every node,
    and weights are put into a folder that has the name of ``folder``, which no other run has
    (:func:`liubai.rollout.transport.own_folder`), and the place: what an actor of the same place could not
    clear up is found by the next one on that node."""

    config: EngineConfig
    model: ModelConfig
    dtype: torch.dtype
    device: str
    parent: Path
    folder: Path
    eos_ids: tuple[int, ...]
    slots: int
    max_length: int
    lora: LoraConfig | None = None
    compile: bool = False

    def __call__(self, place: int, stack: ExitStack) -> Engine:
        with torch.device("meta"):  # shapes alone
            model = Transformer(self.model).to(self.dtype).eval()
        if self.config.kind == "torch":
            model = model.to_empty(device=self.device)
            if self.lora:
                attach(model, self.lora, 0)
            if self.compile:
                model.compile_decoding()
        folder = self.weights(place)
        if self.config.kind != "torch":
            shutil.rmtree(folder, ignore_errors=True)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        return engine_for(
            self.config.model_copy(update={"folder": ""}),
            model,
            parent=self.parent,
            eos_ids=self.eos_ids,
            slots=self.slots,
            max_length=self.max_length,
            folder=folder,
            lora=self.lora,
            stack=stack,
            device=torch.device(self.device),
        )

    def weights(self, place: int) -> Path:
        """No two actors share it, also where ``config.folder`` is one that all nodes see."""
        return Path(self.config.folder or tempfile.gettempdir()) / f"{self.folder.name}-{place}"


def packed(weights: Mapping[str, Tensor]) -> Packed:
    """Raw bytes, for numpy does not know every type; tied weights stay one array."""
    flat: dict[tuple[int, torch.dtype, torch.Size, tuple[int, ...]], Any] = {}
    out: Packed = {}
    for name, tensor in weights.items():
        key = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if key not in flat:
            flat[key] = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        out[name] = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat[key]
    return out


def unpacked(weights: Packed) -> dict[str, Tensor]:
    """Views of what was packed: not to be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # … which PyTorch says, too
        return {
            name: torch.from_numpy(data).view(getattr(torch, dtype)).reshape(shape)
            for name, (dtype, shape, data) in weights.items()
        }


class RolloutActor:
    """One engine and one loop: it is stepped while there is something to write, and between two steps
    messages are read. They may overtake each other: who asks for answers says how new the weights must be,
    and who withdraws them, of which lot."""

    engine: Engine

    def __init__(self) -> None:
        self._lots: dict[int, int] = {}  # of the requests that are pending
        self._ended: list[Written] = []
        self._begun_again = 0
        self._trouble: Exception | None = None
        self._stack = ExitStack()
        self._opened, self._newer = asyncio.Event(), asyncio.Condition()
        # between a step and the next, somebody may wait for …
        self._work, self._news, self._idle = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def open(self, build: Build, place: int, threads: int, release: str) -> int:
        """Its process id. Raises ``UserError`` where the engine cannot be made, or the node has another
        release."""
        if release != (ours := releases()):
            raise UserError(
                f"the nodes of a cluster must have the same releases: here {release}, there {ours}"
            )
        torch.set_num_threads(threads)
        self.engine = build(place, self._stack)
        self._opened.set()
        self._task = asyncio.create_task(self._step())
        return os.getpid()

    async def load(self, weights: Packed, version: int, oldest: int | None) -> None:
        await self._opened.wait()
        with self._noting():
            if version <= self.engine.version:
                return  # overtaken
            if oldest is not None:
                partials = self.engine.partials()
                old = [p for p in partials if any(span.version < oldest for span in p.versions)]
                self.engine.cancel(p.request.id for p in old)
                self.engine.submit(p.request for p in old)
                self._begun_again += len(old)
            self.engine.load(unpacked(weights), version)
            async with self._newer:
                self._newer.notify_all()

    async def write(self, lot: int, asked: Sequence[Partial], version: int) -> None:
        await self._opened.wait()
        with self._noting():
            async with self._newer:
                await self._newer.wait_for(lambda: self.engine.version >= version)
            ids = [partial.request.id for partial in asked]
            self.engine.cancel(id for id in ids if id in self._lots)
            if not self.engine.pending:
                self.engine.abort()  # which slot comes next must not depend on what was written before
            self.engine.resume(asked)
            self._lots |= dict.fromkeys(ids, lot)
            self._idle.clear()
            self._work.set()

    async def cancel(self, lot: int, ids: Sequence[int]) -> None:
        await self._opened.wait()
        with self._noting():
            mine = [id for id in ids if self._lots.get(id) == lot]
            self.engine.cancel(mine)
            for id in mine:
                del self._lots[id]

    async def hear(self, place: int) -> Report:
        """What has ended since the last time, as soon as there is something; raises what went wrong."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), HEARTBEAT)
        if self._ended and self.engine.pending:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), HOLD)
        if self._trouble is not None:
            raise self._trouble
        report = Report(place, tuple(self._ended), self._begun_again)
        self._ended, self._begun_again = [], 0
        self._news.clear()
        return report

    async def close(self) -> None:
        """Leave nothing behind; nothing is written any more."""
        self._task.cancel()
        self._stack.close()

    async def _step(self) -> None:
        with self._noting():
            while True:
                while not self.engine.pending:
                    self._idle.set()
                    self._work.clear()
                    await self._work.wait()
                for request, sample in self.engine.step():
                    self._ended.append(written(self._lots.pop(request.id), request.id, sample))
                if self._ended:
                    self._news.set()
                await asyncio.sleep(0)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Nobody waits for a message's end: what goes wrong is said when news are asked for."""
        try:
            yield
        except Exception as error:
            self._trouble = self._trouble or error
            self._news.set()


def releases() -> str:
    return f"liubai {__version__} with torch {torch.__version__}"


class RayCrew:
    """See :class:`liubai.cluster.crew.Crew`. ``places`` say where on the cluster each actor may be."""

    def __init__(self, build: Build, places: Places, threads: int) -> None:
        self.size, self._build, self._places, self._threads = places.size, build, places, threads
        self.pids: dict[int, int] = {}  #: of the actors that are there, each on its node
        self._actors: dict[int, Any] = {}
        # that an actor is open, its news, and that it has read a message -> its place
        self._awaited: dict[Any, int] = {}
        # lost, and Ray does not know yet why: until when that is waited for
        self._unsure: dict[int, float] = {}

    def start(self, place: int) -> None:
        import ray

        self._end(place)
        kind: Any = ray.remote(RolloutActor)
        actor = kind.options(**self._places.options(place), max_restarts=0).remote()
        self._actors[place] = actor
        self._awaited[actor.open.remote(self._build, place, self._threads, releases())] = place

    def vacant(self, place: int) -> bool:
        return time.monotonic() >= self._unsure.get(place, 0.0)

    def share(self, weights: Mapping[str, Tensor]) -> object:
        import ray

        return ray.put(packed(weights))

    def load(self, place: int, weights: object, version: int, oldest: int | None) -> None:
        self._awaited[self._actors[place].load.remote(weights, version, oldest)] = place

    def write(self, place: int, lot: int, asked: Sequence[Partial], version: int) -> None:
        self._awaited[self._actors[place].write.remote(lot, asked, version)] = place

    def cancel(self, place: int, lot: int, ids: Sequence[int]) -> None:
        self._awaited[self._actors[place].cancel.remote(lot, ids)] = place

    def hear(self, seconds: float) -> list[Report | Lost]:
        import ray

        refs = list(self._awaited)
        if not refs:  # all are down
            time.sleep(seconds)
            return []
        ready, _ = ray.wait(refs, num_returns=1, timeout=seconds)
        if ready:  # and whatever else is there by now
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        return [news for ref in ready if (news := self._news(ref))]

    def _news(self, ref: Any) -> Report | Lost | None:
        """None of an actor that was lost before, and where a message was read, which is no news. One that
        cannot be read is a loss: its actor would wait for weights that never come."""
        place = self._awaited.pop(ref, None)
        if place is None:  # lost with another answer, a moment ago
            return None
        try:
            news = fetched(ref)
        except ActorLost as lost:
            return self._gone(place, lost)
        if news is None:
            return None
        if self._unsure.pop(place, None):  # it lives, but others have its work: the next one ends it
            return None
        self._awaited[self._actors[place].hear.remote(place)] = place
        if isinstance(news, int):
            self.pids[place] = news
            return Report(place)
        report: Report = news
        return report

    def _gone(self, place: int, lost: ActorLost) -> Lost | None:
        self.pids.pop(place, None)
        self._forget(place)
        until = self._unsure.pop(place, None)
        if not lost.sure:
            self._unsure[place] = until or time.monotonic() + UNSURE
            self._awaited[self._actors[place].hear.remote(place)] = place
        return None if until else Lost(place, str(lost))

    def _forget(self, place: int) -> None:
        self._awaited = {ref: p for ref, p in self._awaited.items() if p != place}

    def _end(self, place: int) -> None:
        import ray

        if (actor := self._actors.pop(place, None)) is not None:
            ray.kill(actor)
        self.pids.pop(place, None)
        self._unsure.pop(place, None)
        self._forget(place)

    def close(self) -> None:
        import ray

        farewells = [self._actors[place].close.remote() for place in self.pids]
        if farewells:
            ray.wait(farewells, num_returns=len(farewells), timeout=FAREWELL)
        for place in list(self._actors):
            self._end(place)
        self._places.give_back()


class ActorLost(Exception):
    """What was asked of an actor will never be answered, through no fault of the program; says why. ``sure``:
    the actor is gone, and not only out of reach."""

    def __init__(self, why: str, sure: bool = True) -> None:
        super().__init__(why)
        self.sure = sure


def fetched(ref: Any) -> Any:
    """What an actor has answered. Raises :class:`ActorLost`, or what was raised there.

    Whatever Ray says that is not a task's own error is a loss: that the actor has died or was killed for the
    memory of its node, that the node is gone, or that there is no place for it any more."""
    import ray
    from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, RayError):  # what it was given did not arrive
            raise ActorLost(why_lost(error.cause)) from error
        raise error.cause from error
    except ActorUnavailableError as error:
        raise ActorLost("it cannot be reached", sure=False) from error
    except RayError as error:
        raise ActorLost(why_lost(error)) from error


def why_lost(error: Exception) -> str:
    """The telling part of Ray's message, which is a page."""
    text = " ".join(str(error).split())
    for pattern in (r"because (its [^.]+)", r"exit detail: ([^.]+)", r"^([^.]+)"):
        if found := re.search(pattern, text):
            return found[1].strip()[:200]
    return type(error).__name__

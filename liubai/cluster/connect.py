"""A cluster for the time of a run, on Ray::

    with Cluster("auto", view) as cluster:
        recipe.run(plan, folder, view, cluster=cluster)     # context.cluster, to the stages

``auto`` is a cluster of this machine alone, started here and ended here, or the one that RAY_ADDRESS names.
Another one that happens to be running is never joined.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from liubai.cluster.engine import SILENT, RemoteEngine
from liubai.errors import UserError
from liubai.grade import GraderPool

if TYPE_CHECKING:
    import torch

    from liubai.cluster.actors import Build
    from liubai.cluster.placement import Places, Share
    from liubai.model.config import ModelConfig
    from liubai.model.lora import LoraConfig
    from liubai.rollout.engines import EngineConfig
    from liubai.stages.view import View

#: Grader actors at most, where there are more nodes: each has processes of its own.
GRADERS = 8
#: Seconds that a cluster may take to answer.
ANSWERS = 10.0


class Cluster:
    """See the module. ``actors`` write answers: as many as there is room for, unless told otherwise.

    Raises ``UserError`` on entry when Ray is not installed or nothing answers at the address."""

    def __init__(self, address: str, view: View, actors: int | None = None) -> None:
        self.address, self.view, self.actors = address, view, actors
        self._engine: RemoteEngine | None = None

    def __enter__(self) -> Self:
        from liubai.cluster.placement import free_again, room

        fixed = connect(self.address)
        if self.actors is None:
            free_again(self.view.warn)
        # asked once: what an engine has given back is not free at once, and the number of actors decides bits
        self._room = room(fixed)
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        try:
            self._let_go()
        finally:
            ray.shutdown()  # type: ignore[no-untyped-call]

    def engine_for(
        self,
        config: EngineConfig,
        model: ModelConfig,
        *,
        dtype: torch.dtype,
        device: str,
        compile: bool = False,
        parent: Path,
        folder: Path,
        eos_ids: Sequence[int],
        slots: int,
        max_length: int,
        lora: LoraConfig | None = None,
        inflight: bool = False,
        max_staleness: int | None = None,
    ) -> RemoteEngine:
        """Actors that have what :func:`liubai.rollout.engines.engine_for` would make here, each on a
        ``device`` of its own. ``folder`` has a name that no other run has."""
        from liubai.cluster.actors import EngineBuild

        build = EngineBuild(
            config=config,
            model=model,
            dtype=dtype,
            device=device,
            parent=parent.absolute(),
            folder=folder.absolute(),
            eos_ids=tuple(eos_ids),
            slots=slots,
            max_length=max_length,
            lora=lora,
            compile=compile,
        )
        return self.engine(
            build,
            slots=slots,
            max_length=max_length,
            gpus=config.tensor_parallel if device == "cuda" else 0,
            inflight=inflight,
            max_staleness=max_staleness,
            # another program may take long to begin, and to read weights
            silent=SILENT if config.kind == "torch" else max(SILENT, config.timeout),
        )

    def engine(
        self,
        build: Build,
        *,
        slots: int,
        max_length: int,
        gpus: int = 0,
        inflight: bool = False,
        max_staleness: int | None = None,
        silent: float = SILENT,
    ) -> RemoteEngine:
        """Actors that each have an engine made by ``build`` and so many ``gpus``. There is one such engine
        at a time: the one before is closed."""
        import torch

        from liubai.cluster.actors import RayCrew
        from liubai.cluster.placement import Share, how_many

        self._let_go()
        threads = torch.get_num_threads()
        share = Share(1.0, gpus) if gpus else Share(threads)
        what = "rollout actors"
        count = how_many(self.actors, share, what, self._room)
        places = self._places(count, share, what)
        self._engine = RemoteEngine(
            RayCrew(build, places, threads),
            slots=slots,
            max_length=max_length,
            exact=not inflight,
            max_staleness=max_staleness,
            silent=silent,
            warn=self.view.warn,
            status=self.view.status,
        )
        return self._engine

    def _places(self, count: int, share: Share, what: str) -> Places:
        """For so many or, where a node is gone since they were counted, for as many as there is room for."""
        from liubai.cluster.placement import Places, how_many, room_now

        try:
            return Places(count, share, "SPREAD", what, self.view.warn)
        except UserError:
            fewer = how_many(None, share, what, room_now())
            if self.actors or fewer >= count:
                raise
            self.view.warn(
                f"there was room for {count} {what}, and there is for {fewer} now: the run goes on with "
                "those, and its last bits may differ"
            )
            return Places(fewer, share, "SPREAD", what, self.view.warn)

    def graders(self, timeout_s: float) -> GraderPool:
        """One grader a node. To be closed by whoever asked for it."""
        from liubai.cluster.graders import RayGrader, RemoteGraders
        from liubai.cluster.placement import GRADER_MEMORY, Places, Share, nodes

        places = Places(min(GRADERS, nodes()), Share(memory=GRADER_MEMORY), "SPREAD", "graders")
        return RemoteGraders(
            lambda place: RayGrader(timeout_s, places, place), places.size, timeout_s, places.give_back
        )

    def _let_go(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()


def is_here(address: str) -> bool:
    """Does it stand for a cluster of this machine alone, which is started with the run?"""
    return address == "auto" and not os.environ.get("RAY_ADDRESS")


def joined() -> bool:
    """Is this process one of a cluster's, so that others write and judge for it?"""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def connect(address: str, beside: int = 0) -> bool:
    """Join the cluster at ``address``; see the module for ``auto``. A cluster of this machine alone gives its
    cores to those who write, and counts ``beside`` more for ranks that learn there: who learns waits for
    them, and they for it. Without ranks it is this process that learns, and of several GPUs the first is its
    own. Is it such a cluster, which cannot grow? Raises ``UserError``."""
    # before the import, which reads them
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    named = f"--cluster '{address}'"
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "")
        named = f"RAY_ADDRESS '{address}'"
    if not address:  # nothing of it listens but on the loopback
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--cluster needs Ray ({error}); pip install 'liubai[ray]'") from error
    _hush(ray)
    with _sigterm_as_it_was():
        _init(ray, address, named, beside)
    return not address


def _init(ray: Any, address: str, named: str, beside: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not address:
        cores = len(os.sched_getaffinity(0)) + beside
        try:
            with nullcontext() if beside else _gpus_of_others(), _groups_of_their_own():
                ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
        except Exception as error:  # Ray has no type of its own for it
            raise UserError(
                f"Ray could not start a cluster of this machine ({_first_line(error)}); `ray stop` ends what "
                "an earlier one may have left"
            ) from error
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in address:
        raise UserError(
            f"{named}: a cluster's address is HOST:PORT as `ray start --head` printed it, given on a machine "
            "of that cluster; --cluster auto without RAY_ADDRESS is one of this machine alone"
        )
    try:
        # Ray would try for minutes
        socket.create_connection((host.strip("[]"), int(port)), ANSWERS).close()
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at '{address}' ({_first_line(error)}); is it running, and is this "
            "machine one of it?"
        ) from error


def _hush(ray: Any) -> None:
    """Ray writes a page to the terminal for every process that dies, whatever it was told; the engine says it
    in a line."""
    if hasattr(ray._private.worker, "print_to_stdstream"):
        ray._private.worker.print_to_stdstream = lambda *_, **__: None


@contextmanager
def _sigterm_as_it_was() -> Iterator[None]:
    """Ray takes the signal, to print a trace of its C++ and be gone; whoever had it before gets it back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _groups_of_their_own() -> Iterator[None]:
    """`timeout` and batch systems send SIGTERM to a whole process group. Ray's own processes are to be in
    others: a run whose Ray is gone cannot end in order, and waits for it for a minute."""
    import ray._private as private

    services: Any = private.services
    if not hasattr(services, "ConsolePopen"):  # another version: it is by what all of its processes start
        yield
        return
    before = services.ConsolePopen
    services.ConsolePopen = partial(before, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = before


@contextmanager
def _gpus_of_others() -> Iterator[None]:
    """Of several GPUs the first is this process's own: Ray is not to hear of it."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = before.split(",") if before is not None else [str(i) for i in range(_gpus())]
    if len(seen) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seen[1:])
    try:
        yield
    finally:
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        elif len(seen) > 1:
            del os.environ["CUDA_VISIBLE_DEVICES"]


def _gpus() -> int:
    """Without waking them up."""
    return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

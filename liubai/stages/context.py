"""What a stage gets: its folder, its inputs, a place for numbers, and a way to be killed safely.

The loop in which a context belongs::

    first = 0
    if state := context.restore():
        first = state.step                      # … and load state.tensors, state.meta
    for step in range(first, config.steps):
        ...
        context.log(step + 1, config.steps, {"loss": loss})
        if (step + 1) % config.save_every == 0:
            context.save(step + 1, tensors, {"cursor": cursor})

A saved state remembers how long the logs were when it was made. Steps that were logged after it and
then lost are cut off on ``restore``, so the logs of a killed and resumed run equal those of a run
that was left alone.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liubai import files, ranks
from liubai.errors import UserError
from liubai.grade.pool import GraderPool
from liubai.model.hub import find_folder
from liubai.stages import shards
from liubai.stages.shards import TENSORS as TENSORS
from liubai.stages.view import View

if TYPE_CHECKING:
    import torch

    from liubai.cluster.connect import Cluster

METRICS, SAMPLES, WARNINGS = "metrics.jsonl", "samples.jsonl", "warnings.jsonl"
LOGS = (METRICS, SAMPLES, WARNINGS)
META = "meta.json"


@dataclass(frozen=True)
class State:
    """A resume point: ``step`` steps are done. ``tensors`` are on the CPU, or those that were read into."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    meta: dict[str, Any]


@dataclass
class Context:
    """Made by the runner, one a stage. ``inputs``: stage name -> folder of that finished stage.

    Of several ranks the first has the stage's folder, a view and logs; the others have a folder that goes
    when they end, and say nothing. They call :meth:`save` and :meth:`restore` together."""

    folder: Path
    seed: int
    inputs: Mapping[str, Path]
    view: View
    stage: str = ""
    fingerprint: str = ""
    cluster: Cluster | None = None  #: where answers are written and judged, if not here
    settings: str = ""  #: the fingerprint but for where the stage is computed, and how much at once
    _before: float = field(default=0.0, init=False)  # seconds of work before this session
    _started: float = field(default_factory=time.monotonic, init=False)
    _scalars: Any = field(default=None, init=False)  # TensorBoard's writer, made on first use
    _restored_step: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.stage = self.stage or self.folder.name
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def seconds(self) -> float:
        """Seconds of work in this stage, over all its sessions; work that was lost is not counted."""
        return self._before + time.monotonic() - self._started

    def parent_checkpoint(self, model: str = "") -> Path:
        """The one checkpoint that the stages that this one is ``from`` wrote, or that of ``model``, a folder
        or a hub id. Raises ``UserError`` when it is not exactly one of them."""
        found = self.given("checkpoint")
        if model and not found:
            return find_folder(model)
        if model:
            raise UserError(f"stage '{self.stage}' names a model and an earlier stage; it begins with one")
        names = ", ".join(self.inputs) or "none"
        if len(self.inputs) == 1 and not found:
            raise UserError(f"stage '{self.stage}' needs a checkpoint, but stage '{names}' wrote none")
        if len(found) != 1:
            raise UserError(
                f"stage '{self.stage}' starts from the checkpoint of exactly one earlier stage; "
                f"its 'from' names {names}. Or name a model"
            )
        return found[0]

    def given(self, name: str) -> list[Path]:
        """What the stages that this one is ``from`` wrote under ``name``, in its order: a stage finds its
        inputs by what they are."""
        return [folder / name for folder in self.inputs.values() if (folder / name).exists()]

    def the(self, name: str, what: str) -> Path:
        """The only one of them. Raises ``UserError`` that says of which ``what`` there is none, or two."""
        found = self.given(name)
        if len(found) != 1:
            names = ", ".join(self.inputs) or "none"
            raise UserError(
                f"stage '{self.stage}' needs {what} from exactly one earlier stage; of those that its "
                f"'from' names ({names}), {len(found)} wrote one"
            )
        return found[0]

    def graders(self, timeout_s: float) -> GraderPool:
        """Graders, here or on the cluster. To be closed by whoever asked for them."""
        return self.cluster.graders(timeout_s) if self.cluster else GraderPool(timeout_s=timeout_s)

    def log(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """One line of numbers after ``step`` of ``total`` steps. What is not finite becomes null.

        Raises ``ValueError`` for metrics called ``step`` or ``time``, ``UserError`` when the disk is full.
        """
        if not ranks.is_main():
            return
        if reserved := {"step", "time"} & metrics.keys():
            raise ValueError(f"a metric cannot be called '{reserved.pop()}'")
        numbers = {name: _number(value) for name, value in metrics.items()}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        line = {"step": step, "time": round(self.seconds, 3)}
        self._append(METRICS, [line | {name: finite.get(name) for name in numbers}])
        with files.naming_full_disk(self._tensorboard_folder):
            self._tensorboard(step, finite)
        self.view.update(self.stage, step, total, numbers)

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Keep ``records`` (JSON values) of ``step``, to be read by the report."""
        if not ranks.is_main():
            return
        self._append(SAMPLES, [{"step": step, **_finite(record)} for record in records])

    def warn(self, message: str) -> None:
        """Show a warning, and keep it for the report."""
        if not ranks.is_main():
            return
        self._append(WARNINGS, [{"time": round(self.seconds, 3), "message": message}])
        self.view.warn(f"{self.stage}: {message}")

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Make a resume point after ``step`` steps, replacing the last one atomically.

        ``meta`` holds JSON values. Raises ``UserError`` when the disk is full, or is not one that all ranks
        see: the last one stays.
        """
        if not ranks.is_main():
            shards.write(self.folder, tensors)
            return
        if self._scalars is not None:
            with files.naming_full_disk(self._tensorboard_folder):
                self._scalars.flush()
        lengths = {name: files.sync_file(self.folder / name) for name in LOGS}
        with files.atomic_folder(self.folder / "state") as new:
            digest = shards.write(new, tensors)
            files.write_json(
                new / META,
                {
                    "step": step,
                    "seconds": self.seconds,
                    "fingerprint": self.fingerprint,
                    "settings": self.settings,
                    "lengths": lengths,
                    "sha256": digest,
                    "meta": dict(meta),
                },
            )

    def restore(self, into: Mapping[str, torch.Tensor] | None = None) -> State | None:
        """The last resume point, with the logs cut back to it; None (and a clean folder) without one. Several
        ranks read its tensors ``into`` those of theirs, of the same names.

        To be called before anything is logged.
        Raises ``UserError`` when the saved state is damaged, or holds other tensors.
        """
        found = ranks.by_main(self._saved)
        if found is None:
            return None
        state, saved = Path(found[0]), found[1]
        try:
            tensors = shards.read(state, saved["sha256"], into)
        except (OSError, ValueError) as error:
            several = len(list(state.glob(shards.ENDING))) > 1
            raise _damaged(state if several else state / TENSORS, state, error) from error
        ranks.by_main(lambda: self._cut_back(state, saved["lengths"]))
        self._before, self._started = saved["seconds"], time.monotonic()
        self._restored_step = saved["step"]
        return State(saved["step"], tensors, saved["meta"])

    def _saved(self) -> tuple[str, dict[str, Any]] | None:
        files.sweep(self.folder)
        state = self.folder / "state"
        if state.exists():
            return str(state), read_meta(state)
        self._wipe()
        return None

    def _cut_back(self, state: Path, lengths: Mapping[str, int]) -> None:
        for name in LOGS:
            _truncate(self.folder / name, lengths.get(name, 0), state)

    def finish(self) -> None:
        """Mark the stage as done; the mark is the last thing written. The resume point goes after it."""
        self.close()
        for name in LOGS:
            files.sync_file(self.folder / name)
        done = {"fingerprint": self.fingerprint, "seconds": round(self.seconds, 3)}
        files.write_json(self.folder / "DONE", done)
        files.remove_folder(self.folder / "state")

    def close(self) -> None:
        """Write out what TensorBoard's writer still holds. Safe to call twice."""
        if self._scalars is not None:
            writer, self._scalars = self._scalars, None
            with files.naming_full_disk(self._tensorboard_folder):
                writer.close()

    def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        lines = (json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in records)
        files.append(self.folder / name, "".join(lines))

    def _wipe(self) -> None:
        for entry in list(self.folder.iterdir()):
            if entry.is_dir():
                files.remove_folder(entry)
            else:
                entry.unlink()
        if self._tensorboard_folder.exists():
            files.remove_folder(self._tensorboard_folder)

    @property
    def _tensorboard_folder(self) -> Path:
        return self.folder.parent / "tensorboard" / self.stage

    def _tensorboard(self, step: int, metrics: Mapping[str, float]) -> None:
        # not torch.utils.tensorboard: it costs seconds to import
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined]
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._scalars is None:
            folder = str(self._tensorboard_folder)
            self._scalars = EventFileWriter(folder, flush_secs=10)  # type: ignore[no-untyped-call]
            if self._restored_step is not None:
                # tells TensorBoard to forget the steps that were logged and then lost
                start = SessionLog(status=SessionLog.START)
                self._scalars.add_event(
                    Event(wall_time=time.time(), step=self._restored_step + 1, session_log=start)
                )
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._scalars.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))


def read_meta(state: Path) -> dict[str, Any]:
    """``meta.json`` of a saved state, checked. Raises ``UserError`` when it is damaged."""
    try:
        saved = files.read_json(state / META)
        shapes = {"step": int, "fingerprint": str, "lengths": dict, "sha256": str, "meta": dict}
        for name, kind in shapes.items():
            if not isinstance(saved.get(name), kind):
                raise ValueError(f"no '{name}'")
        saved["seconds"] = float(saved["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(state / META, state, error) from error
    return saved


def read_done(folder: Path) -> dict[str, Any] | None:
    """What a finished stage's ``DONE`` says; None while it is not finished.

    Raises ``UserError`` when the file is damaged.
    """
    path = folder / "DONE"
    if not path.exists():
        return None
    try:
        done = files.read_json(path)
        if not isinstance(done.get("fingerprint"), str):
            raise ValueError("no 'fingerprint'")
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{path}' is damaged ({error}); delete the folder '{folder}' to run its stage again"
        ) from error
    return done


def _damaged(path: Path, state: Path, error: object) -> UserError:
    return UserError(
        f"the saved state '{path}' is damaged ({error}); delete the folder '{state}' to begin its stage again"
    )


def _number(value: float) -> float:
    # tensors and numpy scalars too; whole numbers stay whole
    return value if type(value) is int else float(value)


def _finite(value: Any) -> Any:
    """A JSON value with null for every number that JSON does not know."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value


def _truncate(path: Path, length: int, state: Path) -> None:
    """Cut a log back to ``length`` bytes; 0 removes it."""
    have = path.stat().st_size if path.exists() else 0
    if have < length:
        raise UserError(
            f"'{path}' is shorter than when the state was saved ({have} of {length} bytes); "
            f"delete the folder '{state}' to begin its stage again"
        )
    if length == 0:
        path.unlink(missing_ok=True)
    elif have > length:
        os.truncate(path, length)

"""Runs a recipe in a folder, and takes up where a killed run stopped.

A stage's fingerprint is the hash of everything that decides its result. A folder that carries the
same fingerprint is reused (when DONE) or continued (when there is a saved state); a saved state is also
continued when settings differ that only say where it is computed and how much at once
(:mod:`liubai.recipe.marks`). All else is made again. The old result steps aside until then: a stage that
refuses its settings before it has logged a step leaves the run as it was.

Left out on purpose: running stages at the same time, and the report.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liubai import files, ranks
from liubai.errors import UserError
from liubai.measure.readiness import require_ready
from liubai.problems.questions import Questions, disagreement
from liubai.problems.source import Bank
from liubai.recipe.environment import describe
from liubai.recipe.folder import MARK, locked, require_run
from liubai.recipe.follower import begin, end, follow, runs_together
from liubai.recipe.marks import Mark, mark_of
from liubai.recipe.recipe import Recipe, StagePlan
from liubai.stages import stage_module
from liubai.stages.config import Brought, Compute
from liubai.stages.context import METRICS, Context, read_done, read_meta
from liubai.stages.view import View

if TYPE_CHECKING:
    from liubai.cluster.connect import Cluster

#: Raised when the code changes what a finished stage would contain: old results are then made again.
FORMAT = 1
#: A stage's old curves of TensorBoard, inside its old result while that stands aside: one rename moves both.
CURVES = ".tensorboard"
#: Written for the whole run, and put back when nothing of it was computed.
WHOLE = ("recipe.toml", "environment.json")
#: Kinds of stages that train on questions (or write examples for others to), and that ask held-out ones.
INSTRUMENTS = ("bridge", "attention", "whitebox")
TRAIN, HOLD_OUT = ("rl", "ppo", "distill", "sample"), ("rl", "ppo", "distill", "eval", *INSTRUMENTS)


@dataclass
class _Session:
    """``anew``: has this call computed anything that belongs to its recipe? ``crowded``: has it said that
    there are more threads than cores?"""

    view: View
    reuse: Sequence[Path]
    cluster: Cluster | None
    anew: bool = False
    crowded: bool = False


def run(
    recipe: Recipe, out: Path, view: View, reuse: Sequence[Path] = (), cluster: Cluster | None = None
) -> Path:
    """Run every stage of ``recipe`` that ``out`` does not hold yet; returns ``out``. A stage that one of the
    run folders ``reuse`` has finished with the same fingerprint is copied from there. With a ``cluster``,
    answers are written and judged there.

    Raises ``UserError`` when ``out`` is not a run folder, another run is working in it, questions could
    not be judged, a device or a model is not there or stages cannot do what is asked (nothing is touched
    then), when a saved state is damaged, or the disk is full.

    Of several ranks (:mod:`liubai.ranks`) the first does this, and calls the others to the stages that all
    run; these return when it is done.
    """
    with ranks.joined():
        if not ranks.is_main():
            follow(recipe)
            return out
        try:
            _run(recipe, out, _Session(view, reuse, cluster))
        except BaseException as error:
            with suppress(Exception):  # what went wrong first is what has to be told
                end(failed=str(error) or type(error).__name__)
            raise
        end()
    return out


def _run(recipe: Recipe, out: Path, session: _Session) -> None:
    require_run(out)
    for other in session.reuse:
        if not (other / MARK).exists():
            raise UserError(f"'{other}' is no run folder; --reuse takes the folder of an earlier run")
    _require(recipe)
    with locked(out):
        _recover(out)
        before = {path: path.read_bytes() for name in WHOLE if (path := out / name).exists()}
        moved: list[tuple[Path, Path]] = []
        try:
            files.write_text(out / "recipe.toml", recipe.to_toml())
            _renumber(recipe, out, session.view, moved)
            _stages(recipe, out, session)
        except BaseException:
            if not session.anew:
                with suppress(OSError, UserError):  # what went wrong first is what has to be told
                    for old, new in reversed(moved):
                        os.rename(new, old)
                    for path, data in before.items():
                        files.write_bytes(path, data)
            raise


def _stages(recipe: Recipe, out: Path, session: _Session) -> None:
    finished: dict[str, Path] = {}
    fingerprints: dict[str, str] = {}
    for number, plan in enumerate(recipe.stages, 1):
        mark = mark_of(_decides(recipe, plan, {name: fingerprints[name] for name in plan.parents}))
        fingerprints[plan.name] = mark.fingerprint
        folder = out / f"{number}-{plan.name}"
        inputs = {name: finished[name] for name in plan.parents}
        _take_over(folder, mark.fingerprint, session)
        _stage(recipe, plan, folder, inputs, mark, session)
        finished[plan.name] = folder


def _require(recipe: Recipe) -> None:
    """What can be known of all stages before the first one works. Raises ``UserError``."""
    brought = [(p, p.config) for p in recipe.stages if isinstance(p.config, Brought)]
    asked = [(plan, config.questions) for plan, config in brought if config.questions]
    for i, (plan, table) in enumerate(asked):
        for other, earlier in asked[:i]:
            key = disagreement(earlier, table)
            if key and (plan.kind in TRAIN or other.kind in TRAIN):
                raise UserError(
                    f"stages '{other.name}' and '{plan.name}' split '{table.path}' differently ({key}): what "
                    "one trains on, the other may hold out. Write the table word for word in every stage"
                )
    for questions in dict.fromkeys(table for _, table in asked):
        seconds = [getattr(plan.config, "grader_timeout", 5.0) for plan, table in asked if table == questions]
        require_ready(questions, max(seconds))
    for plan in recipe.stages:
        if isinstance(plan.config, Compute):
            plan.config.where()  # the last stage's device, too, is asked for before the first one works
    banks: dict[Questions, Bank] = {}
    for plan, table in asked:
        if plan.kind not in (*TRAIN, *HOLD_OUT):
            continue
        bank = banks[table] = banks.get(table) or Bank(table)
        try:
            if plan.kind in TRAIN:
                bank.train(0, 0)
            if plan.kind in HOLD_OUT:
                bank.held_out(1)
        except UserError as error:
            raise UserError(f"stage '{plan.name}': {error}") from None
    for plan, config in brought:
        config.require_model(plan.name, plan.parents)


def fingerprint(recipe: Recipe, plan: StagePlan, parents: Mapping[str, str]) -> str:
    """SHA-256 over all that decides a stage's result on one machine. ``parents``: name -> fingerprint, in
    order."""
    return mark_of(_decides(recipe, plan, parents)).fingerprint


def _decides(recipe: Recipe, plan: StagePlan, parents: Mapping[str, str]) -> dict[str, Any]:
    """The number of threads is part of it: it changes the order of sums, so the last bits."""
    what = {
        "format": FORMAT,
        "kind": plan.kind,
        "config": plan.config.model_dump(mode="json"),
        "seed": recipe.seed,
        "threads": recipe.threads,
        "parents": list(parents.items()),
    }
    if outside := plan.config.outside():
        what["outside"] = outside
    return what


def _take_over(folder: Path, mark: str, session: _Session) -> None:
    """Copy the stage from another run that has finished it, unless it is here."""
    if folder.exists() and (done := read_done(folder)) and done["fingerprint"] == mark:
        return
    for other in (f for run in session.reuse for f in sorted(run.iterdir()) if (f / "DONE").exists()):
        if files.is_leftover(other):
            continue
        if (done := read_done(other)) and done["fingerprint"] == mark:
            files.remove_folder(folder.parent / "tensorboard" / folder.name.partition("-")[2])
            with files.atomic_folder(folder) as new:
                shutil.copytree(other, new, dirs_exist_ok=True)
            session.anew = True
            session.view.warn(f"{folder.name}: taken from {other}")
            return


def _stage(
    recipe: Recipe, plan: StagePlan, folder: Path, inputs: Mapping[str, Path], mark: Mark, session: _Session
) -> None:
    total = getattr(plan.config, "steps", 0)
    view = session.view
    view.start(plan.name, plan.kind, total)
    if _is_done(folder, mark.fingerprint):
        view.finish(plan.name, True)
        return
    given = [checkpoint for path in inputs.values() if (checkpoint := path / "checkpoint").exists()]
    if isinstance(plan.config, Brought) and not plan.config.model and given:
        plan.config.require_room(plan.name, given[0])
    with _making_room(plan.name, folder, mark, session):
        if recipe.threads:
            import torch

            torch.set_num_threads(recipe.threads)
        threads = recipe.threads * ranks.on_this_machine()
        cores = os.cpu_count() or threads
        if threads > cores and not session.crowded:
            session.crowded = True
            fewer = max(1, cores // ranks.on_this_machine())
            view.warn(
                f"{threads} threads on {cores} cores: they will wait for each other; --set threads={fewer}"
            )
        # written by the one who computes, not by every later look at a finished run
        continues = (folder / "state").exists()
        _record(folder.parent / "environment.json", describe(recipe.threads), continues, view)
        context = Context(
            folder, recipe.seed, inputs, view, plan.name, mark.fingerprint, session.cluster, mark.settings
        )
        try:
            _all_run(plan, context)
            context.finish()
        finally:
            context.close()
    view.finish(plan.name, False)


def _all_run(plan: StagePlan, context: Context) -> None:
    """The stage itself: on all ranks, or here while they wait."""
    together = runs_together(plan)
    if together:
        begin(plan, context.inputs, context.fingerprint)
    with nullcontext() if together else ranks.alone():
        stage_module(plan.kind).run(plan.config, context)
        ranks.gather(None)  # until all are through


@contextmanager
def _making_room(name: str, folder: Path, mark: Mark, session: _Session) -> Iterator[None]:
    """An old result is aside while its stage is made again. It is back when that ended before the first step
    was logged, whatever ended it, and gone else."""
    old = not _clear(name, folder, mark, session.view)
    try:
        yield
    except BaseException:
        begun = _begun(folder)
        session.anew = session.anew or begun
        with suppress(OSError):  # what went wrong first is what has to be told
            if old and not begun:
                _put_back(folder)
                session.view.warn(f"{name}: nothing was computed; the old result is back in its place")
            elif old:
                files.let_go(folder)
        raise
    session.anew = True
    files.let_go(folder)


def _record(path: Path, now: Mapping[str, str | int], continues: bool, view: View) -> None:
    """Write on what the run is computed, and say so when half of a stage was computed on something else."""
    try:
        before = files.read_json(path)
    except (OSError, ValueError):
        before = {}
    for key in ("processor", "kernels"):
        if continues and key in before and before[key] != now.get(key):
            view.warn(
                f"began with {key} '{before[key]}', goes on with '{now.get(key)}': the last bits may differ"
            )
    if "failed" in str(now.get("kernels")):
        view.warn(f"slower than it could be; kernels: {now['kernels']}")
    files.write_json(path, dict(now))


def _is_done(folder: Path, mark: str) -> bool:
    """Is the stage finished as asked?"""
    if not folder.exists():
        return False
    files.sweep(folder)
    done = read_done(folder)
    if done is None or done["fingerprint"] != mark:
        return False
    files.remove_folder(folder / "state")  # a kill between DONE and this leaves it
    return True


def _clear(name: str, folder: Path, mark: Mark, view: View) -> bool:
    """Leave the stage's folder empty, or with a state to continue from. An old result steps aside; False if
    there was one."""
    old = False
    if folder.exists():
        if read_done(folder):
            view.warn(f"{name}: the recipe changed; running it again in the place of the old result")
            old = True
        elif (folder / "state").exists():
            saved = read_meta(folder / "state")
            if saved["fingerprint"] == mark.fingerprint:
                view.warn(f"{name}: continues after step {saved['step']}")
                return True
            if saved.get("settings") == mark.settings:
                view.warn(
                    f"{name}: continues after step {saved['step']}, on another device or with other sizes "
                    "than it began with: the last bits may differ"
                )
                return True
            view.warn(f"{name}: was interrupted with other settings; begins again")
            old = True
    curves = _curves_of(folder)
    if old:
        if curves.exists():
            os.rename(curves, folder / CURVES)
        files.set_aside(folder)
        return False
    # the curves of TensorBoard go first: once the folder is gone nobody would know that they are old
    files.remove_folder(curves)
    files.remove_folder(folder)
    return True


def _recover(out: Path) -> None:
    """What a killed run left: an old result is put back if the new one had not logged a step."""
    for folder in files.aside(out):
        if not _begun(folder):
            _put_back(folder)
    files.sweep(out)
    for folder in (path for path in out.iterdir() if (path / CURVES).exists()):
        _put_back(folder)


def _begun(folder: Path) -> bool:
    """Has the stage logged a step, and be it in an earlier session?"""
    if (folder / "DONE").exists() or (folder / "state").exists():
        return True
    try:
        with open(folder / METRICS, "rb") as file:
            return file.readline().endswith(b"\n")
    except FileNotFoundError:
        return False


def _put_back(folder: Path) -> None:
    files.put_back(folder)
    curves = _curves_of(folder)
    files.remove_folder(curves)  # those of a stage that has computed nothing
    if (folder / CURVES).exists():
        curves.parent.mkdir(exist_ok=True)
        os.rename(folder / CURVES, curves)


def _curves_of(folder: Path) -> Path:
    return folder.parent / "tensorboard" / folder.name.partition("-")[2]


def _renumber(recipe: Recipe, out: Path, view: View, moved: list[tuple[Path, Path]]) -> None:
    """A stage that moved up or down in the recipe keeps its folder, under its new number; ``moved`` gets
    (old, new)."""
    names = [plan.name for plan in recipe.stages]
    for folder in sorted(out.iterdir()):
        match = re.fullmatch(r"(\d+)-(.+)", folder.name)
        if match is None or not folder.is_dir():
            continue
        if match[2] not in names:
            view.warn(f"{folder.name} belongs to no stage of this recipe; it is left as it is")
            continue
        wanted = out / f"{names.index(match[2]) + 1}-{match[2]}"
        if not wanted.exists():
            os.rename(folder, wanted)
            moved.append((folder, wanted))

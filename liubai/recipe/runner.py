"""Runs a recipe in a folder, and takes up where a killed run stopped.

A stage's fingerprint is the hash of everything that decides its result. A folder that carries the
same fingerprint is reused (when DONE) or continued (when there is a saved state); one that carries
another is deleted and made again.

Left out on purpose: running stages at the same time, and the report.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from liubai import files
from liubai.errors import UserError
from liubai.measure.readiness import require_ready
from liubai.recipe.environment import describe
from liubai.recipe.recipe import Recipe, StagePlan
from liubai.stages import stage_module
from liubai.stages.config import Brought, Compute
from liubai.stages.context import Context, read_done, read_meta
from liubai.stages.view import View

#: Raised when the code changes what a finished stage would contain: old results are then made again.
FORMAT = 1
#: Marks a folder as a run, and is locked while one works in it.
MARK = ".liubai-run"


def run(recipe: Recipe, out: Path, view: View, reuse: Sequence[Path] = ()) -> Path:
    """Run every stage of ``recipe`` that ``out`` does not hold yet; returns ``out``. A stage that one of the
    run folders ``reuse`` has finished with the same fingerprint is copied from there.

    Raises ``UserError`` when ``out`` is not a run folder, another run is working in it, questions could
    not be judged or a device is not there (nothing is touched then), when a saved state is damaged, or the
    disk is full.
    """
    _check_folder(out)
    for other in reuse:
        if not (other / MARK).exists():
            raise UserError(f"'{other}' is no run folder; --reuse takes the folder of an earlier run")
    configs = [plan.config for plan in recipe.stages]
    for questions in dict.fromkeys(c.questions for c in configs if isinstance(c, Brought) and c.questions):
        require_ready(questions)
    for config in configs:
        if isinstance(config, Compute):
            config.where()  # the last stage's device, too, is asked for before the first one works
    with _locked(out):
        files.sweep(out)
        files.write_text(out / "recipe.toml", recipe.to_toml())
        _renumber(recipe, out, view)
        finished: dict[str, Path] = {}
        fingerprints: dict[str, str] = {}
        for number, plan in enumerate(recipe.stages, 1):
            parents = {name: fingerprints[name] for name in plan.parents}
            fingerprints[plan.name] = fingerprint(recipe, plan, parents)
            folder = out / f"{number}-{plan.name}"
            inputs = {name: finished[name] for name in plan.parents}
            _take_over(folder, fingerprints[plan.name], reuse, view)
            _stage(recipe, plan, folder, inputs, fingerprints[plan.name], view)
            finished[plan.name] = folder
    return out


def fingerprint(recipe: Recipe, plan: StagePlan, parents: Mapping[str, str]) -> str:
    """SHA-256 over all that decides a stage's result on one machine. ``parents``: name -> fingerprint, in
    order.

    The number of threads is part of it: it changes the order of sums, so the last bits.
    """
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
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _take_over(folder: Path, mark: str, reuse: Sequence[Path], view: View) -> None:
    """Copy the stage from another run that has finished it, unless it is here."""
    if folder.exists() and (done := read_done(folder)) and done["fingerprint"] == mark:
        return
    for other in (f for run in reuse for f in sorted(run.iterdir()) if (f / "DONE").exists()):
        if (done := read_done(other)) and done["fingerprint"] == mark:
            files.remove_folder(folder.parent / "tensorboard" / folder.name.partition("-")[2])
            with files.atomic_folder(folder) as new:
                shutil.copytree(other, new, dirs_exist_ok=True)
            view.warn(f"{folder.name}: taken from {other}")
            return


def _stage(
    recipe: Recipe, plan: StagePlan, folder: Path, inputs: Mapping[str, Path], mark: str, view: View
) -> None:
    total = getattr(plan.config, "steps", 0)
    view.start(plan.name, plan.kind, total)
    if _prepare(plan.name, folder, mark, view):
        view.finish(plan.name, True)
        return
    if recipe.threads:
        import torch

        torch.set_num_threads(recipe.threads)
    if recipe.threads > (os.cpu_count() or recipe.threads):
        view.warn(f"{recipe.threads} threads on {os.cpu_count()} cores: they will wait for each other")
    module = stage_module(plan.kind)
    # written by the one who computes, not by every later look at a finished run
    _record(folder.parent / "environment.json", describe(recipe.threads), (folder / "state").exists(), view)
    context = Context(folder, recipe.seed, inputs, view, stage=plan.name, fingerprint=mark)
    try:
        module.run(plan.config, context)
        context.finish()
    finally:
        context.close()
    view.finish(plan.name, False)


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


def _prepare(name: str, folder: Path, mark: str, view: View) -> bool:
    """Is the stage finished as asked? If not, leave its folder empty or with a state to continue from."""
    if folder.exists():
        files.sweep(folder)
        if done := read_done(folder):
            if done["fingerprint"] == mark:
                files.remove_folder(folder / "state")  # a kill between DONE and this leaves it
                return True
            view.warn(f"{name}: the recipe changed; deleted the old result, running it again")
        elif (folder / "state").exists():
            saved = read_meta(folder / "state")
            if saved["fingerprint"] == mark:
                view.warn(f"{name}: continues after step {saved['step']}")
                return False
            view.warn(f"{name}: was interrupted with other settings; begins again")
    # the curves of TensorBoard go first: once the folder is gone nobody would know that they are old
    files.remove_folder(folder.parent / "tensorboard" / name)
    files.remove_folder(folder)
    return False


def _renumber(recipe: Recipe, out: Path, view: View) -> None:
    """A stage that moved up or down in the recipe keeps its folder, under its new number."""
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


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"'{out}' is a file; choose another folder with --out")
    if out.is_dir() and not (out / MARK).exists() and any(out.iterdir()):
        raise UserError(
            f"'{out}' is not empty and not a run of liubai; choose another folder with --out "
            "(nothing in it was touched)"
        )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder's lock. The system drops it when the process ends, however it ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / MARK, "a+", encoding="utf-8")  # noqa: SIM115 — closed below
    except OSError as error:
        raise UserError(
            f"cannot work in '{out}': {error.strerror}; choose another folder with --out"
        ) from None
    with lock:
        try:
            # lockf and not flock: a grader that outlives a killed run must not keep the lock
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            who = lock.read().strip()
            raise UserError(
                f"another run is working in '{out}'{f' (process {who})' if who else ''}; "
                "wait for it, or choose another folder with --out"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield

"""A context keeps numbers and resume points so that a killed stage loses nothing that was saved."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from liubai import files
from liubai.errors import UserError
from liubai.stages.context import Context


class Told:
    """A view that remembers."""

    def __init__(self) -> None:
        self.updates: list[tuple[str, int, int, dict[str, float]]] = []
        self.warnings: list[str] = []

    def start(self, stage: str, kind: str, total: int) -> None: ...

    def finish(self, stage: str, reused: bool) -> None: ...

    def update(self, stage: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self.updates.append((stage, step, total, dict(metrics)))

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "1-base"


def context(folder: Path, **options: Any) -> Context:
    return Context(folder, 0, options.pop("inputs", {}), options.pop("view", Told()), stage="base", **options)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / name
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def test_numbers_become_lines_and_reach_the_view(folder: Path) -> None:
    told = Told()
    c = context(folder, view=told)
    c.log(1, 9, {"loss": 0.5, "tokens": 12})
    c.log(2, 9, {"loss": math.nan, "kl": math.inf})
    c.close()
    first, second = lines(folder, "metrics.jsonl")
    assert list(first) == ["step", "time", "loss", "tokens"]
    assert (first["step"], first["loss"], first["tokens"]) == (1, 0.5, 12)
    assert 0 <= first["time"] <= second["time"] < 60
    assert (second["loss"], second["kl"]) == (None, None)
    assert told.updates[0] == ("base", 1, 9, {"loss": 0.5, "tokens": 12})
    assert math.isnan(told.updates[1][3]["loss"])


def test_tensors_are_numbers_too(folder: Path) -> None:
    import torch

    c = context(folder)
    c.log(1, 1, {"loss": torch.tensor(0.25)})  # type: ignore[dict-item]
    c.close()
    assert lines(folder, "metrics.jsonl")[0]["loss"] == 0.25


@pytest.mark.parametrize("name", ["step", "time"])
def test_a_metric_must_not_hide_the_step(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        context(folder).log(1, 1, {name: 3.0})


def test_scalars_are_readable_by_tensorboard(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    c = context(folder)
    c.log(3, 9, {"loss": 0.5, "kl": math.nan})
    c.close()
    (path,) = (folder.parent / "tensorboard" / "base").iterdir()
    scalars = {
        (event.step, value.tag): value.tensor.float_val[0]
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
    }
    assert scalars == {(3, "loss"): 0.5}


def test_a_resumed_stage_tells_tensorboard_to_forget_the_lost_steps(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    c = context(folder)
    for step in (1, 2, 3):
        c.log(step, 9, {"loss": float(step)})
        if step == 1:
            c.save(step, {}, {})
    c.close()
    c = context(folder)
    assert c.restore() is not None
    c.log(2, 9, {"loss": 20.0})
    c.close()
    events = EventAccumulator(str(folder.parent / "tensorboard" / "base"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


def test_samples_and_warnings_are_kept(folder: Path) -> None:
    told = Told()
    c = context(folder, view=told)
    c.samples(4, [{"text": "等等\n", "reward": {"total": math.nan}}, {"text": "b"}])
    c.samples(5, [])
    c.warn("entropy is low")
    assert lines(folder, "samples.jsonl") == [
        {"step": 4, "text": "等等\n", "reward": {"total": None}},
        {"step": 4, "text": "b"},
    ]
    assert [w["message"] for w in lines(folder, "warnings.jsonl")] == ["entropy is low"]
    assert told.warnings == ["base: entropy is low"]


def test_what_is_saved_comes_back_bit_for_bit(folder: Path) -> None:
    import torch

    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    tensors = {
        "w": weight,
        "tied": weight,  # the format refuses shared memory
        "row": weight[1],
        "turned": weight.T,
        "step": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "half": weight.to(torch.bfloat16),
        "rng": torch.Generator().get_state(),
        "empty": torch.zeros(0),
    }
    context(folder).save(7, tensors, {"cursor": [1, 2], "名": None})
    state = context(folder).restore()
    assert state is not None
    assert (state.step, state.meta) == (7, {"cursor": [1, 2], "名": None})
    assert state.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert state.tensors[name].dtype == tensor.dtype
        assert torch.equal(state.tensors[name], tensor), name
    context(folder).save(8, state.tensors, {})  # and what was read can be written again
    again = context(folder).restore()
    assert again is not None
    assert torch.equal(again.tensors["row"], weight[1])


def test_restore_cuts_the_logs_back_to_the_state(folder: Path) -> None:
    c = context(folder)
    for step in (1, 2, 3):
        c.log(step, 9, {"loss": float(step)})
        c.samples(step, [{"text": "步"}])
        c.warn(f"at {step}")
        if step == 2:
            c.save(2, {}, {})
    c.close()
    files.append(folder / "metrics.jsonl", '{"step": 4, "ti')  # a kill in the middle of a line
    c = context(folder)
    assert c.restore() is not None
    assert [m["step"] for m in lines(folder, "metrics.jsonl")] == [1, 2]
    assert [m["step"] for m in lines(folder, "samples.jsonl")] == [1, 2]
    assert [m["message"] for m in lines(folder, "warnings.jsonl")] == ["at 1", "at 2"]


def test_a_log_that_began_after_the_state_is_removed(folder: Path) -> None:
    c = context(folder)
    c.save(1, {}, {})
    c.samples(2, [{"text": "late"}])
    assert context(folder).restore() is not None
    assert not (folder / "samples.jsonl").exists()


def test_without_a_state_the_leftovers_go(folder: Path) -> None:
    c = context(folder)
    c.log(1, 9, {"loss": 1.0})
    c.samples(1, [{"text": "x"}])
    c.close()
    (folder / "checkpoint").mkdir()
    assert context(folder).restore() is None
    assert list(folder.iterdir()) == []
    assert not (folder.parent / "tensorboard" / "base").exists()


def test_time_goes_on_where_the_state_left_it(folder: Path) -> None:
    c = context(folder)
    c._before = 100.0  # as if this session had begun long ago
    c.save(1, {}, {})
    c = context(folder)
    assert c.restore() is not None
    c.log(2, 9, {})
    c.close()
    assert 100 <= lines(folder, "metrics.jsonl")[0]["time"] < 110
    c.finish()
    assert 100 <= files.read_json(folder / "DONE")["seconds"] < 110


def test_done_is_written_last_and_the_state_goes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = context(folder, fingerprint="abc")
    c.log(1, 1, {"loss": 1.0})
    c.save(1, {}, {})
    remove = files.remove_folder
    existed: list[bool] = []

    def removing(path: Path) -> None:
        existed.append((folder / "DONE").exists())
        remove(path)

    monkeypatch.setattr(files, "remove_folder", removing)
    c.finish()
    assert existed == [True]  # the state goes only once DONE is there
    assert files.read_json(folder / "DONE")["fingerprint"] == "abc"
    assert not (folder / "state").exists()


def saved(folder: Path) -> Path:
    import torch

    c = context(folder)
    c.log(1, 9, {"loss": 1.0})
    c.close()
    c.save(1, {"w": torch.arange(64.0)}, {"cursor": 1})
    return folder / "state"


def test_a_state_that_stepped_aside_for_a_killed_save_is_found(folder: Path) -> None:
    state = saved(folder)
    state.rename(folder / f".state{files.OLD}")
    (folder / f".state.12345678{files.TEMPORARY}").mkdir()
    restored = context(folder).restore()
    assert restored is not None
    assert restored.step == 1
    assert {path.name for path in folder.iterdir()} == {"metrics.jsonl", "state"}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tensors.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-5])),
        ("tensors.safetensors", lambda p: flip(p, -3)),
        ("tensors.safetensors", lambda p: p.write_bytes(b"")),
        ("tensors.safetensors", lambda p: p.unlink()),
        ("meta.json", lambda p: p.write_bytes(p.read_bytes()[:20])),
        ("meta.json", lambda p: p.write_text("[]")),
        ("meta.json", lambda p: p.write_text('{"step": 1}')),
        ("meta.json", lambda p: p.write_bytes(b"\xff\xfe")),
        ("meta.json", lambda p: p.unlink()),
    ],
)
def test_a_damaged_state_is_named_with_what_to_do(folder: Path, name: str, damage: Any) -> None:
    state = saved(folder)
    damage(state / name)
    with pytest.raises(UserError) as caught:
        context(folder).restore()
    assert f"'{state / name}' is damaged" in str(caught.value)
    assert f"delete the folder '{state}'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_log_that_lost_lines_is_noticed(folder: Path) -> None:
    saved(folder)
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl' is shorter than when the state was saved"):
        context(folder).restore()


def test_a_full_disk_while_saving_keeps_the_last_state(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    state = saved(folder)

    def full(*_: object) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(UserError, match=r"no space left on .*nothing was lost"):
            context(folder).save(2, {"w": torch.zeros(3)}, {})
    assert {path.name for path in folder.iterdir()} == {"metrics.jsonl", "state"}
    assert state.is_dir()
    restored = context(folder).restore()
    assert restored is not None
    assert (restored.step, restored.meta) == (1, {"cursor": 1})


def test_the_parent_checkpoint(folder: Path, tmp_path: Path) -> None:
    parent = tmp_path / "run" / "0-parent"
    with pytest.raises(UserError, match="exactly one earlier stage; its 'from' names none"):
        context(folder).parent_checkpoint()
    with pytest.raises(UserError, match="its 'from' names a, b"):
        context(folder, inputs={"a": parent, "b": parent}).parent_checkpoint()
    with pytest.raises(UserError, match="needs a checkpoint, but stage 'a' wrote none"):
        context(folder, inputs={"a": parent}).parent_checkpoint()
    (parent / "checkpoint").mkdir(parents=True)
    assert context(folder, inputs={"a": parent}).parent_checkpoint() == parent / "checkpoint"

"""One model on two processes computes what it computes on one: loss, gradient, optimizer, every stage that
learns, resume points, memory that runs out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import rank_jobs
import torch
from safetensors.torch import load_file, save_file
from test_stages import STAGES, metrics_of
from test_stages import wide as wide  # a fixture
from torch import Tensor

from liubai.learn import sharded
from liubai.learn.memory import Lot
from liubai.learn.packing import Sequence1, micro_batches
from liubai.stages.context import Context

EXACT = ("gradient", "gradient_in_layers", "not_finite")
UPDATES = (
    "reference",
    "reference_in_layers",
    "reference_in_the_reward",
    "reference_runs_dry",
    "muon",
    "ratios",
    "lora",
    "crate",
    "halves",
    "scores",
    "in_bfloat16",
)
#: of two ranks alone
OTHERS = ("parts", "small_steps", "unlike", "full_disk", "unseen", "patient")
Found = dict[str, list[dict[str, Tensor]]]


@pytest.fixture(autouse=True)
def _without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return rank_jobs.on_ranks([*EXACT, *UPDATES, *OTHERS], tmp_path_factory.mktemp("ranks"))


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """To ``tolerance`` of each tensor's largest number."""
    assert got.keys() == wanted.keys()
    for name, want in wanted.items():
        scale = float(want.nan_to_num().abs().max()) if want.numel() else 0.0
        torch.testing.assert_close(
            got[name],
            want,
            rtol=0,
            atol=tolerance * max(scale, 1e-3),
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("name", [*EXACT, *UPDATES])
def test_two_processes_take_the_steps_of_one(name: str, together: Found, tmp_path: Path) -> None:
    alone = rank_jobs.JOBS[name](tmp_path)
    # how often micro-batches are halved depends on how many ranks have to have some
    first, second, alone = (
        {n: t for n, t in found.items() if not n.endswith("/halvings")} for found in (*together[name], alone)
    )
    assert all(torch.equal(t.nan_to_num(), second[n].nan_to_num()) for n, t in first.items())
    # bfloat16 has 8 bits: a sum in another order is another sum
    tolerance = 1e-6 if name in EXACT else 3e-2 if name == "in_bfloat16" else 1e-5
    assert_same(first, alone, tolerance)


def test_halves_were_halved(together: Found) -> None:
    for name in ("halves", "reference_runs_dry"):
        assert together[name][0]["log/0/halvings"] >= 1
    assert "log/0/halvings" not in together["reference"][0]


def test_small_steps_are_taken_in_float32(together: Found, tmp_path: Path) -> None:
    """In 16 bits none of them would move a weight."""
    alone = rank_jobs.small_steps(tmp_path)
    for moved in (alone, *together["small_steps"]):
        assert moved.keys() == alone.keys()
        for name, by in moved.items():
            assert 1e-7 < float(by.abs().max()) < 1.1e-5, name
    for name, by in together["small_steps"][0].items():
        near = (by - alone[name]).abs() < 1e-6
        assert near.float().mean() > 0.9, name  # a gradient of next to nothing may have either sign


def test_all_ranks_go_the_same_way_on_unlike_devices(together: Found) -> None:
    assert [bool(found["layered"]) for found in together["unlike"]] == [True, True]


def test_a_full_disk_of_one_rank_is_said_by_all(together: Found) -> None:
    assert [int(found["step"]) for found in together["full_disk"]] == [1, 1]
    assert together["full_disk"][0]["left"]


def test_ranks_wait_for_the_first_as_long_as_it_works(together: Found) -> None:
    assert [int(found["said"]) for found in together["patient"]] == [7, 7]


def test_what_is_not_finite_on_one_rank_changes_nothing(together: Found) -> None:
    for found in together["not_finite"]:
        assert math.isnan(found["norm"][0])
        assert math.isfinite(found["norm"][1])
        assert found["optimizer/steps"] == 1


def test_each_rank_keeps_a_part(together: Found, tmp_path: Path) -> None:
    alone = rank_jobs.JOBS["parts"](tmp_path)
    for name, whole in alone.items():
        kept = [int(found[name]) for found in together["parts"]]
        assert sum(kept) == whole, name
        assert max(kept) < 0.6 * whole, name


def test_shares_are_balanced_by_tokens() -> None:
    assert sharded.balanced([5, 1, 4, 2, 3, 3], 2) == [[0, 1, 5], [2, 3, 4]]
    assert sharded.balanced([7], 3) == [[0], [], []]
    batches = micro_batches([Sequence1(range(n), [True] * n) for n in (3, 5)], 0, 5)
    assert [sharded.tokens_of(b) for b in batches] == [5, 3]
    assert sharded.tokens_of([(Lot((1, 2), batches), 0.5)]) == 8


# ---- stages ----


@pytest.fixture(scope="module")
def stages(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages on two ranks, left alone and interrupted."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "wide").symlink_to(wide)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)
        rank_jobs.write_checkpoints(folder)
        for name in rank_jobs.RESUMED:
            rank_jobs.go_on(name, folder, folder / "alone")
            rank_jobs.interrupt(name, folder, folder / "more")
        found = rank_jobs.on_ranks(
            ["mapped", "rounded", "stages", "layers", "told", "light", "interrupted", "more", "memory"],
            folder,
        )
        state = folder / "fewer" / "sft with lora" / "state"
        save_file(found["light"][1] | found["mapped"][1] | found["rounded"][1], folder / "memory.safetensors")
        (folder / "state.json").write_text(json.dumps(sorted(path.name for path in state.iterdir())))
        for name in rank_jobs.RESUMED:
            rank_jobs.go_on(name, folder, folder / "fewer")
    return folder


def assert_same_stage(got: Path, wanted: Path, tolerance: float) -> None:
    ours, theirs = metrics_of(got), metrics_of(wanted)
    assert len(ours) == len(theirs)
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(yours, rel=tolerance, abs=tolerance)
    weights = [load_file(next(folder.rglob("model.safetensors"))) for folder in (got, wanted)]
    assert_same(*weights, tolerance)


IN_FLIGHT = "ppo in flight"


@pytest.mark.parametrize("name", sorted(set(STAGES) - {IN_FLIGHT, "sample", "pretrain"}))
def test_a_stage_on_two_ranks_is_that_of_one(name: str, stages: Path, wide: Path, tmp_path: Path) -> None:
    from test_stages import run

    alone = run(name, wide, tmp_path)
    assert_same_stage(stages / "whole" / name, alone, 1e-4)
    if name in rank_jobs.IN_LAYERS:
        assert_same_stage(stages / "layers" / name, alone, 1e-4)


@pytest.mark.parametrize("name", rank_jobs.TOLD)
def test_an_engine_elsewhere_is_asked_by_one(name: str, stages: Path, wide: Path, tmp_path: Path) -> None:
    """In flight, too, its groups are those of one process."""
    from test_stages import run

    with rank_jobs.elsewhere():
        alone = run(name, wide, tmp_path)
    assert_same_stage(stages / "told" / name, alone, 1e-4)
    if name != IN_FLIGHT:  # where what is asked beside them decides which groups end first
        assert_same_stage(alone, stages / "whole" / name, 1e-4)


def test_ranks_sample_what_one_process_does(stages: Path, wide: Path, tmp_path: Path) -> None:
    from test_stages import run

    alone, together = run("sample", wide, tmp_path), stages / "whole" / "sample"
    for name in ("graded.jsonl", "examples.jsonl", "sample.json"):
        assert (alone / name).read_bytes() == (together / name).read_bytes()


@pytest.mark.parametrize("name", rank_jobs.RESUMED)
@pytest.mark.parametrize("resumed", ["same", "fewer", "more"])
def test_a_stage_goes_on_with_any_number_of_ranks(name: str, resumed: str, stages: Path) -> None:
    wanted = stages / "whole" / name if name == IN_FLIGHT else stages / "alone" / name
    if name in rank_jobs.NARROW:
        assert_same_but_for_steps(stages / resumed / name, wanted)
    elif name != IN_FLIGHT or resumed == "same":  # which groups end first depends on who writes
        assert_same_stage(stages / resumed / name, wanted, 1e-4)
    if name.startswith("ppo"):
        notes = [json.loads(line) for line in (stages / resumed / f"{name}.jsonl").read_text().splitlines()]
        taken = [index for note in notes[:-1] for index in note["taken"]]
        assert len(notes) == 6
        assert len(taken) == 5 * 3
        # every problem that was begun was taken once, or is open
        assert sorted(taken + notes[-1]["open"]) == notes[-1]["begun"]


def assert_same_but_for_steps(got: Path, wanted: Path) -> None:
    """Sums of 16 bits turn some steps of 1e-6 around; where weights were rounded between two sessions, the
    two steps of the first one are lost of nearly all."""
    ours, theirs = (load_file(next(folder.rglob("model.safetensors"))) for folder in (got, wanted))
    steps = metrics_of(wanted)[-1]["step"]
    assert len(metrics_of(got)) == len(metrics_of(wanted))
    off = torch.cat([(tensor - theirs[name]).abs().flatten() for name, tensor in ours.items()])
    assert float(off.max()) < 2.2e-6 * steps
    assert float(off.median()) < 1e-6


def test_what_fitted_the_memory_fits_the_next_step(stages: Path) -> None:
    rows = metrics_of(stages / "memory")
    assert [bool(row.get("halvings")) for row in rows] == [False, True, False, False]
    (said,) = (stages / "memory" / "warnings.jsonl").read_text().splitlines()
    fitted = int(said.split("micro-batches now have ")[1].split()[0])
    assert 25 < fitted <= 70


def test_no_rank_holds_a_whole_model_for_an_engine_elsewhere(stages: Path) -> None:
    """Half of the weights, of two moments and of the reference, beside tables of positions of 0.45. Another
    half would be a reference that is whole; a copy to write with one more."""
    for sizes in load_file(stages / "memory.safetensors")["held"].tolist():
        assert 1.9 < sizes < 2.7


def test_a_checkpoint_is_opened_without_being_read(stages: Path) -> None:
    for opened, shared in load_file(stages / "memory.safetensors")["grown"].tolist():
        assert opened < 0.2
        assert 0.49 < shared < 0.55


def test_another_precision_than_the_file_s_is_that_of_one_process(stages: Path) -> None:
    same = load_file(stages / "memory.safetensors")["same"]
    assert len(same) > 100
    assert same.all()


def test_resume_points_of_ranks_hold_no_pickle(stages: Path) -> None:
    """A file a rank, and what says how far it got."""
    names = json.loads((stages / "state.json").read_text())
    assert names[0] == "meta.json"
    assert len(names) == 3
    assert all(name.endswith(".safetensors") for name in names[1:])

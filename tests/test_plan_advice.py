"""What planning suggests: it fits, nothing else is faster, and the bottleneck is said in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from planning import SEVEN, job_of
from planning import seven as seven  # a fixture

from liubai.errors import UserError
from liubai.plan import memory
from liubai.plan.advice import Layout, Planner, bottleneck, told_apart, training_memory
from liubai.plan.hardware import DEVICES
from liubai.stages.policy import groups_ahead
from liubai.stages.rl import Config


def planner(
    seven: Path, tmp_path: Path, gpus: int, gpu: str = "h100", *sets: str, staleness: float = 1
) -> Planner:
    return Planner(job_of(seven, tmp_path, 2500, *sets), DEVICES[gpu], gpus, staleness)


def best(layouts: list[Layout]) -> Layout:
    return max(layouts, key=lambda layout: layout.rate)


@pytest.mark.parametrize("gpus", [16, 64, 256])
@pytest.mark.parametrize("gpu", ["h100", "h200", "a100", "l40s"])
def test_everything_that_is_suggested_fits(seven: Path, tmp_path: Path, gpus: int, gpu: str) -> None:
    plan = planner(seven, tmp_path, gpus, gpu)
    for one in plan.layouts():
        assert one.fit >= 1
        assert one.trainer.bytes <= plan.room
        assert one.rollout.bytes <= plan.room
        apart = one.way.startswith("apart")
        if not apart:  # on the same GPU, and one copy of the weights serves both
            writes = one.rollout.bytes - plan.model.bytes
            assert sum(one.trainer.memory[name] for name in memory.KEPT) + writes <= plan.room
        if one.way == "in turn, in flight":  # keys and values stay while it learns
            assert one.trainer.bytes + one.rollout.memory["cache"] <= plan.room
        assert (one.trainer.gpus + one.rollout.gpus if apart else one.trainer.gpus) <= gpus
        assert one.rollout.gpus % one.parts == 0
        assert one.rate == pytest.approx(plan.work.written / one.step)


def test_the_suggested_split_is_the_best_there_is(seven: Path, tmp_path: Path) -> None:
    plan = planner(seven, tmp_path, 16)
    chosen = next(one for one in plan.layouts() if one.way == "apart, asynchronous")
    others = [plan._apart("apart, asynchronous", n) for n in range(1, 16)]
    assert chosen.rate == max(one.rate for one in others if one)
    # balanced: neither side could spare a tenth of its machines' worth of time and more
    assert 0.7 < chosen.writing.seconds / chosen.update_seconds < 1.4


def test_more_gpus_are_never_slower(seven: Path, tmp_path: Path) -> None:
    rates = [best(planner(seven, tmp_path, n).layouts()).rate for n in (4, 8, 16, 32, 64, 128)]
    assert rates == sorted(rates)


def test_writing_ahead_helps_until_the_trainer_is_what_counts(seven: Path, tmp_path: Path) -> None:
    rates = [best(planner(seven, tmp_path, 64, staleness=k).layouts()).rate for k in (0, 1, 4)]
    assert rates == sorted(rates)


def test_nothing_is_written_ahead_where_no_answer_may_be_old(seven: Path, tmp_path: Path) -> None:
    ways = {k: {one.way for one in planner(seven, tmp_path, 16, staleness=k).layouts()} for k in (0, 1)}
    assert ways[0] == {"in turn", "apart, synchronous"}
    assert ways[1] - ways[0] == {"in turn, in flight", "apart, asynchronous"}


def test_in_turn_and_apart_are_given_the_same_lead(seven: Path, tmp_path: Path) -> None:
    """Small steps on many GPUs: whoever fills all slots learns from answers of dozens of updates ago."""
    sets = ("zero.groups=8", "zero.slots=512")
    by_way = {one.way: one for one in planner(seven, tmp_path, 64, "h200", *sets).layouts()}
    one = by_way["in turn, in flight"]
    assert one.writing.rhythm.batch == 8 * 16 * 2 / 64
    assert one.rate < by_way["apart, asynchronous"].rate


@pytest.mark.parametrize(
    ("bound", "writers", "groups", "elsewhere"),
    [
        (None, 1, 8, 8),
        (None, 4, 2, 2),
        (0, 1, 0, 0),
        (1, 1, 8, 8),
        (1, 4, 2, 2),
        (5, 1, 16, 40),
        (1, 64, 1, 1),
    ],
)
def test_a_run_begins_no_more_than_was_planned(
    bound: int | None, writers: int, groups: int, elsewhere: int
) -> None:
    config = Config(
        model="x", steps=1, groups=8, samples=16, slots=256, inflight=True, max_staleness=bound
    )  # fmt: skip
    assert groups_ahead(config, config.slots, writers) == groups
    assert groups_ahead(config, None, writers) == elsewhere  # it goes on during an update
    for slots in (config.slots, None):
        assert groups_ahead(config.model_copy(update={"inflight": False}), slots, writers) == 0


@pytest.mark.parametrize("bound", [None, 0, 1, 3])
def test_run_and_plan_have_one_lead(bound: int | None, seven: Path, tmp_path: Path) -> None:
    sets = (
        "zero.groups=64",
        "zero.inflight=true",
        *SERVER,
        *([] if bound is None else [f"zero.max_staleness={bound}"]),
    )
    job = job_of(seven, tmp_path, 2500, *sets)
    plan = Planner(job, DEVICES["h100"], 64)
    found = plan._apart("apart, asynchronous", 40)
    assert found
    config = job.config
    assert isinstance(config, Config)
    begun = (config.groups + groups_ahead(config, None)) * config.samples
    assert found.writing.rhythm.batch == min(
        found.fit, config.slots, begun / (found.rollout.gpus / found.parts)
    )


VLLM = ("zero.engine.kind=vllm", "zero.lora.rank=16")


def test_a_trainer_makes_room_for_vllm(seven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = planner(seven, tmp_path, 1, "h100", *VLLM)
    assert [one.way for one in found.layouts()] == ["in turn", "in turn, in flight"]
    for one in found.layouts():
        assert one.microbatch == 32_768  # of 65,536 that fit without it
        assert one.trainer.bytes <= (0.9 - 0.4) * 80e9
        assert one.rollout.bytes <= 0.4 * 80e9
    # vLLM in this process is for one process
    more = planner(seven, tmp_path, 4, "h100", *VLLM).layouts()
    assert {one.way for one in more} == {"apart, synchronous", "apart, asynchronous"}


SERVER = ("zero.engine.kind=server", "zero.engine.url=http://127.0.0.1:8000")


def resized(folder: Path, **sizes: int) -> None:
    (folder / "config.json").write_text(json.dumps(SEVEN | sizes), encoding="utf-8")


def test_a_large_model_is_spread_over_the_gpus_of_a_server(tmp_path: Path, seven: Path) -> None:
    resized(seven, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
            num_key_value_heads=8, head_dim=128)  # fmt: skip
    found = planner(seven, tmp_path, 64, "h200", *SERVER)
    assert 32e9 < found.job.size.parameters < 33e9
    assert all(one.way.startswith("apart") for one in found.layouts())
    small = planner(seven, tmp_path, 64, "h100", *SERVER)
    assert small.parts() == 2
    resized(seven, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
            num_key_value_heads=8, head_dim=128)  # fmt: skip
    larger = planner(seven, tmp_path, 64, "h200", *SERVER)
    assert 70e9 < larger.job.size.parameters < 71e9
    assert larger.parts() == 2
    # a rank that learns has parts alone: one engine's weights would fill it
    assert all(one.trainer.memory["whole models"] == 0 for one in larger.layouts())
    assert 2 * larger.job.size.parameters > 0.9 * larger.room


def test_adapters_travel_alone_where_they_do(seven: Path, tmp_path: Path) -> None:
    lora = "zero.lora.rank=16"
    (whole, merged, alone, in_turn) = (
        {one.way: one.transfer for one in planner(seven, tmp_path, 8, "h200", *sets).layouts()}
        for sets in (SERVER, (*SERVER, lora), (*SERVER, lora, "zero.engine.transport=lora"), (lora,))
    )
    asynchronous = "apart, asynchronous"
    assert whole[asynchronous] == merged[asynchronous] > 100 * alone[asynchronous] > 0
    assert in_turn["in turn"] == alone[asynchronous]  # each rank's copy is brought up to date


def test_two_sizes_are_told_apart() -> None:
    assert told_apart(90.4e9, 72e9) == ("90", "72")
    assert told_apart(72.06e9, 72e9) == ("72.1", "72.0")


def test_one_that_is_too_large_is_refused(tmp_path: Path, seven: Path) -> None:
    with pytest.raises(UserError, match=r"an update needs .* GB on each of 1 × h100.*optimizer_state.*lora"):
        planner(seven, tmp_path, 1, "h100").layouts()


def test_adapters_make_room(seven: Path, tmp_path: Path) -> None:
    found = planner(seven, tmp_path, 1, "h100", "zero.lora.rank=16").layouts()
    assert {one.way for one in found} == {"in turn", "in turn, in flight"}


def test_a_model_comes_together_whole_or_by_layers_as_the_trainer_does_it(
    seven: Path, tmp_path: Path
) -> None:
    job = job_of(seven, tmp_path)
    size = job.size
    assert memory.layered(size, "bfloat16", DEVICES["h100"])  # 46 GB of 80
    assert not memory.layered(size, "bfloat16", DEVICES["h200"])  # of 141
    h100, h200 = (training_memory(job, DEVICES[gpu], 16_384, 8) for gpu in ("h100", "h200"))
    assert h100["gathered"] == 6 * (2 * size.layer + size.ends)
    assert h200["gathered"] == 6 * size.parameters
    assert h100["whole models"] == h200["whole models"] == 0
    # what writes answers is whole on every rank
    for ranks, copies in ((8, 1), (1, 0)):
        there = training_memory(job, DEVICES["h100"], 16_384, ranks, writes=True)
        assert there["whole models"] == copies * 2 * size.parameters
    apart = (
        one.trainer.memory for one in planner(seven, tmp_path, 16, "h100").layouts() if "apart" in one.way
    )
    assert {found["whole models"] for found in apart} == {0}


def test_replicas_are_counted_where_the_trainer_has_them(seven: Path, tmp_path: Path) -> None:
    resized(seven, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=256)  # fmt: skip
    cpu = replace(DEVICES["h100"], name="cpu", dtype="float32", node=1)
    job, narrow = (job_of(seven, tmp_path, None, f"zero.precision={p}") for p in ("float32", "bfloat16"))
    assert training_memory(job, cpu, 2048, 1, threads=4)["replicas"] == 3 * 4 * job.size.parameters
    assert training_memory(job, cpu, 2048, 2, threads=4)["replicas"] == 0
    assert training_memory(narrow, cpu, 2048, 1, threads=4)["replicas"] == 0


def test_the_bottleneck_is_said_in_words(seven: Path, tmp_path: Path) -> None:
    plan = planner(seven, tmp_path, 64, "h100", *SERVER)
    by_way = {
        one.way: bottleneck(one, plan.work)
        for one in [*plan.layouts(), *planner(seven, tmp_path, 64).layouts()[:2]]
    }
    assert "longest answer" in by_way["apart, synchronous"][0]
    assert "ahead" in by_way["apart, synchronous"][1]
    assert "cache for more answers" in by_way["in turn"][1]  # bands of powers of two hold few so long answers
    assert by_way["apart, asynchronous"][0].startswith(("writing", "learning"))
    slow = replace(DEVICES["h100"], network=1e8)
    found = Planner(plan.job, slow, 64, 1)._apart("apart, asynchronous", 32)
    assert found
    assert bottleneck(found, plan.work)[0] == "learning (exchange)"

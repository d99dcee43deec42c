"""The simulated pipeline against what can be computed by hand; nothing is lost or counted twice."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liubai.errors import UserError
from liubai.model.config import ModelConfig
from liubai.plan import roofline
from liubai.plan.hardware import DEVICES
from liubai.plan.memory import sizes
from liubai.plan.simulate import Lengths, Outcome, Pipeline, constant, empirical, log_normal, simulate

#: a step takes 1 ms, and a tenth more for each answer
STEP = (0.0, *(1e-3 * (1 + n / 10) for n in range(1, 65)))


def pipeline(**changed: object) -> Pipeline:
    usual = Pipeline(
        engines=4, step=STEP, update=lambda tokens: tokens * 1e-5, lengths=log_normal(200, 0.8, 1000),
        groups=8, samples=4, transfer=0.01,
    )  # fmt: skip
    return replace(usual, **changed)  # type: ignore[arg-type]


def in_turn(*lengths: int) -> Lengths:
    """These lengths one after the other."""
    listed = cycle(lengths)
    return lambda rng: next(listed)


# by hand


def test_one_engine_and_equal_answers() -> None:
    found = simulate(pipeline(engines=1, lengths=constant(100)), updates=5)
    once = 100 * STEP[32] + 32 * 100 * 1e-5 + 0.01
    assert found.seconds == pytest.approx(5 * once)
    assert found.trained == 5 * 32 * 100
    assert found.rate == pytest.approx(32 * 100 / once)
    assert found.idle == pytest.approx(5 * 100 * STEP[32])


def test_answers_are_spread_evenly_over_the_engines() -> None:
    found = simulate(pipeline(engines=4, lengths=constant(100)), updates=3)
    assert found.seconds == pytest.approx(3 * (100 * STEP[8] + 0.032 + 0.01))


def test_who_does_not_find_a_slot_waits_for_one() -> None:
    found = simulate(pipeline(engines=1, step=STEP[:17], lengths=constant(100)), updates=1)
    assert found.seconds == pytest.approx(2 * 100 * STEP[16] + 0.032 + 0.01)


def test_a_step_is_quicker_when_fewer_are_left() -> None:
    found = simulate(
        pipeline(engines=1, groups=1, samples=3, lengths=in_turn(10, 30, 60), transfer=0.0), updates=1
    )
    writing = 10 * STEP[3] + 20 * STEP[2] + 30 * STEP[1]
    assert found.seconds == pytest.approx(writing + 100 * 1e-5)


def test_synchronous_is_the_longest_answer_and_the_update() -> None:
    """Each engine has one answer: the step takes as long as the longest of them."""
    lengths = [random.Random(1).randrange(1, 500) for _ in range(12)]
    found = simulate(
        pipeline(engines=12, groups=3, samples=4, lengths=in_turn(*lengths), transfer=0.25), updates=4
    )
    assert found.seconds == pytest.approx(4 * (max(lengths) * STEP[1] + sum(lengths) * 1e-5 + 0.25))


def test_a_slow_trainer_never_waits_when_writing_may_run_ahead() -> None:
    slow = pipeline(lengths=constant(50), update=lambda tokens: 10.0, transfer=0.0, staleness=math.inf)
    found = simulate(slow, updates=20)
    assert found.idle < 1.0  # for the first groups alone
    assert found.seconds == pytest.approx(20 * 10.0, rel=0.01)


def test_engines_are_never_empty_when_the_trainer_is_quick() -> None:
    quick = pipeline(
        engines=2,
        step=STEP[:9],
        lengths=constant(100),
        update=lambda tokens: 0.0,
        transfer=0.0,
        staleness=math.inf,
    )
    found = simulate(quick, updates=50)
    assert found.rate == pytest.approx(2 * 8 / STEP[8], rel=0.03)
    assert found.occupied == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("reread", [0.0, 0.02])
def test_an_engine_pauses_while_weights_arrive(reread: float) -> None:
    """One answer of 950 tokens, and on the other engine short ones, each of which ends an update: the long
    one has waited for nine of them when it ends."""
    usual = pipeline(
        engines=2, step=STEP[:2], groups=1, samples=1, staleness=math.inf, lengths=in_turn(950, *[100] * 99),
        update=lambda tokens: 0.0, transfer=0.03, reread=reread,
    )  # fmt: skip
    found = simulate(usual, updates=10)
    assert found.clock[0][0] == pytest.approx(100 * STEP[1] + 0.03)
    assert found.clock[1][0] == pytest.approx(2 * (100 * STEP[1] + 0.03) + reread)
    assert [trained for _, trained in found.clock] == [100 * n for n in range(1, 10)] + [900 + 950]
    assert found.seconds == pytest.approx(950 * STEP[1] + 9 * (0.03 + reread) + 0.03)
    assert found.staleness[9] == 1


def test_decoding_is_as_quick_as_the_roofline_says() -> None:
    shape = ModelConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64,
    )  # fmt: skip
    model = roofline.Model(config=shape, size=sizes(shape), dtype="bfloat16")
    work = roofline.Work(groups=64, samples=8, prompt=100, tokens=400, longest=400)
    device = DEVICES["h100"]
    step = [0.0, *(roofline.step_seconds(model, device, work, n) for n in range(1, 65))]
    usual = pipeline(
        engines=4,
        step=step,
        lengths=constant(400),
        groups=64,
        samples=8,
        update=lambda tokens: 0.0,
        transfer=0.0,
    )
    in_step = roofline.at_once(model, device, work, engines=4, slots=64)
    assert simulate(usual, 3).seconds == pytest.approx(3 * in_step.seconds, rel=1e-6)
    endless = roofline.without_end(model, device, work, engines=4, slots=64)
    assert simulate(replace(usual, staleness=math.inf), 20).rate == pytest.approx(
        work.written / endless.seconds, rel=0.05
    )


# properties


@settings(max_examples=60, deadline=None)
@given(
    engines=st.integers(1, 9),
    slots=st.integers(1, 16),
    groups=st.integers(1, 6),
    samples=st.integers(1, 5),
    staleness=st.sampled_from([0, 1, 2, 5, math.inf]),
    failures=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 5),
)
def test_every_group_is_learned_from_or_dropped_once(
    engines: int, slots: int, groups: int, samples: int, staleness: float, failures: float, seed: int
) -> None:
    found = simulate(
        pipeline(
            engines=engines, step=STEP[: slots + 1], groups=groups, samples=samples, staleness=staleness,
            failures=failures, trainer_failures=failures, restart=0.5, seed=seed,
        ),
        updates=12,
    )  # fmt: skip
    fates = list(found.fates.values())
    assert fates.count("trained") == 12 * groups == sum(found.staleness.values())
    assert set(found.fates) <= set(range(found.begun))
    under_way = found.begun - len(fates)
    assert under_way >= 0
    assert math.isinf(staleness) or found.begun - fates.count("dropped") <= (12 + 1 + staleness) * groups
    assert max(found.staleness) <= staleness
    assert found.written >= found.trained + found.lost - 1e-6
    if staleness == 0:  # nobody runs ahead: what was written was learned from, or lost
        assert not fates.count("dropped")
        assert found.written - found.lost == pytest.approx(found.trained)
    if not failures:
        assert (found.lost, found.resubmitted) == (0, 0)


def test_without_a_bound_nothing_is_dropped_and_short_answers_do_not_come_first_for_ever() -> None:
    found = simulate(pipeline(staleness=math.inf), updates=200)
    assert found.dropped == 0
    assert found.shortening == pytest.approx(1.0, abs=0.05)


def test_a_tight_bound_drops_the_long_answers() -> None:
    """One answer in eight takes many updates: with a bound below that, it is hardly ever learned from."""

    def run(staleness: float, updates: int) -> Outcome:
        lengths = in_turn(4000, *[50] * 7)
        usual = pipeline(
            engines=8, groups=2, samples=1, lengths=lengths, update=lambda tokens: 0.01, transfer=0.0
        )
        return simulate(replace(usual, staleness=staleness), updates)

    tight, loose = run(2, 100), run(math.inf, 3000)
    assert tight.dropped > 0.05
    assert tight.shortening < 0.3
    assert loose.dropped == 0
    assert loose.shortening > 0.6


@pytest.mark.parametrize("staleness", [0, 2, math.inf])
def test_the_same_seed_gives_the_same_run(staleness: float) -> None:
    usual = pipeline(staleness=staleness, failures=0.05, trainer_failures=0.05, restart=1.0)
    assert simulate(usual, 20) == simulate(usual, 20)
    assert simulate(usual, 20) != simulate(replace(usual, seed=1), 20)


def test_the_answers_do_not_depend_on_the_machines() -> None:
    runs = [simulate(pipeline(engines=n, failures=f), 10) for n in (1, 4, 16) for f in (0.0, 0.1)]
    assert len({tuple(found.lengths_begun) for found in runs}) == 1


def test_more_engines_are_never_slower_when_synchronous() -> None:
    for seed in range(3):
        taken = [simulate(pipeline(engines=n, seed=seed), 20).seconds for n in (1, 2, 3, 4, 6, 8, 16, 32, 64)]
        assert taken == sorted(taken, reverse=True)


def test_running_ahead_is_never_slower_than_waiting() -> None:
    rates = [simulate(pipeline(staleness=k), 60).rate for k in (0, 1, 4)]
    assert rates == sorted(rates)


def test_lost_engines_begin_again_elsewhere_and_cost_time() -> None:
    calm = simulate(pipeline(), 40)
    found = simulate(pipeline(failures=0.2, restart=0.5), 40)
    assert found.resubmitted > 0
    assert found.lost > 0
    assert found.trained == calm.trained  # the very same answers
    assert found.seconds > calm.seconds


def test_a_lost_trainer_repeats_its_update() -> None:
    calm, found = (simulate(pipeline(trainer_failures=rate, restart=2.0), 40) for rate in (0.0, 0.1))
    assert found.trained == calm.trained
    assert found.seconds > calm.seconds + 2.0


def test_an_engine_that_is_gone_for_good_stops_nobody_else() -> None:
    calm, found = (
        simulate(pipeline(engines=2, failures=rate, restart=1e9, seed=3), 30) for rate in (0.0, 0.01)
    )
    assert found.resubmitted > 0
    assert found.trained == calm.trained
    assert calm.seconds < found.seconds < 1e4


# lengths


def test_log_normal_lengths_have_their_mean_and_their_cap() -> None:
    rng, draw = random.Random(0), log_normal(300, 0.5, 10_000)
    drawn = [draw(rng) for _ in range(20_000)]
    assert sum(drawn) / len(drawn) == pytest.approx(300, rel=0.02)
    assert max(log_normal(300, 2.0, 500)(rng) for _ in range(1000)) == 500


def test_lengths_of_a_run_are_drawn_from_its_answers(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps({"tokens": n}) + "\n" for n in (3, 5, 9)), encoding="utf-8")
    draw, rng = empirical(path), random.Random(0)
    assert {draw(rng) for _ in range(200)} == {3, 5, 9}


@pytest.mark.parametrize("content", ["", "[]\n", "{", '{"tokens": "3"}\n'])
def test_a_file_without_lengths_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"samples\.jsonl"):
        empirical(path)


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"name a samples\.jsonl of a run"):
        empirical(tmp_path / "none.jsonl")


def test_a_rate_may_leave_out_how_a_pipeline_fills() -> None:
    found = simulate(pipeline(staleness=4, update=lambda tokens: 2.0), 20)
    assert found.rate_after(0) == pytest.approx(found.rate)
    assert found.rate_after(5) > found.rate
    (begun, before), (ended, after) = found.clock[4], found.clock[-1]
    assert found.rate_after(5) == pytest.approx((after - before) / (ended - begun))


def test_a_share_of_nothing_is_nothing() -> None:
    assert Outcome().dropped == 0

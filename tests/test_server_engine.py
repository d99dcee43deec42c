"""The engine that speaks with ``vllm serve``, against a server that speaks as it does (``scripted_vllm``):
who wrote which token, and in which order weights are exchanged. The real server is in test_vllm_engine.py.
"""

from __future__ import annotations

import copy
import resource
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import tiny_model
from connected import EOS, PROMPTS, Connected, ask, assert_written_by, run_out
from connected import about as about  # a fixture
from connected import stack as stack  # a fixture
from hypothesis import given, settings
from hypothesis import strategies as st

from liubai.rollout.engine import Partial, StaleWeights, generate
from liubai.rollout.server_engine import connections
from liubai.types import Sample, Stop


def test_answers_have_the_trainers_logprobs(stack: ExitStack, about: Path) -> None:
    c = Connected(stack, about, tiny_model(1))
    with pytest.raises(StaleWeights, match="no weights yet"):
        c.engine.step()
    c.engine.load(c.model.state_dict(), 0)
    requests = [ask(i, tokens=4 + i, temperature=0.5 + 0.1 * i) for i in range(20)]
    samples = generate(c.engine, requests)
    for request, sample in zip(requests, samples, strict=True):
        assert_written_by({0: c.model}, sample, request.temperature)
        ended = EOS in sample.completion_ids
        assert sample.stop is (Stop.EOS if ended else Stop.LENGTH)
        assert len(sample.completion_ids) == request.max_tokens or sample.completion_ids[-1] == EOS
    assert {s.stop for s in samples} == {Stop.EOS, Stop.LENGTH}
    assert samples == generate(c.engine, requests)


def test_each_engine_of_a_server_is_asked_for_as_many_as_there_are_slots(
    stack: ExitStack, about: Path
) -> None:
    c = Connected(stack, about, tiny_model(1), replicas=3, allowed=0)
    c.engine.load(c.model.state_dict(), 0)
    c.engine.submit(ask(i) for i in range(30))
    c.engine.step()
    c.program.wait_until(24, 0)
    assert len(c.program.asked) == 24
    c.program.allow(1_000_000)
    assert len(run_out(c.engine)) == 30


def test_more_connections_than_a_program_is_begun_with(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (400, limits[1]))
        assert connections(100) == 100
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 400
        assert connections(500) == 500
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 500
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    # where the system does not give them, there are fewer
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (400, 600))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limit: None)
    assert 0 < connections(10_000) < 600


def test_what_is_told_of_an_answer_is_told_once(stack: ExitStack, about: Path) -> None:
    c = Connected(stack, about, tiny_model(1))
    c.engine.load(c.model.state_dict(), 0)
    c.engine.submit(ask(i, alternatives=2) for i in range(5))
    told: dict[int, list[int]] = {i: [] for i in range(5)}
    done: dict[int, Sample] = {}
    while c.engine.pending:
        done.update((r.id, s) for r, s in c.engine.step())
        for token in c.engine.fresh():
            told[token.id].append(token.token)
            assert len(token.alternatives) == 2
            assert token.alternatives[0][1] >= max(token.logprob, token.alternatives[1][1]) - 1e-6
    assert told == {i: list(s.completion_ids) for i, s in done.items()}


def test_new_weights_come_while_the_server_is_paused(stack: ExitStack, about: Path) -> None:
    first, second = tiny_model(1), tiny_model(2)
    c = Connected(stack, about, first, allowed=5)
    c.engine.load(first.state_dict(), 0)
    c.program.calls.clear()
    c.engine.submit(ask(i, tokens=12) for i in range(11))
    assert c.engine.step() == []
    c.program.wait_until(8, 5)  # eight slots; three wait here
    c.engine.load(second.state_dict(), 1)
    # paused before the first byte, resumed after the last, and nothing computed with the old weights is left
    kept = [call for call in c.program.calls if call != "/abort_requests"]
    assert kept == [
        "/pause?mode=abort",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/update_weight_version",
        "/resume",
    ]
    assert not c.program.paused
    assert not c.program.writing
    partials = c.engine.partials()
    assert [len(p.completion_ids) for p in partials] == [5] * 8 + [0] * 3
    c.program.allow(100)
    done = run_out(c.engine)
    assert sorted(done) == list(range(11))
    for i, sample in done.items():
        versions = [(span.version, span.count) for span in sample.versions]
        more = len(sample.completion_ids) - 5
        assert versions == ([(0, 5), (1, more)] if i < 8 else [(1, more + 5)])
        assert_written_by({0: first, 1: second}, sample)
    again = [body for body in c.program.asked if "-3." in body["request_id"]]
    # asked for again from where it was, and not with the random numbers that it has had
    assert again[1]["token_ids"] == [*PROMPTS[0], *done[3].completion_ids[:5]]
    assert again[1]["sampling_params"]["max_tokens"] == 7
    assert again[1]["sampling_params"]["seed"] != again[0]["sampling_params"]["seed"]
    with pytest.raises(StaleWeights, match="not newer"):
        c.engine.load(first.state_dict(), 1)


def test_an_answer_that_ended_as_it_was_called_back_is_not_asked_for_again(
    stack: ExitStack, about: Path
) -> None:
    c = Connected(stack, about, tiny_model(1))
    c.engine.load(c.model.state_dict(), 0)
    c.program.allow(2)
    c.engine.submit(ask(i, tokens=3) for i in range(4))
    assert c.engine.step() == []
    c.program.wait_until(4, 2)
    c.program.allow(3)
    with c.program.changed:
        assert c.program.changed.wait_for(lambda: not c.program.writing, timeout=30)
    partials = c.engine.partials()  # it hears of all four, and they have ended
    assert [len(p.completion_ids) for p in partials] == [3] * 4
    assert c.engine.pending == 4
    assert sorted(r.id for r, _ in c.engine.step()) == [0, 1, 2, 3]
    assert c.engine.pending == 0
    assert len(c.program.asked) == 4


def test_withdrawals(stack: ExitStack, about: Path) -> None:
    c = Connected(stack, about, tiny_model(1), allowed=4)
    c.engine.load(c.model.state_dict(), 0)
    c.engine.submit(ask(i, tokens=9, stop_ids=()) for i in range(10))
    c.engine.step()
    c.program.wait_until(8, 4)
    gone = dict(c.engine.cancel([0, 5, 9, 77]))
    assert [(r.id, s.stop, len(s.completion_ids)) for r, s in gone.items()] == [
        (0, Stop.ABORT, 4),
        (5, Stop.ABORT, 4),
    ]  # 9 was not begun
    assert c.engine.pending == 7
    rest = c.engine.abort()
    assert {r.id for r, _ in rest} >= {1, 2, 3, 4, 6, 7}
    assert c.engine.pending == 0
    assert not c.program.writing
    c.program.allow(100)
    samples = generate(c.engine, [ask(i) for i in range(3)])
    for s in samples:
        assert_written_by({0: c.model}, s)


@pytest.mark.parametrize("times", [1, 3])
def test_an_answer_that_somebody_else_aborts_goes_on(times: int, stack: ExitStack, about: Path) -> None:
    c = Connected(stack, about, tiny_model(1), allowed=2)
    c.engine.load(c.model.state_dict(), 0)
    c.engine.submit(ask(i, tokens=12) for i in range(4))
    told = 0
    for time in range(times):
        assert c.engine.step() == []
        c.program.wait_until(4, 2)
        c.program.abort_all()
        while told < 8 * (1 + time):
            assert c.engine.step() == []
            told += len(c.engine.fresh())
        assert c.engine.pending == 4
    c.program.allow(100)
    done = run_out(c.engine)
    assert sorted(done) == list(range(4))
    for s in done.values():
        assert s.stop in (Stop.EOS, Stop.LENGTH)
        assert len(s.completion_ids) > 2 * times
        assert_written_by({0: c.model}, s)


def test_the_end_of_a_run_aborts_its_own_answers_alone(stack: ExitStack, about: Path) -> None:
    c = Connected(stack, about, tiny_model(1))
    other = Connected(stack, about, c.model, server=(c.program, c.url))
    for engine in (c.engine, other.engine):
        engine.load(c.model.state_dict(), 0)
    c.program.allow(2)
    for engine, count in ((c.engine, 3), (other.engine, 4)):
        engine.submit(ask(i, tokens=9) for i in range(count))  # of the same names
        engine.step()
    c.program.wait_until(7, 2)
    other.engine.close()
    c.program.wait_until(3, 2)
    c.program.allow(100)
    assert sorted(run_out(c.engine)) == [0, 1, 2]
    assert len(c.program.asked) == 7


def test_partials_go_on_elsewhere(stack: ExitStack, about: Path) -> None:
    model = tiny_model(1)
    here, there = Connected(stack, about, model, allowed=3), Connected(stack, about, model)
    for c in (here, there):
        c.engine.load(model.state_dict(), 4)
    here.engine.submit(ask(i, tokens=8) for i in range(6))
    here.engine.step()
    here.program.wait_until(6, 3)
    partials = here.engine.partials()
    assert [len(p.completion_ids) for p in partials] == [3] * 6
    assert here.engine.partials() == partials  # looking changes nothing
    there.engine.resume(partials)
    assert there.engine.partials() == partials
    here.program.allow(100)
    mine, theirs = run_out(here.engine), run_out(there.engine)
    assert mine == theirs
    for s in theirs.values():
        assert [span.version for span in s.versions] == [4]
        assert_written_by({4: model}, s)


def test_a_partial_that_has_ended_is_told_and_not_asked_for(stack: ExitStack, about: Path) -> None:
    c = Connected(stack, about, tiny_model(1))
    c.engine.load(c.model.state_dict(), 0)
    (whole,) = generate(c.engine, [ask(0, tokens=6)])
    asked = len(c.program.asked)
    n = len(whole.completion_ids)
    request = ask(0, tokens=n)
    c.engine.resume([Partial(request, whole.completion_ids, whole.logprobs, whole.versions)])
    assert run_out(c.engine)[0].completion_ids == whole.completion_ids
    assert len(c.program.asked) == asked


@settings(max_examples=15)
@given(st.data())
def test_nothing_is_lost_or_told_twice(data: st.DataObject) -> None:
    """Whatever is done in between: every request ends or is withdrawn, once, and its tokens are the
    versions'."""
    import tempfile

    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (root / "about").mkdir()
        policies = {0: MODELS[0]}
        c = Connected(stack, root / "about", copy.deepcopy(MODELS[0]))
        c.engine.load(policies[0].state_dict(), 0)
        requests = [ask(i, tokens=1 + i % 7) for i in range(data.draw(st.integers(1, 14)))]
        c.engine.submit(requests)
        done: dict[int, Sample] = {}
        gone: set[int] = set()
        for _ in range(data.draw(st.integers(1, 6))):
            match data.draw(st.sampled_from(["step", "load", "partials", "cancel", "hold", "let go"])):
                case "step":
                    for r, s in c.engine.step():
                        assert r.id not in done
                        done[r.id] = s
                case "load":
                    version = len(policies)
                    policies[version] = MODELS[version % 3]
                    c.engine.load(policies[version].state_dict(), version)
                case "partials":
                    waiting = {p.request.id for p in c.engine.partials()}
                    assert waiting == {r.id for r in requests} - done.keys() - gone
                case "cancel":
                    id = data.draw(st.integers(0, len(requests) - 1))
                    for _, s in c.engine.cancel([id]):
                        assert s.stop is Stop.ABORT
                        assert_written_by(policies, s)
                    if id not in done:
                        gone.add(id)
                case "hold":
                    c.program.allow(data.draw(st.integers(0, 3)))
                case "let go":
                    c.program.allow(100)
        c.program.allow(100)
        for id, s in run_out(c.engine).items():
            assert id not in done
            done[id] = s
        assert done.keys() | gone == {r.id for r in requests}
        assert not done.keys() & gone
        for id, s in done.items():
            assert_written_by(policies, s)
            assert s.prompt_ids == requests[id].prompt_ids
            assert len(s.completion_ids) == requests[id].max_tokens or s.completion_ids[-1] == EOS


MODELS = [tiny_model(seed) for seed in (1, 2, 3)]

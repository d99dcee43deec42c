"""The engine that speaks with ``vllm serve``, against a server that speaks as it does (``scripted_vllm``):
who wrote which token, in which order weights are exchanged, and every way in which the other side can fail.
The real server is in test_vllm_engine.py.
"""

from __future__ import annotations

import copy
import json
import socket
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Killed, Silent, naive_logprobs, scramble, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scripted_vllm import Script, ScriptedVLLM, serving

from liubai.errors import UserError
from liubai.grade import RewardWeights
from liubai.model.checkpoint import load, to_hf_name
from liubai.model.lora import LoraConfig, attach, merged
from liubai.model.transformer import Transformer
from liubai.recipe import load_recipe
from liubai.recipe.runner import fingerprint
from liubai.rollout.canary import NotArrived
from liubai.rollout.engine import Engine, Partial, Request, StaleWeights, generate
from liubai.rollout.engines import EngineConfig, canary_for, engine_for
from liubai.rollout.outside import OutsideEngine
from liubai.rollout.transport import FolderTransport, LoraTransport, within, write_folder, write_tensors
from liubai.seeds import derive
from liubai.stages import rl
from liubai.stages.context import Context
from liubai.types import Sample, Stop

EOS = 1
LORA = LoraConfig(rank=4, alpha=8.0)
PROMPTS = ((5, 6, 7), (9,), (30, 31, 32, 33, 34, 35))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def about(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "about")


def checkpoint(folder: Path) -> Path:
    """One, as far as it is looked at."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "model.safetensors.index.json").write_text("{}")
    write_tensors(folder / "model.safetensors", tiny_model(1).state_dict())
    return folder


class Connected:
    """A scripted server, its own or ``server``, and an engine that speaks with it."""

    def __init__(self, stack: ExitStack, about: Path, model: Transformer, **keys: Any) -> None:
        self.model = model
        script_keys = {k: keys.pop(k) for k in list(keys) if k in Script.__dataclass_fields__}
        program, url = keys.pop("server", None) or stack.enter_context(serving(Script(model, **script_keys)))
        self.program: ScriptedVLLM = program
        self.url = url
        self.lora = keys.pop("lora", None)
        self.config = EngineConfig(kind="server", url=url, **{"timeout": 30, **keys})
        self.folder = about.parent / "weights"
        engine = engine_for(
            self.config,
            model,
            parent=about,
            eos_ids=(EOS,),
            slots=8,
            max_length=200,
            folder=self.folder,
            lora=self.lora,
            stack=stack,
        )
        assert isinstance(engine, OutsideEngine)
        self.engine = engine

    def canary(self, temperature: float = 1.0) -> Any:
        canary = canary_for(
            self.config, self.engine, self.model, PROMPTS, temperature=temperature, max_tokens=9, seed=0
        )
        assert canary is not None
        return canary


def ask(id: int, tokens: int = 10, **keys: Any) -> Request:
    prompt = keys.pop("prompt_ids", PROMPTS[id % 3])
    return Request(id=id, prompt_ids=prompt, max_tokens=tokens, seed=derive(0, id), **keys)


def run_out(engine: Engine) -> dict[int, Sample]:
    done: dict[int, Sample] = {}
    while engine.pending:
        done.update((r.id, s) for r, s in engine.step())
    return done


def assert_written_by(policies: dict[int, Transformer], sample: Sample, temperature: float = 1.0) -> None:
    """Each token has the log-probability of the version that is said to have written it."""
    at = 0
    for span in sample.versions:
        wanted = naive_logprobs(policies[span.version], sample, temperature)[at : at + span.count].tolist()
        assert list(sample.logprobs[at : at + span.count]) == pytest.approx(wanted, abs=1e-5)
        at += span.count
    assert at == len(sample.completion_ids)


# ---- answers and versions ----


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


# ---- transports ----


def test_a_folder_is_a_checkpoint_and_the_last_thing_in_it_says_so(about: Path, tmp_path: Path) -> None:
    model = tiny_model(1).to(torch.bfloat16)
    folder = tmp_path / "w" / "step-000003"
    (tmp_path / "w" / ".step-000003.tmp").mkdir(parents=True)  # of a killed run
    write_folder(folder, model.state_dict(), about, 3)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "chat_template.jinja", "model.safetensors", "STABLE"}
    assert json.loads((folder / "STABLE").read_text()) == {"version": 3}
    read = load_file(folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.pop(to_hf_name(name)), tensor)
    assert not read
    assert list((tmp_path / "w").iterdir()) == [folder]


def test_adapters_are_merged_on_the_way(about: Path, tmp_path: Path) -> None:
    model = adapted(5)
    write_folder(tmp_path / "w", model.state_dict(), about, 0, LORA)
    read = load_file(tmp_path / "w" / "model.safetensors")
    for name, tensor in merged(model).items():
        assert torch.equal(read.pop(to_hf_name(name)), tensor)
    assert not read


def adapted(seed: int) -> Transformer:
    model = tiny_model(1)
    attach(model, LORA, seed=0)
    retrain(model, seed)
    return model


def retrain(model: Transformer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if name.endswith("lora_b"):
                p.normal_(0.0, 0.3, generator=generator)


def test_an_adapter_has_a_name_of_its_own_for_each_version(stack: ExitStack, about: Path) -> None:
    """And is laid over the model that it belongs to, whatever an earlier run left in the server."""
    model = adapted(1)
    c = Connected(stack, about, tiny_model(7), transport="lora", lora=LORA, allowed=4)
    c.model = model
    canary = c.canary()
    c.engine.load(model.state_dict(), 0)
    c.program.allow(100)
    canary.look(0)
    c.program.allow(4)
    before = copy.deepcopy(model)
    c.engine.submit(ask(i, tokens=9) for i in range(4))
    c.engine.step()
    c.program.wait_until(4, 4)
    retrain(model, 2)
    c.program.calls.clear()
    c.engine.load(model.state_dict(), 1)
    calls = [call for call in c.program.calls if call != "/abort_requests"]
    assert calls[:3] == ["/pause?mode=abort", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
    assert set(c.program.adapters) == {"policy-v1"}
    assert [path.name for path in c.folder.iterdir()] == ["policy-v1"]
    c.program.allow(100)
    canary.look(1)
    for s in run_out(c.engine).values():
        assert [span.version for span in s.versions] == [0, 1]
        assert_written_by({0: before, 1: model}, s)


def test_only_the_last_version_is_kept_and_nothing_in_the_end(stack: ExitStack, about: Path) -> None:
    c = Connected(stack, about, tiny_model(1))
    for version in range(3):
        c.engine.load(c.model.state_dict(), version)
        assert [path.name for path in c.folder.iterdir()] == [f"step-{version:06}"]
    stack.close()
    assert not c.folder.exists()


def test_what_else_is_in_a_folder_stays_there(about: Path, tmp_path: Path) -> None:
    class Reader:
        def reload(self, folder: Path) -> None: ...

        def load_adapter(self, name: str, number: int, folder: Path) -> None: ...

        def unload_adapter(self, name: str, number: int) -> None: ...

    root = tmp_path / "shared"
    root.mkdir()
    (root / "mine.txt").write_text("x")
    folder = FolderTransport(root, about)
    folder.send(tiny_model(1).state_dict(), 1, Reader())  # type: ignore[arg-type]
    adapter = LoraTransport(root, about, LORA)
    adapter.send(adapted(1).state_dict(), 2, Reader())  # type: ignore[arg-type]
    assert {path.name for path in root.iterdir()} == {"mine.txt", "policy-v2"}
    adapter.close()
    folder.close()
    assert {path.name for path in root.iterdir()} == {"mine.txt"}


def test_a_transfer_that_does_not_end_is_given_up() -> None:
    import threading

    never = threading.Event()
    with pytest.raises(UserError, match=r'has not ended after 0 s; transport = "folder"'):
        within(0.05, "the weight transfer", never.wait)
    never.set()
    assert within(30, "it", lambda: 7) == 7
    with pytest.raises(KeyError):
        within(30, "it", lambda: {}["x"])


# ---- what can be wrong with a server ----


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"version": "0.19.1"}, r"is 0\.19\.1; Liubai works with 0\.32\.x"),
        ({"version": "1.0.0"}, r"pip install 'vllm==0\.32\.\*'"),
        ({"max_model_len": 199}, "holds 199 tokens, prompt and answer may have 200"),
        ({"missing": {"/is_paused"}}, "has no /is_paused: start it with VLLM_SERVER_DEV_MODE=1"),
        ({"missing": {"/version"}}, "has no /version"),
        ({"hang": {"/is_paused"}}, "/is_paused has not answered for 1 s"),
        ({"broken": {"/v1/models": "out of   order"}}, "/v1/models: out of order"),
    ],
)
def test_an_unfit_server_is_refused_at_once(
    keys: dict[str, Any], message: str, stack: ExitStack, about: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liubai.rollout.server_engine.SHORT", 1.0)
    with pytest.raises(UserError, match=message):
        Connected(stack, about, tiny_model(1), **keys)


def test_nobody_there(about: Path, stack: ExitStack) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match=r"does not answer .*; start it, then give the same command again"):
        engine_for(
            EngineConfig(kind="server", url=url),
            tiny_model(1),
            parent=about,
            eos_ids=(EOS,),
            slots=8,
            max_length=200,
            folder=about,
            stack=stack,
        )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"missing": {"/pause"}}, "has no /pause: start it with VLLM_SERVER_DEV_MODE=1"),
        ({"missing": {"/collective_rpc"}}, "has no /collective_rpc"),
        ({"broken": {"/collective_rpc": "no such tensor"}}, "/collective_rpc: no such tensor"),
        ({"hang": {"/collective_rpc"}}, "/collective_rpc has not answered for 1 s.*engine.timeout"),
        ({"hang": {"/pause"}}, "/pause has not answered for 1 s"),
        ({"sticky": True}, "has not emptied its prefix cache"),
        (
            {"missing": {"/v1/load_lora_adapter"}, "transport": "lora", "lora": LORA},
            "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
        ),
    ],
)
def test_a_transfer_that_fails_says_why(
    keys: dict[str, Any], message: str, stack: ExitStack, about: Path
) -> None:
    c = Connected(stack, about, tiny_model(1), timeout=1, **keys)
    with pytest.raises(UserError, match=message):
        c.engine.load(adapted(1).state_dict() if "lora" in keys else c.model.state_dict(), 0)
    assert c.engine.version == -1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scale_out": False}, "start it with --enable-scale-out"),
        ({"missing": {"/inference/v1/generate"}}, "start it with --enable-scale-out"),
        ({"broken": {"/inference/v1/generate": "engine is dead"}}, "engine is dead"),
        ({"hang": {"/inference/v1/generate"}}, "has not answered for 1 s"),
        ({"nonsense": True}, "tokens and 0 log-probs"),
        ({"unlabelled": True}, "does not say which weights wrote an answer"),
        ({"short": True}, "ended an answer after 9 of 10 tokens and without an end token.*than the 200 of"),
    ],
)
def test_an_answer_that_does_not_come_ends_the_run(
    keys: dict[str, Any], message: str, stack: ExitStack, about: Path
) -> None:
    c = Connected(stack, about, tiny_model(1), timeout=1, **keys)
    c.engine.load(c.model.state_dict(), 0)
    with pytest.raises(UserError, match=message):
        generate(c.engine, [ask(i) for i in range(3)])


def test_a_server_that_was_started_again_has_other_weights(stack: ExitStack, about: Path) -> None:
    c = Connected(stack, about, tiny_model(1))
    c.engine.load(c.model.state_dict(), 0)
    c.program.label = "default"
    with pytest.raises(UserError, match="wrote with weights 'default', not with version 0"):
        generate(c.engine, [ask(0)])


def test_a_server_that_a_killed_run_left_paused_is_resumed(stack: ExitStack, about: Path) -> None:
    c = Connected(stack, about, tiny_model(1), broken={"/collective_rpc": "killed"})
    with pytest.raises(UserError, match="killed"):
        c.engine.load(c.model.state_dict(), 0)
    assert c.program.paused
    c.engine.server.require(200)  # type: ignore[attr-defined]
    assert not c.program.paused


def test_requests_that_cannot_be_are_refused(stack: ExitStack, about: Path) -> None:
    c = Connected(stack, about, tiny_model(1))
    with pytest.raises(ValueError, match="needs 201 tokens"):
        c.engine.submit([ask(0, tokens=198), ask(0)])
    with pytest.raises(ValueError, match="at the full distribution"):
        c.engine.submit([ask(1), ask(0, top_p=0.9)])
    assert c.engine.pending == 0


# ---- the canary over the wire ----


def test_the_canary_lets_a_sound_server_pass(stack: ExitStack, about: Path) -> None:
    c = Connected(stack, about, tiny_model(1), allowed=3)
    canary = c.canary(temperature=0.7)
    c.engine.submit(ask(i) for i in range(4))
    for version in range(3):
        scramble(c.model, 20 + version)
        c.engine.load(c.model.state_dict(), version)
        c.program.allow(100)
        canary.look(version)
        assert canary.gap < 1e-5
        assert c.engine.pending == 4  # what waits, waits
    assert len(run_out(c.engine)) == 4


@pytest.mark.parametrize("fault", ["deaf", "raw"])
def test_the_canary_stops_a_run_whose_server_is_not(fault: str, stack: ExitStack, about: Path) -> None:
    c = Connected(stack, about, tiny_model(1), **{fault: True})
    canary = c.canary(temperature=0.7)
    if fault == "deaf":
        c.engine.load(c.model.state_dict(), 0)
        canary.look(0)
        scramble(c.model, 9)
        c.engine.load(c.model.state_dict(), 1)
        with pytest.raises(NotArrived, match="still answers as with version 0"):
            canary.look(1)
    else:
        c.engine.load(c.model.state_dict(), 0)
        with pytest.raises(NotArrived, match="sampling temperature"):
            canary.look(0)


# ---- the config, and a stage ----


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "server"}, "needs its url"),
        ({"kind": "server", "url": "10.0.0.2:8000"}, "needs its url"),
        ({"kind": "server", "url": "http://h:abc"}, "needs its url, such as .*, not 'http://h:abc'"),
        ({"kind": "server", "url": "http://h:99999"}, "needs its url"),
        ({"kind": "server", "url": "http://[::1"}, "needs its url"),
        ({"kind": "vllm", "address": "host:abc"}, "address is HOST or HOST:PORT, not 'host:abc'"),
        ({"kind": "vllm", "address": "host:0"}, "address is HOST or HOST:PORT"),
        ({"kind": "vllm", "address": "http://host:29500"}, "address is HOST or HOST:PORT"),
        ({"kind": "torch", "url": "http://h:1"}, "url is not for an engine of kind 'torch'"),
        ({"kind": "vllm", "url": "http://h:1"}, "url is not for an engine of kind 'vllm'"),
        (
            {"kind": "server", "url": "http://h:1", "tensor_parallel": 2},
            "tensor_parallel is not for an engine of kind 'server'",
        ),
        ({"transport": "lora"}, "transport is not for an engine of kind 'torch'"),
    ],
)
def test_a_senseless_engine_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**keys)


RECIPE = """
[stages.zero]
kind = "rl"
model = "MODEL"
steps = 2
groups = 3
samples = 4
max_tokens = 12
eval_problems = 2
eval_samples = 1
save_every = 1
slots = 8
{more}
"""


def recipe(path: Path, model: Path, more: str) -> Any:
    file = path / "r.toml"
    file.write_text(RECIPE.replace("MODEL", str(model)).format(more=more))
    return load_recipe(file)


def test_the_usual_engine_leaves_no_trace_in_a_recipe(base: Path, tmp_path: Path) -> None:
    """What was computed before there were others keeps its fingerprint."""
    plain = recipe(tmp_path, base / "checkpoint", "")
    said = recipe(tmp_path, base / "checkpoint", 'engine = "torch"')
    other = recipe(tmp_path, base / "checkpoint", 'engine = "vllm"')
    marks = [fingerprint(r, r.stages[0], {}) for r in (plain, said, other)]
    assert marks[0] == marks[1] != marks[2]
    assert "engine" not in plain.to_toml()
    resolved = tomllib.loads(other.to_toml())["stages"]["zero"]["engine"]
    assert resolved["kind"] == "vllm"
    (tmp_path / "again.toml").write_text(other.to_toml())
    assert load_recipe(tmp_path / "again.toml") == other


def test_a_recipes_engine_is_checked_and_its_folder_found(base: Path, tmp_path: Path) -> None:
    table = '[stages.zero.engine]\nkind = "server"\nurl = "http://h:8000"\nfolder = "w"'
    engine = recipe(tmp_path, base / "checkpoint", table).stages[0].config.engine
    assert engine.folder == str(tmp_path / "w")
    with pytest.raises(UserError, match=r"'stages.zero.engine'.*did you mean 'vllm'"):
        recipe(tmp_path, base / "checkpoint", 'engine = "vlm"')
    wanted = recipe(tmp_path, base / "checkpoint", table + '\ntransport = "lora"').stages[0].config
    with pytest.raises(UserError, match="set lora, too"):
        wanted.require_model("zero", [])


def stage(base: Path, url: str, transport: Any = "folder", **keys: Any) -> rl.Config:
    """An untrained model is never right: the length is what its answers differ in."""
    return rl.Config(
        model=str(base / "checkpoint"),
        groups=3,
        samples=4,
        max_tokens=24,
        eval_problems=2,
        eval_samples=1,
        save_every=1,
        slots=8,
        lr=3e-3,
        rewards=RewardWeights(overlong=-0.5, overlong_from=0.0),
        engine=EngineConfig(kind="server", url=url, transport=transport),
        **keys,
    )


@pytest.mark.parametrize(
    ("transport", "keys"),
    [
        ("folder", {"inflight": False}),
        ("folder", {"inflight": True}),
        ("lora", {"inflight": True, "lora": LORA}),
    ],
)
def test_a_stage_learns_from_answers_of_a_server(
    transport: str,
    keys: dict[str, Any],
    base: Path,
    tmp_path: Path,
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed after its first step and taken up again: it goes on with exactly the answers that it had."""
    monkeypatch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)
    model, _ = load(base / "checkpoint")
    program, url = stack.enter_context(serving(Script(model, max_model_len=4096)))
    config = stage(base, url, transport, steps=3, **keys)
    folder = tmp_path / "1-zero"
    with pytest.raises(Killed):
        rl.run(config, Context(folder, 0, {}, Silent(kill_at=2)))
    rl.run(config, Context(folder, 0, {}, Silent()))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows[1:]:
        assert row["logprob_gap/canary"] < 1e-5
        assert row["logprob_gap/fresh"] < 1e-5
        assert row["grad_norm"] > 0
    assert (program.label, program.paused, program.writing, program.adapters) == ("2", False, {}, {})
    assert not (folder / "weights").exists()


def test_a_stage_stops_when_its_weights_do_not_arrive(
    base: Path, tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)
    model, _ = load(base / "checkpoint")
    _, url = stack.enter_context(serving(Script(model, max_model_len=4096, deaf=True)))
    folder = tmp_path / "1-zero"
    with pytest.raises(NotArrived, match="did not reach the engine"):
        rl.run(stage(base, url, steps=9), Context(folder, 0, {}, Silent()))
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2  # the first step was sound, and the second was not begun

"""Every way in which a server can fail is said in a sentence, and the canary finds what it does not say."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import scramble, tiny_config, tiny_model
from connected import EOS, LORA, Connected, adapted, ask, run_out
from connected import about as about  # a fixture
from connected import stack as stack  # a fixture

from liubai.errors import UserError
from liubai.rollout.canary import NotArrived
from liubai.rollout.engine import generate
from liubai.rollout.engines import EngineConfig, engine_for

# ---- what can be wrong with a server ----


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"version": "0.19.1"}, r"is 0\.19\.1; Liubai works with 0\.32\.x"),
        ({"version": "1.0.0"}, r"pip install 'vllm==0\.32\.\*'"),
        ({"max_model_len": 199}, "holds 199 tokens, prompt and answer may have 200"),
        ({"missing": {"/is_paused"}}, "has no /is_paused: start it with VLLM_SERVER_DEV_MODE=1"),
        (
            {"missing": {"/version"}},
            r"no vLLM server there, at http://\S+ \(status 404\); is the url right\?",
        ),
        ({"pages": {"/version": 404}}, r"\(status 404\); is the url right\? It is the root, without /v1$"),
        ({"pages": {"/version": 200}}, r"no vLLM server there.*\(status 200\)"),
        ({"pages": {"/v1/models": 502}}, r"/v1/models: status 502$"),
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


def test_a_cpu_keeps_the_old_head(stack: ExitStack, about: Path) -> None:
    """Where the head is the embedding: said before anything is asked. An adapter leaves it as it is."""
    with pytest.raises(UserError, match="goes on with its old head"):
        Connected(stack, about, tiny_model(1), device="cpu")
    Connected(stack, about, tiny_model(1, tiny_config(tie_word_embeddings=False)), device="cpu")
    Connected(stack, about, adapted(0), device="cpu", transport="lora", lora=LORA)
    Connected(stack, about, tiny_model(1), device="cpu", pages={"/server_info": 500})  # says nothing


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


def test_the_first_disagreement_names_the_precision(stack: ExitStack, about: Path) -> None:
    """vLLM serves a checkpoint in float32 in bfloat16, unless told otherwise."""
    c = Connected(stack, about, tiny_model(1))
    c.engine.load(c.model.state_dict(), 0)
    canary = c.canary()
    score = canary.score
    wrong = lambda samples: [[one - 0.01 for one in row] for row in score(samples)]  # noqa: E731
    canary.score = wrong
    with pytest.raises(NotArrived, match=r"computes in float32, .*start it with --dtype float32, or set"):
        canary.look(0)
    canary._looks.clear()
    with pytest.raises(NotArrived, match=r"the bound 0\.001\. Either the new weights"):
        canary.look(1)  # it was right before

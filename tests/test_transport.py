"""How weights get to a server that is not theirs alone: what a killed run left there, what others have in the
same folder, and vLLM's own protocol for trainers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model
from connected import LORA, Connected, adapted, ask, assert_written_by, checkpoint, retrain, run_out
from connected import stack as stack  # a fixture
from scripted_vllm import Script, serving
from torch import Tensor

from liubai.errors import UserError
from liubai.rollout.engine import generate
from liubai.rollout.server_engine import Server, ServerEngine
from liubai.rollout.transport import PLACE, Receiver, plain

# ---- adapters ----


def test_a_server_is_used_again_after_a_run_was_killed(stack: ExitStack, tmp_path: Path) -> None:
    """vLLM refuses a name that it holds, whatever is behind it by now."""
    model = adapted(1)
    killed = Connected(stack, checkpoint(tmp_path / "about"), tiny_model(7), transport="lora", lora=LORA)
    program = killed.program
    program.adapters |= {"policy-value": program.base, "mine": program.base}
    for version in (16, 17):
        killed.engine.load(model.state_dict(), version)
    program.adapters["policy-v16"] = program.base  # killed between the two calls
    retrain(model, 2)
    with ExitStack() as later:
        c = Connected(
            later,
            tmp_path / "about",
            model,
            transport="lora",
            lora=LORA,
            server=(program, killed.url),
        )
        c.engine.load(model.state_dict(), 17)
        assert set(program.adapters) == {"policy-value", "mine", "policy-v17"}
        for sample in generate(c.engine, [ask(i) for i in range(4)]):
            assert_written_by({17: model}, sample)
        c.engine.load(model.state_dict(), 18)
    assert set(program.adapters) == {"policy-value", "mine"}


def test_a_server_that_is_gone_does_not_hinder_the_end(stack: ExitStack, tmp_path: Path) -> None:
    model = adapted(1)
    c = Connected(stack, checkpoint(tmp_path / "about"), tiny_model(7), transport="lora", lora=LORA)
    c.engine.load(model.state_dict(), 0)
    c.program.script.broken["/v1/unload_lora_adapter"] = "gone"
    c.engine.close()
    assert not c.folder.exists()


# ---- folders ----


def test_what_others_have_in_a_shared_folder_stays_theirs(stack: ExitStack, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    theirs = [shared / name for name in ("step-1000", "step-001000", "policy-v3", ".step-7.tmp")]
    for folder in theirs:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("x")
    first, second = (
        Connected(stack, checkpoint(tmp_path / run / "about"), tiny_model(i), folder=str(shared))
        for i, run in enumerate(("one", "two"))
    )
    for c in (first, second, first, second):
        c.engine.load(c.model.state_dict(), c.engine.version + 1)
    places = {Path((c.folder / PLACE).read_text()) for c in (first, second)}
    assert {path.parent for path in places} == {shared}
    assert [[path.name for path in place.iterdir()] for place in places] == [["step-000001"]] * 2
    second.engine.close()
    first.engine.load(first.model.state_dict(), 1000)
    assert_written_by({1000: first.model}, generate(first.engine, [ask(0)])[0])
    stack.close()
    assert set(shared.iterdir()) == set(theirs)
    assert all((folder / "model.safetensors").read_text() == "x" for folder in theirs)
    assert not first.folder.exists()


def test_a_killed_run_finds_its_folder_again(stack: ExitStack, tmp_path: Path) -> None:
    about, shared = checkpoint(tmp_path / "about"), tmp_path / "shared"
    killed = Connected(stack, about, tiny_model(1), folder=str(shared))
    killed.engine.load(killed.model.state_dict(), 5)
    (place,) = shared.iterdir()
    (place / ".step-000006.tmp").mkdir()
    (place / ".step-000004.0123abcd.liubai-tmp").mkdir()
    with ExitStack() as later:
        c = Connected(later, about, tiny_model(1), folder=str(shared))
        c.engine.load(c.model.state_dict(), 7)
        assert list(shared.iterdir()) == [place]
        assert [path.name for path in place.iterdir()] == ["step-000007"]
    assert not place.exists()


def test_a_killed_run_goes_on_with_another_folder(stack: ExitStack, tmp_path: Path) -> None:
    about, old, new = checkpoint(tmp_path / "about"), tmp_path / "old", tmp_path / "new"
    killed = Connected(stack, about, tiny_model(1), folder=str(old))
    killed.engine.load(killed.model.state_dict(), 5)
    c = Connected(stack, about, tiny_model(1), folder=str(new))
    c.engine.load(c.model.state_dict(), 6)
    assert list(old.iterdir()) == []
    assert [path.name for path in new.glob("*/*")] == ["step-000006"]


# ---- vLLM's protocol for trainers ----


class ByNumbers:
    """As a trainer of vLLM's, with what is sent in the request itself."""

    def __init__(self) -> None:
        self.greeted = False

    def send(self, weights: Mapping[str, Tensor], version: int, receiver: Receiver) -> None:
        if not self.greeted:
            init = {"master_address": "h", "master_port": 1, "world_size": 1 + receiver.workers()}  # type: ignore[attr-defined]
            receiver.init_weight_transfer_engine(init)
            self.greeted = True
        receiver.start_weight_update()
        for name, tensor in plain(weights, LORA):
            receiver.update_weights({name: tensor.tolist()})
        receiver.finish_weight_update(str(version))

    def close(self) -> None: ...


@pytest.mark.parametrize("lora", [False, True])
def test_weights_that_travel_by_vllms_own_protocol(lora: bool, stack: ExitStack) -> None:
    model = adapted(1) if lora else tiny_model(1)
    program, url = stack.enter_context(serving(Script(tiny_model(1), allowed=3)))
    engine = ServerEngine(Server(url, 30), ByNumbers(), eos_ids=(1,), slots=4, max_length=200)
    stack.callback(engine.close)
    policies: dict[int, Any] = {}
    for version in range(2):
        policies[version] = copy.deepcopy(model)
        engine.load(model.state_dict(), version)
        if version == 0:
            engine.submit(ask(i, tokens=9) for i in range(4))
            engine.step()
            program.wait_until(4, 3)
            retrain(model, 3) if lora else model.load_state_dict(tiny_model(2).state_dict())
    posts = [call for call in program.calls if "weight" in call and call != "/update_weights"]
    each = ["/start_weight_update", "/finish_weight_update", "/update_weight_version"]
    assert posts == ["/init_weight_transfer_engine", *each, *each]
    program.allow(100)
    for sample in run_out(engine).values():
        assert [span.version for span in sample.versions] == [0, 1]
        assert_written_by(policies, sample)


def test_a_server_that_takes_no_tensors_says_so(stack: ExitStack) -> None:
    script = Script(tiny_model(1), broken={"/start_weight_update": "Weight transfer not configured."})
    _, url = stack.enter_context(serving(script))
    engine = ServerEngine(Server(url, 30), ByNumbers(), eos_ids=(1,), slots=4, max_length=200)
    with pytest.raises(UserError, match="/start_weight_update: Weight transfer not configured"):
        engine.load(tiny_model(1).state_dict(), 0)

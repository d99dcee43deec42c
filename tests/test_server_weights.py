"""How weights get to a server: as the folder of a checkpoint, or as an adapter; and what is left there."""

from __future__ import annotations

import copy
import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from connected import LORA, Connected, adapted, ask, assert_written_by, retrain, run_out
from connected import about as about  # a fixture
from connected import stack as stack  # a fixture
from safetensors.torch import load_file

from liubai.errors import UserError
from liubai.model.checkpoint import to_hf_name
from liubai.model.lora import merged
from liubai.rollout.transport import FolderTransport, LoraTransport, within, write_folder


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

"""The command ``liubai serve``: where it says that it is, how it ends, and mistakes that are one line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_config, tiny_model
from serving import CHAT, HEALTH, HELLO, events_of, http, raw

from liubai import cli
from liubai.commands import serve as command
from liubai.model.checkpoint import save_checkpoint
from liubai.problems import world_vocabulary
from liubai.serve.server import listen
from liubai.text.template import BARE
from liubai.text.tokenizer import word_level

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "3-zero" / "checkpoint"
    words = word_level(world_vocabulary())
    config = tiny_config(vocab_size=words.vocab_size, max_position_embeddings=256, eos_token_id=words.eos_id)
    save_checkpoint(folder, tiny_model(0, config), words, BARE)
    return folder


def liubai(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; from liubai.cli import main; sys.exit(main())", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", **environment},
    )


def test_serve_says_where_it_is_and_ends_cleanly(checkpoint: Path) -> None:
    process = liubai("serve", str(checkpoint), "--port", "0", "--device", "cpu", "--grace", "0.2")
    assert process.stdout is not None
    assert process.stdout.readline() == "loading zero\n"
    ready = process.stdout.readline()
    found = re.fullmatch(r"serving zero at http://127\.0\.0\.1:(\d+) \(Ctrl-C stops it\)\n", ready)
    assert found is not None
    port = int(found[1])
    assert raw(port, HEALTH).recv(100).startswith(b"HTTP/1.1 200")
    link = raw(port, http(CHAT, {**HELLO, "stream": True, "max_tokens": 200, "think_at_least": 200}))
    assert b"200 OK" in link.recv(20)
    process.send_signal(signal.SIGTERM)
    events = events_of(link)
    assert events[-1] == "[DONE]" or "shutting_down" in events[-1]
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    # the answer may have been quicker than the signal
    assert out in ("", "stopping in 0.2 s at most (open requests: 1); Ctrl-C again: at once\n")


def test_a_port_in_use_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        number = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["liubai", "serve", str(checkpoint), "--port", str(number)])
        assert cli.main() == 2
    said = f"liubai: port {number} is in use; choose another with --port, or --port 0 for a free one\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "needs a key"),
        (["--cors", "example.com"], "an origin is like https://example.com"),
        (["--name", "a", "--name", "b"], "2 --name for 1 checkpoints"),
        (["--fast", "nope"], "there is no model 'nope' here"),
        (["--host", "no.such.host.invalid"], "needs a key"),
        (["--device", "gpu"], "--device 'gpu'"),
        (["--reward-model", "nope"], "--reward-model 'nope': there is no such folder"),
        (
            ["--process-model", "."],
            "--process-model '.' is no model that judges; give a process_model folder",
        ),
        (["--max-length", "100000"], "max_length must be"),
    ],
)
def test_mistakes_of_serve_are_one_line(
    checkpoint: Path,
    options: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("LIUBAI_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["liubai", "serve", str(checkpoint), "--port", "0", *options])
    assert cli.main() == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "calibrated", "option", "said"),
    [
        ("LlamaForCausalLM", True, "--reward-model", "is a language model"),
        (
            "LlamaForSequenceClassification",
            False,
            "--reward-model",
            "is a process model; give a reward_model",
        ),
        (
            "LlamaForSequenceClassification",
            True,
            "--process-model",
            "is a reward model; give a process_model",
        ),
    ],
)
def test_a_judge_of_another_kind_is_refused_at_the_start(
    checkpoint: Path,
    tmp_path: Path,
    kind: str,
    calibrated: bool,
    option: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"architectures": [kind], "num_labels": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if calibrated:
        (tmp_path / "calibration.json").write_text('{"mean": 0.0, "spread": 1.0}')
    monkeypatch.setattr(
        sys, "argv", ["liubai", "serve", str(checkpoint), "--port", "0", option, str(tmp_path)]
    )
    assert cli.main() == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert str(tmp_path) in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""  # no model was loaded


def test_without_the_extra_serve_says_what_to_install(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["liubai", "serve", str(checkpoint)])
    assert cli.main() == 2
    assert (
        capsys.readouterr().err == "liubai: serving needs FastAPI and uvicorn: pip install 'liubai[serve]'\n"
    )

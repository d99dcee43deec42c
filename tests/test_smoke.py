"""The whole path with the real stages, as a user runs it: smoke.toml, kill -9, resume, the commands."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIUBAI = [sys.executable, "-m", "liubai.cli"]

#: small enough for a dozen starts; plain lines, single thread, a resume point after every step
TINY = """
name = "tiny"
seed = 3
threads = 1
[stages.base]
kind = "pretrain"
steps = 10
tokens_per_step = 512
save_every = 2
[stages.base.model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
[stages.zero]
kind = "rl"
from = "base"
steps = 10
groups = 4
samples = 4
max_tokens = 48
slots = 12
inflight = {inflight}
eval_every = 4
eval_problems = 4
eval_samples = 2
save_every = 1
[stages.zero.loss]
aggregation = "token-mean"
kl = 0.01
[stages.eval]
kind = "eval"
from = "zero"
limit = 4
samples = 2
max_tokens = 48
"""


def liubai(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LIUBAI, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False, **options
    )


def lines(run: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in run.glob("*/metrics.jsonl"))


def without_times(path: Path) -> list[dict]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {k: v for k, v in r.items() if k not in ("time", "tokens/s") and not k.startswith("seconds/")}
        for r in records
    ]


@pytest.mark.parametrize("inflight", [True, False])
def test_kill_9_anywhere_and_resume_is_bit_identical(tmp_path: Path, inflight: bool) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY.replace("{inflight}", str(inflight).lower()))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = liubai("run", str(recipe), "--out", str(whole))
    assert done.returncode == 0, done.stderr
    rng = random.Random(7)
    kills = 0
    while kills < (10 if inflight else 4):
        process = subprocess.Popen(
            [*LIUBAI, "run", str(recipe), "--out", str(killed)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        goal = lines(killed) + rng.randint(1, 2)
        while process.poll() is None and lines(killed) < goal:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)  # anywhere in the step that follows, saving included
        assert process.poll() is None, f"it ended after {kills} kills: {process.stderr.read()!r}"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()
        kills += 1
    done = liubai("run", str(recipe), "--out", str(killed))
    assert done.returncode == 0, done.stderr
    for stage in ("1-base", "2-zero"):
        weights = f"{stage}/checkpoint/model.safetensors"
        assert (whole / weights).read_bytes() == (killed / weights).read_bytes(), stage
        log = f"{stage}/metrics.jsonl"
        assert without_times(whole / log) == without_times(killed / log), stage
    assert (whole / "2-zero/samples.jsonl").read_bytes() == (killed / "2-zero/samples.jsonl").read_bytes()
    assert (whole / "3-eval/eval.json").read_bytes() == (killed / "3-eval/eval.json").read_bytes()


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("smoke") / "run"
    done = liubai("run", "recipes/smoke.toml", "--out", str(run))
    assert done.returncode == 0, done.stderr
    assert str(run / "report.html") in done.stdout
    return run


def test_smoke_learns_its_mother_tongue(smoke: Path) -> None:
    losses = [r["loss"] for r in without_times(smoke / "1-base/metrics.jsonl")]
    assert losses[-1] < 0.4 * losses[0]
    after = json.loads((smoke / "4-eval-zero/eval.json").read_text())
    assert after["format"] > 0.3, "a base that cannot write its tags is broken, however short the run"


def test_smoke_sampler_and_trainer_agree(smoke: Path) -> None:
    records = [r for r in without_times(smoke / "3-zero/metrics.jsonl") if "logprob_gap/fresh" in r]
    assert records
    assert all(r["logprob_gap/fresh"] < 1e-4 for r in records)


def test_eval_prints_one_json_object(smoke: Path) -> None:
    done = liubai(
        *("eval", str(smoke / "3-zero/checkpoint"), "--problems", "countdown"),
        *("--samples", "16", "--limit", "5", "--max-tokens", "64", "--json"),
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    wanted = {"pass@1", "pass@16", "cons@16", "mean_tokens", "format", "reflections", "problems", "samples"}
    assert wanted <= figures.keys()
    assert figures["samples"] == 16
    assert 0 <= figures["pass@1"] <= figures["pass@16"] <= 1


def test_a_finished_run_is_reused(smoke: Path) -> None:
    before = (smoke / "3-zero/checkpoint/model.safetensors").stat().st_mtime_ns
    done = liubai("run", "recipes/smoke.toml", "--out", str(smoke))
    assert done.returncode == 0, done.stderr
    assert (smoke / "3-zero/checkpoint/model.safetensors").stat().st_mtime_ns == before


def test_a_broken_checkpoint_is_a_sentence(smoke: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (smoke / "3-zero/checkpoint").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = liubai("eval", str(broken), "--problems", "countdown")
    assert done.returncode == 2
    assert "model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_family_names_the_nearest(smoke: Path) -> None:
    done = liubai("eval", str(smoke / "3-zero/checkpoint"), "--problems", "countdwon")
    assert done.returncode == 2
    assert "countdown" in done.stderr

"""The command ``liubai plan``: what it prints, in words and in JSON, and mistakes that are one sentence."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planning import RECIPE, write
from planning import seven as seven  # a fixture

from liubai.plan.hardware import DEVICES


def test_the_command_prints_memory_speed_split_and_bottleneck(
    liubai_: Any, seven: Path, tmp_path: Path
) -> None:
    recipe = write(tmp_path, RECIPE.format(model="Qwen/Qwen2.5-7B"))
    result = liubai_("plan", str(recipe), "--gpus", "64", "--model-config", str(seven / "config.json"))
    assert result.code == 0
    for part in (
        "7.62 G",
        "moments",
        "cache",
        "tokens/s written",
        "suggested",
        "bottleneck:",
        "would help",
        "data sheet",
    ):
        assert part in result.out


def test_the_command_in_json(liubai_: Any, seven: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, RECIPE.format(model=seven))
    result = liubai_("plan", str(recipe), "--gpus", "16", "--gpu", "h200", "--tokens", "1000", "--json")
    told = json.loads(result.out)
    stage = told["stages"][0]
    assert (told["gpus"], told["device"]["name"], stage["step"]["tokens"]) == (16, "h200", 1000)
    way = next(way for way in stage["ways"] if way["way"] == stage["suggested"])
    assert way["tokens/s"]["all"] == max(one["tokens/s"]["all"] for one in stage["ways"])
    assert stage["hours"] == pytest.approx(300 * way["seconds"]["step"] / 3600)
    assert math.fsum(way["writing goes to"].values()) == pytest.approx(1)


def test_the_command_on_this_machine(liubai_: Any) -> None:
    result = liubai_("plan", "recipes/smoke.toml", "--gpu", "cpu")
    assert result.code == 0
    assert "measured now" in result.out
    assert "reads" in result.out  # pre-training
    assert "data sheet" not in result.out
    assert "(holes: what malloc keeps" in result.out


PRETRAIN = """
name = "base"
threads = {threads}
[stages.base]
kind = "pretrain"
steps = 1000
"""


def test_the_tokens_of_a_step_are_those_that_it_has(liubai_: Any, tmp_path: Path) -> None:
    def told(tokens: int, gpus: int = 1) -> Any:
        recipe = write(tmp_path, PRETRAIN.format(threads=0))
        sets = ("--set", f"base.tokens_per_step={tokens}")
        return json.loads(
            liubai_("plan", str(recipe), "--gpus", str(gpus), *sets, "--json").out
        )["stages"][0]  # fmt: skip

    few, many = told(4096), told(1 << 22)
    assert (few["microbatch"], many["microbatch"]) == (4096, 65_536)
    assert few["memory"]["trainer"]["activations"] == many["memory"]["trainer"]["activations"] / 16
    # the optimizer's walk over memory is that of a step, however few tokens it has
    assert few["tokens/s"]["read"] < many["tokens/s"]["read"] / 1.2
    assert few["hours"] == pytest.approx(1000 * 4096 / few["tokens/s"]["read"] / 3600)
    assert told(4096, gpus=8)["microbatch"] == 256  # two for every rank


def test_as_many_threads_as_torch_has(liubai_: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from liubai.plan import hardware

    cpu = replace(DEVICES["h100"], name="cpu", dtype="float32", node=1)
    monkeypatch.setattr(hardware, "this_cpu", lambda threads: cpu)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    found = [
        json.loads(
            liubai_("plan", str(write(tmp_path, PRETRAIN.format(threads=n))), "--gpu", "cpu", "--json").out
        )
        for n in (0, 4, 1)
    ]
    replicas = [told["stages"][0]["memory"]["trainer"]["replicas"] for told in found]
    assert replicas[0] == replicas[1] > replicas[2] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpu", "b300"], "valid: h100, h200, a100, l40s, 4090, cpu"),
        (["--gpus", "3", "--gpu", "a100"], "no engine fits beside the trainer on 3 × a100; more GPUs"),
        (["--gpus", "64", "--prompt", "100000"], "would help: prompts of fewer than 100,000 tokens"),
        (["--tokens", "9000"], "more than max_tokens"),
        (["--model-config", "nowhere.json"], "cannot read the model's shape"),
        (["--set", "zero.nope=1"], "unknown key"),
    ],
)
def test_mistakes_are_one_sentence(
    liubai_: Any, seven: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    recipe = write(tmp_path, RECIPE.format(model=seven))
    result = liubai_("plan", str(recipe), *arguments)
    assert result.code == 2
    assert says in result.err
    assert len(result.err.strip().splitlines()) == 1


@pytest.mark.parametrize("option", ["--tokens", "--staleness"])
def test_what_is_not_a_number_is_refused(liubai_: Any, seven: Path, tmp_path: Path, option: str) -> None:
    result = liubai_("plan", str(write(tmp_path, RECIPE.format(model=seven))), option, "nan")
    assert result.code == 2
    assert f"Invalid value for '{option}'" in result.err


def test_a_shape_that_nobody_has_is_asked_for(
    liubai_: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def offline(*arguments: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    result = liubai_("plan", str(write(tmp_path, RECIPE.format(model="nobody/nothing"))))
    assert result.code == 2
    assert "--model-config FILE" in result.err


def test_the_name_of_the_gpu_is_looked_at_first(
    liubai_: Any, seven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub takes its time to be away."""
    result = liubai_("plan", "there/is/no/recipe.toml", "--gpu", "h1000")
    assert (result.code, "--gpu 'h1000' is not known" in result.err) == (2, True)
    recipe = str(write(tmp_path, RECIPE.format(model=seven)))
    assert "64 × h200 (" in liubai_("plan", recipe, "--gpus", "64", "--gpu", "H200").out
    # under torchrun one says it for all
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "1")
    assert liubai_("plan", recipe, "--gpus", "64").out == ""


def test_no_figures_where_fixed_costs_decide(liubai_: Any) -> None:
    result = liubai_("plan", "recipes/r1.toml", "--gpus", "64")
    assert result.code == 0
    assert "too small for these GPUs" in result.out
    assert "reads" not in result.out
    assert " in all\n" not in result.out
    assert "for all steps" not in result.out
    assert "answers are begun up to 1 update ahead\n" in result.out
    further = liubai_("plan", "recipes/r1.toml", "--gpus", "64", "--staleness", "4").out
    assert "answers are begun up to 4 updates ahead, with max_staleness = 4 in the stage\n" in further
    sets = ("--set", "zero.max_staleness=4")
    assert (
        "answers are begun up to 4 updates ahead\n"
        in liubai_("plan", "recipes/r1.toml", "--gpus", "64", *sets).out
    )


def test_a_recipe_that_trains_nothing_is_refused(liubai_: Any, tmp_path: Path) -> None:
    recipe = write(tmp_path, f'[stages.look]\nkind = "eval"\nmodel = "{tmp_path}"\n')
    result = liubai_("plan", str(recipe))
    assert (result.code, "nothing to plan" in result.err) == (2, True)

"""What a recipe's stages ask for: whose shapes they have, what reads and what learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planning import RECIPE, SEVEN, job_of, write
from planning import seven as seven  # a fixture

from liubai.errors import UserError
from liubai.plan import memory
from liubai.plan.advice import Planner, training_memory
from liubai.plan.hardware import DEVICES
from liubai.plan.reading import Job, jobs, read_shape
from liubai.recipe import load_recipe


def test_a_model_that_is_brought_has_the_shape_of_its_config(seven: Path, tmp_path: Path) -> None:
    job = job_of(seven, tmp_path)
    assert job.size.parameters == 7_615_616_512  # as its model card says
    assert job.work is not None
    assert (job.work.answers, job.work.tokens, job.work.longest) == (8192, 4096, 8192)
    lora = job_of(seven, tmp_path, None, "zero.lora.rank=16")
    assert lora.size.parameters == job.size.parameters > 100 * lora.size.trained


def test_models_of_a_recipe_come_from_where_its_stages_come_from() -> None:
    recipe = load_recipe(Path("recipes/r1.toml"))
    found = {job.stage: job for job in jobs(recipe)}
    assert {"base", "zero", "dev1", "dev2", "dev3", "taste", "rules", "r1"} <= found.keys()
    assert len({job.model for job in found.values()}) == 1
    from liubai.stages import pretrain

    config = recipe.stages[0].config
    assert isinstance(config, pretrain.Config)
    assert found["zero"].model.vocab_size == pretrain.invent(config)[0].vocab_size
    assert found["base"].size.by_muon > 0
    assert found["zero"].size.by_muon == 0
    (judge,) = found["r1"].frozen  # the reward model
    assert (judge.size, judge.dtype) == (found["taste"].size, "float32")
    assert found["taste"].size.head == found["taste"].model.hidden_size
    assert found["zero"].frozen == ()


def test_what_else_reads_and_learns_is_counted(seven: Path, tmp_path: Path) -> None:
    plain, kl = job_of(seven, tmp_path), job_of(seven, tmp_path, None, "zero.loss.kl=0.01")
    assert plain.work
    assert kl.work
    assert plain.frozen == ()
    assert [(r.size, r.dtype) for r in kl.frozen] == [(plain.size, None)]
    assert kl.work.forwards == plain.work.forwards
    for ranks in (1, 8):  # shared out as the policy is
        one, two = (training_memory(job, DEVICES["h100"], 8192, ranks) for job in (plain, kl))
        assert one["reference"] == two["whole models"] == 0
        assert two["reference"] == 2 * plain.size.parameters / ranks


def ppo_of(seven: Path, tmp_path: Path, *sets: str) -> Job:
    text = RECIPE.format(model=seven).replace('"rl"', '"ppo"').replace('preset = "dapo"\n', "")
    return jobs(load_recipe(write(tmp_path, text), sets), tokens=2500)[0]


def test_all_of_a_critic_learns_whatever_the_policy_does(seven: Path, tmp_path: Path) -> None:
    h100 = DEVICES["h100"]
    job, thin = ppo_of(seven, tmp_path), ppo_of(seven, tmp_path, "zero.lora.rank=16")
    assert job.critic == thin.critic == memory.sizes(job.model, scorer=True)
    assert job.critic
    for one in (job, thin):
        found = training_memory(one, h100, 8192, 8)
        assert found["moments"] == pytest.approx(8 * (one.size.trained + job.critic.trained) / 8)
        assert found["gradients"] >= 4 * job.critic.trained / 8  # one of the two learns at a time
    assert training_memory(thin, h100, 8192, 8, writes=True)["whole models"] == 2 * job.size.parameters
    seconds, slower = (
        sum(Planner(one, h100, 8)._update(8, 8192).values())
        for one in (thin, ppo_of(seven, tmp_path, "zero.lora.rank=16", "zero.critic_epochs=3"))
    )
    alone = replace(thin, critic=None)
    assert seconds > 1.9 * sum(Planner(alone, h100, 8)._update(8, 8192).values())
    assert slower > 1.7 * seconds


DISTILL = """
name = "taught"
[stages.large]
kind = "rl"
model = "{teacher}"
steps = 1
[stages.small]
kind = "distill"
from = "large"
model = "{student}"
steps = 10
max_tokens = 4096
checkpointing = true
"""


def test_a_teacher_has_its_own_size(tmp_path: Path) -> None:
    """32 billion parameters teach one and a half."""
    large = {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
             "num_attention_heads": 40, "num_key_value_heads": 8}  # fmt: skip
    small = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
             "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
    folders = {}
    for name, shape in (("teacher", large), ("student", small)):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        (folders[name] / "config.json").write_text(json.dumps(SEVEN | shape), encoding="utf-8")
    job = {job.stage: job for job in jobs(load_recipe(write(tmp_path, DISTILL.format(**folders))))}["small"]
    assert 1.5e9 < job.size.parameters < 1.6e9
    (teacher,) = job.frozen
    assert 32e9 < teacher.size.parameters < 33e9
    found = training_memory(job, DEVICES["h200"], 8192, 1)
    assert found["whole models"] == 2 * teacher.size.parameters
    plan = Planner(job, DEVICES["h200"], 8)
    alone = Planner(replace(job, frozen=()), DEVICES["h200"], 8)
    assert plan._update(8, 8192)["arithmetic"] > 3 * alone._update(8, 8192)["arithmetic"]
    assert all(one.trainer.bytes <= plan.room for one in plan.layouts())
    with pytest.raises(
        UserError, match=r"66 GB of whole models that are only read .* no number of them helps"
    ):
        Planner(job, DEVICES["l40s"], 64).layouts()


JUDGED = """
name = "judged"
[stages.base]
kind = "pretrain"
steps = 1
[stages.steps]
kind = "process"
from = "base"
[stages.zero]
kind = "rl"
from = {parents}
steps = 1
problems = {{ countdown = 1 }}
[stages.zero.rewards]
process = 0.5
"""


@pytest.mark.parametrize(("parents", "judges"), [('["base", "steps"]', 1), ('"base"', 0)])
def test_steps_are_judged_by_a_model_where_there_is_one(tmp_path: Path, parents: str, judges: int) -> None:
    found = {job.stage: job for job in jobs(load_recipe(write(tmp_path, JUDGED.format(parents=parents))))}
    assert len(found["zero"].frozen) == judges
    # a judge computes in float32, whatever the policy does
    parts = training_memory(found["zero"], DEVICES["h100"], 2048, 1)
    assert parts["whole models"] == judges * 4 * found["steps"].size.parameters


def test_a_tokenizer_is_learned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from liubai.stages import pretrain

    counted, invent = [0], pretrain.invent

    def once(config: pretrain.Config) -> Any:
        counted[0] += 1
        return invent(config)

    monkeypatch.setattr(pretrain, "invent", once)
    assert len(jobs(load_recipe(Path("recipes/r1.toml")))) > 5
    assert counted == [1]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"architectures": ["GPT2LMHeadModel"]}'])
def test_a_file_that_is_no_shape_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError):
        read_shape(tmp_path)

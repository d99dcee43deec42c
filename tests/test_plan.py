"""Planning against what is counted by hand or on the model itself, and what the command says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from liubai.errors import UserError
from liubai.learn.optim import Optimizer
from liubai.model.config import ModelConfig
from liubai.model.lora import LoraConfig, attach
from liubai.model.scorer import scorer_from
from liubai.model.transformer import build
from liubai.plan import memory, roofline
from liubai.plan.advice import Layout, Planner, bottleneck, training_memory
from liubai.plan.hardware import DEVICES, Device, device, this_cpu
from liubai.plan.memory import Training
from liubai.plan.reading import Job, jobs, read_shape
from liubai.plan.roofline import Model, Work
from liubai.recipe import load_recipe
from liubai.rollout.cache import BandedCache

SMALL = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
SHAPES = [
    ModelConfig(architecture="LlamaForCausalLM", **SMALL),
    ModelConfig(architecture="Qwen2ForCausalLM", **{**SMALL, "tie_word_embeddings": False}),
    ModelConfig(architecture="Qwen3ForCausalLM", **SMALL),
    ModelConfig(architecture="CrateForCausalLM", **{**SMALL, "num_key_value_heads": 4}),
    ModelConfig(architecture="CrateAlphaForCausalLM", **{**SMALL, "num_key_value_heads": 4}),
]
#: Qwen2.5-7B's
SEVEN = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip
RECIPE = """
name = "maths"
[stages.zero]
kind = "rl"
model = "{model}"
preset = "dapo"
steps = 300
groups = 512
samples = 16
max_tokens = 8192
checkpointing = true
"""
#: a machine of round numbers
ROUND = Device(
    name="round", memory=100e9, flops={"bfloat16": 1e12, "float32": 1e11}, bandwidth=1e9, link=1e8,
    network=1e7, source="made up", usable=1.0, training=1.0, reading=1.0, streaming=1.0, step_seconds=0.5,
    layer_seconds=0.25,
    hop_seconds=0.0,
)  # fmt: skip


# memory


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.architecture)
def test_parameters_are_those_of_the_model(shape: ModelConfig) -> None:
    model, size = build(shape, 0), memory.sizes(shape)
    assert size.parameters == size.trained == model.count_parameters()
    assert size.layer == sum(p.numel() for p in model.layers[0].parameters())
    assert size.layer * shape.num_hidden_layers + size.ends == size.parameters
    assert size.largest == max(p.numel() for p in model.parameters())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.architecture)
def test_operations_are_those_that_torch_counts(shape: ModelConfig) -> None:
    """Of a token that looks back at itself alone: inner products and head, two operations a weight."""
    from torch.utils.flop_counter import FlopCounterMode

    model, size = build(shape, 0), memory.sizes(shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(7, 1, dtype=torch.long))
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if "attention" not in str(op))
    assert products == 7 * 2 * (size.inner + size.head)


def test_adapters_are_counted_as_they_are_attached() -> None:
    shape, lora = SHAPES[2], LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))
    model = build(shape, 0)
    attach(model, lora, 0)
    size = memory.sizes(shape, lora=lora)
    assert size.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert size.parameters == build(shape, 0).count_parameters()
    narrow = model.to(torch.bfloat16)
    optimizer = Optimizer(narrow, lr=1e-3)
    found = memory.states(size, Training(dtype="bfloat16", tokens=1))
    assert found["weights"] == sum(p.nbytes for p in narrow.parameters())
    assert found["masters"] + found["moments"] == sum(t.nbytes for t in optimizer.state.values())


def test_a_scorer_has_a_row_in_the_place_of_a_head() -> None:
    for shape in SHAPES:
        size = memory.sizes(shape, scorer=True)
        assert size.parameters == size.trained == scorer_from(build(shape, 0), 0).count_parameters()
        assert size.head == shape.hidden_size
        # one number a token: next to no logits
        assert memory.training(shape, size, Training(dtype="float32", tokens=100))["logits"] < 2000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("muon", [False, True])
def test_states_are_those_of_the_optimizer(dtype: str, moments: str, muon: bool) -> None:
    shape = SHAPES[0]
    model = build(shape, 0).to(getattr(torch, dtype))
    optimizer = Optimizer(model, lr=1e-3, muon_lr=1e-2 if muon else None, moments=getattr(torch, moments))
    size = memory.sizes(shape, muon=muon)
    found = memory.states(size, Training(dtype=dtype, moments=moments, tokens=1))
    masters = sum(t.nbytes for n, t in optimizer.state.items() if n.endswith("/master"))
    assert found["weights"] == sum(p.nbytes for p in model.parameters())
    assert found["masters"] == masters
    assert found["moments"] == sum(t.nbytes for t in optimizer.state.values()) - masters
    assert found["gradients"] == 4 * size.parameters


def test_every_rank_holds_its_share() -> None:
    size = memory.sizes(SHAPES[0])
    for dtype in ("float32", "bfloat16"):
        alone, shared = (memory.states(size, Training(dtype=dtype, tokens=1, ranks=n)) for n in (1, 8))
        wide = 4 * size.parameters
        assert shared["weights"] == pytest.approx(wide / 8)  # masters are the weights then
        assert shared["masters"] == 0
        for name in ("gradients", "moments"):
            assert shared[name] == pytest.approx(alone[name] / 8)


def test_what_is_frozen_is_shared_out_in_32_bits_and_has_no_gradient() -> None:
    """As :func:`liubai.learn.sharded.share_out` does it, under adapters; and the head learns nothing."""
    shape = replace(SHAPES[0], vocab_size=150_000)
    size, whole = memory.sizes(shape, lora=LoraConfig(rank=2)), memory.sizes(shape)
    held = size.parameters + size.trained
    how = Training(dtype="bfloat16", tokens=1000, ranks=8)
    found, full = (memory.training(shape, one, how) for one in (size, whole))
    assert found["weights"] == pytest.approx(4 * held / 8)
    assert found["gathered"] == 2 * held + 4 * size.trained
    assert full["gathered"] == (2 + 4) * whole.parameters
    assert full["logits"] - found["logits"] == 4 * whole.head
    by_layer = memory.training(shape, size, replace(how, layered=True))
    assert by_layer["gathered"] == 2 * (2 * size.layer + size.ends + size.trained) + 4 * size.trained


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.architecture)
@pytest.mark.parametrize("rows", [(2, 16), (1, 50)])
def test_activations_are_what_autograd_keeps(
    shape: ModelConfig, rows: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor that a forward pass keeps, once: what there is for each token, in bytes."""
    model, kept = build(shape, 0), dict[int, torch.UntypedStorage]()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(300, rows)
    model.hidden(
        ids, torch.arange(rows[1]).expand(rows), lambda layer, q, k, v: _attend(q, k, v)
    )  # rope's table
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model.hidden(ids, torch.arange(rows[1]).expand(rows), lambda layer, q, k, v: _attend(q, k, v))
    whole, _ = memory.activations(shape, "float32")
    tokens = rows[0] * rows[1]
    ends = (
        out.nbytes + 4 * tokens + ids.nbytes + 2 * tokens * shape.head_dim * 4
    )  # last norm, ids, cos and sin
    found = sum(storage.nbytes() for storage in kept.values())
    assert found == pytest.approx(tokens * shape.num_hidden_layers * whole + ends, rel=0.02)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from liubai.model.attention import attention

    return attention(q, k, v)


def test_checkpointing_keeps_what_comes_into_a_layer() -> None:
    shape, size = SHAPES[0], memory.sizes(SHAPES[0])
    plain, again = (
        memory.training(shape, size, Training(dtype="float32", tokens=1000, checkpointing=on))["activations"]
        for on in (False, True)
    )
    whole, entering = memory.activations(shape, "float32")
    layers = shape.num_hidden_layers
    assert plain - again == pytest.approx(1000 * (layers * whole - layers * entering - whole))


def test_logits_do_not_grow_with_tokens_times_vocabulary() -> None:
    shape = replace(SHAPES[0], vocab_size=150_000)
    size = memory.sizes(shape)
    few, many = (
        memory.training(shape, size, Training(dtype="float32", tokens=n))["logits"] for n in (1000, 50_000)
    )
    assert few == many < 1.1 * (3 * 4 * 2**24 + 4 * size.head)


def test_a_micro_batch_is_a_group_at_most_where_prompts_are_shared() -> None:
    assert memory.microbatch(2048, 8, 80, prompt=48) == 640
    assert memory.microbatch(512, 8, 80, prompt=48) == 512
    assert memory.microbatch(2048, 8, 80, prompt=16) == 2048
    assert memory.microbatch(64, 8, 80, prompt=48) == 80  # one answer is read whole
    assert memory.microbatch(64, 8, 80, prompt=16) == 96


def test_a_token_of_the_cache_is_as_large_as_a_band_says() -> None:
    shape = SHAPES[2]
    cache = BandedCache(shape, 200, torch.float32, torch.device("cpu"))
    band = cache.bands[1]
    band.append(torch.arange(8))
    assert band.k.nbytes + band.v.nbytes == memory.kv_bytes(shape, "float32") * band.width * band.capacity
    # rows asked for ahead: as many answers as the band has room for, no fewer
    length = band.width
    held = memory.answers_that_fit(band.k.nbytes + band.v.nbytes, shape, "float32", length, "torch")
    assert held == 8
    assert memory.answers_that_fit(1e6, shape, "float32", 100, "paged") == int(1e6 // (112 * 768))
    assert memory.answers_that_fit(-5.0, shape, "float32", 100, "paged") == 0


# rooflines


def shape_of(dtype: str = "bfloat16") -> Model:
    return Model(config=SHAPES[0], size=memory.sizes(SHAPES[0]), dtype=dtype)


def test_one_answer_reads_the_weights_and_a_thousand_multiply() -> None:
    model = shape_of()
    alone = roofline.decoding(model, ROUND, 1, 10)
    assert alone["weights"] == pytest.approx(2 * (model.size.inner + model.size.head) / 1e9)
    assert alone["arithmetic"] == 0
    assert alone["fixed cost"] == pytest.approx(0.5 + 3 * 0.25)
    assert alone["keys and values"] == pytest.approx(10 * 2 * 3 * 2 * 16 * 2 / 1e9)
    crowd = roofline.decoding(model, ROUND, 10_000, 10)
    assert crowd["weights"] == 0
    assert crowd["arithmetic"] == pytest.approx(10_000 * 2 * (model.size.inner + model.size.head) / 1e12)


def test_an_update_is_six_operations_a_weight_and_eight_with_checkpointing() -> None:
    model, size = shape_of(), memory.sizes(SHAPES[0])
    work = Work(groups=1, samples=1, prompt=0, tokens=1000, longest=1000)
    found = roofline.update(model, ROUND, work, context=0)
    assert found["arithmetic"] == pytest.approx(1000 * (6 * size.inner + 8 * size.head) / 1e12)
    again = roofline.update(model, ROUND, replace(work, checkpointing=True), context=0)
    assert again["arithmetic"] == pytest.approx(1000 * (8 * size.inner + 8 * size.head) / 1e12)
    assert found["exchange"] == 0
    assert found["optimizer"] == pytest.approx(2 * size.parameters * 16 / 1e9)
    twice = roofline.update(model, ROUND, replace(work, epochs=2), context=0)
    assert sum(twice.values()) == pytest.approx(2 * sum(found.values()))


def test_models_that_only_read_take_two_operations_a_weight_of_their_own() -> None:
    model, shape = shape_of(), replace(SHAPES[0], hidden_size=96)
    teacher = Model(config=shape, size=memory.sizes(shape), dtype="float32")
    work = Work(groups=1, samples=4, prompt=50, tokens=1000, longest=1000)
    plain, more = (
        roofline.update(model, ROUND, replace(work, frozen=frozen), context=0) for frozen in ((), (teacher,))
    )
    reading = 2 * (4050 * teacher.size.inner + 4000 * teacher.size.head) / 1e11
    assert more["arithmetic"] - plain["arithmetic"] == pytest.approx(reading)
    alone = roofline.update(model, ROUND, replace(work, alone=True), context=0)
    assert alone["arithmetic"] - plain["arithmetic"] == pytest.approx(150 * 6 * model.size.inner / 1e12)


def test_ranks_share_the_arithmetic_and_exchange_weights_for_every_micro_batch() -> None:
    model = shape_of()
    work = Work(groups=1, samples=1, prompt=0, tokens=1000, longest=1000, microbatch=100)
    alone, two = (roofline.update(model, ROUND, work, ranks, context=0) for ranks in (1, 2))
    assert two["arithmetic"] == pytest.approx(alone["arithmetic"] / 2)
    assert two["exchange"] == pytest.approx((2 + 4) * model.size.parameters / 2 / 1e8)
    by_layer = roofline.update(model, ROUND, replace(work, layered=True), 2, context=0)
    moved = 5 * (2 * 2 + 4) * model.size.parameters / 2  # five micro-batches on each
    assert by_layer["exchange"] == pytest.approx(moved / 1e8 - two["arithmetic"])
    apart = roofline.update(model, ROUND, work, 16, context=0)  # on two nodes the network is what counts
    assert apart["exchange"] > two["exchange"]


def test_a_step_of_equal_answers_is_their_length() -> None:
    model, work = shape_of(), Work(groups=4, samples=8, prompt=20, tokens=50, longest=50)
    found = roofline.at_once(model, ROUND, work, engines=2, slots=64)
    assert found.rhythm.steps == 50
    assert found.rhythm.batch == 16
    assert found.seconds == pytest.approx(50 * roofline.step_seconds(model, ROUND, work, 16))
    assert sum(found.shares.values()) == pytest.approx(1)
    fewer = roofline.at_once(model, ROUND, work, engines=2, slots=8)
    assert (fewer.rhythm.steps, fewer.rhythm.batch) == (100, 8)


def test_the_longest_answer_is_waited_for_unless_others_begin() -> None:
    model, work = shape_of(), Work(groups=4, samples=8, prompt=20, tokens=50, longest=500)
    waits = roofline.at_once(model, ROUND, work, engines=1, slots=64)
    assert waits.rhythm.steps == 500
    assert waits.rhythm.full == 50
    goes_on = roofline.without_end(model, ROUND, work, engines=1, slots=32)
    assert goes_on.rhythm.steps == 50
    assert roofline.without_end(model, ROUND, work, engines=1, slots=32, ahead=16).rhythm.batch == 16


def test_a_bound_on_memory_traffic_never_falls_below_either_roof() -> None:
    model = shape_of()
    for batch in (1, 10, 100, 1000):
        spent = sum(roofline.decoding(model, DEVICES["h100"], batch, 100).values())
        assert spent > model.read_bytes / DEVICES["h100"].bandwidth
        assert spent > 2 * model.size.inner * batch / DEVICES["h100"].flops["bfloat16"]


# hardware


def test_gpus_are_those_of_their_data_sheets() -> None:
    for name, known in DEVICES.items():
        assert device(name) is known
        assert known.source
        assert known.gpu
        # operations a byte: between 100 and 450 for everything built since 2020
        assert 100 < known.flops["bfloat16"] / known.bandwidth < 450
    with pytest.raises(UserError, match="did you mean 'h100'"):
        device("h10")


def test_this_cpu_is_measured_and_torch_left_as_it_was() -> None:
    before = torch.get_num_threads()
    found = this_cpu(1)
    assert torch.get_num_threads() == before
    assert 1e8 < found.flops["float32"] < 1e14
    assert 1e7 < found.bandwidth < 1e13
    assert 0 < found.step_seconds + found.layer_seconds < 1
    assert not found.gpu


# recipes


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def seven(tmp_path: Path) -> Path:
    (tmp_path / "seven").mkdir()
    (tmp_path / "seven" / "config.json").write_text(json.dumps(SEVEN), encoding="utf-8")
    return tmp_path / "seven"


def job_of(seven: Path, tmp_path: Path, tokens: float | None = None, *sets: str) -> Job:
    return jobs(load_recipe(write(tmp_path, RECIPE.format(model=seven)), sets), tokens=tokens)[0]


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
    one, two = (training_memory(job, DEVICES["h100"], 8192, 8) for job in (plain, kl))
    assert two["whole models"] - one["whole models"] == 2 * plain.size.parameters


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
    assert training_memory(thin, h100, 8192, 8)["whole models"] == 2 * job.size.parameters
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
    with pytest.raises(UserError, match=r"69 GB of whole models .* no number of them helps"):
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


# advice


def planner(
    seven: Path, tmp_path: Path, gpus: int, gpu: str = "h100", *sets: str, staleness: float = 1
) -> Planner:
    return Planner(job_of(seven, tmp_path, 2500, *sets), DEVICES[gpu], gpus, staleness)


def best(layouts: list[Layout]) -> Layout:
    return max(layouts, key=lambda layout: layout.rate)


@pytest.mark.parametrize("gpus", [16, 64, 256])
@pytest.mark.parametrize("gpu", ["h100", "h200", "a100", "l40s"])
def test_everything_that_is_suggested_fits(seven: Path, tmp_path: Path, gpus: int, gpu: str) -> None:
    plan = planner(seven, tmp_path, gpus, gpu)
    for one in plan.layouts():
        assert one.fit >= 1
        assert one.trainer.bytes <= plan.room
        assert one.rollout.bytes <= plan.room
        apart = one.way.startswith("apart")
        if not apart:  # on the same GPU, and one copy of the weights serves both
            writes = one.rollout.bytes - plan.model.bytes
            assert sum(one.trainer.memory[name] for name in memory.KEPT) + writes <= plan.room
        if one.way == "in turn, in flight":  # keys and values stay while it learns
            assert one.trainer.bytes + one.rollout.memory["cache"] <= plan.room
        assert (one.trainer.gpus + one.rollout.gpus if apart else one.trainer.gpus) <= gpus
        assert one.rollout.gpus % one.parts == 0
        assert one.rate == pytest.approx(plan.work.written / one.step)


def test_the_suggested_split_is_the_best_there_is(seven: Path, tmp_path: Path) -> None:
    plan = planner(seven, tmp_path, 16)
    chosen = next(one for one in plan.layouts() if one.way == "apart, asynchronous")
    others = [plan._apart("apart, asynchronous", n) for n in range(1, 16)]
    assert chosen.rate == max(one.rate for one in others if one)
    # balanced: neither side could spare a tenth of its machines' worth of time and more
    assert 0.7 < chosen.writing.seconds / chosen.update_seconds < 1.4


def test_more_gpus_are_never_slower(seven: Path, tmp_path: Path) -> None:
    rates = [best(planner(seven, tmp_path, n).layouts()).rate for n in (4, 8, 16, 32, 64, 128)]
    assert rates == sorted(rates)


def test_writing_ahead_helps_until_the_trainer_is_what_counts(seven: Path, tmp_path: Path) -> None:
    rates = [best(planner(seven, tmp_path, 64, staleness=k).layouts()).rate for k in (0, 1, 4)]
    assert rates == sorted(rates)


def test_nothing_is_written_ahead_where_no_answer_may_be_old(seven: Path, tmp_path: Path) -> None:
    ways = {k: {one.way for one in planner(seven, tmp_path, 16, staleness=k).layouts()} for k in (0, 1)}
    assert ways[0] == {"in turn", "apart, synchronous"}
    assert ways[1] - ways[0] == {"in turn, in flight", "apart, asynchronous"}


VLLM = ("zero.engine.kind=vllm", "zero.lora.rank=16")


def test_a_trainer_makes_room_for_vllm(seven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = planner(seven, tmp_path, 1, "h100", *VLLM)
    assert [one.way for one in found.layouts()] == ["in turn", "in turn, in flight"]
    for one in found.layouts():
        assert one.microbatch == 32_768  # of 65,536 that fit without it
        assert one.trainer.bytes <= (0.9 - 0.4) * 80e9
        assert one.rollout.bytes <= 0.4 * 80e9
    # vLLM in this process is for one process
    more = planner(seven, tmp_path, 4, "h100", *VLLM).layouts()
    assert {one.way for one in more} == {"apart, synchronous", "apart, asynchronous"}


SERVER = ("zero.engine.kind=server", "zero.engine.url=http://127.0.0.1:8000")


def resized(folder: Path, **sizes: int) -> None:
    (folder / "config.json").write_text(json.dumps(SEVEN | sizes), encoding="utf-8")


def test_a_large_model_is_spread_over_the_gpus_of_a_server(tmp_path: Path, seven: Path) -> None:
    resized(seven, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
            num_key_value_heads=8, head_dim=128)  # fmt: skip
    found = planner(seven, tmp_path, 64, "h200", *SERVER)
    assert 32e9 < found.job.size.parameters < 33e9
    assert all(one.way.startswith("apart") for one in found.layouts())
    small = planner(seven, tmp_path, 64, "h100", *SERVER)
    assert small.parts() == 2
    resized(seven, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
            num_key_value_heads=8, head_dim=128)  # fmt: skip
    larger = planner(seven, tmp_path, 64, "h200", *SERVER)
    with pytest.raises(UserError, match="no number of them helps"):
        larger.layouts()


def test_one_that_is_too_large_is_refused(tmp_path: Path, seven: Path) -> None:
    with pytest.raises(UserError, match=r"an update needs .* GB on each of 1 × h100.*optimizer_state.*lora"):
        planner(seven, tmp_path, 1, "h100").layouts()


def test_adapters_make_room(seven: Path, tmp_path: Path) -> None:
    found = planner(seven, tmp_path, 1, "h100", "zero.lora.rank=16").layouts()
    assert {one.way for one in found} == {"in turn", "in turn, in flight"}


def test_a_model_comes_together_whole_or_by_layers_as_the_trainer_does_it(
    seven: Path, tmp_path: Path
) -> None:
    job = job_of(seven, tmp_path)
    size = job.size
    assert memory.layered(size, "bfloat16", DEVICES["h100"])  # 46 GB of 80
    assert not memory.layered(size, "bfloat16", DEVICES["h200"])  # of 141
    h100, h200 = (training_memory(job, DEVICES[gpu], 16_384, 8) for gpu in ("h100", "h200"))
    assert h100["gathered"] == 6 * (2 * size.layer + size.ends)
    assert h200["gathered"] == 6 * size.parameters
    # what writes answers is whole on every rank
    assert h100["whole models"] == h200["whole models"] == 2 * size.parameters
    assert training_memory(job, DEVICES["h100"], 16_384, 1)["whole models"] == 0


def test_replicas_are_counted_where_the_trainer_has_them(seven: Path, tmp_path: Path) -> None:
    resized(seven, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=256)  # fmt: skip
    cpu = replace(DEVICES["h100"], name="cpu", dtype="float32", node=1)
    job, narrow = (job_of(seven, tmp_path, None, f"zero.precision={p}") for p in ("float32", "bfloat16"))
    assert training_memory(job, cpu, 2048, 1, threads=4)["replicas"] == 3 * 4 * job.size.parameters
    assert training_memory(job, cpu, 2048, 2, threads=4)["replicas"] == 0
    assert training_memory(narrow, cpu, 2048, 1, threads=4)["replicas"] == 0


def test_the_bottleneck_is_said_in_words(seven: Path, tmp_path: Path) -> None:
    plan = planner(seven, tmp_path, 64, "h100", *SERVER)
    by_way = {
        one.way: bottleneck(one, plan.work)
        for one in [*plan.layouts(), *planner(seven, tmp_path, 64).layouts()[:2]]
    }
    assert "longest answer" in by_way["apart, synchronous"][0]
    assert "ahead" in by_way["apart, synchronous"][1]
    assert "cache for more answers" in by_way["in turn"][1]  # bands of powers of two hold few so long answers
    assert by_way["apart, asynchronous"][0].startswith(("writing", "learning"))
    slow = replace(DEVICES["h100"], network=1e8)
    found = Planner(plan.job, slow, 64, 1)._apart("apart, asynchronous", 32)
    assert found
    assert bottleneck(found, plan.work)[0] == "learning (exchange)"


# the command


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
        (["--gpu", "b300"], "not known"),
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


def test_a_recipe_that_trains_nothing_is_refused(liubai_: Any, tmp_path: Path) -> None:
    recipe = write(tmp_path, f'[stages.look]\nkind = "eval"\nmodel = "{tmp_path}"\n')
    result = liubai_("plan", str(recipe))
    assert (result.code, "nothing to plan" in result.err) == (2, True)

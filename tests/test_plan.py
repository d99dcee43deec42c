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
    both = roofline.update(model, ROUND, replace(work, learners=2), context=0)
    assert sum(both.values()) == pytest.approx(2 * sum(found.values()))


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
    assert found["r1"].frozen == 1  # the reward model
    assert found["zero"].frozen == 0


def test_what_else_reads_and_learns_is_counted(seven: Path, tmp_path: Path) -> None:
    plain, kl = job_of(seven, tmp_path), job_of(seven, tmp_path, None, "zero.loss.kl=0.01")
    assert plain.work
    assert kl.work
    assert (kl.frozen, kl.work.forwards - plain.work.forwards) == (plain.frozen + 1, 1)
    ppo = RECIPE.format(model=seven).replace('"rl"', '"ppo"').replace('preset = "dapo"\n', "")
    critic = jobs(load_recipe(write(tmp_path, ppo)))[0]
    assert critic.work
    assert critic.work.learners == 2
    one, two = (training_memory(job, DEVICES["h100"], 8192, 8) for job in (plain, critic))
    assert two["moments"] == 2 * one["moments"]


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

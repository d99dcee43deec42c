"""Planning against what is counted by hand or on the model itself: memory, rooflines, hardware."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from liubai.errors import UserError
from liubai.learn.optim import Optimizer
from liubai.model.config import ModelConfig
from liubai.model.lora import LoraConfig, attach
from liubai.model.scorer import scorer_from
from liubai.model.transformer import build
from liubai.plan import memory, roofline
from liubai.plan.hardware import DEVICES, Device, device, this_cpu
from liubai.plan.memory import Training
from liubai.plan.roofline import Model, Work
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
#: a machine of round numbers
ROUND = Device(
    name="round", memory=100e9, flops={"bfloat16": 1e12, "float32": 1e11}, bandwidth=1e9, link=1e8,
    network=1e7, source="made up", usable=1.0, training=1.0, reading=1.0, streaming=1.0, step_seconds=0.5,
    layer_seconds=0.25, launch_seconds=0.0,
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


def test_kernels_are_started_beside_what_they_compute() -> None:
    """Of the two, the slower counts; where it is the starting, there is no figure to believe."""
    model = shape_of()
    work = Work(groups=1, samples=1, prompt=0, tokens=1000, longest=1000, microbatch=250)
    plain = roofline.update(model, ROUND, work, context=0)
    slow = roofline.update(model, replace(ROUND, launch_seconds=0.5), work, context=0)
    assert slow["arithmetic"] + slow["launches"] == pytest.approx(4 * 3 * 0.5)  # micro-batches, layers
    assert (roofline.too_small(plain), roofline.too_small(slow)) == (False, True)
    quick = roofline.update(model, replace(ROUND, launch_seconds=1e-12), work, context=0)
    assert sum(quick.values()) == sum(plain.values())


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
    with pytest.raises(UserError, match="valid: h100, h200"):
        device("h10")


def test_this_cpu_is_measured_and_torch_left_as_it_was() -> None:
    before = torch.get_num_threads()
    found = this_cpu(1)
    assert torch.get_num_threads() == before
    assert 1e8 < found.flops["float32"] < 1e14
    assert 1e7 < found.bandwidth < 1e13
    assert 0 < found.step_seconds + found.layer_seconds < 1
    assert not found.gpu

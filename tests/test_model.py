"""The model computes what its formulas say, and its checkpoints are Hugging Face's."""

from __future__ import annotations

import json
import math
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import scramble, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

import liubai
import liubai.model.checkpoint
from liubai.errors import UserError
from liubai.model.checkpoint import INDEX, load, save_checkpoint
from liubai.model.config import Llama3Rope, ModelConfig
from liubai.model.functions import rms_norm, rotate, swiglu
from liubai.model.transformer import Transformer, build, rope_table
from liubai.rollout.engine import Request, generate
from liubai.rollout.torch_engine import TorchEngine
from liubai.text.template import BARE, THINK_ANSWER, Template
from liubai.text.tokenizer import TextTokenizer
from liubai.types import Stop

QUESTIONS = ("3 4 5 ->35", "9 9 1 ->80", "等等 7 ->7")


# ---- the hand-written backward passes ----


def complex_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE as it is meant: multiplication by e^{iθ} (Su et al. 2021)."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)
    return torch.cat([turned.real, turned.imag], dim=-1)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


ANGLES = torch.linspace(-3, 3, 2 * 3 * 4, dtype=torch.float64).view(2, 3, 1, 4)
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "rotate": (
        lambda x: rotate(x, ANGLES.cos().repeat(1, 1, 1, 2), torch.cat([-ANGLES.sin(), ANGLES.sin()], -1)),
        lambda x: complex_rotation(x, ANGLES.cos(), ANGLES.sin()),
        [(2, 3, 5, 8)],
    ),
    "swiglu": (swiglu, lambda gate, up: gate / (1 + torch.exp(-gate)) * up, [(3, 7), (3, 7)]),
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-5), plain_norm, [(2, 3, 8), (8,)]),
}


@pytest.mark.parametrize("name", CASES)
def test_function_equals_the_obvious_expression(name: str) -> None:
    ours, obvious, shapes = CASES[name]
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    outputs = ours(*inputs), obvious(*inputs)
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(outputs[0].shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad(y, inputs, cotangent) for y in outputs]
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
    assert torch.autograd.gradcheck(ours, inputs)
    with torch.no_grad():  # another path: what the engine runs
        torch.testing.assert_close(ours(*inputs), outputs[1], rtol=1e-12, atol=1e-12)


def test_rms_norm_of_bfloat16_is_computed_in_float32() -> None:
    x = (torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 30).bfloat16()
    weight = torch.linspace(0.5, 1.5, 64).bfloat16()
    wanted = plain_norm(x.float(), weight.float()).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-5), wanted)
    assert rms_norm(x.requires_grad_(), weight, 1e-5).dtype == torch.bfloat16


def test_rope_angles_are_right_at_far_positions() -> None:
    cos, sin = rope_table(100_001, 8, 500.0)
    for i in range(4):
        angle = 100_000 * 500.0 ** (-2 * i / 8)
        assert cos[-1, 0, i].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert sin[-1, 0, 4 + i].item() == pytest.approx(math.sin(angle), abs=1e-6)
    assert torch.equal(cos[..., 4:], cos[..., :4])
    assert torch.equal(sin[..., 4:], -sin[..., :4])


def test_rope_table_grows_with_the_text_and_may_be_asked_for_by_an_engine_first() -> None:
    model, ids = tiny_model(), torch.randint(0, 60, (1, 700), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        short = model(ids[:, :20])
    whole = model(ids)
    torch.testing.assert_close(whole[:, :20], short, rtol=1e-5, atol=1e-5)
    whole.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---- packing and padding ----


@torch.no_grad()
def test_packed_documents_do_not_see_each_other() -> None:
    model = tiny_model(3)
    ids = torch.randint(0, 60, (1, 24), generator=torch.Generator().manual_seed(2))
    lengths, at, parts = (9, 1, 7), 0, []
    positions, documents = torch.zeros(1, 24, dtype=torch.long), torch.full((1, 24), -1)
    for d, n in enumerate(lengths):
        positions[0, at : at + n], documents[0, at : at + n] = torch.arange(n), d
        parts.append(model(ids[:, at : at + n]))
        at += n
    packed = model(ids, positions, documents)
    torch.testing.assert_close(packed[:, :at], torch.cat(parts, 1), rtol=1e-5, atol=1e-5)
    ids[:, at:] = 5  # what stands on padding does not matter
    torch.testing.assert_close(model(ids, positions, documents)[:, :at], packed[:, :at])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_packed_rows_work_in_every_precision(dtype: torch.dtype) -> None:
    model = tiny_model(3).to(dtype)
    ids = torch.randint(0, 60, (1, 12), generator=torch.Generator().manual_seed(2))
    positions, documents = torch.tensor([[*range(7), *range(5)]]), torch.tensor([[0] * 7 + [1] * 5])
    apart = torch.cat([model(ids[:, :7]), model(ids[:, 7:])], 1)
    tolerance = 1e-12 if dtype is torch.float64 else 0.1
    torch.testing.assert_close(model(ids, positions, documents), apart, rtol=0, atol=tolerance)


@torch.no_grad()
def test_no_token_sees_a_later_one() -> None:
    model = tiny_model(3)
    ids = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(2))
    other = ids.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 60
    before, after = model(ids), model(other)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-2)


def test_build_depends_on_the_seed_alone() -> None:
    first, same, other = (build(tiny_config("Qwen2ForCausalLM"), seed) for seed in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.embed_tokens.weight, other.embed_tokens.weight)


# ---- transformers ----

SHAPES = {
    "llama-tied": tiny_config(tie_word_embeddings=True),
    "llama-free": tiny_config(tie_word_embeddings=False, rope_theta=500.0, rms_norm_eps=1e-3),
    "llama3": tiny_config(
        tie_word_embeddings=True,
        rope_theta=5e5,
        rope_scaling=Llama3Rope(
            factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
        ),
        eos_token_id=(1, 2),
    ),
    "qwen2-tied": tiny_config("Qwen2ForCausalLM", tie_word_embeddings=True, num_key_value_heads=1),
    "qwen2-free": tiny_config("Qwen2ForCausalLM", tie_word_embeddings=False, rope_theta=1e6),
    "qwen3-tied": tiny_config("Qwen3ForCausalLM", tie_word_embeddings=True, num_key_value_heads=4),
    "qwen3-free": tiny_config("Qwen3ForCausalLM", tie_word_embeddings=False, rope_theta=50.0),
}


def fit(config: ModelConfig, tokenizer: TextTokenizer) -> ModelConfig:
    """The same shape for the words of ``tokenizer``."""
    fields = {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__}
    fields |= {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_id}
    several = isinstance(config.eos_token_id, tuple)
    eos = (tokenizer.eos_id, tokenizer.bos_id) if several else tokenizer.eos_id
    return ModelConfig(**{**fields, "bos_token_id": tokenizer.bos_id, "eos_token_id": eos})


@pytest.mark.parametrize("shape", SHAPES)
def test_checkpoint_opens_in_transformers(shape: str, world: TextTokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny_model(5, fit(SHAPES[shape], world), scale=2.0)
    save_checkpoint(tmp_path / "ours", model, world, BARE)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert type(theirs).__name__ == model.config.architecture
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    eos = theirs.generation_config.eos_token_id
    assert eos == ([world.eos_id, world.bos_id] if shape == "llama3" else world.eos_id)
    ids = torch.randint(0, world.vocab_size, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(ids)
        assert ours.std() > 0.5
        torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_checkpoint_of_transformers_opens_here(shape: str, world: TextTokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    wanted = fit(SHAPES[shape], world)
    config = transformers.AutoConfig.for_model(
        wanted.to_hf()["model_type"],
        **{
            name: wanted.to_hf()[name]
            for name in ModelConfig.__dataclass_fields__
            if name not in ("architecture", "rope_theta", "rope_scaling", "dtype")
        },
        rope_parameters=wanted.to_hf()["rope_parameters"],
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    scramble(theirs, 6, scale=2.0)
    theirs.save_pretrained(tmp_path / "theirs")
    world.save(tmp_path / "theirs" / "tokenizer.json")
    model, tokenizer = liubai.load(tmp_path / "theirs")
    assert model.config == wanted
    assert tokenizer.eos_id == world.eos_id
    ids = torch.randint(0, world.vocab_size, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("source", [BARE, THINK_ANSWER], ids=["bare", "think-answer"])
@pytest.mark.parametrize("thinking", [True, False])
def test_tokenizer_and_template_agree_with_transformers(
    source: str, thinking: bool, world: TextTokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    save_checkpoint(tmp_path / "c", tiny_model(0, fit(tiny_config(), world)), world, source)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "c")
    ours = Template(load(tmp_path / "c")[1], source, thinking=thinking)
    assert (theirs.bos_token, theirs.eos_token) == (world.bos, world.eos)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (world.eos_id, world.pad_id)
    for question in QUESTIONS:
        asked: dict[str, Any] = {"add_generation_prompt": True, "thinking": thinking}
        chat = [{"role": "user", "content": question}]
        assert theirs.apply_chat_template(chat, tokenize=False, **asked) == ours.render(question)
        ids = theirs.apply_chat_template(chat, tokenize=True, return_dict=False, **asked)
        assert ids == ours.prompt_ids(question)
        text = f"{question} <think> 3 + 4 =7 </think> <answer> ( 3 + 4 ) * 5 </answer>{world.eos}"
        assert theirs.encode(text, add_special_tokens=False) == world.encode(text)
        assert theirs.decode(world.encode(text)) == world.decode(world.encode(text))


# ---- our own folder ----


@pytest.fixture
def checkpoint(world: TextTokenizer, tmp_path: Path) -> Path:
    config = fit(tiny_config("Qwen2ForCausalLM", tie_word_embeddings=False), world)
    save_checkpoint(tmp_path / "c", tiny_model(0, config), world, BARE)
    return tmp_path / "c"


def test_round_trip_keeps_every_bit(checkpoint: Path, tmp_path: Path) -> None:
    model, tokenizer = load(checkpoint)
    assert {p.name for p in checkpoint.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    save_checkpoint(tmp_path / "again", model, tokenizer, BARE)
    for path in checkpoint.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_tied_head_written_twice_is_accepted(world: TextTokenizer, tmp_path: Path) -> None:
    model = tiny_model(0, fit(tiny_config(), world))
    save_checkpoint(tmp_path / "c", model, world, BARE)
    change_weights(tmp_path / "c", lambda w: w | {"lm_head.weight": model.head_weight.detach().clone()})
    assert torch.equal(load(tmp_path / "c")[0].head_weight, model.head_weight)


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({n: t.clone() for n, t in change(weights).items()}, folder / "model.safetensors")


def change_config(folder: Path, **fields: object) -> None:
    """Set fields of config.json; ``...`` takes one away."""
    raw = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[:8] = b"\xff" * 8
    (folder / "model.safetensors").write_bytes(data)


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) - 5])


def sharded(folder: Path) -> None:
    """The same weights in shards, as large checkpoints have them."""
    model, tokenizer = load(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(liubai.model.checkpoint, "SHARD", 9000)
        save_checkpoint(folder, model, tokenizer, BARE)


def add_token(folder: Path) -> None:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(["one-too-many"])
    backend.save(str(folder / "tokenizer.json"))


def lose_shard(folder: Path) -> None:
    sharded(folder)
    next(folder.glob("model-00002-of-*")).unlink()


def shard_elsewhere(folder: Path) -> None:
    """An index may not point out of its folder."""
    (folder.parent / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    sharded(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../other.safetensors")
    (folder / INDEX).write_text(json.dumps(index))


NORM = "model.layers.1.input_layernorm.weight"
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json' is not valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json' must hold"),
    "config lacks a key": (lambda f: change_config(f, hidden_size=...), "hidden_size"),
    "config has a word": (lambda f: change_config(f, num_attention_heads="four"), "num_attention_heads"),
    "config has a zero": (lambda f: change_config(f, num_attention_heads=0), "num_attention_heads"),
    "architecture": (lambda f: change_config(f, architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
    "no architecture": (lambda f: change_config(f, architectures=...), "architecture"),
    "rope": (
        lambda f: change_config(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        "rope scaling 'yarn'",
    ),
    "half a rope": (
        lambda f: change_config(f, rope_parameters={"rope_type": "llama3", "factor": 8.0}),
        "rope scaling llama3 needs low_freq_factor",
    ),
    "its own code": (
        lambda f: change_config(f, auto_map={"AutoModel": "x.Y"}),
        "brings model code of its own.*supported: LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
    ),
    "quantized": (lambda f: change_config(f, quantization_config={"bits": 4}), "quantization_config"),
    "dtype": (lambda f: change_config(f, dtype="float8"), "dtype 'float8'"),
    "larger tokenizer": (lambda f: add_token(f), "has token id 423, config.json only 423 tokens"),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "a pickle, which may run code",
    ),
    "lost shard": (lambda f: lose_shard(f), "lacks its shard model-00002-of"),
    "shard elsewhere": (lambda f: shard_elsewhere(f), "lacks its shard"),
    "index without a map": (
        lambda f: ((f / "model.safetensors").unlink(), (f / INDEX).write_text("{}")),
        "no weight_map",
    ),
    "activation": (lambda f: change_config(f, hidden_act="gelu"), "gelu"),
    "window": (lambda f: change_config(f, use_sliding_window=True), "use_sliding_window"),
    "uneven heads": (lambda f: change_config(f, num_key_value_heads=3), "num_key_value_heads"),
    "no eos": (
        lambda f: ((f / "generation_config.json").unlink(), change_config(f, eos_token_id=...)),
        "names no eos_token_id",
    ),
    "foreign eos": (lambda f: change_config(f, eos_token_id=10**6), "eos_token_id 1000000"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no model\.safetensors"),
    "corrupt": (flip, r"model\.safetensors' is corrupt"),
    "truncated": (truncate, r"model\.safetensors' is corrupt or truncated"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "corrupt or truncated"),
    "missing tensor": (
        lambda f: change_weights(f, lambda w: {n: t for n, t in w.items() if n != NORM}),
        f"lacks {NORM}",
    ),
    "extra tensor": (
        lambda f: change_weights(f, lambda w: w | {"model.spare": torch.zeros(1)}),
        r"unknown tensor model\.spare",
    ),
    "wrong shape": (
        lambda f: change_weights(f, lambda w: w | {NORM: torch.ones(31)}),
        rf"{NORM} is \[31\], config\.json says \[32\]",
    ),
    "broadcastable shape": (lambda f: change_weights(f, lambda w: w | {NORM: torch.ones(1)}), NORM),
    "whole numbers": (
        lambda f: change_weights(f, lambda w: w | {NORM: torch.ones(32, dtype=torch.int8)}),
        rf"{NORM} is stored as I8, not in floating point",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"no tokenizer\.json"),
    "bad tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "is not a tokenizer"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_bad_checkpoint_is_named(case: str, checkpoint: Path) -> None:
    spoil, message = WRONG[case]
    spoil(checkpoint)
    with pytest.raises(UserError, match=message):
        load(checkpoint)


def test_weights_may_be_read_by_whom_their_neighbours_may(checkpoint: Path) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) for path in checkpoint.iterdir()}
    (checkpoint / "new").touch()
    assert modes == {stat.S_IMODE((checkpoint / "new").stat().st_mode)}


def test_shards_open_here_and_in_transformers(checkpoint: Path) -> None:
    model, _ = load(checkpoint)
    sharded(checkpoint)
    names = sorted(p.name for p in checkpoint.glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    for name, tensor in load(checkpoint)[0].state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    theirs = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_bfloat16_stays_bfloat16_on_the_disk(world: TextTokenizer, tmp_path: Path) -> None:
    config = fit(tiny_config("Qwen3ForCausalLM", dtype="bfloat16"), world)
    save_checkpoint(tmp_path / "c", tiny_model(0, config), world, BARE)
    assert {t.dtype for t in load_file(tmp_path / "c" / "model.safetensors").values()} == {torch.bfloat16}
    assert {p.dtype for p in load(tmp_path / "c")[0].parameters()} == {torch.float32}
    model, tokenizer = load(tmp_path / "c", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    save_checkpoint(tmp_path / "again", model, tokenizer, BARE)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    theirs = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        ours, other = model(ids).float(), theirs(ids).logits.float()
    # eight bits of mantissa: sums in another order differ by more than single logits can bear
    assert (ours - other).abs().mean() < 0.02 * other.std()


def test_the_weights_are_not_those_of_the_file(checkpoint: Path) -> None:
    """A checkpoint may be replaced while its model lives."""
    model, _ = load(checkpoint)
    before = model.head_weight.detach().clone()
    path = checkpoint / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(model.head_weight, before)


def test_to_load_and_write_takes_no_compiler(checkpoint: Path) -> None:
    """torch._dynamo is a second of every process's start, and comes in by side doors."""
    program = (
        "import sys, torch\nfrom liubai.model.checkpoint import load\n"
        "model, _ = load(sys.argv[1])\nmodel(torch.tensor([[1, 2, 3]])).sum().backward()\n"
        "print(sorted({'torch._dynamo', 'torch'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(checkpoint)], capture_output=True, text=True)
    assert done.stdout == "['torch']\n", done.stderr


def test_every_end_token_ends_an_answer(checkpoint: Path) -> None:
    """Qwen and Llama 3 have several, and only generation_config.json names them all."""
    _, plain = load(checkpoint)
    other = plain.encode("3")[0]
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [other, plain.eos_id]}))
    model, tokenizer = load(checkpoint)
    assert tokenizer.eos == plain.eos  # config.json's own is the one that is written
    assert tokenizer.eos_ids == (plain.eos_id, other)
    engine = TorchEngine(model, eos_ids=tokenizer.eos_ids, slots=64, max_length=200)
    engine.load(model.state_dict(), version=0)
    requests = [Request(id=i, prompt_ids=(5,), max_tokens=150, seed=i) for i in range(64)]
    last = {s.completion_ids[-1] for s in generate(engine, requests) if s.stop is Stop.EOS}
    assert last == set(tokenizer.eos_ids)


def test_the_tokenizer_that_came_with_a_model_goes_with_it(checkpoint: Path, tmp_path: Path) -> None:
    """Qwen names a bos_token_id in config.json and never writes it: tokenizer_config.json decides."""
    path = checkpoint / "tokenizer_config.json"
    about = {"bos_token": None, "tokenizer_class": "Qwen2Tokenizer", "chat_template": "x", "own": [1]}
    path.write_text(json.dumps(about))
    model, tokenizer = load(checkpoint)
    assert tokenizer.bos is None
    save_checkpoint(tmp_path / "again", model, tokenizer, BARE)
    again = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert again == {"bos_token": None, "tokenizer_class": "Qwen2Tokenizer", "own": [1]}
    path.write_text(json.dumps({"bos_token": {"__type": "AddedToken", "content": tokenizer.eos}}))
    assert load(checkpoint)[1].bos == tokenizer.eos


def test_a_hub_id_without_a_network_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no checkpoint folder 'runs/zero', and the hub gave no model"):
        load("runs/zero")


def test_a_hub_id_is_fetched(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[tuple[str, list[str]]] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert load("Qwen/Qwen3-0.6B")[1].eos == load(checkpoint)[1].eos
    assert asked == [("Qwen/Qwen3-0.6B", ["*.json", "*.safetensors", "*.jinja"])]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint folder"):
        load(tmp_path / "nowhere")


def test_transformer_counts_what_it_has() -> None:
    config = tiny_config("Qwen3ForCausalLM", tie_word_embeddings=False)
    sizes = 2 * 60 * 32 + 32 + 2 * (2 * 32 + 2 * 32 * 64 + 2 * 32 * 32 + 2 * 16 + 3 * 32 * 48)
    assert Transformer(config).count_parameters() == sizes

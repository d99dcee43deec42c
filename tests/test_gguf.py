"""A GGUF file holds every weight and the tokenizer, and llama.cpp computes from it what Liubai computes."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_model
from families import (
    FAMILIES,
    LLAMA3,
    QWEN2,
    R1_SPECIAL,
    byte_level,
    greedy,
    prompts,
    save_family,
)
from test_model import fit, sharded
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from liubai.errors import UserError
from liubai.model.checkpoint import load, save_checkpoint
from liubai.model.config import Llama3Rope, ModelConfig
from liubai.model.export import export
from liubai.model.gguf import gguf_name, pairs_together
from liubai.model.gguf_vocab import TokenType, vocab_of
from liubai.model.transformer import rope_slowing, rope_table
from liubai.text.template import BARE, Template
from liubai.text.tokenizer import TextTokenizer

PARTS = (
    "wait",
    "We'VE",
    "'s",
    "12",
    "3456",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "等等",
    "é",
    "🙂",
    "_",
    "...",
    "<end>",
    "=",
)
TEXTS = (
    "I'll say WE'VE got 1234567 of\n\n them,  ok?\t等等 留白\r\n",
    " wait",
    "é ñ 🙂 <think> x </think>",
)


def llama(file: Path) -> Any:
    """The file in llama.cpp, all in float32."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make test-llama")
    f32 = llama_cpp.GGML_TYPE_F32  # of the KV cache; float16 is the default
    return llama_cpp.Llama(
        str(file), n_ctx=256, n_threads=1, n_threads_batch=1, type_k=f32, type_v=f32, verbose=False
    )


def continued(program: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    program.reset()
    said: list[int] = []
    for token in program.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
        said.append(token)
        if len(said) == tokens:
            break
    return said


# ---- in llama.cpp ----


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_and_text_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model, tokenizer = save_family(name, tmp_path / "c")
    sharded(tmp_path / "c")
    export(tmp_path / "c", "gguf", tmp_path / "c.gguf")
    program = llama(tmp_path / "c.gguf")
    asked = prompts(model)
    assert [continued(program, ids, 40) for ids in asked] == greedy(model, asked)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert program.tokenize(text.encode(), add_bos=False, special=True) == ids
        assert program.detokenize(ids, special=True).decode() == text
    for i in tokenizer.eos_ids:
        assert program._model.token_eos() == tokenizer.eos_id
        assert is_end(program, i)
    begun = tokenizer.backend.encode("x").ids
    assert program.tokenize(b"x", add_bos=program._model.add_bos_token()) == begun


def is_end(program: Any, token: int) -> bool:
    import llama_cpp

    return bool(llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(program._model.model), token))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_opens_in_llama_cpp(dtype: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    save_family("Qwen3-0.6B", tmp_path / "c")
    export(tmp_path / "c", "gguf", tmp_path / "c.gguf", dtype)
    program = llama(tmp_path / "c.gguf")
    export(tmp_path / "c", "hf", tmp_path / "half", dtype)
    ids = prompts(load(tmp_path / "c")[0])[2]
    program.eval(ids)
    # the same rounded weights; llama.cpp rounds what it multiplies them with, too
    ours = load(tmp_path / "half")[0](torch.tensor([ids]))[0, -1]
    theirs = torch.tensor(program._ctx.get_logits()[: len(ours)])
    assert (ours - theirs).abs().mean() < 0.05 * ours.std()


def test_the_small_worlds_prompts_are_read_and_written_by_llama_cpp(
    world: TextTokenizer, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    model = tiny_model(0, fit(tiny_config(), world), scale=2.0)
    save_checkpoint(tmp_path / "c", model, world, BARE)
    written = export(tmp_path / "c", "gguf", tmp_path / "c.gguf")
    assert "no word-level tokenizer" in written["caveats"][0]
    program, template = llama(tmp_path / "c.gguf"), Template(world, BARE)
    for question in ("3 4 5 ->35", "12 99 1 ->8"):
        asked = program.tokenize(template.render(question).encode(), add_bos=False, special=True)
        assert asked == template.prompt_ids(question)
        said = continued(program, asked, 32)
        assert said == greedy(model, [asked], 32)[0]
        assert program.detokenize(said, special=True).decode().split() == world.decode(said).split()


# ---- the file ----


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(file)
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return {name: field.contents() for name, field in reader.fields.items()}, {
        t.name: torch.from_numpy(t.data.copy())
        .view(dtypes[t.tensor_type.name])
        .view(*map(int, t.shape[::-1]))
        for t in reader.tensors
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Qwen2.5-7B", "Qwen3-0.6B"])
def test_every_tensor_is_there(name: str, dtype: Any, tmp_path: Path) -> None:
    model, _ = save_family(name, tmp_path / "c")
    export(tmp_path / "c", "gguf", tmp_path / "c.gguf", dtype)
    fields, found = read(tmp_path / "c.gguf")
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for ours, tensor in model.state_dict().items():
        theirs, kind = found.pop(gguf_name(ours)), ours.split(".")[-2]
        turned = name.startswith("Llama") and kind in heads
        wanted = pairs_together(tensor, heads[kind]) if turned else tensor
        assert torch.equal(theirs, wanted.to(getattr(torch, dtype) if tensor.ndim > 1 else torch.float32))
    assert set(found) == ({"rope_freqs.weight"} if name.startswith("Llama") else set())
    arch, c = fields["general.architecture"], model.config
    assert arch == name.partition("-")[0].partition(".")[0].lower().replace("qwen2.5", "qwen2")
    assert {key.removeprefix(f"{arch}."): value for key, value in fields.items() if key.startswith(arch)} == {
        "vocab_size": c.vocab_size,
        "context_length": 4096,
        "embedding_length": c.hidden_size,
        "block_count": 2,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.layer_norm_rms_epsilon": pytest.approx(c.rms_norm_eps),
        "rope.freq_base": c.rope_theta,
        "rope.dimension_count": 32,
    }


TOKENIZERS = {
    "Llama-3.1-8B": ("llama-bpe", True, 3),
    "Qwen2.5-0.5B": ("qwen2", False, 2),
    "R1-Distill-Qwen-1.5B": ("deepseek-r1-qwen", True, 1),
    "R1-Distill-Llama-8B": ("llama-bpe", True, 1),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizer_is_there(name: str, tmp_path: Path) -> None:
    _, tokenizer = save_family(name, tmp_path / "c")
    export(tmp_path / "c", "gguf", tmp_path / "c.gguf")
    pre, begins, ends = TOKENIZERS[name]
    fields = read(tmp_path / "c.gguf")[0]
    fields = {k.removeprefix("tokenizer.ggml."): v for k, v in fields.items() if k.startswith("tokenizer.")}
    assert (fields["model"], fields["pre"]) == ("gpt2", pre)
    assert len(fields["tokens"]) == len(fields["token_type"]) == 320
    for i, (token, kind) in enumerate(zip(fields["tokens"], fields["token_type"], strict=True)):
        known = tokenizer.backend.id_to_token(i)
        assert token == (known or f"[PAD{i}]")
        special = tokenizer.backend.get_added_tokens_decoder().get(i)
        thought = special is not None and special.content in ("<think>", "</think>")
        assert kind == (5 if known is None else 4 if thought else 3 if special else 1)
    merges = json.loads(tokenizer.backend.to_str())["model"]["merges"]
    assert [merge.split(" ") for merge in fields["merges"]] == merges
    assert fields["add_bos_token"] is begins
    assert fields.get("bos_token_id") == tokenizer.bos_id
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    assert {fields[key] for key in keys if key in fields} == set(tokenizer.eos_ids)
    assert sum(key in fields for key in keys) == ends
    assert fields["eos_token_id"] == tokenizer.eos_id
    if ends == 3:
        assert tokenizer.backend.id_to_token(fields["eot_token_id"]) == "<|eot_id|>"
    assert fields["tokenizer.chat_template"] == FAMILIES[name].template


def test_a_fourth_end_token_is_named(tmp_path: Path) -> None:
    _, tokenizer = save_family("Llama-3.1-8B", tmp_path / "c")
    more = [*tokenizer.eos_ids[1:], tokenizer.id_of("<|end_header_id|>")]
    (tmp_path / "c" / "generation_config.json").write_text(json.dumps({"eos_token_id": more}))
    pytest.importorskip("gguf")
    caveats = export(tmp_path / "c", "gguf", tmp_path / "c.gguf")["caveats"]
    assert len(caveats) == 1
    assert "stop words: '<|end_header_id|>'" in caveats[0]


def test_pairs_stand_together() -> None:
    """Rotating neighbours after the turn is rotating halves before it."""
    weight = torch.randn(2 * 8, 5, generator=torch.Generator().manual_seed(0))
    turned = pairs_together(weight, 2).view(2, 4, 2, 5)
    halves = weight.view(2, 2, 4, 5)
    assert torch.equal(turned[:, :, 0], halves[:, 0])
    assert torch.equal(turned[:, :, 1], halves[:, 1])


def test_slowing_is_what_the_rope_table_has() -> None:
    rope = Llama3Rope(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    )
    slow = rope_slowing(16, 1e3, rope)
    assert slow.min() == 1
    assert slow.max() == 8
    assert ((slow > 1) & (slow < 8)).any()
    angle = 50 * 1e3 ** (-torch.arange(0, 16, 2).double() / 16) / slow
    torch.testing.assert_close(rope_table(51, 16, 1e3, rope)[0][50, 0, :8], angle.cos().float())


# ---- tokenizers ----


def named(backend: Tokenizer) -> str:
    backend.add_special_tokens(["<end>"])
    tokenizer = TextTokenizer(backend, eos="<end>", bos=None)
    return vocab_of(tokenizer, ModelConfig(vocab_size=tokenizer.vocab_size)).pre


def with_pre(*steps: pre_tokenizers.PreTokenizer) -> Tokenizer:
    backend = byte_level(QWEN2)
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    return backend


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
KNOWN = {
    "qwen2": lambda: byte_level(QWEN2, nfc=True),
    "deepseek-r1-qwen": lambda: byte_level(QWEN2, R1_SPECIAL),
    "llama-bpe": lambda: byte_level(LLAMA3, ignore_merges=True),
    "dbrx": lambda: byte_level(LLAMA3),  # Llama 3's cuts, but every word is merged
    "gpt-2": lambda: with_pre(GPT2),
    "smollm": lambda: with_pre(pre_tokenizers.Digits(individual_digits=True), GPT2),
}


@pytest.mark.parametrize("name", KNOWN)
def test_pre_tokenizers_are_known_by_their_patterns(name: str) -> None:
    assert named(KNOWN[name]()) == name


@pytest.mark.parametrize("name", KNOWN)
def test_llama_cpp_cuts_as_the_pre_tokenizer_of_that_name(name: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    backend = KNOWN[name]()
    backend.add_special_tokens(["<end>"])
    tokenizer = TextTokenizer(backend, eos="<end>", bos=None)
    save_checkpoint(tmp_path / "c", tiny_model(0, fit(tiny_config(), tokenizer)), tokenizer, BARE)
    export(tmp_path / "c", "gguf", tmp_path / "c.gguf")
    program = llama(tmp_path / "c.gguf")
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choice(PARTS) for _ in range(draw.randint(1, 12)))
        ids = tokenizer.encode(text)
        assert program.tokenize(text.encode(), add_bos=False, special=True) == ids, text


def lowercase() -> Tokenizer:
    backend = byte_level(QWEN2)
    backend.normalizer = normalizers.Lowercase()
    return backend


def swallowing() -> Tokenizer:
    backend = byte_level(QWEN2)
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return backend


UNKNOWN = {
    "pattern": (
        lambda: byte_level(QWEN2.replace(r"\p{N}", r"\p{N}{1,2}", 1)),
        "by a pattern that is none of",
    ),
    "whole words": (lambda: byte_level(QWEN2, ignore_merges=True), "by a pattern"),
    "prefix": (lambda: with_pre(pre_tokenizers.ByteLevel(add_prefix_space=True)), "by a pattern"),
    "metaspace": (lambda: with_pre(pre_tokenizers.Metaspace()), "by a pattern"),
    "normalizer": (lowercase, "changes text before it cuts it"),
    "swallowing": (swallowing, "swallows what stands beside it"),
    "unigram": (lambda: Tokenizer(models.Unigram([("a", 0.0)], None, False)), "is of type Unigram"),
    "bytes": (lambda: Tokenizer(models.BPE(byte_fallback=True)), "byte_fallback"),
    "words": (lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "is of type WordLevel"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_tokenizer_is_refused(case: str) -> None:
    make, message = UNKNOWN[case]
    with pytest.raises(UserError, match=message):
        named(make())


def test_words_of_the_small_world_are_found_in_text(world: TextTokenizer) -> None:
    vocab = vocab_of(world, ModelConfig(vocab_size=world.vocab_size + 2))
    assert vocab.tokens[:4] == ["<|unknown|>", "<|start|>", "<|end|>", " <think>"]
    assert vocab.types[:4] == [*[TokenType.CONTROL] * 3, TokenType.USER_DEFINED]
    assert vocab.types[-2:] == [TokenType.UNUSED] * 2
    assert len(set(vocab.tokens)) == world.vocab_size + 2


# ---- models ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "architecture": "Qwen2ForCausalLM",
                "rope_scaling": Llama3Rope(
                    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
                ),
                "head_dim": 8,
            },
            "no llama3 rope scaling for qwen2",
        ),
        ({"architecture": "Qwen2ForCausalLM"}, "Qwen2's head_dim"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(
    changes: dict[str, Any], message: str, world: TextTokenizer, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    save_checkpoint(tmp_path / "c", tiny_model(0, fit(tiny_config(**changes), world)), world, BARE)
    with pytest.raises(UserError, match=message):
        export(tmp_path / "c", "gguf", tmp_path / "c.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]

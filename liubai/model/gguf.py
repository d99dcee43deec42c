"""A model as one GGUF file, for llama.cpp and what is built on it. Our code over the ``gguf`` package.

Tensors are read, turned and written one at a time. Matrices take the wanted dtype; norms and biases are
float32, as llama.cpp wants them. Left out on purpose: quantisation (llama.cpp's ``llama-quantize`` does it).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from liubai.errors import UserError
from liubai.files import atomic_file
from liubai.model.config import ModelConfig
from liubai.model.gguf_vocab import vocab_of
from liubai.model.transformer import rope_slowing
from liubai.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

#: architecture in config.json -> llama.cpp's
ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
#: the parts of a layer, ours -> llama.cpp's
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGML_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
TOP = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def write_gguf(
    path: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, Tensor],
    tokenizer: TextTokenizer,
    template: str | None,
    *,
    name: str,
) -> list[str]:
    """Write ``path`` atomically, matrices in ``config.dtype``; the sentences that the user should read.

    ``shapes`` are the weights without their values, on the meta device. Raises ``UserError`` for a model or
    tokenizer that llama.cpp does not cover, a missing ``gguf``, a full disk.
    """
    try:
        from gguf import GGMLQuantizationType, GGUFWriter
    except ImportError:
        raise UserError("GGUF needs a package more: pip install 'liubai[gguf]'") from None
    if config.architecture not in ARCHITECTURES:
        raise UserError(f"llama.cpp does not know {config.architecture}: only Liubai reads such a checkpoint")
    arch = ARCHITECTURES[config.architecture]
    if config.rope_scaling and arch != "llama":
        raise UserError(f"llama.cpp has no llama3 rope scaling for {arch}; use --to hf")
    if arch == "qwen2" and config.num_attention_heads * config.head_dim != config.hidden_size:
        raise UserError(
            "llama.cpp wants Qwen2's head_dim to be hidden_size / num_attention_heads; use --to hf"
        )
    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = GGUFWriter(None, arch)
    _describe(writer, config, name)
    caveats = _describe_tokenizer(writer, config, tokenizer, template)
    tensors = dict(_tensors(config, shapes, weights))
    for theirs, (shape, _) in tensors.items():
        dtype = _dtype(shape, config)
        kind = GGMLQuantizationType[GGML_TYPES[dtype]]
        size = shape.numel() * dtype.itemsize
        writer.add_tensor_info(theirs, shape.shape, np.dtype(np.float32), size, raw_dtype=kind)
    with atomic_file(path) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        # not the writer's own: numpy's tofile loses the reason of a failure, and a full disk needs its name
        with open(temporary, "ab") as file:
            file.write(bytes(-file.tell() % writer.data_alignment))
            for shape, read in tensors.values():
                file.write(read().to(_dtype(shape, config)).contiguous().view(torch.uint8).numpy().data)
                file.write(bytes(-file.tell() % writer.data_alignment))
    return caveats


def _describe(writer: GGUFWriter, config: ModelConfig, name: str) -> None:
    c = config
    writer.add_name(name)
    writer.add_file_type({"float32": 0, "float16": 1, "bfloat16": 32}[c.dtype])  # llama_ftype
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.head_dim)


def _describe_tokenizer(
    writer: GGUFWriter, config: ModelConfig, tokenizer: TextTokenizer, template: str | None
) -> list[str]:
    vocab = vocab_of(tokenizer, config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    writer.add_token_merges(vocab.merges)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    # what the tokenizer does by itself, whatever its configuration says
    begun = tokenizer.backend.encode("").ids[:1]
    writer.add_add_bos_token(bool(begun) and begun[0] == tokenizer.bos_id)
    if config.pad_token_id is not None:
        writer.add_pad_token_id(config.pad_token_id)
    if vocab.unknown_id is not None:
        writer.add_unk_token_id(vocab.unknown_id)
    if template is not None:
        writer.add_chat_template(template)
    caveats = [vocab.caveat] if vocab.caveat else []
    # three keys for tokens that end an answer; llama.cpp stops at each of them
    eos, *more = tokenizer.eos_ids
    more.sort(key=lambda i: vocab.tokens[i] not in ("<|eot_id|>", "<|im_end|>"))
    writer.add_eos_token_id(eos)
    for add, i in zip((writer.add_eot_token_id, writer.add_eom_token_id), more, strict=False):
        add(i)
    if len(more) > 2:
        lost = ", ".join(f"'{vocab.tokens[i]}'" for i in more[2:])
        caveats.append(f"GGUF has room for three end tokens; name the others yourself as stop words: {lost}")
    return caveats


def _tensors(
    config: ModelConfig, shapes: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> Iterator[tuple[str, tuple[Tensor, Callable[[], Tensor]]]]:
    """llama.cpp's name, the shape, and what reads the values."""
    if config.rope_scaling:
        slowing = rope_slowing(config.head_dim, config.rope_theta, config.rope_scaling)
        yield "rope_freqs.weight", (slowing, lambda: slowing)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for ours, shape in shapes.items():
        turned = heads.get(ours.split(".")[-2], 0) if config.architecture == "LlamaForCausalLM" else 0

        def read(ours: str = ours, turned: int = turned) -> Tensor:
            return pairs_together(weights[ours], turned) if turned else weights[ours]

        yield gguf_name(ours), (shape, read)


def gguf_name(ours: str) -> str:
    """``layers.0.mlp.up_proj.weight`` -> ``blk.0.ffn_up.weight``."""
    if layer := re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", ours):
        return f"blk.{layer[1]}.{PARTS[layer[2]]}.{layer[3]}"
    return f"{TOP[ours.removesuffix('.weight')]}.weight"


def pairs_together(weight: Tensor, heads: int) -> Tensor:
    """Rows ``[heads·E, D]`` of q or k so that the two of a RoPE pair are neighbours: llama.cpp turns Llama's
    as Meta's code does, Hugging Face (and we) the i-th of the first half with the i-th of the second."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _dtype(shape: Tensor, config: ModelConfig) -> torch.dtype:
    return getattr(torch, config.dtype) if shape.ndim > 1 else torch.float32  # type: ignore[no-any-return]

"""The real families in small: every ratio, base, epsilon, bias and tie as published, only fewer and thinner.

What is scaled: layers (2), heads (their ratio stays), the head size (32, the smallest that vLLM's CPU
attention takes), the vocabulary, and the length that Llama's RoPE was trained for, so that tests reach
beyond it. Weights are drawn at random everywhere (``conftest.scramble``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import tiny_model
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from liubai.model.checkpoint import save_checkpoint
from liubai.model.config import Llama3Rope, ModelConfig
from liubai.model.transformer import Transformer
from liubai.rollout.engine import Request, generate
from liubai.rollout.torch_engine import TorchEngine
from liubai.text.tokenizer import TextTokenizer

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{WORDS}|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{WORDS}|\p{{N}}|{REST}"

#: One turn of a chat, as each family writes it; the whole templates are longer and say nothing more here.
LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1_CHAT = (
    "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)

LLAMA_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
)
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
R1_SPECIAL = ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
THOUGHT = ("<think>", "</think>")


def byte_level(
    pattern: str,
    special: Sequence[str] = (),
    plain: Sequence[str] = (),
    *,
    bos: str | None = None,
    ignore_merges: bool = False,
    nfc: bool = False,
) -> Tokenizer:
    """A byte-level BPE tokenizer built as Llama 3's and Qwen's are, learned from a few sentences."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    text = ["I'll wait, and then we'VE got 12 345 of them.", "等等，留白 then 1234\n\n  wait", "so 3 + 4 = 7"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learn = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(text * 3, learn)
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    if nfc:
        backend.normalizer = normalizers.NFC()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return backend


@dataclass(frozen=True, kw_only=True)
class Family:
    architecture: str
    heads: int
    kv_heads: int
    #: of hidden_size
    wide: float = 4.0
    #: heads · head_dim / hidden_size
    inner: int = 1
    theta: float = 1e6
    stretch: float | None = None
    eps: float = 1e-6
    tied: bool = False
    tokens: str = "qwen"
    #: of weights whose greedy answers to `prompts` are nowhere close calls
    seed: int = 0

    def tokenizer(self) -> TextTokenizer:
        if self.tokens == "llama":
            bos = LLAMA_SPECIAL[0]
            backend = byte_level(LLAMA3, LLAMA_SPECIAL, bos=bos, ignore_merges=True)
            more = [backend.token_to_id(token) for token in LLAMA_SPECIAL[2:4]]
            return TextTokenizer(backend, eos=LLAMA_SPECIAL[1], bos=bos, more_eos=more)
        if self.tokens == "qwen":
            backend = byte_level(QWEN2, QWEN_SPECIAL, THOUGHT, nfc=True)
            more = [backend.token_to_id("<|endoftext|>")]
            return TextTokenizer(backend, eos="<|im_end|>", bos=None, more_eos=more)
        llama = self.architecture == "LlamaForCausalLM"
        bos = R1_SPECIAL[1]
        backend = byte_level(LLAMA3 if llama else QWEN2, R1_SPECIAL, THOUGHT, bos=bos, ignore_merges=llama)
        return TextTokenizer(backend, eos=R1_SPECIAL[0], bos=bos)

    @property
    def template(self) -> str:
        return {"llama": LLAMA_CHAT, "qwen": QWEN_CHAT, "r1": R1_CHAT}[self.tokens]

    def config(self, tokenizer: TextTokenizer) -> ModelConfig:
        hidden = self.heads * 32 // self.inner
        rope = Llama3Rope(
            factor=self.stretch or 1.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        )
        return ModelConfig(
            architecture=self.architecture,
            vocab_size=-(-tokenizer.vocab_size // 64) * 64,  # real ones have more rows than tokens, too
            hidden_size=hidden,
            intermediate_size=int(self.wide * hidden),
            num_hidden_layers=2,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=32,
            rope_theta=self.theta,
            rope_scaling=rope if self.stretch else None,
            rms_norm_eps=self.eps,
            tie_word_embeddings=self.tied,
            max_position_embeddings=4096,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_ids if len(tokenizer.eos_ids) > 1 else tokenizer.eos_id,
        )


LLAMA, QWEN2_, QWEN3 = "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
_LLAMA_8B = Family(
    architecture=LLAMA, heads=4, kv_heads=1, wide=3.5, theta=5e5, stretch=8.0, eps=1e-5, tokens="llama"
)
FAMILIES = {
    "Llama-3.2-1B": Family(
        architecture=LLAMA, heads=4, kv_heads=1, theta=5e5, stretch=32.0, eps=1e-5, tied=True, tokens="llama"
    ),
    "Llama-3.1-8B": _LLAMA_8B,
    "Qwen2.5-0.5B": Family(architecture=QWEN2_, heads=14, kv_heads=2, wide=4864 / 896, tied=True),
    "Qwen2.5-7B": Family(architecture=QWEN2_, heads=7, kv_heads=1, wide=18944 / 3584, seed=1),
    "Qwen3-0.6B": Family(architecture=QWEN3, heads=4, kv_heads=2, wide=3.0, inner=2, tied=True),
    "Qwen3-8B": Family(architecture=QWEN3, heads=4, kv_heads=1, wide=3.0, seed=3),
    "R1-Distill-Qwen-1.5B": Family(
        architecture=QWEN2_, heads=6, kv_heads=1, wide=8960 / 1536, theta=1e4, tokens="r1", seed=1
    ),
    "R1-Distill-Llama-8B": Family(**{**vars(_LLAMA_8B), "tokens": "r1"}),
}


def save_family(name: str, folder: Path) -> tuple[Transformer, TextTokenizer]:
    """A checkpoint of the family, as Liubai writes one."""
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    model = tiny_model(family.seed, family.config(tokenizer), scale=2.5)
    save_checkpoint(folder, model, tokenizer, family.template)
    return model, tokenizer


def prompts(model: Transformer) -> list[list[int]]:
    """Random ids of several lengths, some beyond what Llama's RoPE was trained for."""
    generator = torch.Generator().manual_seed(1)
    lengths = (1, 7, 30, 70)
    return [torch.randint(0, model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]


#: logits of two programs differ by less than a tenth of this
MARGIN = 1e-3


def greedy(model: Transformer, asked: Sequence[Sequence[int]], tokens: int = 40) -> list[list[int]]:
    """Liubai's own greedy answers, which nothing ends before ``tokens``, and which are not close calls."""
    engine = TorchEngine(model, eos_ids=(), slots=len(asked), max_length=256)
    engine.load(model.state_dict(), version=0)
    requests = [
        Request(id=i, prompt_ids=tuple(ids), max_tokens=tokens, seed=0, temperature=0.0)
        for i, ids in enumerate(asked)
    ]
    answers = [list(sample.completion_ids) for sample in generate(engine, requests)]
    assert all(len(answer) == tokens for answer in answers)
    assert smallest_margin(model, asked, answers) > MARGIN
    return answers


@torch.no_grad()
def smallest_margin(
    model: Transformer, asked: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> float:
    """How far the best logit of a full pass ever stands before the second; the best is the answer's."""
    margins = []
    for prompt, answer in zip(asked, answers, strict=True):
        logits_TV = model(torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1 : -1]
        best = logits_TV.topk(2, dim=-1)
        assert best.indices[:, 0].tolist() == answer
        margins.append(float((best.values[:, 0] - best.values[:, 1]).min()))
    return min(margins)

"""A model that gives a text one number: reward model, critic and process reward model share it.

The trunk is a language model's; instead of the vocabulary projection there is one vector. On the disk it is
what transformers calls ``LlamaForSequenceClassification`` (Qwen2 and Qwen3 alike) with one label, which takes
the number at the last token for that of the text. Left out, as there: a bias. Left out on purpose: several
numbers a text.

Shapes: B rows, T tokens, D hidden.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from liubai.model.checkpoint import load_as, read_config, save_described
from liubai.model.config import ModelConfig
from liubai.model.hub import find_folder
from liubai.model.lora import merged
from liubai.model.matmul import Linear
from liubai.model.transformer import Transformer
from liubai.seeds import derive
from liubai.text.tokenizer import TextTokenizer

HEAD = "score.weight"


class Scorer(Transformer):
    """``scorer(ids_BT) -> scores_BT``. ``config`` is that of the language model whose trunk this is."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if not config.tie_word_embeddings:
            del self.lm_head
        self.score = Linear(config.hidden_size, 1, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """What the last hidden state is multiplied with, ``[1, D]``."""
        return self.score.weight

    def head(self, hidden: Tensor) -> Tensor:
        """``[..., 1]``, in float32 or wider: in bfloat16 rewards may differ by 0.7 % and be one."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return F.linear(hidden.to(wide), self.score.weight.to(wide))

    def forward(
        self, ids_BT: Tensor, positions_BT: Tensor | None = None, documents_BT: Tensor | None = None
    ) -> Tensor:
        """Scores ``[B, T]``: at t that of the text up to and with token t. ``documents_BT`` numbers the
        documents of packed rows."""
        return super().forward(ids_BT, positions_BT, documents_BT)[..., 0]


@torch.no_grad()
def scorer_from(model: Transformer, seed: int) -> Scorer:
    """A scorer with the trunk of ``model``, adapters merged, and a new head: ``N(0, 1/(D+1)²)``. What is not
    merged is the model's own memory: one of the two may learn.

    Reward models since Stiennon et al. 2020 (arXiv 2009.01325; Huang et al. 2024, arXiv 2403.17031) begin
    with a standard deviation of ``1/√(D+1)``, hence with scores of random size about 1. Here they begin with
    about ``1/√D``: a coin's loss for a pair, and a critic that adds little noise to its first returns.
    The head is not zero, for then the trunk would learn nothing from the first step.
    """
    with torch.device("meta"):
        scorer = Scorer(model.config)
    scorer.computes, size = model.computes, model.config.hidden_size
    generator = torch.Generator().manual_seed(derive(seed, "score"))
    head = torch.empty(1, size).normal_(0.0, 1 / (size + 1), generator=generator)
    weights, device = merged(model), model.norm.weight.device
    state = {name: weights[name] for name in scorer.state_dict() if name != HEAD}
    scorer.load_state_dict(state | {HEAD: head.to(device, model.dtype)}, assign=True)
    return scorer.eval()


def save_scorer(folder: Path, scorer: Scorer, tokenizer: TextTokenizer, template: str | None) -> None:
    """Write a Hugging Face folder in ``scorer.config.dtype``, whole or not at all, adapters merged.

    Where the end token pads, transformers would read the score before it: config.json then names no pad
    token, and transformers takes one text at a time.
    """
    about = {"config.json": scorer.config.to_hf(scorer=True)}
    save_described(folder, scorer, tokenizer, template, about, merged(scorer))


def load_scorer(
    path: str | Path,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Scorer, TextTokenizer]:
    """A scorer and its tokenizer from a Hugging Face folder or hub id, ours or transformers'.

    As :func:`liubai.model.checkpoint.load`, also in what is a ``UserError``; so are a language model and a
    classifier of several labels.
    """
    folder = find_folder(path)
    return load_as(Scorer, folder, read_config(folder, scorer=True), dtype, device)

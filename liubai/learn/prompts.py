"""Prompts that many answers share, read once.

The answers of a group begin with the same prompt. Engines compute its keys and values once for all;
here training does so, too, and the gradients of all answers flow back into that one reading. With
prompts of a fifth of the text, this saves a sixth of an update.

Shapes: P prompts, S prompt tokens, B rows, K key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liubai.learn.packing import Batch
from liubai.model.attention import attention
from liubai.model.transformer import Attend, Transformer, causal


class SharedPrompts:
    """The loop in which it belongs::

    prompts = SharedPrompts(model, texts)
    for batch in batches:
        hidden = model.hidden(batch.ids_BT, batch.positions_BT, prompts.attend(batch))
        loss(hidden).backward()
    prompts.backward()              # what the answers' gradients mean for the prompts
    """

    def __init__(self, model: Transformer, texts: Sequence[Sequence[int]]) -> None:
        """``texts`` may be empty, and differ in length: they are padded on the right."""
        width = max((len(text) for text in texts), default=0)
        self._roots: list[Tensor] = []
        self._leaves: list[Tensor] = []
        if not width:
            return
        device = model.head_weight.device
        ids_PS = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=device)
        lengths_P = torch.tensor([len(text) for text in texts], device=device)
        columns_S = torch.arange(width, device=device)
        self._hidden_PS = columns_S >= lengths_P[:, None]
        plain = causal()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._roots += [k, v]
            return plain(layer, q, k, v)

        model.hidden(ids_PS, columns_S.expand_as(ids_PS), attend)
        # cut here: each micro-batch's backward pass ends at the leaves, and their sums go on later
        self._leaves = [root.detach().requires_grad_(root.requires_grad) for root in self._roots]

    def attend(self, batch: Batch) -> Attend:
        """Attention for rows that continue prompts, each its own."""
        if not self._leaves:
            return causal(batch.attention_documents)
        prefixes_B = batch.prefixes_B
        hidden_BS = self._hidden_PS[prefixes_B]
        padded = bool(hidden_BS.any())

        def attend(layer: int, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
            k_PSKE, v_PSKE = self._leaves[2 * layer : 2 * layer + 2]
            own_BT = torch.zeros(q_BTHE.shape[:2], dtype=torch.bool, device=q_BTHE.device)
            return attention(
                q_BTHE,
                torch.cat([k_PSKE.index_select(0, prefixes_B), k_BTKE], 1),
                torch.cat([v_PSKE.index_select(0, prefixes_B), v_BTKE], 1),
                torch.cat([hidden_BS, own_BT], 1) if padded else None,
            )

        return attend

    def backward(self) -> None:
        """Carry the gradients that have come together at the prompts into the model."""
        pairs = [(r, leaf.grad) for r, leaf in zip(self._roots, self._leaves, strict=True)]
        if used := [(r, g) for r, g in pairs if g is not None]:
            torch.autograd.backward([r for r, _ in used], [g for _, g in used])

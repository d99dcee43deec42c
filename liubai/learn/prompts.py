"""A prompt that many answers share, read once.

The answers of a group begin with the same prompt. Engines compute its keys and values once for all;
here training does so, too, and the gradients of all answers flow back into that one reading.

Shapes: B rows, S prompt tokens, K key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liubai.model.attention import attention
from liubai.model.transformer import Transformer, causal


class SharedPrompt:
    """The loop in which it belongs::

    prompt = SharedPrompt(model, ids)
    for batch in batches:                           # rows that continue the prompt
        loss(model.hidden(batch.ids_BT, batch.positions_BT, prompt.attend)).backward()
    prompt.backward()                               # what the answers' gradients mean for it
    """

    def __init__(self, model: Transformer, ids: Sequence[int]) -> None:
        ids_1S = torch.tensor([ids], device=model.head_weight.device)
        roots: dict[int, tuple[Tensor, Tensor]] = {}
        plain = causal()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            roots.setdefault(layer, (k, v))  # a checkpointing model comes by again in the backward pass
            return plain(layer, q, k, v)

        model.hidden(ids_1S, torch.arange(len(ids), device=ids_1S.device)[None], attend)
        self._roots = [root for layer in sorted(roots) for root in roots[layer]]
        # cut here: each micro-batch's backward pass ends at the leaves, and their sums go on later
        self._leaves = [root.detach().requires_grad_(root.requires_grad) for root in self._roots]

    def attend(self, layer: int, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
        """An ``Attend`` for rows that continue the prompt."""
        k_1SKE, v_1SKE = self._leaves[2 * layer : 2 * layer + 2]
        rows = (q_BTHE.shape[0], -1, -1, -1)
        return attention(
            q_BTHE, torch.cat([k_1SKE.expand(rows), k_BTKE], 1), torch.cat([v_1SKE.expand(rows), v_BTKE], 1)
        )

    def backward(self) -> None:
        """Carry the gradients that have come together at the prompt into the model."""
        pairs = [(r, leaf.grad) for r, leaf in zip(self._roots, self._leaves, strict=True)]
        if used := [(r, g) for r, g in pairs if g is not None]:
            torch.autograd.backward([r for r, _ in used], [g for _, g in used])

"""What a white-box layer does to the tokens: how sparse its codes are, and how far it compresses.

CRATE (:mod:`liubai.model.crate`) is derived from an objective, sparse rate reduction (Yu et al. 2023,
arXiv 2306.01129, eq. 1): expand all tokens, compress them onto the heads' subspaces, make their codes
sparse. Here the terms are measured layer by layer on texts that the model reads. For the other
architectures the first two exist as well (of their feed-forward units, their tokens), so that the curves
can be compared; they have no subspaces of their own.

Coding rates are nats a token as they stand, for N is inside the determinant; of tokens scaled to unit
length (D hidden, E a subspace's size, ε² = 0.25)::

    R(Z)   = ½ logdet(I + D/(N ε²) ZᵀZ)                   all tokens
    Rc(Z)  = Σ_k ½ logdet(I + E/(N ε²) (Z U_k)ᵀ(Z U_k))   in the subspaces, U_k orthonormal

The subspaces are those of what attention reads, so tokens are looked at in its coordinates on both sides of
it: the norm before attention is applied to Z and to Z + attention alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liubai.model.blocks import Layer, RMSNorm
from liubai.model.crate import CrateBlock, SparseCode
from liubai.model.transformer import Transformer, causal

EPSILON_SQUARED = 0.25
#: Below this share of the largest one a unit of an ordinary feed-forward layer counts as silent: SwiGLU is
#: never exactly zero.
SILENT = 0.01


@dataclass(frozen=True, slots=True)
class LayerFigures:
    """``sparsity``: share of zeros in the code (of silent units where nothing is exactly zero). In nats a
    token, ``rate``: R of what the layer's attention reads; ``before``: Rc of the same, in its subspaces, and
    ``compressed``: Rc after attention (``None`` without subspaces)."""

    sparsity: float
    rate: float
    before: float | None
    compressed: float | None


def coding_rate(tokens_ND: Tensor) -> float:
    """R(Z), nats a token; tokens are scaled to unit length first. The same tokens many times over change
    nothing."""
    unit_ND = nn.functional.normalize(tokens_ND.double(), dim=-1)
    N, D = unit_ND.shape
    gram_DD = unit_ND.T @ unit_ND * (D / (N * EPSILON_SQUARED))
    return float(torch.logdet(torch.eye(D, dtype=torch.float64) + gram_DD)) / 2


def subspace_rate(tokens_ND: Tensor, subspaces_HDE: Tensor) -> float:
    """Rc(Z), nats a token, for orthonormal bases of the subspaces: what the heads see of the tokens."""
    unit_ND = nn.functional.normalize(tokens_ND.double(), dim=-1)
    N, E = unit_ND.shape[0], subspaces_HDE.shape[-1]
    total = 0.0
    for basis_DE in subspaces_HDE.double():
        seen_NE = unit_ND @ torch.linalg.qr(basis_DE).Q
        gram_EE = seen_NE.T @ seen_NE * (E / (N * EPSILON_SQUARED))
        total += float(torch.logdet(torch.eye(E, dtype=torch.float64) + gram_EE)) / 2
    return total


@torch.no_grad()
def white_box(model: Transformer, texts: Sequence[Sequence[int]]) -> list[LayerFigures]:
    """The figures of every layer, over all tokens of ``texts`` (ids), each read on its own."""
    blocks = list(model.layers)
    seen: list[list[Tensor]] = [[] for _ in blocks]  # what attention reads
    left: list[list[Tensor]] = [[] for _ in blocks]  # that and what attention adds, in the same coordinates
    zeros, units = [0.0] * len(blocks), [0] * len(blocks)
    hooks = []

    def watch(layer: int, block: nn.Module) -> None:
        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            code = output if isinstance(module, SparseCode) else inputs[0]
            floor = 0.0 if isinstance(module, SparseCode) else SILENT * float(code.abs().max())
            zeros[layer] += float((code.abs() <= floor).sum())
            units[layer] += code.numel()

        assert isinstance(block, Layer)
        before = block.input_layernorm

        def keep(norm: RMSNorm, kept: list[Tensor]) -> None:
            def look(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                # past the hooks: of the norm before attention this is one
                kept.append(before.forward(inputs[0]).flatten(0, -2).cpu())

            hooks.append(norm.register_forward_pre_hook(look))

        keep(before, seen[layer])
        if isinstance(block, CrateBlock):
            keep(block.post_attention_layernorm, left[layer])
        unit = block.code if isinstance(block, CrateBlock) else block.mlp.down_proj  # type: ignore[union-attr]
        hooks.append(unit.register_forward_hook(count))  # type: ignore[union-attr, arg-type]

    for layer, block in enumerate(blocks):
        watch(layer, block)
    try:
        device = model.head_weight.device
        for ids in texts:
            ids_1T = torch.tensor([list(ids)], device=device)
            positions = torch.arange(ids_1T.shape[1], device=device)[None]
            model.hidden(ids_1T, positions, causal())
    finally:
        for hook in hooks:
            hook.remove()
    return [
        _figures(block, torch.cat(seen[i]), left[i], zeros[i] / max(1, units[i]))
        for i, block in enumerate(blocks)
    ]


def _figures(block: nn.Module, seen_ND: Tensor, left: list[Tensor], sparsity: float) -> LayerFigures:
    rate = coding_rate(seen_ND)
    if not isinstance(block, CrateBlock):
        return LayerFigures(sparsity, rate, None, None)
    attention = block.self_attn
    u_HED = attention.u_proj.weight.detach().cpu().view(-1, attention.head_dim, seen_ND.shape[1])
    before, compressed = (
        subspace_rate(tokens_ND, u_HED.transpose(1, 2)) for tokens_ND in (seen_ND, torch.cat(left))
    )
    return LayerFigures(sparsity, rate, before, compressed)


def atoms(model: Transformer, layer: int, count: int = 8) -> list[list[int]]:
    """What the atoms of a CRATE layer's dictionary are about: for each the ids of the ``count`` tokens whose
    embeddings lie closest, by cosine."""
    block = model.layers[layer]
    if not isinstance(block, CrateBlock):
        raise ValueError("only CRATE has a dictionary")
    atoms_MD = nn.functional.normalize(block.code.dictionary.weight.detach().float(), dim=-1)
    words_VD = nn.functional.normalize(model.embed_tokens.weight.detach().float(), dim=-1)
    found: list[list[int]] = (atoms_MD @ words_VD.T).topk(min(count, words_VD.shape[0]), -1).indices.tolist()
    return found

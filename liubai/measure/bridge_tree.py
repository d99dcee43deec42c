"""Token sequences that share their beginnings, scored at once: each token is read once.

A thought is cut after every step, closed there, and followed by every answer whose probability is asked for.
Written out, these sequences would repeat the question and the thought dozens of times; as a tree, a token is
a node with a parent, and it attends to its ancestors and itself alone. Its log-probability is what it would
have in a sequence of its own (tree attention, as in SpecInfer, Miao et al. 2023, arXiv 2305.09781).

Everything but attention works token by token, so the nodes of many trees are read as one flat batch without
padding. Attention comes in two kinds: along the trunk of a tree, and of what grows at one place of the trunk
to the trunk below it and to itself. Who attends to whom is carried with the nodes and never inferred from
token values.

Shapes: N nodes of all trees, H query heads, K key/value heads, E head size; L nodes of a trunk, G groups of
W nodes that see S nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from liubai.learn.logprobs import token_logprobs
from liubai.learn.replicas import Replicas
from liubai.model.attention import attention
from liubai.model.transformer import Transformer

#: Nodes read at once, and weights of attention that are written down at once.
TOKENS, WEIGHTS = 4096, 1 << 20
#: What the first token of a sequence follows.
ROOT = -1


class TokenTree:
    """``parents[i]`` is the node before node ``i``, always a smaller number; ``depths[i]`` its position."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.scored: list[bool] = []
        self._children: dict[tuple[int, int], int] = {}

    def extend(self, node: int, ids: Sequence[int], scored: Sequence[bool] | bool = False) -> list[int]:
        """Write ``ids`` behind ``node`` (or :data:`ROOT`), and return their nodes. What stands there already
        is not written again. ``scored`` says which of them are asked for; the first token of all has no
        probability, and asking for it raises ``ValueError``."""
        wanted = [scored] * len(ids) if isinstance(scored, bool) else scored
        path = []
        for id, ask in zip(ids, wanted, strict=True):
            if ask and node == ROOT:
                raise ValueError("nothing stands before the first token: it has no probability")
            child = self._children.get((node, id))
            if child is None:
                child = self._children[node, id] = len(self.ids)
                self.ids.append(id)
                self.parents.append(node)
                self.depths.append(0 if node == ROOT else self.depths[node] + 1)
                self.scored.append(ask)
            elif ask:
                self.scored[child] = True
            node = child
            path.append(node)
        return path

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trunk(self) -> int:
        """How many nodes, from the first, follow one upon another."""
        return next((i for i, parent in enumerate(self.parents) if parent != i - 1), len(self))

    def groups(self) -> dict[int, list[int]]:
        """What grows at each node of the trunk (or of :data:`ROOT`), in order."""
        trunk, foot = self.trunk, dict[int, int]()
        found: dict[int, list[int]] = {}
        for i in range(trunk, len(self)):
            parent = self.parents[i]
            foot[i] = parent if parent < trunk else foot[parent]
            found.setdefault(foot[i], []).append(i)
        return found


@dataclass(frozen=True, slots=True)
class Scores:
    """By node, float64, in nats, NaN where nothing was asked: the log-probability of the node's token, and
    the entropy of the distribution that it was taken from."""

    logprobs_T: NDArray[np.float64]
    entropies_T: NDArray[np.float64]


def score(model: Transformer, trees: Sequence[TokenTree]) -> list[Scores]:
    """The scores of every tree, at temperature 1. Of a small model on a CPU every core reads trees of its
    own."""
    lots: list[list[TokenTree]] = []
    nodes = TOKENS
    for tree in trees:
        if nodes + len(tree) > TOKENS:
            lots.append([])
            nodes = 0
        lots[-1].append(tree)
        nodes += len(tree)

    @torch.no_grad()  # it is a thread's own affair
    def read(model: Transformer, share: Sequence[list[TokenTree]]) -> list[list[Scores]]:
        return [_score(model, lot) for lot in share]

    return [scores for lot in Replicas(model).map(read, lots) for scores in lot] if lots else []


def _score(model: Transformer, trees: Sequence[TokenTree]) -> list[Scores]:
    device = model.head_weight.device
    first = np.cumsum([0, *map(len, trees)])
    asked = [np.flatnonzero(tree.scored) for tree in trees]

    def flat(columns: Sequence[Sequence[int] | NDArray[np.int64]]) -> Tensor:
        return torch.from_numpy(np.concatenate([np.asarray(c, dtype=np.int64) for c in columns])).to(device)

    ids_N, depths_N = flat([t.ids for t in trees]), flat([t.depths for t in trees])
    hidden_ND = model.hidden(ids_N, depths_N, _Attention(trees, first.tolist(), model.head_weight))
    before = flat([at + np.asarray(t.parents)[a] for t, a, at in zip(trees, asked, first, strict=False)])
    targets = ids_N[flat([at + a for a, at in zip(asked, first, strict=False)])]
    logprobs, entropies = token_logprobs(hidden_ND[before], model.head_weight, targets)
    values = torch.stack([logprobs, entropies]).double().cpu().numpy()
    scores, at = [], 0
    for tree, wanted in zip(trees, asked, strict=True):
        values_2T = np.full((2, len(tree)), np.nan)
        values_2T[:, wanted] = values[:, at : at + len(wanted)]
        scores.append(Scores(*values_2T))
        at += len(wanted)
    return scores


class _Attention:
    """An ``Attend`` for the nodes of some trees, which begin at ``first``."""

    def __init__(self, trees: Sequence[TokenTree], first: Sequence[int], like: Tensor) -> None:
        self._like = like
        trunks = [(at, tree.trunk) for tree, at in zip(trees, first, strict=False)]
        self._trunks_BL = self._index([list(range(at, at + size)) for at, size in trunks])
        rows = [(b, t) for b, (_, size) in enumerate(trunks) for t in range(size)]
        self._of_trunks = self._places(rows, self._trunks_BL.shape[1])
        self._in_trunks = self._flat([at + t for at, size in trunks for t in range(size)])
        groups = [
            (tree, at, foot + 1, nodes)
            for tree, at in zip(trees, first, strict=False)
            for foot, nodes in tree.groups().items()
        ]
        groups.sort(key=lambda g: (-len(g[3]), -g[2]))
        self._lots = []
        while groups:
            width, size = len(groups[0][3]), 1
            lead = groups[0][2]
            while size < len(groups) and 2 * len(groups[size][3]) >= width:
                longer = max(lead, groups[size][2])
                if (size + 1) * width * (longer + width) > WEIGHTS:
                    break
                lead, size = longer, size + 1
            self._lots.append(self._lot(groups[:size], lead, width))
            groups = groups[size:]

    def _lot(
        self, groups: Sequence[tuple[TokenTree, int, int, list[int]]], lead: int, width: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Nodes ``[G, W]``, what they may look at ``[G, S]``, the mask ``[G, 1, W, S]``, and where the
        results are and belong."""
        seen_GWS = np.zeros((len(groups), width, lead + width), dtype=np.bool_)
        keys, rows, nodes = [], [], []
        for g, (tree, at, below, members) in enumerate(groups):
            place = {node: w for w, node in enumerate(members)}
            mine_WS = seen_GWS[g]
            for w, node in enumerate(members):
                parent = place.get(tree.parents[node])
                if parent is None:
                    mine_WS[w, :below] = True
                else:
                    mine_WS[w] = mine_WS[parent]
                mine_WS[w, lead + w] = True
            mine_WS[len(members) :] = True  # padding may see anything, nobody looks at it
            keys.append([*range(at, at + below), *[at] * (lead - below), *(at + m for m in members)])
            rows += [(g, w) for w in range(len(members))]
            nodes += [at + m for m in members]
        seen_G1WS = torch.from_numpy(seen_GWS)[:, None].to(self._like.device)
        # additive, made once: from a boolean mask every layer would make its own
        bias_G1WS = torch.zeros(seen_G1WS.shape, dtype=self._like.dtype, device=self._like.device)
        bias_G1WS.masked_fill_(~seen_G1WS, -torch.inf)
        own_GW = self._index([[at + m for m in members] for _, at, _, members in groups])
        return own_GW, self._index(keys), bias_G1WS, self._places(rows, width), self._flat(nodes)

    def __call__(self, layer: int, q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor) -> Tensor:
        out_NHE = torch.empty_like(q_NHE)
        at_BL = self._trunks_BL
        seen_BLHE = attention(q_NHE[at_BL], k_NKE[at_BL], v_NKE[at_BL])
        out_NHE[self._in_trunks] = seen_BLHE.flatten(0, 1)[self._of_trunks]
        for own_GW, keys_GS, bias_G1WS, places, nodes in self._lots:
            seen_GHWE = F.scaled_dot_product_attention(
                q_NHE[own_GW].transpose(1, 2),
                k_NKE[keys_GS].transpose(1, 2),
                v_NKE[keys_GS].transpose(1, 2),
                attn_mask=bias_G1WS,
                enable_gqa=q_NHE.shape[1] != k_NKE.shape[1],
            )
            out_NHE[nodes] = seen_GHWE.transpose(1, 2).flatten(0, 1)[places]
        return out_NHE

    def _index(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows of unequal length, the shorter ones filled up with their first number."""
        width = max(map(len, rows))
        filled = [[*row, *[row[0]] * (width - len(row))] for row in rows]
        return torch.tensor(filled, dtype=torch.long, device=self._like.device)

    def _places(self, rows: Sequence[tuple[int, int]], width: int) -> Tensor:
        return self._flat([row * width + column for row, column in rows])

    def _flat(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self._like.device)

"""What each attention head looks at, what it reads and writes, and what is lost without it.

Attention is a strategy of the model (:data:`liubai.model.blocks.Attend`), so an instrument is one more
strategy: :class:`Watching` computes the weights as the plain formula says and keeps them. Scores are means
over texts that the model wrote itself; a head is what it does there, and may do something else elsewhere.

Shapes: T tokens, L layers, H query heads, K key/value heads, E head size, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from liubai.measure.ratio import ratio_and_error
from liubai.model.blocks import Block
from liubai.model.transformer import Transformer

#: What a head can be good at: name -> what the score says. All are mean attention weights, 0 to 1.
KINDS = {
    "previous": "on the token before",
    "first": "on the first token",
    "same": "on earlier tokens like this one",
    "induction": "on what followed earlier tokens like this one",
    "target": "on the target, from the answer",
    "source": "on the number in the question that is written next",
}


@dataclass(frozen=True, slots=True)
class Reading:
    """A text that the model reads: ``ids`` of question and answer, of which the first ``prompt`` are the
    question; ``target`` is the place of what the answer aims at, ``numbers`` the ids of number tokens."""

    ids: tuple[int, ...]
    prompt: int
    target: int | None = None
    numbers: frozenset[int] = frozenset()


@dataclass(slots=True)
class Watching:
    """An ``Attend`` for whole rows ``[1, T]`` that keeps each layer's weights ``[H, T, T]``. The heads of
    ``silent``, (layer, head) pairs, say nothing."""

    silent: frozenset[tuple[int, int]] = frozenset()
    weights: list[Tensor] = field(default_factory=list)

    def __call__(self, layer: int, q_1THE: Tensor, k_1TKE: Tensor, v_1TKE: Tensor) -> Tensor:
        group = q_1THE.shape[2] // k_1TKE.shape[2]
        q_HTE = q_1THE[0].transpose(0, 1).float()
        k_HTE, v_HTE = (x[0].transpose(0, 1).repeat_interleave(group, 0).float() for x in (k_1TKE, v_1TKE))
        T = q_HTE.shape[1]
        scores_HTT = q_HTE @ k_HTE.transpose(1, 2) * q_HTE.shape[-1] ** -0.5
        later_TT = torch.ones(T, T, dtype=torch.bool, device=q_HTE.device).triu(1)
        weights_HTT = scores_HTT.masked_fill(later_TT, -torch.inf).softmax(-1)
        self.weights.append(weights_HTT)
        out_HTE = weights_HTT @ v_HTE
        for at, head in self.silent:
            if at == layer:
                out_HTE[head] = 0
        out_1THE: Tensor = out_HTE.transpose(0, 1)[None].to(q_1THE.dtype)
        return out_1THE


@torch.no_grad()
def patterns(model: Transformer, ids: Sequence[int]) -> Tensor:
    """The weights of every head on one text, ``[L, H, T, T]``: row t says where token t looks."""
    watching = Watching()
    _read(model, ids, watching)
    return torch.stack(watching.weights).cpu()


@torch.no_grad()
def head_scores(model: Transformer, readings: Sequence[Reading]) -> dict[str, Tensor]:
    """Kind -> ``[L, H]``: the mean weight over all places of ``readings`` at which the kind could show
    itself; NaN where there is none."""
    config = model.config
    size = config.num_hidden_layers, config.num_attention_heads
    total = {kind: torch.zeros(size, dtype=torch.float64) for kind in KINDS}
    places = dict.fromkeys(KINDS, 0)
    for reading in readings:
        weights_LHTT = patterns(model, reading.ids).double()
        for kind, mask_TT in looks(reading).items():
            rows_T = mask_TT.any(1)
            if not rows_T.any():
                continue
            total[kind] += (weights_LHTT * mask_TT).sum(-1)[..., rows_T].sum(-1)
            places[kind] += int(rows_T.sum())
    return {kind: total[kind] / n if (n := places[kind]) else total[kind] * torch.nan for kind in KINDS}


def chances(readings: Sequence[Reading]) -> dict[str, float]:
    """Kind -> the score of a head that looks everywhere alike, over the same places as :func:`head_scores`;
    NaN where there is none."""
    shares: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for reading in readings:
        seen_T = torch.arange(1, len(reading.ids) + 1)  # a token sees itself and what came before
        for kind, mask_TT in looks(reading).items():
            count_T = mask_TT.sum(1)
            shares[kind].append((count_T.double() / seen_T)[count_T > 0])
    return {kind: float(torch.cat(found).mean()) if found else math.nan for kind, found in shares.items()}


def looks(reading: Reading) -> dict[str, Tensor]:
    """Kind -> boolean ``[T, T]``: which places count for it, seen from which. A row without any does not
    take part."""
    ids_T = torch.tensor(reading.ids)
    T = len(reading.ids)
    at_T = torch.arange(T)
    earlier_TT = at_T[None] < at_T[:, None]
    alike_TT = ids_T[:, None] == ids_T[None]
    same_TT = alike_TT & earlier_TT
    # what followed: shifted by one; the token itself is not what followed it
    induction_TT = torch.zeros_like(same_TT)
    induction_TT[:, 1:] = same_TT[:, :-1]
    induction_TT &= earlier_TT
    answer_T = at_T >= reading.prompt - 1  # from where the answer's tokens are chosen
    target_TT = torch.zeros_like(same_TT)
    if reading.target is not None:
        target_TT[:, reading.target] = answer_T & (at_T > reading.target)
    next_T = torch.cat([ids_T[1:], torch.tensor([-1])])
    number_T = torch.tensor([i in reading.numbers for i in next_T.tolist()])
    source_TT = (next_T[:, None] == ids_T[None]) & (at_T[None] < reading.prompt) & earlier_TT
    source_TT &= (number_T & answer_T)[:, None]
    return {
        "previous": at_T[None] == at_T[:, None] - 1,
        "first": (at_T == 0)[None] & earlier_TT,
        "same": same_TT,
        "induction": induction_TT,
        "target": target_TT,
        "source": source_TT,
    }


def subspaces(model: Transformer) -> dict[str, Tensor]:
    """How large the matrices of each head are and what they share, ``[L, H]`` each.

    ``|q| |k| |v| |o|`` are Frobenius norms. ``q·k`` is the overlap of what Q and K read: the mean squared
    cosine between their row spaces, 1 when they are the same, E/D by chance; ``k·v`` likewise.
    ``v·embedding`` is that between what V reads and the E main directions of the embedding, ``copy`` the mean
    cosine of a token's embedding with what the head would write of it (W_o W_v x), 1 for a head that copies.
    Norm weights before the projections are taken in.
    """
    config = model.config
    if config.crate:
        raise ValueError("CRATE has one projection for all three; see liubai.measure.whitebox")
    group = config.num_attention_heads // config.num_key_value_heads
    words_VD = model.embed_tokens.weight.detach().float().cpu()
    main_ED = torch.linalg.svd(words_VD - words_VD.mean(0), full_matrices=False).Vh[: config.head_dim]
    rows: dict[str, list[list[float]]] = {}
    for block in model.layers:
        assert isinstance(block, Block)
        scale_D = block.input_layernorm.weight.detach().float().cpu()
        q_HED, k_KED, v_KED, o_DHE = (
            getattr(block.self_attn, f"{name}_proj").weight.detach().float().cpu() for name in "qkvo"
        )
        q_HED, k_KED, v_KED = (
            (w * scale_D).view(-1, config.head_dim, config.hidden_size) for w in (q_HED, k_KED, v_KED)
        )
        o_HDE = o_DHE.view(config.hidden_size, -1, config.head_dim).transpose(0, 1)
        found: dict[str, list[float]] = {}
        for head in range(config.num_attention_heads):
            q, k, v, o = q_HED[head], k_KED[head // group], v_KED[head // group], o_HDE[head]
            written_VD = words_VD @ v.T @ o.T
            for name, value in {
                "|q|": q.norm(), "|k|": k.norm(), "|v|": v.norm(), "|o|": o.norm(),
                "q·k": overlap(q, k), "k·v": overlap(k, v), "v·embedding": overlap(v, main_ED),
                "copy": torch.cosine_similarity(written_VD, words_VD, dim=-1).mean(),
            }.items():  # fmt: skip
                found.setdefault(name, []).append(float(value))
        for name, values in found.items():
            rows.setdefault(name, []).append(values)
    return {name: torch.tensor(values) for name, values in rows.items()}


def overlap(a_ED: Tensor, b_ED: Tensor) -> float:
    """The mean squared cosine of the principal angles between two row spaces (Björck & Golub 1973)."""
    a_DE, b_DE = (torch.linalg.qr(x.double().T).Q for x in (a_ED, b_ED))
    return float((a_DE.T @ b_DE).square().sum() / min(a_DE.shape[1], b_DE.shape[1]))


@torch.no_grad()
def ablation(model: Transformer, readings: Sequence[Reading]) -> tuple[Tensor, Tensor]:
    """By how many nats a token the answers of ``readings`` become less likely when one head says nothing, and
    the standard error of that over the answers, ``[L, H]`` each. Negative where the head was in the way."""
    config = model.config
    sizes = [len(reading.ids) - reading.prompt for reading in readings]
    whole = _losses(model, readings, frozenset())
    lost, error = torch.empty(2, config.num_hidden_layers, config.num_attention_heads)
    for layer in range(config.num_hidden_layers):
        for head in range(config.num_attention_heads):
            without = _losses(model, readings, frozenset({(layer, head)}))
            more = [a - b for a, b in zip(without, whole, strict=True)]
            lost[layer, head], error[layer, head] = ratio_and_error(more, sizes)
    return lost, error


def _losses(
    model: Transformer, readings: Sequence[Reading], silent: frozenset[tuple[int, int]]
) -> list[float]:
    """The cross-entropy of each answer, in nats."""
    found = []
    for reading in readings:
        logits_TV = model.head(_read(model, reading.ids, Watching(silent))).float().log_softmax(-1)
        targets = torch.tensor(reading.ids[reading.prompt :], device=logits_TV.device)
        found.append(-float(logits_TV[reading.prompt - 1 : -1].gather(1, targets[:, None]).sum()))
    return found


def _read(model: Transformer, ids: Sequence[int], watching: Watching) -> Tensor:
    """The last hidden state ``[T, D]``."""
    ids_1T = torch.tensor([list(ids)], device=model.head_weight.device)
    positions_1T = torch.arange(ids_1T.shape[1], device=ids_1T.device)[None]
    return model.hidden(ids_1T, positions_1T, watching)[0]


def division_of_labour(scores: dict[str, Tensor]) -> dict[str, tuple[int, int, float]]:
    """Kind -> (layer, head, score) of the head that is best at it; kinds that never showed are left out."""
    found = {}
    for kind, table_LH in scores.items():
        if table_LH.isnan().all():
            continue
        best = int(table_LH.argmax())
        layer, head = divmod(best, table_LH.shape[1])
        found[kind] = layer, head, float(table_LH[layer, head])
    return found

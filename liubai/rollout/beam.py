"""Beam search: the likeliest whole answers, by keeping the ``width`` likeliest beginnings of each length.

    search = BeamSearch(model, request, width=4, eos_ids=tokenizer.eos_ids)
    while search.step():                         # one token for every beginning that is still open
        ...
    samples = search.best()

An answer scores ``log p / length^alpha`` (Wu et al. 2016, arXiv 1609.08144, eq. 14, without its constants):
``alpha`` 0 is the likeliest answer, which tends to be a short one; 1 is the mean per token. Ended answers
come before those that ran out of tokens, whatever they score: an answer without an end is none. When the
width is that of all beginnings there are, this is the best of all sequences.

The keys and values are its own, one rectangle whose rows are put in a new order at each step: all
beginnings are of one length, so that nothing is masked. Left out: diversity between beams, constraints.

Shapes: W beginnings, T tokens, V vocabulary, L layers, K key/value heads, H query heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from liubai.errors import Diverged, UserError, is_out_of_memory
from liubai.model.transformer import Transformer, causal
from liubai.rollout.engine import Request
from liubai.rollout.sampling import BROKEN
from liubai.types import Sample, Span, Stop

T = TypeVar("T")
#: Tokens that there is room for at first; most answers are shorter than they may be.
ROOM = 64


@dataclass(frozen=True, slots=True)
class _Found:
    """A whole answer. ``score`` is normalised."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    score: float
    stop: Stop


class BeamSearch:
    """See the module. Of the request, ``temperature``, ``top_p`` and ``seed`` mean nothing here:
    log-probabilities are those at temperature 1. ``version`` is that of the weights, for the samples.

    Raises ``ValueError`` for a width below 1, ``UserError`` when memory runs out, ``Diverged`` for broken
    weights.
    """

    def __init__(
        self,
        model: Transformer,
        request: Request,
        width: int,
        *,
        eos_ids: Sequence[int],
        alpha: float = 0.0,
        version: int = 0,
    ) -> None:
        if width < 1:
            raise ValueError(f"a beam has a width of at least 1, not {width}")
        self.model, self.request, self.width = model, request, width
        self.alpha, self.version = alpha, version
        self.device = device = model.head_weight.device
        ends = [i for i in (*eos_ids, *request.stop_ids) if 0 <= i < model.config.vocab_size]
        self._ends = torch.tensor(sorted(set(ends)), dtype=torch.long, device=device)
        self._ended: list[_Found] = []
        self._cut_off: list[_Found] = []
        # the open beginnings: at first one, of no tokens
        self._scores_W = torch.zeros(1, dtype=torch.float64, device=device)
        self._ids_WT = torch.zeros(1, 0, dtype=torch.long, device=device)
        self._logprobs_WT = torch.zeros(1, 0, dtype=torch.float64, device=device)
        self._last_W = torch.tensor(request.prompt_ids[-1:], device=device)
        self._cache = _sparing(width, lambda: self._read(request.prompt_ids[:-1]))

    @property
    def length(self) -> int:
        """Tokens of the open beginnings."""
        return self._ids_WT.shape[1]

    def step(self) -> bool:
        """One token more; ``False`` when nothing is open any more that could be among the best."""
        if not len(self._scores_W):
            return False
        with torch.inference_mode():
            logprobs_WV = _sparing(self.width, self._next)
            self._grow(logprobs_WV)
        if self.length == self.request.max_tokens:
            self._cut_off += self._found(self._ids_WT, self._logprobs_WT, self._scores_W, Stop.LENGTH)
            self._scores_W = self._scores_W[:0]
        elif self._is_settled():
            self._scores_W = self._scores_W[:0]
        return bool(len(self._scores_W))

    def best(self) -> list[Sample]:
        """At most ``width`` answers, best first. To be called when :meth:`step` has said that it is over."""
        cut_off = sorted(self._cut_off, key=lambda found: -found.score)
        prompt = self.request.prompt_ids
        return [
            Sample(prompt, f.ids, f.logprobs, f.stop, (Span(self.version, len(f.ids)),))
            for f in (self._ended + cut_off)[: self.width]
        ]

    def _read(self, ids: Sequence[int]) -> _Rows:
        """The prompt, but for the last token, which the first step feeds."""
        c = self.model.config
        like = self.model.embed_tokens.weight
        most = len(ids) + self.request.max_tokens
        rows = _Rows(c.num_hidden_layers, c.num_key_value_heads, len(ids) + ROOM, most, c.head_dim, like)
        if ids:
            plain = causal()

            def attend(layer: int, q: Tensor, k_1TKE: Tensor, v_1TKE: Tensor) -> Tensor:
                rows.k_LWKTE[layer, :, :, : len(ids)] = k_1TKE.transpose(1, 2)
                rows.v_LWKTE[layer, :, :, : len(ids)] = v_1TKE.transpose(1, 2)
                return plain(layer, q, k_1TKE, v_1TKE)

            with torch.inference_mode():
                ids_1T = torch.tensor([list(ids)], device=self.device)
                self.model.hidden(ids_1T, torch.arange(len(ids), device=self.device)[None], attend)
            rows.filled = len(ids)
        return rows

    def _next(self) -> Tensor:
        """Log-probabilities of the next token, ``[W, V]`` in float64."""
        n = len(self._last_W)
        padded = self._last_W.new_full((max(n, self.model.fewest_rows),), int(self._last_W[0]))
        padded[:n] = self._last_W
        positions = torch.full_like(padded, self._cache.filled)
        hidden = self.model.hidden(padded, positions, self._cache)
        self._cache.filled += 1
        logits_WV = self.model.head(hidden)[:n].double()
        if not bool(torch.isfinite(logits_WV).all()):
            raise Diverged(BROKEN)
        return torch.log_softmax(logits_WV, dim=-1)

    def _grow(self, logprobs_WV: Tensor) -> None:
        vocabulary = logprobs_WV.shape[1]
        scores_WV = self._scores_W[:, None] + logprobs_WV
        # ends: every one competes, and leaves its place in the beam to those that go on
        for end in self._ends.tolist():
            token_W1 = torch.full_like(self._last_W[:, None], end)
            self._ended += self._found(
                torch.cat([self._ids_WT, token_W1], 1),
                torch.cat([self._logprobs_WT, logprobs_WV[:, end, None]], 1),
                scores_WV[:, end],
                Stop.EOS,
            )
        self._ended = sorted(self._ended, key=lambda found: -found.score)[: self.width]
        scores_WV[:, self._ends] = -torch.inf
        open_tokens = len(scores_WV) * (vocabulary - len(self._ends))
        scores_W, flat_W = scores_WV.flatten().topk(min(self.width, open_tokens))
        rows_W, tokens_W = flat_W // vocabulary, flat_W % vocabulary
        self._ids_WT = torch.cat([self._ids_WT[rows_W], tokens_W[:, None]], 1)
        self._logprobs_WT = torch.cat([self._logprobs_WT[rows_W], logprobs_WV[rows_W, tokens_W, None]], 1)
        self._scores_W, self._last_W = scores_W, tokens_W
        self._cache.reorder(rows_W)

    def _is_settled(self) -> bool:
        """Whole answers fill the width, and no beginning can become a better one: it loses with every token,
        and the longest that it can be is what the normalisation would forgive most."""
        if len(self._ended) < self.width or not len(self._scores_W):
            return not len(self._scores_W)
        bound = float(self._scores_W.max()) / self.request.max_tokens**self.alpha
        return bool(bound <= self._ended[-1].score)

    def _found(self, ids_WT: Tensor, logprobs_WT: Tensor, scores_W: Tensor, stop: Stop) -> list[_Found]:
        scale = ids_WT.shape[1] ** self.alpha
        worth_W = scores_W / scale
        rows = range(len(worth_W))
        if stop is Stop.EOS and len(self._ended) == self.width:  # most of them are hopeless: not to Python
            rows = (worth_W > self._ended[-1].score).nonzero()[:, 0].tolist()  # type: ignore[assignment]
        return [
            _Found(tuple(ids_WT[row].tolist()), tuple(logprobs_WT[row].tolist()), float(worth_W[row]), stop)
            for row in rows
        ]


class _Rows:
    """Keys and values of all beginnings, and the ``Attend`` of one token a row. Padding rows come last. There
    is room for ``length`` tokens at first, and for ``most`` at last."""

    def __init__(self, layers: int, heads: int, length: int, most: int, size: int, like: Tensor) -> None:
        self.k_LWKTE = like.new_zeros(layers, 1, heads, min(length, most), size)
        self.v_LWKTE = torch.zeros_like(self.k_LWKTE)
        self.most = most
        self.filled = 0

    def reorder(self, rows_W: Tensor) -> None:
        """Row i is what row ``rows_W[i]`` was, and has room for one more token."""
        n = self.filled
        for name in ("k_LWKTE", "v_LWKTE"):
            old_LWKTE: Tensor = getattr(self, name)
            layers, rows, heads, room, size = old_LWKTE.shape
            new_LWKTE = old_LWKTE
            if rows != len(rows_W) or n == room:
                room = min(2 * room, self.most) if n == room else room
                new_LWKTE = old_LWKTE.new_zeros(layers, len(rows_W), heads, room, size)
            new_LWKTE[:, :, :, :n] = old_LWKTE[:, rows_W, :, :n]
            setattr(self, name, new_LWKTE)

    def __call__(self, layer: int, q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor) -> Tensor:
        at, n = self.filled, self.k_LWKTE.shape[1]
        k_WKTE, v_WKTE = self.k_LWKTE[layer], self.v_LWKTE[layer]
        k_WKTE[:, :, at] = k_NKE[:n]
        v_WKTE[:, :, at] = v_NKE[:n]
        out_WHE = F.scaled_dot_product_attention(
            q_NHE[:n, :, None],
            k_WKTE[:, :, : at + 1],
            v_WKTE[:, :, : at + 1],
            enable_gqa=q_NHE.shape[1] != k_NKE.shape[1],
        )[:, :, 0]
        if n == len(q_NHE):
            return out_WHE
        return torch.cat([out_WHE, torch.zeros_like(q_NHE[n:])])


def _sparing(width: int, work: Callable[[], T]) -> T:
    try:
        return work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"the keys and values of {width} beams do not fit the memory; lower the width or max_tokens"
        ) from None

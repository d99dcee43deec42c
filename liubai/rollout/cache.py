"""The key/value cache, in bands of length.

Answers differ in length, and attention over one rectangle would cost every answer what the longest
one costs. So rows live in bands (32, 64, 128 … tokens wide): a row moves to the next band when it
outgrows its own, and the hole that it leaves is filled by the band's last row. Bands stay dense, so
each decoding step is one kernel, or two batched matrix products, a band and layer, over live rows only.

Shapes: n rows, K key/value heads, T tokens, E head size, H query heads, G = H/K.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from liubai.errors import UserError, is_out_of_memory
from liubai.model import kernels
from liubai.model.config import ModelConfig

NARROWEST = 64
#: An empty band gives memory of more bytes than this back; to a small model, asking again would cost more.
KEEP = 1 << 28


class Band:
    """Rows of at most ``width`` tokens, never more than ``most``. ``slots[r]`` says whose row ``r`` is."""

    def __init__(
        self, config: ModelConfig, width: int, dtype: torch.dtype, device: torch.device, most: float
    ) -> None:
        self.width, self.most = width, most
        self.slots = torch.empty(0, dtype=torch.long, device=device)
        self._shape = (config.num_hidden_layers, config.num_key_value_heads, width, config.head_dim)
        self.k = torch.empty(0, dtype=dtype, device=device)
        self.v = torch.empty(0, dtype=dtype, device=device)
        self.capacity = 0
        self.longest = 0  #: tokens of the longest row, as of the last decoding step

    def __len__(self) -> int:
        return self.slots.shape[0]

    def append(self, slots: Tensor) -> slice:
        """Room for new rows at the end."""
        n, m = len(self), slots.shape[0]
        if n + m > self.capacity:
            self._grow(n + m)
        self.slots = torch.cat([self.slots, slots])
        return slice(n, n + m)

    def _grow(self, rows: int) -> None:
        layers, heads, width, size = self._shape
        capacity = max(rows, int(min(self.most, rows + max(4, rows // 2))))
        for name in ("k", "v"):
            old: Tensor = getattr(self, name)
            # zeros, not empty: masked columns are multiplied by 0, and 0 × NaN is NaN
            shape = (layers, capacity, heads, width, size)
            try:
                new = torch.zeros(shape, dtype=old.dtype, device=self.slots.device)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise UserError(
                    f"the keys and values of {rows} answers of up to {width} tokens do not fit the memory; "
                    "lower slots (answers written at once) or max_tokens"
                ) from None
            if len(self):
                new[:, : len(self)] = old[:, : len(self)]
            setattr(self, name, new)
        self.capacity = capacity

    def remove(self, rows: Sequence[int]) -> None:
        """Drop rows; the last ones move into the holes."""
        gone = set(rows)
        keep = len(self) - len(gone)
        holes = sorted(r for r in gone if r < keep)
        movers = [r for r in range(keep, len(self)) if r not in gone]
        if holes:
            self.k[:, holes] = self.k[:, movers]
            self.v[:, holes] = self.v[:, movers]
            self.slots[holes] = self.slots[movers]
        self.slots = self.slots[:keep]
        self.release()

    def clear(self) -> None:
        self.slots = self.slots[:0]
        self.release()

    def release(self) -> None:
        if not len(self) and self.k.nbytes + self.v.nbytes > KEEP:
            self.k, self.v, self.capacity = self.k.new_empty(0), self.v.new_empty(0), 0


class BandedCache:
    """All bands, and the attention of one decoding step over them.

    A band keeps room for as many rows as it ever had at once and a half more, but not for more than the
    ``slots`` there are: together they hold the keys and values of fewer than ``slots`` times twice the widest
    band's tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
        slots: float = math.inf,
    ) -> None:
        self.config = config
        self.group = config.num_attention_heads // config.num_key_value_heads
        widths = [NARROWEST]
        while widths[-1] < max_length:
            widths.append(widths[-1] * 2)
        self.bands = [Band(config, w, dtype, device, slots) for w in widths]

    def slots(self) -> Tensor:
        """Slot of every live row, in batch order: band after band."""
        return torch.cat([band.slots for band in self.bands])

    def clear(self) -> None:
        for band in self.bands:
            band.clear()

    def admit(
        self,
        slots: Tensor,
        keys_LBTKE: Sequence[Tensor],
        values_LBTKE: Sequence[Tensor],
        source: Tensor,
        lengths: Sequence[int],
    ) -> None:
        """Take in prefilled rows: slot ``i`` copies the first ``lengths[i]`` tokens of row
        ``source[i]``. Room for one more token is part of the choice of band."""
        for b, band in enumerate(self.bands):
            narrower = self.bands[b - 1].width if b else -1
            mine = [i for i, n in enumerate(lengths) if narrower < n + 1 <= band.width]
            if not mine:
                continue
            rows = band.append(slots[mine])
            longest = max(lengths[i] for i in mine)
            if longest == 0:
                continue
            for layer, (k, v) in enumerate(zip(keys_LBTKE, values_LBTKE, strict=True)):
                band.k[layer, rows, :, :longest] = k[source[mine], :longest].transpose(1, 2)
                band.v[layer, rows, :, :longest] = v[source[mine], :longest].transpose(1, 2)

    def remove(self, gone_S: Tensor) -> None:
        """Drop the rows of the slots marked in the boolean ``gone_S``."""
        for band in self.bands:
            rows = gone_S[band.slots].nonzero()[:, 0].tolist() if len(band) else []
            if rows:
                band.remove(rows)

    def promote(self, length_S: Tensor) -> None:
        """Move rows whose next token would not fit to the next band."""
        for band, wider in zip(self.bands[:-1], self.bands[1:], strict=True):
            if not len(band) or band.longest < band.width:
                continue
            rows = (length_S[band.slots] >= band.width).nonzero()[:, 0].tolist()
            if rows:
                new = wider.append(band.slots[rows])
                # answers of one length move together: then there is nothing to pick out first
                which = slice(len(band)) if len(rows) == len(band) else rows
                wider.k[:, new, :, : band.width] = band.k[:, which]
                wider.v[:, new, :, : band.width] = band.v[:, which]
                band.remove(rows)

    def attend(self, length_S: Tensor) -> DecodeAttend:
        """The attention strategy of one step of a batch of the live rows, and padding after them;
        ``length_S`` counts the tokens cached per slot."""
        return DecodeAttend(self, length_S)


class DecodeAttend:
    """One query token a row, against its own cached keys and values. An ``Attend``."""

    def __init__(self, cache: BandedCache, length_S: Tensor) -> None:
        self.group, self.heads = cache.group, cache.config.num_key_value_heads
        self.plans: list[tuple[Band, slice, Tensor]] = []
        start = 0
        for band in cache.bands:
            if n := len(band):
                at_n = length_S[band.slots]
                band.longest = int(at_n.max()) + 1
                self.plans.append((band, slice(start, start + n), at_n))
                start += n
        self.live = start  #: rows past these are padding
        self._products: dict[Band, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor) -> Tensor:
        out_NHE = torch.empty_like(q_NHE)
        out_NHE[self.live :] = 0
        for band, rows, at_n in self.plans:
            n = len(band)
            q, k, v = q_NHE[rows], k_NKE[rows], v_NKE[rows]
            keys, values, out = band.k[layer, :n], band.v[layer, :n], out_NHE[rows]
            if kernels.ready(q, k, v, keys, values, out) and q.shape[-1] <= kernels.LARGEST_HEAD:
                kernels.decode_attention(q, k, v, at_n, keys, values, out)
            else:
                self._by_products(band, at_n, q, k, v, keys, values, out)
        return out_NHE

    def _by_products(
        self,
        band: Band,
        at_n: Tensor,
        q_nHE: Tensor,
        k_nKE: Tensor,
        v_nKE: Tensor,
        keys_nKWE: Tensor,
        values_nKWE: Tensor,
        out_nHE: Tensor,
    ) -> None:
        """The same as batched matrix products over the band's rectangle."""
        n, K, E, G, T = len(band), self.heads, q_nHE.shape[-1], self.group, band.longest
        if band not in self._products:
            self._products[band] = self._mask_and_places(band, at_n, q_nHE.dtype)
        mask_nT, places = self._products[band]
        keys_nKWE.view(-1, E).index_copy_(0, places, k_nKE.reshape(-1, E))
        values_nKWE.view(-1, E).index_copy_(0, places, v_nKE.reshape(-1, E))
        keys_RTE, values_RTE = keys_nKWE.flatten(0, 1)[:, :T], values_nKWE.flatten(0, 1)[:, :T]
        if q_nHE.dtype in (torch.bfloat16, torch.float16):  # scores of 16 bits would be too coarse
            out_nKGE = F.scaled_dot_product_attention(
                q_nHE.reshape(n, K, G, E), keys_nKWE[:, :, :T], values_nKWE[:, :, :T], mask_nT[:, None]
            )
            out_nHE.copy_(out_nKGE.flatten(1, 2))
            return
        scores_RGT = torch.bmm((q_nHE * E**-0.5).reshape(n * K, G, E), keys_RTE.transpose(1, 2))
        weights_nHT = torch.softmax(scores_RGT.view(n, K * G, T).add_(mask_nT), dim=-1)
        out_nHE.copy_(torch.bmm(weights_nHT.view(n * K, G, T), values_RTE).view(n, K * G, E))

    def _mask_and_places(self, band: Band, at_n: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What each row sees, ``[n, 1, T]``, and where each head's new key goes in the flattened cache."""
        columns_T = torch.arange(band.longest, device=at_n.device)
        mask_nT = torch.zeros(len(band), 1, band.longest, device=at_n.device, dtype=dtype)
        mask_nT.masked_fill_(columns_T > at_n[:, None, None], float("-inf"))
        heads = torch.arange(len(band) * self.heads, device=at_n.device) * band.width
        return mask_nT, heads + at_n.repeat_interleave(self.heads)

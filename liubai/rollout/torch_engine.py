"""The embedded engine: continuous batching in plain PyTorch, on the same model code as training.

Slots are refilled as answers end, so no step waits for the longest one. Prompts that are waiting
together are prefilled once per distinct prompt (a group's samples share theirs). Every answer's
tokens and behaviour log-probabilities stay in tensors until it ends; Python touches only endings.

Left out on purpose: chunked prefill, paging, speculative decoding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from liubai.model.matmul import onednn_takes
from liubai.model.transformer import Attend, Transformer, causal
from liubai.rollout.cache import BandedCache
from liubai.rollout.engine import Fresh, Partial, Request, StaleWeights
from liubai.rollout.sampling import sample, uniform
from liubai.types import Sample, Span, Stop

#: Prefill at most this many tokens (padding included) in one forward pass.
PREFILL_TOKENS = 16384
#: Where oneDNN multiplies, a decoding step has a multiple of this many rows: it compiles a product for
#: each number of rows, and the number of answers that are still being written changes all the time.
ROUND = 32


class TorchEngine:
    """See :class:`liubai.rollout.engine.Engine`. ``model`` may be the trainer's own: then ``load`` copies
    nothing, and is still how the engine learns that the weights have changed.

    ``slots`` answers are written at once; ``max_length`` bounds prompt + completion. Waiting requests are let
    in when ``lot`` slots are free, a sixteenth of them unless told otherwise, or nobody writes; it may be
    changed between steps. As many come as there are free slots. With ``prefill`` a step reads the first of
    them, and others as long as there are no more distinct tokens than that in all: who is being written does
    not wait for everybody who comes.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        eos_ids: Sequence[int],
        slots: int = 256,
        max_length: int = 1024,
        lot: int | None = None,
        prefill: int | None = None,
    ) -> None:
        self.model = model
        parameter = next(model.parameters())
        self.device = device = parameter.device
        self.slots, self.max_length = slots, max_length
        self.lot = lot or max(1, slots // 16)
        self.prefill = prefill
        self._round = ROUND if onednn_takes(model.head_weight) else 1
        self._version = -1
        self._eos = torch.tensor(sorted(eos_ids), device=device)
        self._cache = BandedCache(model.config, max_length, parameter.dtype, device, slots)
        self._queue: deque[Partial] = deque()
        self._free = list(range(slots))[::-1]
        self._requests: list[Request | None] = [None] * slots
        self._order: dict[int, None] = {}  # live slots in order of admission
        self._spans: list[list[Span]] = [[] for _ in range(slots)]

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self._last = zeros(slots)  # the token to feed next
        self._length = zeros(slots)  # tokens in the cache
        self._count = zeros(slots)  # completion tokens so far
        self._budget = zeros(slots)
        self._seed = zeros(slots)
        self._temperature = zeros(slots, dtype=torch.float32)
        self._top_p = zeros(slots, dtype=torch.float32)
        self._ids = zeros(slots, max_length)
        self._logprobs = zeros(slots, max_length, dtype=torch.float32)
        # what only some requests ask for: nothing is computed while these are empty
        self._stopping: set[int] = set()  # slots whose request has end tokens of its own
        self._stop_ids = zeros(slots, 0)  # -1 where there are fewer
        self._curious: dict[int, int] = {}  # slot -> alternatives wanted
        # the last step: slots, tokens, log-probabilities; whose slots were let go since; alternatives by row
        self._wrote: tuple[Tensor, Tensor, Tensor] | None = None
        self._left: dict[int, int] = {}
        self._likeliest: dict[int, tuple[tuple[int, float], ...]] = {}

    @property
    def version(self) -> int:
        return self._version

    @property
    def pending(self) -> int:
        return len(self._order) + len(self._queue)

    @property
    def in_use(self) -> int:
        """Slots in which an answer is being written."""
        return len(self._order)

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy new weights in. Unfinished answers go on: what they said so far is read again under
        the new weights, so that every later token sees one consistent cache."""
        if version <= self._version:
            raise StaleWeights(f"weights of version {version} are not newer than {self._version}")
        partials = self._begun()
        with torch.no_grad():
            own = self.model.state_dict()
            if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in weights.items()}:
                raise ValueError("the weights belong to a model of another shape")
            for name, tensor in own.items():
                tensor.copy_(weights[name])
        self._version = version
        self._empty()
        self._queue.extendleft(reversed(partials))

    def submit(self, requests: Iterable[Request]) -> None:
        self.resume([Partial(request) for request in requests])

    def resume(self, partials: Sequence[Partial]) -> None:
        for partial in partials:
            need = len(partial.request.prompt_ids) + partial.request.max_tokens
            if need > self.max_length:
                raise ValueError(
                    f"a request needs {need} tokens (prompt + max_tokens), the engine holds "
                    f"{self.max_length}; lower max_tokens or raise max_length"
                )
        self._queue.extend(partials)

    def partials(self) -> list[Partial]:
        return [*self._begun(), *self._queue]

    def abort(self) -> list[tuple[Request, Sample]]:
        partials = self.partials()
        self._queue.clear()
        self._empty()
        return [_ended(p, Stop.ABORT) for p in partials if p.completion_ids]

    @torch.inference_mode()
    def cancel(self, ids: Iterable[int]) -> list[tuple[Request, Sample]]:
        unwanted = set(ids)
        slots = [slot for slot in self._order if self._request(slot).id in unwanted]
        gone = self._take_out(slots) + [p for p in self._queue if p.request.id in unwanted]
        self._queue = deque(p for p in self._queue if p.request.id not in unwanted)
        return [_ended(p, Stop.ABORT) for p in gone if p.completion_ids]

    def fresh(self) -> list[Fresh]:
        if self._wrote is None:
            return []
        slots, ids, logprobs = (column.tolist() for column in self._wrote)
        owners = [self._left[s] if s in self._left else self._request(s).id for s in slots]
        if not self._likeliest:
            return [Fresh(*token) for token in zip(owners, ids, logprobs, strict=True)]
        rows = zip(owners, ids, logprobs, strict=True)
        return [Fresh(*token, self._likeliest.get(row, ())) for row, token in enumerate(rows)]

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, Sample]]:
        if self._version < 0:
            raise StaleWeights("the engine has no weights yet: call load first")
        self._wrote = None
        self._left.clear()
        self._likeliest.clear()
        # Refilling in small lots amortises the prefill; an idle slot costs nothing meanwhile,
        # because only live rows are in the batch.
        if self._queue and (len(self._free) >= self.lot or not self._order):
            self._refill()
        if not self._order:
            return []
        slots = self._cache.slots()
        length_S = self._length[slots]
        rows = max(self.model.fewest_rows, -(-len(slots) // self._round) * self._round)
        padded = torch.cat([slots, slots[:1].expand(rows - len(slots))])
        attend = self._cache.attend(self._length)
        hidden = self.model.hidden(self._last[padded], self._length[padded], attend)
        count = self._count[slots]
        top_p = self._top_p[slots]
        logits = self.model.head(hidden)[: len(slots)]
        if self._curious:  # before ``sample``, which may work in place
            self._look(logits, slots.tolist())
        ids, logprobs = sample(
            logits,
            uniform(self._seed[slots], count),
            self._temperature[slots],
            top_p if bool((top_p < 1).any()) else None,
        )
        self._ids[slots, count] = ids
        self._logprobs[slots, count] = logprobs
        self._last[slots] = ids
        self._length[slots] = length_S + 1
        self._count[slots] = count + 1
        self._wrote = slots, ids, logprobs
        ended_by_eos = (ids[:, None] == self._eos).any(1)
        if self._stopping:
            ended_by_eos |= (ids[:, None] == self._stop_ids[slots]).any(1)
        over = ended_by_eos | (count + 1 >= self._budget[slots])
        finished = self._finish(slots[over].tolist(), ended_by_eos[over].tolist())
        self._cache.promote(self._length)
        return finished

    def _finish(self, slots: list[int], by_eos: list[bool]) -> list[tuple[Request, Sample]]:
        partials = self._take_out(slots)
        return [_ended(p, Stop.EOS if eos else Stop.LENGTH) for p, eos in zip(partials, by_eos, strict=True)]

    def _take_out(self, slots: list[int]) -> list[Partial]:
        """What stands in these slots, which are let go of."""
        if not slots:
            return []
        gone = torch.zeros(self.slots, dtype=torch.bool, device=self.device)
        gone[slots] = True
        self._cache.remove(gone)
        partials = []
        for slot in slots:
            partials.append(self._partial(slot))
            self._release(slot)
        return partials

    def _release(self, slot: int) -> None:
        self._left[slot] = self._request(slot).id
        self._requests[slot] = None
        self._spans[slot] = []
        self._free.append(slot)
        del self._order[slot]
        self._curious.pop(slot, None)
        self._stopping.discard(slot)

    def _request(self, slot: int) -> Request:
        request = self._requests[slot]
        assert request is not None
        return request

    def _look(self, logits_SV: Tensor, slots: list[int]) -> None:
        """The likeliest tokens in the rows of those who asked. As many as each asked for, by itself: which of
        two equals comes first must not depend on a neighbour."""
        rows = {row: self._curious[slot] for row, slot in enumerate(slots) if slot in self._curious}
        for count in set(rows.values()):
            mine = [row for row, wanted in rows.items() if wanted == count]
            scale_M = self._temperature[[slots[row] for row in mine]]
            scale_M = torch.where(scale_M == 0, 1.0, scale_M)
            logprobs_MV = torch.log_softmax(logits_SV[mine].float() / scale_M[:, None], dim=-1)
            best = logprobs_MV.topk(min(count, logits_SV.shape[1]))
            for row, ids, logprobs in zip(mine, best.indices.tolist(), best.values.tolist(), strict=True):
                self._likeliest[row] = tuple(zip(ids, logprobs, strict=True))

    def _also_stop(self, slot: int, ids: Sequence[int]) -> None:
        if self._stop_ids.shape[1] < len(ids):
            wider = torch.full((self.slots, len(ids)), -1, dtype=torch.long, device=self.device)
            wider[:, : self._stop_ids.shape[1]] = self._stop_ids
            self._stop_ids = wider
        self._stop_ids[slot] = -1
        if ids:
            self._stop_ids[slot, : len(ids)] = torch.tensor(ids, device=self.device)
            self._stopping.add(slot)

    def _partial(self, slot: int) -> Partial:
        request, n = self._request(slot), int(self._count[slot])
        spans = self._spans[slot]
        fresh = n - sum(span.count for span in spans)
        if fresh and spans and spans[-1].version == self._version:  # resumed under the same weights
            fresh += spans[-1].count
            spans = spans[:-1]
        versions = (*spans, Span(self._version, fresh)) if fresh else tuple(spans)
        return Partial(
            request,
            tuple(self._ids[slot, :n].tolist()),
            tuple(self._logprobs[slot, :n].tolist()),
            versions,
        )

    def _begun(self) -> list[Partial]:
        return [self._partial(slot) for slot in self._order]

    def _empty(self) -> None:
        self._cache.clear()
        for slot in list(self._order):
            self._release(slot)
        self._free = list(range(self.slots))[::-1]  # slot numbers, too, must not depend on history

    def _let_in(self) -> list[Partial]:
        """Those of the queue that are read in this step."""
        room = min(len(self._free), len(self._queue))
        if self.prefill is None:
            return [self._queue.popleft() for _ in range(room)]
        taken: list[Partial] = []
        texts: set[tuple[int, ...]] = set()
        tokens = 0
        while len(taken) < room:
            text = _text(self._queue[0])
            if text not in texts:
                tokens += len(text)
                if taken and tokens > self.prefill:
                    break
                texts.add(text)
            taken.append(self._queue.popleft())
        return taken

    def _refill(self) -> None:
        taken = self._let_in()
        slots = [self._free.pop() for _ in taken]
        for slot, p in zip(slots, taken, strict=True):
            r, n = p.request, len(p.completion_ids)
            self._requests[slot], self._spans[slot] = r, list(p.versions)
            self._order[slot] = None
            self._last[slot] = (p.completion_ids or r.prompt_ids)[-1]
            self._length[slot] = len(r.prompt_ids) + n - 1
            self._count[slot], self._budget[slot], self._seed[slot] = n, r.max_tokens, r.seed
            self._temperature[slot], self._top_p[slot] = r.temperature, r.top_p
            if r.alternatives:
                self._curious[slot] = r.alternatives
            if r.stop_ids or self._stop_ids.numel():  # those of whoever had the slot before must go
                self._also_stop(slot, r.stop_ids)
            if n:
                self._ids[slot, :n] = torch.tensor(p.completion_ids, device=self.device)
                self._logprobs[slot, :n] = torch.tensor(p.logprobs, device=self.device)
        texts = [_text(p) for p in taken]
        distinct = list(dict.fromkeys(texts))
        row = {text: i for i, text in enumerate(distinct)}
        for chunk in _chunks(distinct, min(PREFILL_TOKENS, self.prefill or PREFILL_TOKENS)):
            at = {row[text]: i for i, text in enumerate(chunk)}
            mine = [i for i, text in enumerate(texts) if row[text] in at]
            keys, values = self._prefill(chunk)
            self._cache.admit(
                torch.tensor([slots[i] for i in mine], device=self.device),
                keys,
                values,
                torch.tensor([at[row[texts[i]]] for i in mine], device=self.device),
                [len(texts[i]) for i in mine],
            )

    def _prefill(self, texts: Sequence[tuple[int, ...]]) -> tuple[list[Tensor], list[Tensor]]:
        """Rotated keys and values per layer, ``[B, T, K, E]``, right-padded."""
        T = max(1, max(map(len, texts)))
        ids_BT = torch.zeros(len(texts), T, dtype=torch.long)
        for i, text in enumerate(texts):
            ids_BT[i, : len(text)] = torch.tensor(text, dtype=torch.long)
        ids_BT = ids_BT.to(self.device)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        plain: Attend = causal()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys.append(k)
            values.append(v)
            return plain(layer, q, k, v)

        self.model.hidden(ids_BT, torch.arange(T, device=self.device).expand_as(ids_BT), attend)
        return keys, values


def _ended(partial: Partial, stop: Stop) -> tuple[Request, Sample]:
    p = partial
    return p.request, Sample(p.request.prompt_ids, p.completion_ids, p.logprobs, stop, p.versions)


def _text(partial: Partial) -> tuple[int, ...]:
    """What is read before it goes on: all but the last token, which the next decoding step is fed."""
    return (partial.request.prompt_ids + partial.completion_ids)[:-1]


def _chunks(texts: Sequence[tuple[int, ...]], most: int) -> Iterable[list[tuple[int, ...]]]:
    """Texts in lots of similar length whose padded size stays under ``most`` tokens, where one text does."""
    lot: list[tuple[int, ...]] = []
    for text in sorted(texts, key=len):
        if lot and (len(lot) + 1) * len(text) > most:
            yield lot
            lot = []
        lot.append(text)
    if lot:
        yield lot

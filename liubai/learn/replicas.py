"""One model in several threads: shared weights, gradients of each thread's own.

A core that works through a micro-batch by itself never waits for another one. Cutting each matrix of
a small model up between the cores, as PyTorch does by default, makes them wait at every operation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import nn

from liubai import ranks
from liubai.learn.sharded import is_shared_out, over_ranks
from liubai.model.transformer import Transformer

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Parameters of all replicas together. Larger models have matrices that are worth cutting up, and
#: gradients too large to have many times.
LARGEST = 1 << 26

#: Threads that stay: each has memory of its own in malloc and in the libraries, which a new thread
#: would ask for again. They are started when there is work for them.
WORKERS = ThreadPoolExecutor(1024, thread_name_prefix="replica")


class Replicas:
    """As many as torch has threads, of a small model on a CPU; fewer of a larger one, down to itself.
    Elsewhere the model alone, and so is one that is shared out over ranks."""

    def __init__(self, model: Transformer) -> None:
        self.threads = torch.get_num_threads()
        weight = model.head_weight
        small = weight.device.type == "cpu" and weight.dtype == torch.float32 and not is_shared_out(model)
        fit = LARGEST // max(1, model.count_parameters()) if small else 1
        self.models = [model, *(_replica(model) for _ in range(min(self.threads, fit) - 1))]

    def map(
        self, work: Callable[[Transformer, Sequence[Item]], list[Result]], items: Sequence[Item]
    ) -> list[Result]:
        """``work(model, share)`` for shares of ``items``, at the same time; results in the order of
        ``items``. Gradients come together in the first model, in a fixed order: the same threads give
        the same sums, to the last bit. Raises what ``work`` raises.

        Over several ranks each has a part of the items, and all have the results and their part of the
        gradients' sum."""
        return self._over_ranks(work, items, learns=True)

    def read(
        self, work: Callable[[Transformer, Sequence[Item]], list[Result]], items: Sequence[Item]
    ) -> list[Result]:
        """:meth:`map` for ``work`` without gradients."""
        return self._over_ranks(work, items, learns=False)

    def _over_ranks(
        self,
        work: Callable[[Transformer, Sequence[Item]], list[Result]],
        items: Sequence[Item],
        learns: bool,
    ) -> list[Result]:
        if ranks.world() == 1:
            return self._over_threads(work, items)
        return over_ranks(self.models[0], lambda share: self._over_threads(work, share), items, learns)

    def _over_threads(
        self, work: Callable[[Transformer, Sequence[Item]], list[Result]], items: Sequence[Item]
    ) -> list[Result]:
        n = min(len(self.models), len(items))
        if n <= 1:
            return work(self.models[0], items)

        def alone(number: int) -> list[Result]:
            torch.set_num_threads(max(1, self.threads // n))
            return work(self.models[number], items[number::n])

        others = [WORKERS.submit(alone, number) for number in range(1, n)]
        try:
            shares = [alone(0), *(other.result() for other in others)]
        except BaseException:  # half a gradient must not turn up in a later one
            wait(others)
            for p in (p for model in self.models for p in model.parameters()):
                p.grad = None
            raise
        finally:
            torch.set_num_threads(self.threads)
        for replica in self.models[1:n]:
            for p, q in zip(self.models[0].parameters(), replica.parameters(), strict=True):
                if q.grad is not None:
                    p.grad = q.grad if p.grad is None else p.grad.add_(q.grad)
                    q.grad = None
        return [shares[i % n][i // n] for i in range(len(items))]


def _replica(model: Transformer) -> Transformer:
    shared = {id(p): nn.Parameter(p.data, p.requires_grad) for p in model.parameters()}  # the same memory
    return copy.deepcopy(model, shared)  # type: ignore[arg-type]  # a memo: these are copied already

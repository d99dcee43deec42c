"""One model in several threads: shared weights, gradients of each thread's own.

A core that works through a micro-batch by itself never waits for another one. Cutting each matrix of
a small model up between the cores, as PyTorch does by default, makes them wait at every operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from liubai.model.transformer import Transformer

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Larger models have matrices that are worth cutting up, and gradients too large to have twice.
LARGEST = 1 << 25


class Replicas:
    """As many as torch has threads, of a small model on a CPU; else the model alone."""

    def __init__(self, model: Transformer) -> None:
        self.threads = torch.get_num_threads()
        small = model.head_weight.device.type == "cpu" and model.count_parameters() <= LARGEST
        self.models = [model, *(_replica(model) for _ in range(self.threads - 1) if small)]

    def map(
        self, work: Callable[[Transformer, Sequence[Item]], list[Result]], items: Sequence[Item]
    ) -> list[Result]:
        """``work(model, share)`` for shares of ``items``, at the same time; results in the order of
        ``items``. Gradients come together in the first model, in a fixed order: the same threads give
        the same sums, to the last bit. Raises what ``work`` raises."""
        n = min(len(self.models), len(items))
        if n <= 1:
            return work(self.models[0], items)

        def alone(number: int) -> list[Result]:
            torch.set_num_threads(max(1, self.threads // n))
            return work(self.models[number], items[number::n])

        try:
            with ThreadPoolExecutor(n) as pool:
                shares = [future.result() for future in [pool.submit(alone, i) for i in range(n)]]
        finally:
            torch.set_num_threads(self.threads)
        for replica in self.models[1:n]:
            for p, q in zip(self.models[0].parameters(), replica.parameters(), strict=True):
                if q.grad is not None:
                    p.grad = q.grad if p.grad is None else p.grad.add_(q.grad)
                    q.grad = None
        return [shares[i % n][i // n] for i in range(len(items))]


def _replica(model: Transformer) -> Transformer:
    with torch.device("meta"):
        replica = Transformer(model.config)
    replica.load_state_dict(model.state_dict(), assign=True)  # the same memory
    return replica

"""How to share the machines out between writing and learning, what holds a run up, and what would help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from liubai.errors import UserError
from liubai.plan import memory, roofline
from liubai.plan.hardware import Device
from liubai.plan.memory import Sizes
from liubai.plan.reading import Job
from liubai.plan.roofline import Model, Work, Writing

Way = Literal["in turn", "in turn, in flight", "apart, synchronous", "apart, asynchronous"]
WAYS: tuple[Way, ...] = get_args(Way)
#: ways in which answers are under way during an update
AHEAD: tuple[Way, ...] = ("in turn, in flight", "apart, asynchronous")

#: micro-batches that "auto" begins with (:class:`liubai.stages.config.Trained`)
AUTO, AUTO_CPU = 65536, 2048
#: an engine should have room for so many answers, or a model is spread over more GPUs
FEWEST = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two sides: how many GPUs it has, its memory by parts, bytes for each GPU."""

    gpus: int
    memory: dict[str, float]

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One way to share the machines out. ``step`` are the seconds of a step, ``rate`` the tokens a second
    that it yields; ``parts`` GPUs make one engine, of its ``kind`` and with ``slots`` slots; ``fit`` answers
    of full length are in its cache, at most."""

    way: Way
    trainer: Side
    rollout: Side
    kind: str
    parts: int
    slots: int
    fit: int
    microbatch: int
    writing: Writing
    update: dict[str, float]
    transfer: float
    step: float
    rate: float

    @property
    def update_seconds(self) -> float:
        return sum(self.update.values())


class Planner:
    """One job on ``gpus`` devices. ``staleness`` is the updates that writing may be ahead of learning: the
    stage's own (:attr:`liubai.stages.policy.PolicyConfig.lead`) unless given."""

    def __init__(
        self, job: Job, device: Device, gpus: int, staleness: float | None = None, threads: int = 1
    ) -> None:
        if job.work is None:
            raise ValueError(f"stage '{job.stage}' writes no answers")
        self.job, self.device, self.gpus = job, device, gpus
        self.staleness: float = job.config.lead if staleness is None else staleness  # type: ignore[attr-defined]
        self.dtype = dtype_of(job, device)
        self.work = replace(
            job.work,
            layered=memory.layered(job.size, self.dtype, device),
            frozen=readers(job, device),
        )
        #: who writes: bands or pages, and can a model be spread over several GPUs?
        self.kind: str = job.config.engine.kind  # type: ignore[attr-defined]
        self.model = Model(config=job.model, size=job.size, dtype=self.dtype)
        self.slots: int = job.config.slots  # type: ignore[attr-defined]
        self.room = device.memory * device.usable
        self.threads = threads

    def layouts(self) -> list[Layout]:
        """Every way that fits, each at its best; those that write ahead where an answer may be an update old.
        Raises ``UserError`` where none does."""
        ways = [way for way in WAYS if self.staleness >= 1 or way not in AHEAD]
        found = [layout for way in ways if (layout := self._best(way))]
        if not found:
            raise UserError(self._too_large())
        return found

    def _best(self, way: Way) -> Layout | None:
        """The one with the most tokens a second, of those with the same rate the first."""
        if way in ("apart, synchronous", "apart, asynchronous"):
            tried = (self._apart(way, trainer) for trainer in self._splits())
        elif self.kind == "torch" or (self.kind == "vllm" and self.gpus == 1):
            room = self.room - self.share
            tried = (self._in_turn(way, *update) for update in self.updates(self.gpus, room, writes=True))
        else:  # a server is elsewhere, and vLLM beside the trainer is for one process
            return None
        return max((layout for layout in tried if layout), key=lambda layout: layout.rate, default=None)

    def _splits(self) -> Iterator[int]:
        """Numbers of trainer GPUs to try: of a few nodes every number, of many whole nodes."""
        unit = self.device.node if self.gpus >= 4 * self.device.node else 1
        return iter(range(unit, self.gpus, unit))

    # memory

    @property
    def share(self) -> float:
        """Bytes that vLLM takes of the trainer's GPU, whatever it does with them."""
        if self.kind != "vllm":
            return 0.0
        taken: float = self.job.config.engine.gpu_memory_utilization  # type: ignore[attr-defined]
        return self.device.memory * taken

    def updates(
        self, ranks: int, room: float, writes: bool = False
    ) -> Iterator[tuple[dict[str, float], int]]:
        """Updates that fit ``room`` bytes: their memory and their micro-batches, the largest first."""
        tokens = microbatch_of(self.job, self.device)
        while True:
            parts = self.training_with(tokens, ranks, writes)
            if sum(parts.values()) <= room:
                yield parts, tokens
            if tokens <= self.work.longest:
                return
            tokens //= 2

    def training_with(self, tokens: int, ranks: int, writes: bool = False) -> dict[str, float]:
        return training_memory(self.job, self.device, tokens, ranks, self.threads, writes)

    def engine(self, used: float, parts: int, kind: str) -> tuple[dict[str, float], int]:
        """The memory of an engine beside ``used`` bytes, and how many answers of full length its cache
        holds."""
        w = self.work
        about = memory.writing(self.model.config, self.model.size, self.dtype, self.slots, parts)
        left = (self.room - used - sum(about.values())) * parts
        length = w.prompt + w.longest
        fit = memory.answers_that_fit(left, self.model.config, self.dtype, length, kind)
        held = (
            min(fit, self.slots)
            * memory.cache_tokens(length, kind)
            * memory.kv_bytes(self.model.config, self.dtype)
        )
        return {**about, "cache": held / parts}, fit

    # speed

    def _in_turn(self, way: Way, learning: dict[str, float], microbatch: int) -> Layout | None:
        """Every GPU writes and learns, one after the other: the torch engine on the trainer's own weights, or
        on the whole copy where those are shared out; or vLLM beside it."""
        if self.kind == "vllm":  # it has a copy of its own, and its share of the GPU
            beside = self.room - self.share
        else:  # a copy of the weights is there already; in flight, so are keys and values during the update
            there = learning if way in AHEAD else memory.KEPT
            beside = sum(learning[name] for name in there) - self.model.bytes
        rollout, fit = self.engine(beside, 1, self.kind)
        if fit < 1:
            return None
        slots = min(self.slots, fit)
        if way == "in turn":
            writing = roofline.at_once(self.model, self.device, self.work, self.gpus, slots)
        else:
            # no more than the slots hold: they stand still during an update
            full = self.slots * self.gpus / self.work.answers
            ahead = self.work.answers * (1 + min(self.staleness, full))
            writing = roofline.without_end(self.model, self.device, self.work, self.gpus, slots, ahead=ahead)
        update = self._update(self.gpus, microbatch)
        sent = self._transfer(adapters=True) if self.gpus > 1 else 0.0
        step = writing.seconds + sum(update.values()) + sent
        return Layout(
            way=way, trainer=Side(gpus=self.gpus, memory=learning), kind=self.kind, parts=1,
            rollout=Side(gpus=self.gpus, memory=rollout), slots=self.slots, fit=fit, microbatch=microbatch,
            writing=writing, update=update, transfer=sent, step=step, rate=self.work.written / step,
        )  # fmt: skip

    def _apart(self, way: Way, trainer: int) -> Layout | None:
        parts = self.parts()
        engines = (self.gpus - trainer) // parts if parts else 0
        trained = next(self.updates(trainer, self.room), None)
        if not engines or trained is None:
            return None
        learning, microbatch = trained
        rollout, fit = self.engine(0.0, parts, self.kind)
        slots = min(self.slots, fit)
        update = self._update(trainer, microbatch)
        sent = self._transfer(adapters=self.job.config.engine.transport == "lora")  # type: ignore[attr-defined]
        if way == "apart, synchronous":
            writing = roofline.at_once(self.model, self.device, self.work, engines, slots, parts)
            step = writing.seconds + sum(update.values()) + sent
        else:
            ahead = self.work.answers * (1 + self.staleness)
            writing = roofline.without_end(self.model, self.device, self.work, engines, slots, parts, ahead)
            step = max(writing.seconds, sum(update.values())) + sent
        return Layout(
            way=way, trainer=Side(gpus=trainer, memory=learning),
            rollout=Side(gpus=engines * parts, memory=rollout), kind=self.kind, parts=parts,
            slots=self.slots, fit=fit, microbatch=microbatch, writing=writing, update=update, transfer=sent,
            step=step, rate=self.work.written / step,
        )  # fmt: skip

    def _transfer(self, adapters: bool) -> float:
        """Do adapters, where the stage trains some, travel alone?"""
        share = self.job.size.trained / self.job.size.parameters if adapters and self.job.lora else 1.0
        return share * roofline.transfer(self.model, self.device, self.gpus)

    def parts(self) -> int:
        """The fewest GPUs that hold an engine with room for a few answers; 0 when a node does not."""
        parts = 1
        while parts <= (1 if self.kind == "torch" else min(self.device.node, max(1, self.gpus - 1))):
            if self.engine(0.0, parts, self.kind)[1] >= min(FEWEST, self.work.answers):
                return parts
            parts *= 2
        return 0

    def _update(self, ranks: int, microbatch: int) -> dict[str, float]:
        """Seconds of learning: the policy's, and then the critic's."""
        work = replace(self.work, microbatch=microbatch)
        found = roofline.update(self.model, self.device, work, ranks)
        if critic := self.job.critic:
            epochs: int = self.job.config.critic_epochs  # type: ignore[attr-defined]
            # it says what it expects of the answers, and learns; the other readers are counted already
            alone = replace(
                work, forwards=1.0, frozen=(), epochs=epochs, alone=True,
                layered=memory.layered(critic, self.dtype, self.device),
            )  # fmt: skip
            more = roofline.update(replace(self.model, size=critic), self.device, alone, ranks)
            found = {name: seconds + more[name] for name, seconds in found.items()}
        return found

    def _too_large(self) -> str:
        least = self.training_with(self.work.longest, self.gpus)
        need, name = sum(least.values()), self.device.name
        if need <= self.room:
            spread = ', or engine = "vllm" or a server, which one model can be spread over GPUs with'
            shorter = "lower max_tokens"
            if self.work.prompt > self.work.longest:
                shorter = f"prompts of fewer than {self.work.prompt:,} tokens (--prompt)"
            return (
                f"stage '{self.job.stage}': no engine fits beside the trainer on {self.gpus} × {name}; more "
                f"GPUs, {shorter}{spread if self.kind == 'torch' else ''}"
            )
        if (whole := least["whole models"]) > self.room:
            large, room = told_apart(whole, self.room)
            return (
                f"stage '{self.job.stage}' does not fit: every GPU that learns has {large} GB of "
                "whole models that are only read (a teacher, judges), and a program has "
                f"{room} GB on one {name}; no number of them helps: take GPUs with more "
                "memory, or a smaller model"
            )
        helps = ", ".join(self._helps()) or "a smaller model"
        large, room = told_apart(need, self.room)
        return (
            f"stage '{self.job.stage}' does not fit: an update needs {large} GB on each of "
            f"{self.gpus} × {name}, and a program has {room} GB; what would help: {helps}, "
            "more GPUs"
        )

    def _helps(self) -> Iterator[str]:
        config = self.job.config
        if self.work.prompt > self.work.longest:
            yield f"prompts of fewer than {self.work.prompt:,} tokens (--prompt)"
        if not config.checkpointing:
            yield "checkpointing = true"
        if config.optimizer_state == "float32":
            yield 'optimizer_state = "bfloat16"'
        if self.job.lora is None and hasattr(config, "lora"):
            yield "lora"


def told_apart(more: float, less: float) -> tuple[str, str]:
    """Two sizes in GB with as many digits as show which is larger."""
    for digits in range(4):
        found = f"{more / 1e9:,.{digits}f}", f"{less / 1e9:,.{digits}f}"
        if found[0] != found[1]:
            break
    return found


def dtype_of(job: Job, device: Device) -> str:
    return device.dtype if job.config.precision == "auto" else job.config.precision


def microbatch_of(job: Job, device: Device) -> int:
    """What an update begins with: the recipe's, or as much as the stage would try."""
    asked = job.config.tokens_per_microbatch
    return asked if asked != "auto" else AUTO if device.gpu else AUTO_CPU


def readers(job: Job, device: Device) -> tuple[Model, ...]:
    """The models that are only read, as ``device`` computes them."""
    usual = dtype_of(job, device)
    return tuple(Model(config=r.model, size=r.size, dtype=r.dtype or usual) for r in job.frozen)


def training_memory(
    job: Job, device: Device, tokens: int, ranks: int, threads: int = 1, writes: bool = False
) -> dict[str, float]:
    """Of an update, or of a supervised step, with micro-batches of ``tokens`` tokens at most. Does every rank
    write answers, too?"""
    w, dtype = job.work, dtype_of(job, device)
    answer, prompt = (w.longest, w.prompt) if w else (1, 0)
    many = not device.gpu and ranks == 1 and dtype == "float32"  # as liubai.learn.replicas

    def update(size: Sizes, alone: bool, reference: float, whole: float) -> dict[str, float]:
        by_layer = ranks > 1 and memory.layered(size, dtype, device)
        shared = not (by_layer or alone)
        how = memory.Training(
            dtype=dtype,
            moments=job.config.optimizer_state,
            checkpointing=job.config.checkpointing,
            tokens=memory.microbatch(tokens, w.samples, answer, prompt, shared) if w else tokens,
            prompt=prompt if shared else 0,
            answer=answer,
            ranks=ranks,
            layered=by_layer,
            reference=reference,
            whole=whole,
            replicas=memory.replicas(size, threads) if many else 1,
            holes=device.holes,
        )
        return memory.training(job.model, size, how)

    read = [(one.shared, model.bytes) for one, model in zip(job.frozen, readers(job, device), strict=True)]
    reference = sum(size for shared, size in read if shared)
    whole = sum(size for shared, size in read if not shared)
    if writes and ranks > 1:  # a copy beside the parts
        whole += Model(config=job.model, size=job.size, dtype=dtype).bytes
    updates = [update(job.size, bool(w and w.alone), reference, whole)]
    if job.critic:
        updates.append(update(job.critic, True, 0.0, 0.0))
    return memory.one_after_the_other(updates)


# words

#: part of a decoding step -> what it means, and what would help where it is not the number of answers
SLOW = {
    "weights": ("reading the weights, once a step for only {batch}", ""),
    "keys and values": (
        "reading keys and values of {batch}",
        "memory bandwidth, or shorter answers; a larger batch does not help",
    ),
    "arithmetic": ("arithmetic, with {batch}", "only more rollout GPUs"),
    "sampling": ("choosing tokens from a large vocabulary", "only more rollout GPUs"),
    "fixed cost": ("what a step costs whoever takes part, with {batch}", ""),
    "prompts": ("reading prompts", "shorter prompts, or more samples for each"),
}
#: part of an update -> what would help
LEARNING = {
    "arithmetic": "more GPUs that learn",
    "launches": "larger micro-batches, or fewer GPUs that learn: they wait to be told what to do",
    "activations": "more machines that learn: a small model's layers are walks over memory",
    "exchange": "larger micro-batches (each gathers all weights anew), or fewer GPUs that learn",
    "optimizer": "more tokens in a step: the optimizer's walk over memory costs the same",
}


def bottleneck(layout: Layout, work: Work) -> tuple[str, str]:
    """What takes longest, and what would help, in words."""
    writing, update = layout.writing, layout.update
    if layout.transfer > max(writing.seconds, layout.update_seconds):
        return (
            "sending the weights",
            'a faster network, transport = "lora" (an adapter alone travels), or more work in a step',
        )
    if layout.update_seconds > writing.seconds:
        worst = max(update, key=lambda name: update[name])
        saves = "; checkpointing = false saves a fifth where memory allows it" if work.checkpointing else ""
        return f"learning ({worst})", LEARNING[worst] + (saves if worst == "arithmetic" else "")
    waits = 1 - writing.rhythm.full / writing.rhythm.steps
    if layout.way in ("in turn", "apart, synchronous") and waits > 0.5:
        return (
            f"waiting for the longest answer: {waits:.0%} of what the engines could write is not asked for",
            "writing ahead: inflight = true, or a trainer apart that is not waited for",
        )
    worst = max(writing.shares, key=lambda name: writing.shares[name])
    what, helps = SLOW[worst]
    count = f"{writing.rhythm.batch:.0f}"
    batch = f"{count} answer{'' if count == '1' else 's'} at once"
    return f"writing ({what.format(batch=batch)})", helps or _more_at_once(layout)


def _more_at_once(layout: Layout) -> str:
    """What keeps the number of answers small."""
    if layout.writing.rhythm.most < min(layout.fit, layout.slots):
        return (
            "more answers under way: a higher --staleness, more groups or samples; "
            "fewer rollout GPUs lose little"
        )
    if layout.fit < layout.slots:
        pages = ", or pages (vLLM) in the place of bands" if layout.kind == "torch" else ""
        return f"a cache for more answers: more memory, or a lower max_tokens{pages}"
    return f"more slots than {layout.slots}"

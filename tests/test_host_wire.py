"""What goes between a host and its process: how it is packed, and when which tokens are sent."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from liubai.rollout.engine import Fresh
from liubai.serve.inside import LONGEST, REPORT, Outbox
from liubai.serve.wire import NOTE, PIECES, Frames, Pieces, Written, note, pack, unpack
from liubai.types import Stop

numbers = st.integers(0, 2**31 - 1)
logprobs = st.floats(-1e4, 0, width=32)


@st.composite
def written(draw: st.DrawFn) -> Written:
    ids = draw(st.lists(numbers, min_size=1, max_size=5))
    likely = draw(st.integers(0, 3))
    return Written(
        draw(st.integers(0, 2**62)),
        ids,
        draw(st.lists(logprobs, min_size=len(ids), max_size=len(ids))),
        [
            tuple(draw(st.lists(st.tuples(numbers, logprobs), min_size=likely, max_size=likely)))
            for _ in ids
            if likely
        ],
    )


frames = st.one_of(
    st.builds(
        Pieces,
        numbers,
        numbers,
        st.integers(0, 2**62),
        st.lists(written(), max_size=6),
        st.lists(st.tuples(st.integers(0, 2**62), st.sampled_from(Stop)), max_size=4),
    ),
    st.lists(st.text(), max_size=3),
)


@given(st.lists(frames, max_size=5), st.randoms(use_true_random=False))
def test_what_is_packed_is_unpacked_however_it_is_cut(sent: list[object], rng: random.Random) -> None:
    data = b"".join(pack(x) if isinstance(x, Pieces) else note(x) for x in sent)
    got: list[object] = []
    reader = Frames()
    while data:
        cut = rng.randint(1, len(data))
        for kind, body in reader.feed(data[:cut]):
            assert kind in (NOTE, PIECES)
            got.append(unpack(body) if kind == PIECES else json.loads(body))
        data = data[cut:]
    assert got == sent


class Script:
    """An engine that writes what it is told."""

    in_use = pending = 7

    def __init__(self) -> None:
        self.now: list[Fresh] = []

    def fresh(self) -> list[Fresh]:
        return self.now


def outbox() -> tuple[Callable[..., list[Pieces]], Outbox, Callable[[float], None]]:
    """``step(tokens, ended)`` -> what was sent; the box; its clock."""
    sent: list[bytes] = []
    now = [0.0]
    engine, box = Script(), Outbox(sent.append, lambda: now[0])

    def step(*streams: int, ended: tuple[int, ...] = ()) -> list[Pieces]:
        sent.clear()
        engine.now = [Fresh(stream, 40 + stream, -0.5) for stream in streams]
        box.pass_on(engine, [(stream, Stop.EOS) for stream in ended])  # type: ignore[arg-type]
        return [unpack(body) for frame in sent for _, body in Frames().feed(frame)]

    def tick(seconds: float) -> None:
        now[0] += seconds

    return step, box, tick


def heard(sent: list[Pieces]) -> dict[int, int]:
    """Tokens by stream of the one frame that was sent."""
    (pieces,) = sent or [Pieces(0, 0, 0, [], [])]
    return {w.stream: len(w.ids) for w in pieces.written}


def test_first_tokens_and_ends_go_at_once_and_the_rest_together() -> None:
    step, box, tick = outbox()
    for i in range(200):
        box.open(i, True, False)
    assert heard(step(*range(199))) == dict.fromkeys(range(199), 1)
    tick(0.01)
    assert step(*range(199)) == []
    tick(0.01)
    assert heard(step(*range(200))) == {199: 1}  # its first; the others go on waiting
    tick(0.01)
    (frame,) = step(*range(200), ended=(3, 199))
    assert {w.stream: len(w.ids) for w in frame.written} == {3: 3, 199: 1}
    assert frame.ended == [(3, Stop.EOS), (199, Stop.EOS)]
    assert frame.tokens == 199 + 199 + 200 + 200
    tick(LONGEST)
    everybody = heard(step(*range(3), *range(4, 199)))
    assert everybody == {i: 4 for i in range(199) if i != 3}


def test_few_listeners_hear_every_token_and_the_silent_ones_only_the_end() -> None:
    step, box, tick = outbox()
    box.open(1, True, False)
    box.open(2, False, False)
    for _ in range(3):
        tick(0.002)
        assert heard(step(1, 2)) == {1: 1}
    tick(0.002)
    assert heard(step(1, 2, ended=(2,))) == {1: 1, 2: 4}
    box.close(1)
    box.open(5, False, False)
    assert step(5) == []
    tick(REPORT)
    assert step(5)[0].tokens == 10  # the load is told all the same
    box.close(5)
    tick(0.1)
    assert step(5) == []  # nobody is there to hear it

"""From tokens to what a client sees while they come: whole characters, no tags, nothing taken back."""

from __future__ import annotations

import json
import random
import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from serving import chat, house_of, says, tokenizer

from liubai.problems import world_vocabulary
from liubai.rollout.thinking import Ask, Draft, path_of, split
from liubai.rollout.writer import Piece
from liubai.serve.app import create_app
from liubai.serve.replies import bytes_of, entry
from liubai.serve.streams import Decoder, Said, Speech
from liubai.serve.toolcalls import Call, parse_call
from liubai.text.template import Template
from liubai.text.tokenizer import TextTokenizer, word_level

BYTES = tokenizer()
WORDS = word_level(world_vocabulary())


def pieces(ids: list[int], cuts: random.Random | None) -> list[Piece]:
    """All at once, or cut at random."""
    found = []
    while ids:
        n = len(ids) if cuts is None else cuts.randint(1, 5)
        part, ids = ids[:n], ids[n:]
        found.append(Piece(tuple(part), (-0.5,) * len(part)))
    return found


def heard(
    text: str,
    prefilled: str | None,
    cuts: random.Random | None,
    tokenizer: TextTokenizer = BYTES,
    **options: Any,
) -> tuple[dict[str, str], list[Call], Speech]:
    """The thought, the answer and the calls, put together again."""
    speech = Speech(tokenizer, prefilled, **options)
    texts = {"reasoning": "", "content": ""}
    calls = []
    said = [one for piece in pieces(tokenizer.encode(text), cuts) for one in speech.hear(piece)]
    for one in said + speech.end():
        if isinstance(one, Said):
            assert one.text
            texts[one.kind] += one.text
        else:
            calls.append(one)
    return texts, calls, speech


# ---- characters ----


@given(st.text(max_size=30), st.integers(0, 2**32))
def test_the_text_comes_whole_however_it_is_cut(text: str, seed: int) -> None:
    decoder, cuts = Decoder(BYTES), random.Random(seed)
    found = ""
    for piece in pieces(BYTES.encode(text), cuts):
        fresh = decoder.push(piece.ids)
        assert "\ufffd" not in fresh or "\ufffd" in text
        found += fresh
    assert found + decoder.end() == BYTES.decode(BYTES.encode(text))


def test_a_character_of_several_tokens_waits_for_the_last() -> None:
    ids = BYTES.encode("🙂")
    assert len(ids) == 4
    decoder = Decoder(BYTES)
    assert [decoder.push([i]) for i in ids] == ["", "", "", "🙂"]
    cut = Decoder(BYTES)
    assert cut.push(ids[:2]) == ""
    assert cut.end() == "\ufffd"  # it never came


def test_bytes_that_are_no_character_do_not_hold_up_the_rest() -> None:
    start = BYTES.encode("🙂")[0]
    decoder = Decoder(BYTES)
    said = "".join(decoder.push([start]) for _ in range(50))
    assert len(said) > 40


def test_words_get_the_spaces_between_them() -> None:
    ids = WORDS.encode("3 + 4 =7")
    decoder = Decoder(WORDS)
    assert [decoder.push([i]) for i in ids] == ["3", " +", " 4", " =7"]
    assert Decoder(WORDS, ids[:2]).push(ids[2:3]) == " 4"


# ---- thought and answer ----


@pytest.mark.parametrize(
    ("text", "prefilled", "thought", "answer"),
    [
        ("try 3\n</think>\n\n7 ", "<think>", "try 3", "7"),
        ("try 3", "<think>", "try 3", ""),
        ("try 3 </thi", "<think>", "try 3 </thi", ""),
        ("<think> a </think> b", "", "a", "b"),
        ("<think>a", "<think>", "a", ""),
        ("  7 < 8 ", "", "", "7 < 8"),
        ("b", "<think> </think>", "", "b"),
        ("</think></think>b", "<think>", "", "b"),
        ("a <think>b</think> c", "", "b", "a c"),
        ("a<think>b</think>c", "", "b", "ac"),
        ("留白</think>留 白\n", "<think>", "留白", "留 白"),
    ],
)
def test_a_thought_and_its_answer(text: str, prefilled: str, thought: str, answer: str) -> None:
    for cuts in (None, *map(random.Random, range(10))):
        texts, _, _ = heard(text, prefilled, cuts)
        assert texts == {"reasoning": thought, "content": answer}


PARTS = st.lists(
    st.sampled_from(
        [*"<thinkab/> \n留🙂", "<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "STOP"]
    ),
    max_size=14,
)


@settings(max_examples=300)
@given(
    PARTS,
    st.sampled_from(["", "<think>", "<think> </think>"]),
    st.integers(0, 2**32),
    st.booleans(),
    st.booleans(),
)
def test_pieces_do_not_matter_and_no_tag_leaks(
    parts: list[str], prefilled: str, seed: int, tags: bool, curious: bool
) -> None:
    text = "".join(parts)
    options: dict[str, Any] = {"tags": tags, "curious": curious, "stops": ("STOP", "ba")}
    whole, _, _ = heard(text, prefilled, None, **options)
    cut, _, _ = heard(text, prefilled, random.Random(seed), **options)
    assert whole == cut
    for said in whole.values():
        assert "<think>" not in said
        assert "</think>" not in said
        assert said == said.strip()
    assert "STOP" not in whole["content"]
    assert "ba" not in whole["content"]
    if tags:
        assert "<answer>" not in whole["content"]


def naive(text: str, prefilled: str) -> dict[str, str]:
    """The same once all is there, by the letter of the rule."""
    state = "reasoning" if prefilled == "<think>" else "content"
    found: dict[str, list[str]] = {"reasoning": [], "content": []}
    for part in re.split("(</?think>)", text):
        if part == "<think>":
            state = "reasoning"
        elif part == "</think>":
            state = "content"
        else:
            found[state].append(part)
    return {kind: "".join("".join(parts).split()) for kind, parts in found.items()}


@given(PARTS, st.sampled_from(["", "<think>"]), st.integers(0, 2**32))
def test_every_letter_is_said_once_and_on_the_right_side(parts: list[str], prefilled: str, seed: int) -> None:
    texts, _, _ = heard("".join(parts), prefilled, random.Random(seed))
    assert {kind: "".join(said.split()) for kind, said in texts.items()} == naive("".join(parts), prefilled)


@given(PARTS, st.sampled_from(["", "<think>", "<think> </think>"]), st.integers(0, 2**32))
def test_a_path_is_split_as_its_stream_was(parts: list[str], prefilled: str, seed: int) -> None:
    text = "".join(parts)
    texts, _, _ = heard(text, prefilled, random.Random(seed))
    thought, said = split(SimpleNamespace(prefilled=prefilled), text)  # type: ignore[arg-type]
    assert "".join(thought.split()) == "".join(texts["reasoning"].split())
    assert "".join(said.split()) == "".join(texts["content"].split())


@given(
    st.lists(st.sampled_from([*"<thinkab/> \n留🙂", "</th"]), max_size=14),
    st.sampled_from(["</think>", "</think> 4", " </think>\n4", "\n</think>\n\n4"]),
    st.sampled_from([BYTES, WORDS]),
)
@example([" ", "留"], "</think>", BYTES)  # its first token is a space and a part of the character
def test_the_tokens_of_a_thought_end_where_its_tag_begins(
    parts: list[str], rest: str, tokenizer: TextTokenizer
) -> None:
    """Also for who stops the stream before there is a path; none of them is the tag's."""
    ids = tuple(tokenizer.encode("".join(parts) + rest))
    template = Template(tokenizer, "{{ messages[-1].content }} <think>")
    ask = Ask(question="", template=template, prompt_ids=(1,), max_tokens=99, seed=0)
    path = path_of(ask, Draft(ids, (0.0,) * len(ids), (False,) * len(ids)))
    speech = Speech(tokenizer, "<think>", curious=True)
    for piece in pieces(list(ids), None):
        speech.hear(piece)
    assert speech.thought_tokens == path.thought_tokens
    before, tag, _ = tokenizer.decode(ids).partition("</think>")
    assert tag
    assert len(tokenizer.decode(ids[: path.thought_tokens])) <= len(before)
    assert tokenizer.decode(ids[path.thought_tokens :]).lstrip().startswith("</think>")


def test_what_was_never_opened_is_not_closed() -> None:
    """A template that leaves it to the model to open its thought, and a model that did not."""
    template = Template(BYTES, "{{ messages[-1].content }} ")
    assert template.prefilled == ""
    ids = tuple(BYTES.encode("it is</think> 42"))
    draft = Draft(ids, (0.0,) * len(ids), (False,) * len(ids))
    ask = Ask(question="", template=template, prompt_ids=(1,), max_tokens=99, seed=0)
    path = path_of(ask, draft)
    assert (path.thought, path.content, path.thought_tokens) == ("", "it is 42", 0)
    texts, _, speech = heard("it is</think> 42", "", random.Random(0))
    assert (texts["content"], speech.thought_tokens) == ("it is 42", 0)
    whole = chat(create_app(house_of(says("it is</think> 42"), template=template.source))).json()
    assert whole["choices"][0]["message"]["content"] == "it is 42"
    assert whole["liubai"]["thinking"]["tokens"] == 0
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


def test_answer_tags_are_form_where_they_are_tokens_of_their_own() -> None:
    texts, _, _ = heard("try </think> <answer> 7 </answer>", "<think>", random.Random(0), WORDS, tags=True)
    assert texts["content"] == "7"
    texts, _, _ = heard("</think>so <answer>7</answer> it is", "<think>", random.Random(0), tags=True)
    assert texts["content"] == "so 7 it is"


def test_nothing_is_held_back_longer_than_it_must() -> None:
    speech = Speech(BYTES, "<think>", stops=("END",))
    said = [one.text for i in BYTES.encode("a b</think>c E") for one in speech.hear(Piece((i,), (0.0,)))]  # type: ignore[union-attr]
    assert "".join(said) == "a bc"  # " E" may still become the stop, or white space at the end
    assert [one.text for one in speech.hear(Piece(tuple(BYTES.encode("x")), (0.0,)))] == [" Ex"]  # type: ignore[union-attr]


# ---- stops ----


def test_a_stop_over_several_tokens_ends_the_answer_and_is_not_in_it() -> None:
    for cuts in (None, *map(random.Random, range(10))):
        texts, _, speech = heard(
            "I STOP here</think>one, STOP two", "<think>", cuts, stops=("STOP", "nothing")
        )
        assert texts == {"reasoning": "I STOP here", "content": "one,"}
        assert speech.stopped
        # what was written behind it is not counted, however it came
        assert speech.tokens == len(BYTES.encode("I STOP here</think>one, STOP"))


def test_of_two_stops_the_one_that_is_complete_first_counts() -> None:
    for cuts in (None, *map(random.Random, range(10))):
        texts, _, _ = heard("xabcdef", None, cuts, stops=("abcde", "cd"))
        assert texts["content"] == "xab"


def test_bare_texts_keep_every_blank() -> None:
    for cuts in (None, random.Random(1)):
        texts, _, _ = heard("  a <think> b  \n", None, cuts)
        assert texts["content"] == "  a <think> b  \n"


# ---- calls ----


def test_calls_are_read_wherever_they_are_cut() -> None:
    text = 'x <tool_call>{"name": "f", "arguments": {"留": 1}}</tool_call> y <tool_call>no</tool_call>'
    for cuts in (None, *map(random.Random, range(10))):
        texts, calls, _ = heard(text, "", cuts, understand=lambda t: parse_call(t, ["f"]))
        assert [json.loads(call.arguments) for call in calls] == [{"留": 1}]
        assert texts["content"] == "x y <tool_call>no</tool_call>"


# ---- tokens and their probabilities ----


@given(PARTS, st.integers(0, 2**32))
def test_tokens_stand_with_their_text(parts: list[str], seed: int) -> None:
    """Each token once, in order, on the side where it begins; those of tags nowhere."""
    text = "".join(parts).replace("<answer>", "").replace("STOP", "")
    ids = BYTES.encode(text)
    speech = Speech(BYTES, "<think>", curious=True)
    said = [one for piece in pieces(ids, random.Random(seed)) for one in speech.hear(piece)] + speech.end()
    shown = [token.id for one in said if isinstance(one, Said) for token in one.tokens]
    left = iter(ids)
    assert all(token in left for token in shown)  # in order, none twice
    written = "".join(one.text for one in said if isinstance(one, Said))
    assert "".join(BYTES.decode(shown).split()) == "".join(written.split())
    tags = {BYTES.id_of("<think>"), BYTES.id_of("</think>")}
    assert not tags & set(shown)


def test_all_tokens_of_plain_text_are_shown() -> None:
    ids = BYTES.encode("留白 and 🙂</think>the answer")
    speech = Speech(BYTES, "<think>", curious=True)
    said = [
        one for i in ids for one in speech.hear(Piece((i,), (-1.0,), (((i, -1.0), (0, -2.0)),)))
    ] + speech.end()
    by_kind = {
        kind: [t for one in said if isinstance(one, Said) and one.kind == kind for t in one.tokens]
        for kind in ("reasoning", "content")
    }
    at = ids.index(BYTES.id_of("</think>"))  # type: ignore[arg-type]
    assert [t.id for t in by_kind["reasoning"]] == ids[:at]
    assert [t.id for t in by_kind["content"]] == ids[at + 1 :]
    joined = bytes(b for t in by_kind["reasoning"] for b in entry(BYTES, t)["bytes"])
    assert joined.decode() == "留白 and 🙂"
    assert all(len(entry(BYTES, t)["top_logprobs"]) == 2 for t in by_kind["content"])


def test_the_bytes_of_a_part_of_a_character() -> None:
    ids = BYTES.encode("🙂")
    assert b"".join(bytes_of(BYTES, i) for i in ids) == "🙂".encode()
    assert bytes_of(BYTES, BYTES.encode("a")[0]) == b"a"


# ---- over the API ----


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_a_stream_says_what_the_whole_answer_says(size: int) -> None:
    script = "Let me think, 留白 🙂.\n</think>\n\nIt is 等等 42.\n"
    app = create_app(house_of(says(script, size=size)))
    whole = chat(app, logprobs=True, top_logprobs=1).json()["choices"][0]
    answer = chat(app, logprobs=True, top_logprobs=1, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = answer.chunks()
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [choice for chunk in chunks for choice in chunk["choices"]]
    assert deltas[0]["delta"]["role"] == "assistant"
    for name in ("content", "reasoning_content", "reasoning"):
        assert "".join(d["delta"].get(name) or "" for d in deltas) == whole["message"][name]
    assert whole["message"]["content"] == "It is 等等 42."
    for name in ("content", "reasoning_content"):
        streamed = [t for d in deltas if d["logprobs"] for t in d["logprobs"][name] or ()]
        assert streamed == whole["logprobs"][name]
        assert all(t["logprob"] == -0.5 for t in streamed)
    assert [d["finish_reason"] for d in deltas if d["finish_reason"]] == ["stop"]
    assert chunks[-1]["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    usage = chunks[-1]["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]
    assert "liubai" in chunks[-2]


def test_a_stream_without_usage_has_none() -> None:
    chunks = chat(create_app(house_of(says("</think>x"))), stream=True).chunks()
    assert all("usage" not in chunk for chunk in chunks)


def test_several_choices_stream_side_by_side() -> None:
    app = create_app(house_of(says("a</think>one", "b</think>two", "c</think>three", size=1)))
    chunks = chat(app, n=3, stream=True).chunks()
    texts = {0: "", 1: "", 2: ""}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] += choice["delta"].get("content") or ""
    assert sorted(texts.values()) == ["one", "three", "two"]
    summaries = [chunk for chunk in chunks if "liubai" in chunk]
    assert summaries == chunks[-1:]
    assert len(summaries[0]["liubai"]["paths"]["list"]) == 3


def test_several_paths_are_told_before_the_one_that_is_chosen() -> None:
    texts = ["a</think>\\boxed{1}", "b</think>\\boxed{2}", "c</think>\\boxed{2}"]
    app = create_app(house_of(says(*texts, size=2)))
    chunks = chat(app, stream=True, paths={"kind": "vote", "n": 3}).chunks()
    paths: dict[int, dict[str, str]] = {}
    for chunk in chunks:
        piece = chunk.get("liubai", {})
        if "path" in piece:
            assert chunk["choices"] == []
            mine = paths.setdefault(piece["path"], {"reasoning": "", "content": ""})
            for kind in ("reasoning", "content"):
                mine[kind] += piece.get(kind, "")
    assert sorted((p["reasoning"], p["content"]) for p in paths.values()) == [
        ("a", "\\boxed{1}"),
        ("b", "\\boxed{2}"),
        ("c", "\\boxed{2}"),
    ]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(d.get("content") or "" for d in deltas) == "\\boxed{2}"
    summary = chunks[-1]["liubai"]["paths"]
    assert summary["kind"] == "vote"
    assert summary["list"][summary["chosen"]]["answer"] == "2"
    assert sorted(path["votes"] for path in summary["list"]) == [1, 2, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_over_the_api_withdraws_the_rest(stream: bool) -> None:
    writer = says("STOP is thought of</think>one STOP " + "two " * 200, size=2)
    app = create_app(house_of(writer))
    answer = chat(app, stop=["STOP"], stream=stream)
    assert writer.cancelled == 1
    if stream:
        chunks = answer.chunks()
        said = "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"])
        finish = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = answer.json()["choices"][0]
        said, finish = choice["message"]["content"], choice["finish_reason"]
        assert answer.json()["usage"]["completion_tokens"] < 40
    assert (said, finish) == ("one", "stop")

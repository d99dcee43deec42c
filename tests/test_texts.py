"""A base model from the user's own texts: what is read, in which tokens, and that nothing held out is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import SupportsIndex

import pytest
import torch
from conftest import TINY_SHAPE, Killed, Silent, scramble
from hypothesis import given, settings
from hypothesis import strategies as st

from liubai.errors import UserError
from liubai.model.checkpoint import load
from liubai.problems.questions import Questions, read_questions, share_of, splits
from liubai.problems.texts import PIECE, Texts, pieces, read_texts, split_texts
from liubai.recipe import load_recipe
from liubai.recipe.runner import fingerprint
from liubai.stages import pretrain, sft
from liubai.stages.context import Context
from liubai.text.template import template_for
from liubai.text.tokenizer import BOS, EOS, TAGS, byte_level

SUMS = [(f"What is {a} plus {b}?", str(a + b)) for a in range(10, 30) for b in (5, 17, 400)]
TEXTS = [f"{question} <think> {a} </think> <answer> {a} </answer>" for question, a in SUMS]
TOKENIZER = byte_level(TEXTS, 320)


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    rows = [{"prompt": q, "text": f"<think> {a}. </think> <answer> {a} </answer>"} for q, a in SUMS]
    return write(tmp_path / "notes.jsonl", rows)


# ---- tokens ----


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_frequent_words_and_numbers_are_single_tokens() -> None:
    pieces = [TOKENIZER.decode([i]) for i in TOKENIZER.encode(TEXTS[1])]
    assert pieces == [
        *("What", " is", " ", "10", " plus", " ", "17", "?", " ", "<think>", " ", "27", " ", "</think>"),
        *(" ", "<answer>", " ", "27", " ", "</answer>"),
    ]
    assert [TOKENIZER.decode([i]) for i in TOKENIZER.encode("400400")] == ["400", "400"]


def test_the_vocabulary_is_no_larger_than_asked_and_the_same_every_time() -> None:
    assert TOKENIZER.vocab_size <= 320
    assert byte_level(iter(TEXTS), 320).backend.to_str() == TOKENIZER.backend.to_str()
    assert all(len(TOKENIZER.encode(token)) == 1 for token in (BOS, EOS, *TAGS))
    assert byte_level(TEXTS, 262).vocab_size == 262


# ---- rows ----


def test_a_text_about_a_held_out_question_is_never_read(notes: Path) -> None:
    rows = [{"question": q, "answer": a} for q, a in SUMS]
    questions = Questions(
        path=str(write(notes.parent / "questions.jsonl", rows)), instruction="Think.", eval_share=0.3
    )
    train, held_out = splits(read_questions(questions))
    assert train
    assert held_out
    read = {row.prompt for row in read_texts(Texts(path=str(notes), instruction="Think.", eval_share=0.3))}
    assert read == {problem.prompt for problem in train}
    assert {row.prompt for row in read_texts(Texts(path=str(notes), eval_share=0))} == {q for q, _ in SUMS}


MISTAKES = [
    ({"prompt": "How?", "texts": "<think>"}, ":1: there is no column 'text'; did you mean 'texts'?"),
    ({"prompt": "How?", "text": ""}, ":1: 'text' must be text, and not empty"),
    ({"prompt": 3, "text": "<think>"}, ":1: 'prompt' must be text"),
    ({"prompt": "How?", "text": "So."}, ":1: 'text' must begin with <think>"),
]


@pytest.mark.parametrize(("row", "message"), MISTAKES)
def test_a_row_that_is_no_text_is_named(row: dict[str, object], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "notes.jsonl", [row])
    with pytest.raises(UserError) as raised:
        read_texts(Texts(path=str(path)))
    assert message in str(raised.value)


def test_a_file_of_nothing_else_is_a_mistake(notes: Path) -> None:
    with pytest.raises(UserError, match=r"all questions of .* are held out; lower eval_share"):
        read_texts(Texts(path=str(notes), eval_share=1))
    with pytest.raises(UserError, match="has no texts"):
        read_texts(Texts(path=str(write(notes, []))))


def test_a_text_longer_than_the_model_is_named(tmp_path: Path) -> None:
    row = {"prompt": "How?", "text": "<think> " + "x y " * 3000}
    path = write(tmp_path / "notes.jsonl", [row])
    with pytest.raises(UserError, match=r"notes\.jsonl:1: \d+ tokens, and the model has 2048 positions"):
        pretrain.read(Texts(path=str(path), eval_share=0))


# ---- plain text ----


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """Paragraphs of sums, one line each, with a blank line after every third."""
    lines = [f"{a} and {b} are {a + b}, said the {'miller' if a % 2 else 'king'}." for a in range(60)
             for b in (3, 8, 11)]  # fmt: skip
    path = tmp_path / "book.txt"
    path.write_bytes(
        "\r\n".join(f"{line}\r\n" if i % 3 == 2 else line for i, line in enumerate(lines)).encode()
    )
    return path


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab仄 \n"), max_size=200), st.integers(1, 30))
def test_pieces_lose_nothing_but_white_space_and_are_not_too_long(text: str, most: int) -> None:
    found = list(pieces(text, most))
    assert "".join("".join(piece.split()) for piece in found) == "".join(text.split())
    assert all(0 < len(piece) <= most for piece in found)


def slowly(text: str, most: int) -> Iterator[str]:
    """The rule as it is told: what is left is a new text each time."""
    text = text.strip()
    while len(text) > most:
        head = text[: most + 1]
        ends = (head.rfind(gap) for gap in ("\n\n", "\n", " "))
        at = next((end for end in ends if end > most // 2), most)
        yield text[:at].rstrip()
        text = text[at:].lstrip()
    if text:
        yield text


@settings(max_examples=400, deadline=None)
@given(
    st.text(st.sampled_from("ab仄 \n\t\x1c\x85\u2003\u200b"), max_size=120) | st.text(max_size=120),
    st.integers(1, 30),
)
def test_pieces_are_what_the_rule_says(text: str, most: int) -> None:
    assert list(pieces(text, most)) == list(slowly(text, most))


def test_a_large_file_is_cut_in_one_walk() -> None:
    """No piece is cut from a copy of all that is left."""
    book = "a word or two, and\n" * 20_000

    class Counted(str):
        copied = 0

        def strip(self, chars: str | None = None) -> Counted:
            return Counted(str.strip(self, chars))

        def lstrip(self, chars: str | None = None) -> Counted:
            return Counted(str.lstrip(self, chars))

        def __getitem__(self, key: SupportsIndex | slice) -> Counted:
            found = Counted(str.__getitem__(self, key))
            Counted.copied += len(found)
            return found

    assert "".join(pieces(Counted(book))).replace("\n", "") == book.replace("\n", "")
    assert Counted.copied < 3 * len(book)


def test_a_piece_ends_with_a_paragraph_or_else_a_line_or_else_a_word() -> None:
    assert list(pieces("aa bb\ncc\n\ndd\nee ff", 14)) == ["aa bb\ncc", "dd\nee ff"]
    assert list(pieces("aa bb\ncc dd ee ff", 14)) == ["aa bb\ncc dd ee", "ff"]  # that line ends too early
    assert list(pieces("aa\nbb bb bb\ncc dd", 14)) == ["aa\nbb bb bb", "cc dd"]
    assert list(pieces("abcdefgh", 5)) == ["abcde", "fgh"]
    assert list(pieces(" \n ")) == []


def test_what_is_held_out_of_a_book_is_not_read(book: Path) -> None:
    texts = Texts(path=str(book), eval_share=0.3)
    read, held_out = split_texts(texts)
    whole = " ".join(book.read_text().split())
    assert read
    assert held_out
    assert not {t.text for t in read} & {t.text for t in held_out}
    assert len(read) + len(held_out) == len(list(pieces(book.read_text())))
    for text in (*read, *held_out):
        assert " ".join(text.text.split()) in whole
        assert len(text.text) <= PIECE
        assert (text.prompt, text.question) == ("", "")
    assert [share_of(t.text) for t in held_out] == sorted(share_of(t.text) for t in held_out)
    assert split_texts(Texts(path=str(book), eval_share=0))[1] == []


def test_rows_without_a_question_are_plain_text_of_any_kind(tmp_path: Path) -> None:
    path = write(tmp_path / "poems.jsonl", [{"text": f"Poem {i}, of {i * i} lines."} for i in range(40)])
    texts = Texts(path=str(path), prompt="")
    read, held_out = split_texts(texts)
    assert {t.text for t in (*read, *held_out)} == {f"Poem {i}, of {i * i} lines." for i in range(40)}
    with pytest.raises(UserError, match=r"poems.jsonl:1: there is no column 'poem'"):
        read_texts(Texts(path=str(path), prompt="", text="poem"))
    with pytest.raises(UserError, match="there is no file"):
        read_texts(Texts(path=str(tmp_path / "none.txt")))
    with pytest.raises(ValueError, match="examples need a question"):
        sft.Config(texts=texts)


@torch.no_grad()
def test_bits_a_byte_are_those_of_each_text_alone(book: Path) -> None:
    texts = Texts(path=str(book), vocabulary=320)
    tokenizer, *_ = pretrain.read(texts)
    model = pretrain.build(pretrain.model_config(TINY_SHAPE, tokenizer), 0)
    scramble(model, 3)
    rows = split_texts(Texts(path=str(book), eval_share=0.5))[1]
    documents = pretrain.encoded(rows, texts, tokenizer)
    each, tokens = [], 0
    for row, document in zip(rows, documents, strict=True):
        assert tokenizer.decode(document.ids) == f"{BOS}{row.text}{EOS}"
        logprobs = model(torch.tensor([list(document.ids)]))[0].double().log_softmax(-1)
        after = torch.tensor(document.ids[1:])
        each.append(-float(logprobs[:-1].gather(1, after[:, None]).sum()))
        tokens += len(after)
    nats, size = sum(each), sum(len(row.text.encode()) for row in rows)
    for room in (64, 4096):  # however it is cut into micro-batches
        found = pretrain.unread_loss(model, documents, size, tokenizer.pad_id, room)
        assert found["eval/loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert found["eval/bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
        assert pretrain.unread_nats(model, documents, tokenizer.pad_id, room) == pytest.approx(each, rel=1e-5)


# ---- training ----


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)


def test_killed_and_resumed_ends_in_the_same_bits(notes: Path, tmp_path: Path) -> None:
    texts = Texts(path=str(notes), vocabulary=320)
    config = pretrain.Config(steps=8, tokens_per_step=512, model=TINY_SHAPE, texts=texts, save_every=2)
    pretrain.run(config, Context(tmp_path / "whole", 1, {}, Silent()))
    with pytest.raises(Killed):
        pretrain.run(config, Context(tmp_path / "killed", 1, {}, Silent(kill_at=5)))
    pretrain.run(config, Context(tmp_path / "killed", 1, {}, Silent()))
    for file in ("model.safetensors", "tokenizer.json"):
        whole, killed = (tmp_path / run / "checkpoint" / file for run in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes()


def test_a_book_is_read_and_asked_about_and_goes_on_in_the_same_bits(book: Path, tmp_path: Path) -> None:
    texts = Texts(path=str(book), vocabulary=320)
    config = pretrain.Config(steps=40, tokens_per_step=512, model=TINY_SHAPE, texts=texts, save_every=10)
    pretrain.run(config, Context(tmp_path / "whole", 1, {}, Silent()))
    with pytest.raises(Killed):
        pretrain.run(config, Context(tmp_path / "killed", 1, {}, Silent(kill_at=25)))
    pretrain.run(config, Context(tmp_path / "killed", 1, {}, Silent()))
    told = []
    for name in ("whole", "killed"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        told.append({row["step"]: row["eval/bits_per_byte"] for row in rows if "eval/bits_per_byte" in row})
    assert told[0] == told[1]
    assert list(told[0]) == [10, 20, 30, 40]
    assert told[0][40] < told[0][10] < 8
    kept = json.loads((tmp_path / "whole" / pretrain.HELD_OUT).read_text())
    model, _ = load(tmp_path / "whole" / "checkpoint")
    assert kept["parameters"] == model.count_parameters()
    assert sum(kept["bits"]) / kept["bytes"] == pytest.approx(told[0][40], rel=1e-6)
    assert len(kept["bits"]) == len(kept["sizes"]) == kept["texts"]
    assert (
        kept["bytes"] == sum(kept["sizes"]) == sum(len(text.text.encode()) for text in split_texts(texts)[1])
    )


def test_what_was_read_begins_as_a_prompt_does(notes: Path, tmp_path: Path) -> None:
    """The tokens under which the model learned to answer are those that it is asked with."""
    config = pretrain.Config(
        steps=1, tokens_per_step=64, model=TINY_SHAPE, texts=Texts(path=str(notes), vocabulary=320)
    )
    pretrain.run(config, Context(tmp_path / "run", 0, {}, Silent()))
    _, tokenizer = load(tmp_path / "run" / "checkpoint")
    template = template_for(tokenizer, tmp_path / "run" / "checkpoint")
    assert template.prefilled == "<think>"
    _, draw, _ = pretrain.read(config.texts)
    (document, *_) = pretrain.documents(draw, 64, 0, 0)
    text = tokenizer.decode(document.ids)
    question = text.partition("<think>")[0].removeprefix(BOS).strip()
    prompt = template.prompt_ids(question)
    assert list(document.ids[: len(prompt)]) == prompt
    assert text.endswith(f"</answer>{EOS}")
    assert share_of(question) >= 0.2
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(
        tmp_path / "run" / "checkpoint"
    )
    assert theirs(text, add_special_tokens=False)["input_ids"] == list(document.ids)


def test_other_texts_are_another_stage(notes: Path) -> None:
    recipe = notes.parent / "recipe.toml"
    texts = '[stages.base.texts]\npath = "notes.jsonl"\n'
    recipe.write_text(f'name = "x"\n[stages.base]\nkind = "pretrain"\nsteps = 1\n{texts}')

    def mark() -> str:
        loaded = load_recipe(recipe)
        return fingerprint(loaded, loaded.stages[0], {})

    before = mark()
    assert mark() == before
    notes.write_text(notes.read_text().replace("27", "28"))
    assert mark() != before
    recipe.write_text(recipe.read_text().replace("notes.jsonl", "book.txt"))
    (notes.parent / "book.txt").write_text("Once upon a time.")
    before = mark()
    (notes.parent / "book.txt").write_text("Once upon a night.")
    assert mark() != before

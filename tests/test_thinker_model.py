"""The model inside the page against the engine, in a real browser; its words and marks against ours."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright: install liubai[dev]")
pytest.register_assert_rewrite("thinking")

from playwright.sync_api import Browser, Page  # noqa: E402
from thinking import SHAPES, by_engine, carried, in_eight_bits, model_folder  # noqa: E402

from liubai.grade.extract import extract  # noqa: E402
from liubai.grade.verifiers import countdown  # noqa: E402
from liubai.measure.attention import patterns  # noqa: E402
from liubai.problems import family, problem_at, world_vocabulary  # noqa: E402
from liubai.report import thinker as section  # noqa: E402
from liubai.rollout.sampling import uniform  # noqa: E402
from liubai.stages.evaluate import held_out_of  # noqa: E402
from liubai.text.template import template_for, text_of  # noqa: E402
from liubai.text.tokenizer import TextTokenizer, word_level  # noqa: E402
from liubai.types import Problem, Stop  # noqa: E402

pytest_plugins = ["thinking"]


@pytest.fixture(scope="module")
def bare(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page with nothing but the model's script."""
    path = tmp_path_factory.mktemp("bare") / "bare.html"
    script = (Path(section.__file__).parent / "thinker.js").read_text(encoding="utf-8")
    path.write_text(f'<!doctype html><meta charset="utf-8"><script>{script}</script>', encoding="utf-8")
    page = chromium.new_page()
    page.goto(path.as_uri())
    yield page
    page.close()


#: Answers to some questions: prompt, completion, the logits of every step, and every head's weights.
ASK = """
({ told, questions, most, temperature, seed }) => {
  const [model] = mindsOf(told);
  return questions.map((question) => {
    const answer = new Answer(model, question, { most, temperature, seed }), logits = [[...answer.logits]];
    while (!answer.stop) { answer.write(); logits.push([...answer.logits]); }
    return { prompt: answer.prompt, ids: answer.ids, stop: answer.stop, text: answer.text, logits,
             looks: model.mind.looks.map((row) => [...row]) };
  });
}
"""


def by_page(
    page: Page, told: dict[str, Any], problems: Sequence[Problem], most: int, temperature: float, seed: int
) -> list[dict[str, Any]]:
    asked = {"told": told, "questions": [p.prompt for p in problems], "most": most}
    answers: list[dict[str, Any]] = page.evaluate(
        ASK, asked | {"temperature": temperature, "seed": str(seed)}
    )
    return answers


@pytest.mark.parametrize("which", [*SHAPES, "trained"])
def test_the_page_writes_what_the_engine_writes(
    which: str, base: Path, world: TextTokenizer, bare: Page, tmp_path: Path
) -> None:
    path = model_folder(which, base, world, tmp_path / "c")
    problems = held_out_of("countdown", 3, 1)
    told = carried(path, problems)
    model, tokenizer = in_eight_bits(path)
    template = template_for(tokenizer, path)
    for temperature, seed in ((0.0, 0), (1.0, 7), (0.7, 2**63 - 1)):
        wanted = by_engine(path, problems, 24, temperature, seed)
        found = by_page(bare, told, problems, 24, temperature, seed)
        for sample, answer in zip(wanted, found, strict=True):
            assert tuple(answer["prompt"]) == sample.prompt_ids
            assert tuple(answer["ids"]) == sample.completion_ids
            assert answer["stop"] == ("end" if sample.stop is Stop.EOS else "length")
            assert answer["text"] == f"{template.prefilled} {text_of(template, sample)}".strip()
            ids = [*sample.prompt_ids, *sample.completion_ids][:-1]  # the last one is written, not read
            with torch.no_grad():
                logits_TV = model(torch.tensor([ids]))[0, len(sample.prompt_ids) - 1 :]
            steps = torch.tensor(answer["logits"][: len(logits_TV)])
            assert torch.allclose(steps, logits_TV, atol=1e-4, rtol=0)
            rows_LHTT = patterns(model, ids)
            L, H, T, _ = rows_LHTT.shape
            assert len(answer["looks"]) == T
            for t, row in enumerate(answer["looks"]):
                looks_LHt = torch.tensor(row, dtype=torch.float32).view(L, H, t + 1)
                assert torch.allclose(looks_LHt, rows_LHTT[:, :, t, : t + 1], atol=1e-4)
        # otherwise the seeds would not have been tested
        assert temperature or all(a["ids"] for a in found)
        assert not temperature or len({tuple(a["ids"]) for a in found}) > 1


def test_one_head_a_layer_or_all_of_them(base: Path, bare: Page) -> None:
    problems = held_out_of("countdown", 1, 1)
    told = carried(base / "checkpoint", problems)
    script = """
    ({ told, question }) => {
      const [model] = mindsOf(told), answer = new Answer(model, question, { most: 4 }), t = 4;
      const of = (wanted) => [...model.mind.weights(t, wanted)];
      return [of(), of((l) => l === 1), of((l, h) => l === 1 && h === 0), of(() => false)];
    }"""
    every, layer, head, nobody = bare.evaluate(script, {"told": told, "question": problems[0].prompt})
    model, tokenizer = in_eight_bits(base / "checkpoint")
    prompt = template_for(tokenizer, base / "checkpoint").prompt_ids(problems[0].prompt)
    row_LHt = patterns(model, prompt)[:, :, 4, :5]
    assert every == pytest.approx(row_LHt.mean((0, 1)).tolist(), abs=1e-5)
    assert layer == pytest.approx(row_LHt[1].mean(0).tolist(), abs=1e-5)
    assert head == pytest.approx(row_LHt[1, 0].tolist(), abs=1e-5)
    assert nobody == [0] * 5


def test_chance_is_the_engines(bare: Page) -> None:
    rng = random.Random(0)
    pairs = [(rng.randrange(2**63), rng.randrange(5000)) for _ in range(200)] + [(0, 0), (2**63 - 1, 319)]
    found = bare.evaluate("(pairs) => pairs.map(([s, i]) => chance(s, i))", [(str(s), i) for s, i in pairs])
    seeds, places = (torch.tensor(column) for column in zip(*pairs, strict=True))
    assert found == uniform(seeds, places).tolist()  # to the last bit


def test_words_are_cut_as_by_the_tokenizer(bare: Page) -> None:
    tokenizer = word_level(world_vocabulary(["make"]))
    rng = random.Random(1)
    pieces = [
        "make",
        "凑",
        "等等",
        "3",
        "12",
        "007",
        "->29",
        "=big",
        ":far",
        ":",
        "=7",
        "<think>",
        "</answer>",
    ]
    pieces += [
        "<|end|>",
        "<|nobody|>",
        "<",
        ">",
        "|",
        "-",
        "x",
        "Wait",
        "é",
        "٣٤",
        "３",
        "\u3000",
        "\ufeff",
        "\u0085",
    ]
    pieces += [
        "🙂",
        "〇",
        "々",
        "\u200b",
        "'",
        "\\",
        "\x00",
        " ",
        "  ",
        "\n",
        "\t",
        "\xa0",
        "->",
        "big",
        "far9",
    ]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 9))) for _ in range(600)]
    words = [tokenizer.backend.id_to_token(i) for i in range(tokenizer.vocab_size)]
    reader = {"words": words, "unknown": tokenizer.unknown_id, "ends": [], "before": "", "after": ""}
    script = "({ reader, texts }) => { const r = new Reader(reader); return texts.map((t) => r.encode(t)); }"
    found = bare.evaluate(script, {"reader": reader, "texts": texts})
    for text, ids in zip(texts, found, strict=True):
        assert ids == tokenizer.encode(text), text
    strange = "(reader) => new Reader(reader).unknownIn('make foo 3 foo bar ->29 ->290')"
    assert bare.evaluate(strange, reader) == ["foo", "bar", "->290"]


def test_the_page_marks_as_the_verifier_does(bare: Page) -> None:
    rng = random.Random(2)
    signs = [
        "3",
        "8",
        "9",
        "+",
        "-",
        "*",
        "/",
        "(",
        ")",
        "×",
        "÷",
        "−",
        "=",
        "= 33",
        " ",
        "08",
        ".",
        "33",
        "0",
    ]
    answers = ["( 3 * 8 ) + 9", "9+3*8", "9 + 3 × 8 = 33", "9 + 3 * 8 = 34", "33", "3 * 8 + 9 + 0", "9 - -24"]
    answers += [
        "(" * 20 + "3*8" + ")" * 20 + "+9",
        "(" * 21 + "3*8" + ")" * 21 + "+9",
        "8 / ( 3 - 3 )",
        "9=33=33",
    ]
    answers += [" ".join(rng.choices(signs, k=rng.randint(1, 7))) for _ in range(300)]
    for _ in range(300):  # of the right numbers, so that some are right
        a, b, c = rng.sample(["3", "8", "9"], 3)
        p, q = rng.choices("+-*/", k=2)
        answers.append(
            rng.choice([f"( {a} {p} {b} ) {q} {c}", f"{a} {p} ( {b} {q} {c} )", f"{a}{p}{b}{q}{c}"])
        )
    right = 0
    for target in (33, 20, 3):
        found = bare.evaluate(
            "({ question, answers }) => answers.map((answer) => isRight(question, answer))",
            {"question": f"make 3 8  9 ->{target}", "answers": answers},
        )
        for answer, mark in zip(answers, found, strict=True):
            assert mark is countdown(f"3 8 9 ->{target}", answer, {}), answer
        right += sum(found)
    assert 10 < right < 600
    for question in ("凑 3 8 9 ->33", "3 8 9 ->33", "3 8 9->33"):
        assert bare.evaluate(
            "(q) => [isRight(q, '9 + 3 * 8'), isRight(q, '9'), isRight(q, null)]", question
        ) == [*(True, False, False)]


def test_numbers_are_marked_where_the_question_says_it_all(bare: Page) -> None:
    problems = [
        problem_at(family(name), "eval", 0, i) for name in ("total", "greater", "solve") for i in range(40)
    ]
    others = [problem_at(family(name), "eval", 0, 0) for name in ("passage", "errand", "chain", "compare")]
    found = bare.evaluate("(questions) => questions.map(numberFor)", [p.prompt for p in problems])
    assert found == [p.gold for p in problems]
    script = "(questions) => questions.map((q) => isRight(q, '3'))"
    assert bare.evaluate(script, [p.prompt for p in others[:3]]) == [None, None, None]
    wrong = "solve 3 * x + 2 = 24", "14.6 or 14.60", "total", "total a", "tell me 3 ->3"
    assert bare.evaluate(script, wrong) == [None] * 5
    chain = {"prompt": others[2].prompt, "gold": others[2].gold, "verifier": "number"}
    script = "({ chain, gold }) => [gold, '11', '3 .', ''].map((a) => isRight(chain.prompt, a, [chain]))"
    assert bare.evaluate(script, {"chain": chain, "gold": chain["gold"]}) == [True, False, False, False]
    spaced = "isRight('83.22 or 83.4', '83 . 4') && !isRight('83.22 or 83.4', '83 . 22')"
    assert bare.evaluate(spaced) is True


def test_an_answer_is_found_as_in_grading(bare: Page) -> None:
    rng = random.Random(3)
    texts = []
    for _ in range(600):
        words = ["<think>", "3", "+", "4", "=7", "</think>", "<answer>", "3", "+", "4", "</answer>"]
        for _ in range(rng.randint(0, 4)):  # tags lost, doubled and moved
            words.insert(rng.randrange(len(words)), words[rng.randrange(len(words))])
            del words[rng.randrange(len(words))]
        texts.append(" ".join(words))
    found = bare.evaluate("(texts) => texts.map(answerIn)", texts)
    assert found == [extract(text).answer for text in texts]
    assert 100 < sum(answer is not None for answer in found) < 500

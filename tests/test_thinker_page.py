"""A reader lets the models of a report think: types, watches, stops, points at tokens, in a real browser."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Silent, tiny_config, tiny_model

pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright: install liubai[dev]")
pytest.register_assert_rewrite("thinking")

from playwright.sync_api import Browser, Page, expect  # noqa: E402
from thinking import by_engine, in_eight_bits  # noqa: E402

from liubai.grade import GradeItem, grade  # noqa: E402
from liubai.measure.attention import patterns  # noqa: E402
from liubai.model.checkpoint import save_checkpoint  # noqa: E402
from liubai.model.transformer import Transformer  # noqa: E402
from liubai.report import write_report  # noqa: E402
from liubai.stages import thinker  # noqa: E402
from liubai.stages.context import Context  # noqa: E402
from liubai.text.template import BARE  # noqa: E402
from liubai.text.tokenizer import TextTokenizer  # noqa: E402
from liubai.types import Problem, Sample, Stop  # noqa: E402

pytest_plugins = ["thinking"]

SAID = "3 * 8 + 9"
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def parrot(world: TextTokenizer) -> Transformer:
    """A model that answers SAID whatever it is asked: its layers write nothing, and every token of the chain
    has a direction of its own, by which the head knows what comes next."""
    shape = tiny_config(
        vocab_size=world.vocab_size,
        eos_token_id=world.eos_id,
        bos_token_id=world.bos_id,
        tie_word_embeddings=False,
    )
    model = tiny_model(0, shape)
    chain = ["<think>", "</think>", "<answer>", *SAID.split(), "</answer>", "<|end|>"]
    ids = [world.id_of(word) for word in chain]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.zero_()
        model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        model.norm.weight.fill_(1.0)
        for direction, (this, following) in enumerate(itertools.pairwise(ids)):
            model.embed_tokens.weight[this, direction] = 1.0
            model.lm_head.weight[following, direction] = 5.0
    return model


class Report:
    """Three models: a trained one, the parrot, and the first again under a hostile name."""

    def __init__(self, base: Path, world: TextTokenizer, folder: Path) -> None:
        self.run = folder
        other = folder / "2-zero"
        save_checkpoint(other / "checkpoint", parrot(world), world, BARE)
        config = thinker.Config(
            examples=4, limit=4, max_tokens=60, labels={"base": "Base", "zero": "Zero", "r1": EVIL}
        )
        inputs = {"base": base, "zero": other, "r1": base}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)
            context = Context(folder / "4-thinks", 0, inputs, Silent())
            thinker.run(config, context)
            context.finish()
        (folder / "recipe.toml").write_text('[stages.thinks]\nkind = "thinker"\nfrom = []\n')
        self.html = write_report(folder)
        self.folders = [base / "checkpoint", other / "checkpoint", base / "checkpoint"]

    def answers(self, question: str, temperature: float = 0.0, seed: int = 0) -> list[Sample]:
        problem = Problem(question, "", "countdown")
        return [by_engine(path, [problem], 60, temperature, seed)[0] for path in self.folders]


@pytest.fixture(scope="module")
def report(base: Path, world: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return Report(base, world, tmp_path_factory.mktemp("thinks"))


@pytest.fixture
def page(chromium: Browser, report: Report) -> Iterator[Page]:
    """The report as somebody opens it. No script may fail, and the policy may never be hurt."""
    opened = chromium.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda said: wrong.append(said.text))
    opened.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    opened.goto(report.html.as_uri())
    yield opened
    opened.close()
    assert not wrong


def think(page: Page, question: str, speed: str = "Infinity") -> None:
    page.select_option(".speed", speed)
    page.fill(".thinker .question", question)
    page.press(".thinker .question", "Enter")


def done(page: Page) -> None:
    expect(page.locator(".halt")).to_be_disabled(timeout=15_000)


def written(page: Page, column: int) -> list[str]:
    tokens = page.locator(".minds article").nth(column).locator(".token")
    return [
        str(title or text)
        for title, text in tokens.evaluate_all("(all) => all.map((t) => [t.title, t.textContent])")
    ]


def test_three_think_side_by_side(page: Page, report: Report, world: TextTokenizer) -> None:
    expect(page.locator(".thinker .off")).to_be_hidden()
    question = "3 4 5 ->35"
    think(page, question)
    done(page)
    columns = page.locator(".minds article")
    expect(columns).to_have_count(3)
    assert columns.locator("h3").evaluate_all("(all) => all.map((h) => h.firstChild.data)") == [
        "Base",
        "Zero",
        EVIL,
    ]
    marks = []
    for i, sample in enumerate(report.answers(question)):
        ids = [*sample.prompt_ids, *sample.completion_ids]
        assert written(page, i) == [world.backend.id_to_token(id) for id in ids]
        expect(columns.nth(i).locator(".count")).to_have_text(f"{len(sample.completion_ids)} tokens")
        response = world.decode(sample.completion_ids[: -1 if sample.stop is Stop.EOS else None])
        verdict = grade(GradeItem("countdown", question, response, {"prefilled": "<think>"}))
        ended = sample.stop is Stop.EOS
        marks.append("cut off" if not ended else "✓ right" if verdict.correct else "✗ wrong")
        expect(columns.nth(i).locator(".verdict b")).to_have_text(marks[-1])
    # the same model says the same; thought and answer stand apart
    assert written(page, 0) == written(page, 2)
    parts = columns.nth(0).locator(".part").evaluate_all("(all) => all.map((p) => p.dataset.part)")
    assert parts[:2] == ["question", "thought"]
    assert columns.nth(0).locator(".part").nth(0).locator(".token").count() == 5
    said = page.locator(".voice").inner_text()
    assert all(name in said for name in ("Base:", "Zero:", EVIL))
    assert page.locator(".thinker [aria-live]").count() == 1  # the final answers alone are spoken


def test_right_and_wrong_are_marked(page: Page) -> None:
    parrot = page.locator(".minds article").nth(1)
    for question, mark, name in (
        ("3 8 9 ->33", "✓ right", "right"),
        ("9 8 3 ->33", "✓ right", "right"),
        ("3 8 9 ->34", "✗ wrong", "wrong"),
        ("3 8 8 ->33", "✗ wrong", "wrong"),
    ):
        think(page, question)
        done(page)
        expect(parrot.locator(".verdict b")).to_have_text(mark)
        expect(parrot.locator(".verdict code")).to_have_text(SAID)
        expect(parrot).to_have_class(re.compile(rf"\b{name}\b"))
    think(page, "3 4 or 5")  # nothing here can tell
    done(page)
    expect(parrot.locator(".verdict b")).to_have_text("answer")
    expect(parrot).to_have_class("answer")


def test_drawn_with_a_seed(page: Page, report: Report, world: TextTokenizer) -> None:
    page.select_option(".draw", "0.5")
    seen = []
    for seed in (5, 6):
        page.fill(".seed", str(seed))
        think(page, "3 4 5 ->35")
        done(page)
        sample = report.answers("3 4 5 ->35", 0.5, seed)[0]
        seen.append(sample.completion_ids)
        ids = [*sample.prompt_ids, *sample.completion_ids]
        assert written(page, 0) == [world.backend.id_to_token(id) for id in ids]
    assert seen[0] != seen[1]


def test_stopped_and_asked_again(page: Page) -> None:
    think(page, "3 4 5 ->35", speed="6")
    halt = page.locator(".halt")
    expect(halt).to_be_enabled()
    expect(page.locator(".minds .count").nth(0)).to_have_text(re.compile(r"^[1-9]"))
    halt.click()
    expect(halt).to_be_disabled()
    stopped = page.locator(".minds .verdict b").nth(0)
    expect(stopped).to_have_text("stopped")
    before = [written(page, i) for i in range(3)]
    page.wait_for_timeout(400)
    assert [written(page, i) for i in range(3)] == before
    page.locator(".pick button").nth(1).click()
    expect(halt).to_be_enabled()
    assert page.input_value(".thinker .question") == page.locator(".thinker .pick button").nth(1).inner_text()
    page.select_option(".speed", "Infinity")
    done(page)
    expect(stopped).not_to_have_text("stopped")


def test_unknown_words_and_nothing_at_all(page: Page) -> None:
    think(page, "  ")
    expect(page.locator(".trouble")).to_have_text("Type a problem first, or take an example.")
    expect(page.locator(".thinker .question")).to_be_focused()
    think(page, "frobnicate 3 4 5 ->35")
    expect(page.locator(".trouble")).to_contain_text("“frobnicate”")
    expect(page.locator(".trouble")).to_contain_text("<|unknown|>")
    done(page)
    assert written(page, 0)[1] == "<|unknown|>"
    assert page.locator(".minds .verdict.none").count() == 0
    think(page, "3 4 5 ->35")
    expect(page.locator(".trouble")).to_have_text("")
    done(page)


def test_hostile_words_are_words(page: Page) -> None:
    think(page, EVIL)
    done(page)
    expect(page.locator(".trouble")).to_contain_text("alert")
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 3
    assert EVIL in page.locator(".minds").inner_text()


def test_a_token_shows_where_it_looks(page: Page, report: Report) -> None:
    question = "3 4 5 ->35"
    think(page, question)
    done(page)
    page.select_option(".view", "1.0")
    model, _ = in_eight_bits(report.folders[0])
    sample = report.answers(question)[0]
    row_t = patterns(model, [*sample.prompt_ids, *sample.completion_ids][:-1])[1, 0, 4, :5]
    first = page.locator(".minds article").first
    weight = "(t) => Number(t.style.getPropertyValue('--weight')) ** 2"

    def shades() -> list[float]:
        return [first.locator(".token").nth(i).evaluate(weight) for i in range(6)]

    first.locator(".text").focus()
    page.keyboard.press("Home")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert shades() == pytest.approx([*row_t.tolist(), 0], abs=6e-3)
    looked = first.locator(".looking").inner_text().replace("\xa0", " ")
    best = int(row_t.argmax())
    assert looked.startswith(f"“{first.locator('.token').nth(4).inner_text()}” looks at")
    assert (
        f"“{first.locator('.token').nth(best).inner_text()}” {row_t[best]:.0%}".replace("%", " %") in looked
    )
    active = first.locator(".text").get_attribute("aria-activedescendant")
    assert page.locator(f"#{active}").get_attribute("aria-label") == first.locator(".looking").inner_text()
    page.keyboard.press("Escape")
    assert first.locator(".text").get_attribute("aria-activedescendant") is None
    first.locator(".token").nth(1).hover()  # by mouse, too
    assert shades()[2:] == [0, 0, 0, 0]
    page.select_option(".view", "none")
    assert shades() == [0] * 6


def test_on_a_telephone_by_name_and_on_paper(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    think(page, "3 4 5 ->35")
    done(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    controls = page.locator(".thinker :is(button, input, select, [tabindex='0'])")
    named = "(e) => e.ariaLabel || [...(e.labels ?? [])].map((l) => l.textContent).join() || e.textContent"
    names = [str(controls.nth(i).evaluate(named)).strip() for i in range(controls.count())]
    assert all(names)
    assert len(names) == 3 + 4 + 4 + 3  # the line, examples, dials, texts
    page.emulate_media(media="print")
    expect(page.locator(".thinker .ask")).to_be_hidden()
    expect(page.locator(".minds article").first).to_be_visible()


def test_without_scripts_it_says_what_it_would_do(chromium: Browser, report: Report) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.html.as_uri())
    expect(page.locator(".thinker .off")).to_contain_text("Nothing is loaded and nothing is sent")
    expect(page.locator(".thinker .ask")).to_be_hidden()
    context.close()

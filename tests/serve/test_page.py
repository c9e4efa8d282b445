"""The page in a real browser: Debian's Chromium, driven by Playwright."""

import logging
import re

import pytest
from page_driver import (
    TIMEOUT_MS,
    blank_field,
    classify,
    expect,
    fill_in,
    problem,
    send,
    text_field,
    verdict,
)
from stand_in import Running

from raybert.serve.http.api import make_api
from raybert.serve.http.authentication import Keys
from raybert.serve.runtime.service import Service
from raybert.serve.settings import ServeConfig

NASTY = "<img src=x onerror='window.broken=1'><script>window.broken=1</script> superb & moving"

pytestmark = pytest.mark.browser


def test_a_text_gets_its_label_and_confidence(visit):
    page = visit(reduced_motion="reduce")  # bars have their width at once
    expect(page.get_by_text("Up to 32 tokens")).to_be_visible()
    classify(page, "a superb and moving film")
    expect(verdict(page)).to_have_text(re.compile(r"pos\s+(> )?\d+(\.\d)?% sure.*Answered in \d"))
    bars = page.locator("#predict .bars li")
    assert [text.split()[0] for text in bars.all_inner_texts()] == ["pos", "neg"]
    widths = page.locator("#predict .bar").evaluate_all(
        "all => all.map(bar => parseFloat(getComputedStyle(bar, '::before').width))"
    )
    assert widths[0] > widths[1] > 0
    classify(page, "an awful and boring film")
    expect(verdict(page)).to_contain_text("neg")


def test_the_weights_of_words_are_shown(visit):
    """By tint, by underline and in words: colour alone must not carry information."""
    page = visit()
    text = "🎬🎬 the film was superb,\nmoving — and superb 🎉 music"
    classify(page, text)
    shown = page.locator("#predict .details .text")
    assert shown.evaluate("p => p.textContent") == text
    marks = shown.locator("mark").all_text_contents()
    assert {"superb,", "moving"} & set(marks) and set(marks) <= set(text.split())
    lines = shown.locator("mark.for").evaluate_all(
        "all => all.map(mark => getComputedStyle(mark).textDecorationStyle)"
    )
    assert set(lines) == {"solid"}
    against = page.locator("#predict h3 mark.against")
    assert against.evaluate("mark => getComputedStyle(mark).textDecorationStyle") == "dashed"
    listed = page.get_by_role("heading", name="For pos").locator("..").get_by_role("listitem")
    heaviest = re.fullmatch(r"(\S+)\s*\+\d\.\d\d", listed.first.inner_text())
    assert heaviest and heaviest[1] in marks
    weights = shown.locator("mark").evaluate_all(
        "all => all.map(mark => parseFloat(mark.style.getPropertyValue('--weight')))"
    )
    assert max(weights) == 1 and min(weights) > 0


def test_a_very_long_word_is_wrapped_and_its_weight_is_not(visit):
    page = visit(viewport={"width": 400, "height": 900})
    classify(page, "superb" * 200 + " awful film")
    figures = page.locator("#predict .weights .figure, #predict .bars .figure")
    count_lines = """all => all.map(one => {
        const range = document.createRange();
        range.selectNodeContents(one);
        return range.getClientRects().length;
    })"""
    assert set(figures.evaluate_all(count_lines)) == {1}
    width = "document.documentElement"
    assert page.evaluate(f"{width}.scrollWidth <= {width}.clientWidth")


def test_a_text_that_was_cut_is_said(visit):
    page = visit()
    classify(page, "superb " * 100)
    expect(verdict(page)).to_contain_text("too long for the model")
    classify(page, "a superb film")
    expect(verdict(page)).not_to_contain_text("too long")


@pytest.mark.parametrize("address", ["reviews", "reviews/"])
def test_the_page_works_under_a_path(browser, model, pretrained, address):
    config = ServeConfig(
        model=model.uri, fill_mask=pretrained.uri, precision="fp32", root_path="/reviews"
    )
    service = Service(config, threads=1)
    service.load()
    app = make_api(service, Keys([]), log=logging.getLogger("raybert.test"))
    with Running(app, lifespan="on") as server:
        page = browser.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.goto(f"{server.url}{address}")
        classify(page, "a superb film")
        expect(verdict(page)).to_contain_text("pos")
        page.close()
    service.close()


def test_the_label_is_shown_before_the_explanation(stand_in, visit):
    page = visit()
    release = stand_in.hold(explain=True)
    send(page, "a superb film")
    expect(verdict(page)).to_contain_text("pos")
    expect(page.get_by_text("The words that decided it")).to_have_count(0)
    release.set()
    expect(page.get_by_text("The words that decided it")).to_be_visible()


def test_a_label_stays_when_its_explanation_is_rejected(stand_in, visit):
    page = visit()
    stand_in.reject(422, "explain: not with int8", after=1)
    send(page, "a superb film")
    expect(problem(page)).to_have_text("explain: not with int8")
    expect(verdict(page)).to_contain_text("pos")
    stand_in.reject(422, "not read")
    send(page, "an awful film")
    expect(problem(page)).to_have_text("not read")
    expect(verdict(page)).to_be_empty()


def test_no_explanation_is_requested_from_a_server_without_them(stand_in, visit):
    stand_in.explains = False
    page = visit()
    send(page, "a superb film")
    expect(verdict(page)).to_contain_text("pos")
    send(page, "an awful film")
    expect(verdict(page)).to_contain_text("neg")
    assert [asked["explain"] for asked in stand_in.asked] == [False, False]
    expect(problem(page)).to_be_empty()


def test_masks_are_filled(visit):
    page = visit()
    blank_field(page).fill("no mask here")
    expect(page.get_by_role("button", name="Fill in")).to_be_disabled()
    blank_field(page).fill("the [MASK] was a ")
    page.get_by_role("button", name="Insert [MASK]").click()
    expect(blank_field(page)).to_have_value("the [MASK] was a [MASK]")
    expect(blank_field(page)).to_be_focused()
    fill_in(page, "the [MASK] was a [MASK]")
    section = page.locator("#fill")
    headings = section.get_by_role("heading", level=3).all_inner_texts()
    assert headings == ["Blank 1", "Blank 2"]
    bars = section.locator(".bars li")
    assert bars.count() == 10
    first = section.locator(".bars li span:first-child").first.inner_text()
    assert section.locator(".verdict b").first.inner_text() == first


def test_nothing_is_sent_without_a_text(stand_in, visit):
    page = visit()
    button = page.get_by_role("button", name="Classify")
    expect(button).to_be_disabled()
    text_field(page).fill(" \n\t ")
    expect(button).to_be_disabled()
    text_field(page).press("Control+Enter")
    text_field(page).fill("superb")
    expect(button).to_be_enabled()
    assert stand_in.asked == []


def test_markup_is_shown_as_text(stand_in, visit):
    stand_in.model_id = "<b>tiny</b>"
    stand_in.labels = ["<i>neg</i>", "<i>pos</i>"]
    page = visit()
    classify(page, NASTY)
    expect(page.get_by_text("<b>tiny</b>")).to_be_visible()
    expect(verdict(page)).to_contain_text("<i>pos</i>")
    assert page.locator("#predict .details .text").inner_text() == NASTY
    fill_in(page, f"{NASTY} [MASK]")
    expect(page.locator("#recent li")).to_have_text([f"{NASTY} [MASK]", NASTY])
    stand_in.reject(422, NASTY)
    send(page, "a film")
    expect(problem(page)).to_have_text(NASTY)
    assert page.evaluate("window.broken") is None
    assert page.locator("main :is(img, script, i)").count() == 0


def test_recent_texts_stay_in_the_browser_until_cleared(visit):
    page = visit()
    classify(page, "a superb film")
    long = "an awful film " * 40
    classify(page, long)
    classify(page, "a superb film")  # again: it moves to the front
    fill_in(page, "the [MASK] was a story")
    page.reload()
    rows = page.locator("#recent li")
    expect(rows).to_have_count(3)
    assert rows.all_inner_texts()[:2] == ["the [MASK] was a story", "a superb film"]
    assert len(rows.nth(2).inner_text()) < 130
    rows.nth(2).get_by_role("button").click()
    expect(text_field(page)).to_have_value(long)
    expect(verdict(page)).to_contain_text("neg")
    for number in range(12):
        classify(page, f"superb film {number}")
    expect(rows).to_have_count(8)
    page.get_by_role("button", name="Clear").click()
    expect(page.get_by_role("status").filter(has_text="cleared")).to_have_count(1)
    page.reload()
    expect(text_field(page)).to_be_visible()
    expect(page.locator("#recent")).to_be_hidden()
    assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 0]


@pytest.mark.parametrize("missing", ["labels", "mask_token"])
def test_sections_without_a_model_are_hidden(stand_in, visit, missing):
    setattr(stand_in, missing, None)
    page = visit()
    there, absent = text_field(page), blank_field(page)
    if missing == "labels":
        there, absent = absent, there
    expect(there).to_be_visible()
    expect(absent).to_be_hidden()

"""Accessibility: keyboard, screen reader, both colour schemes, small screens."""

import re

import pytest
from page_driver import (
    CONTRASTS,
    blank_field,
    classify,
    expect,
    fill_in,
    problem,
    send,
    text_field,
    verdict,
)

PHONE = {"width": 320, "height": 640}

pytestmark = pytest.mark.browser


def test_everything_can_be_done_by_keyboard(visit):
    page = visit()

    def focused():
        """Return the focused element; its outline must be visible."""
        name, outline = page.evaluate(
            "() => [document.activeElement.id || document.activeElement.textContent,"
            " parseFloat(getComputedStyle(document.activeElement).outlineWidth)]"
        )
        assert outline >= 2
        return name

    expect(text_field(page)).to_be_visible()
    page.keyboard.press("Tab")
    assert focused() == "review"
    page.keyboard.type("a superb film")
    page.keyboard.press("Tab")
    assert focused() == "Classify"
    page.keyboard.press("Enter")
    expect(verdict(page)).to_contain_text("pos")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type("an awful film")
    page.keyboard.press("Control+Enter")
    expect(verdict(page)).to_contain_text("neg")
    for name in ("Classify", "blank"):
        page.keyboard.press("Tab")
        assert focused() == name
    page.keyboard.type("the ")
    page.keyboard.press("Tab")  # over the button that is not there yet
    assert focused() == "insert"
    page.keyboard.press("Space")
    assert focused() == "blank"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#fill .verdict")).to_contain_text("Answered in")
    for name in ("insert", "clear", "the [MASK]"):
        page.keyboard.press("Tab")
        assert focused() == name
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Recent")).to_be_hidden()
    assert focused() == "review"


def test_every_control_has_a_name(visit):
    page = visit()
    classify(page, "a superb film")
    page.locator("#key-form").evaluate("form => (form.hidden = false)")
    controls = page.get_by_role("button").all() + page.get_by_role("textbox").all()
    assert len(controls) == 9  # six buttons, three fields
    for control in controls:
        expect(control).to_have_accessible_name(re.compile(r"\w"))


def test_a_phone_of_320_pixels_scrolls_in_one_direction(visit):
    page = visit(viewport=PHONE, has_touch=True, is_mobile=True)
    classify(page, "a superb film " + "x" * 300)
    fill_in(page, "the [MASK] was a " + "y" * 300)
    page.locator("#key-form").evaluate("form => (form.hidden = false)")
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    for button in page.get_by_role("button").all():
        assert button.bounding_box()["height"] >= 44


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(stand_in, visit, scheme):
    page = visit(color_scheme=scheme)
    classify(page, "a superb and moving film, though awful music and boring people")
    fill_in(page, "the [MASK] was a story")
    stand_in.reject(504)
    send(page, "an awful film")
    expect(problem(page)).to_contain_text("took too long")
    classify(page, "a superb and moving film, though awful music and boring people")
    page.locator("#problem").evaluate("p => (p.textContent = 'a problem')")
    page.locator("#key-form").evaluate("form => (form.hidden = false)")
    blank_field(page).fill("")  # so that a button is disabled
    expect(page.get_by_role("button", name="Fill in")).to_be_disabled()
    found = page.evaluate(CONTRASTS)
    assert {"a problem", "superb", "Fill in", "raybert"} <= {text for text, _ in found}
    assert [(text, ratio) for text, ratio in found if ratio < 4.5] == []
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) > 3 * 128) == (scheme == "light")


@pytest.mark.parametrize(("wish", "name"), [("reduce", "none"), ("no-preference", "grow")])
def test_reduced_motion_is_respected(visit, wish, name):
    page = visit(reduced_motion=wish)
    classify(page, "a superb film")
    bar = page.locator(".bar").first
    assert bar.evaluate("bar => getComputedStyle(bar, '::before').animationName") == name

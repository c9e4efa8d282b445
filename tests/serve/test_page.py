"""The page in a real browser: Debian's Chromium, headless, driven by Playwright.

`url` is the server whose answers are looked at: the stand-in, which any server that keeps to the
contract can replace. Tests that ask for `server` need one that misbehaves on demand.
"""

import os
import re
import time

import pytest
import torch
from making import finetune_job, make_corpus, pretrain_job, reviews
from stand_in import StandIn

from raybert.storage import Folder
from raybert.train.run import execute_bare

CHROMIUM = "/usr/bin/chromium"
PATIENCE_MS = 30_000
NASTY = "<img src=x onerror='window.broken=1'><script>window.broken=1</script> superb & moving"
PHONE = {"width": 320, "height": 640}

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"needs {CHROMIUM}: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    playwright.expect.set_options(timeout=PATIENCE_MS)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def models(browser, tmp_path_factory):
    """A classifier of reviews, and a model that fills in masks; made only where they are used."""
    torch.set_num_threads(1)
    folder = Folder(tmp_path_factory.mktemp("page"))
    tuned = finetune_job(folder, rows=reviews(200), steps=None, epochs=5, lr=1e-2)
    execute_bare(tuned, folder / "tuned", on_progress=lambda record: None)
    make_corpus(folder / "corpus")
    trained = pretrain_job(folder / "corpus")
    execute_bare(trained, folder / "trained", on_progress=lambda record: None)
    return folder / "tuned" / "model", folder / "trained" / "model"


@pytest.fixture
def server(models):
    with StandIn(*models) as stand_in:
        yield stand_in


@pytest.fixture
def url(server):
    return server.url


@pytest.fixture
def visit(browser, url):
    """Open the page as a new visitor; at the end, look at all that the browser did meanwhile."""
    contexts, requests, complaints = [], [], []

    def complain(message):
        # The browser's own line on an answer of 4xx or 5xx says nothing about the page.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            complaints.append(message.text)

    def open_page(*, clock=False, script=None, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", complain)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        if clock:
            page.clock.install()
        if script:
            page.add_init_script(script)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert requests
    assert [address for address in requests if not address.startswith(url)] == []
    assert complaints == []


def expect(thing):
    from playwright.sync_api import expect

    return expect(thing)


def until(holds):
    ends = time.monotonic() + PATIENCE_MS / 1000
    while not holds():
        assert time.monotonic() < ends, "what a test waits for does not come"
        time.sleep(0.01)


def text_field(page):
    return page.get_by_role("textbox", name="Your text")


def blank_field(page):
    return page.get_by_role("textbox", name="A sentence with a blank")


def verdict(page):
    return page.locator("#predict").get_by_role("status")


def problem(page):
    return page.locator("#predict").get_by_role("alert")


def send(page, text):
    text_field(page).fill(text)
    page.get_by_role("button", name="Classify").click()


def classify(page, text):
    """Send a text and wait until all of its answer is shown."""
    send(page, text)
    expect(page.get_by_role("heading", name="The words that decided it")).to_be_visible()


def fill_in(page, text):
    blank_field(page).fill(text)
    page.get_by_role("button", name="Fill in").click()
    expect(page.locator("#fill").get_by_role("status")).to_contain_text("Answered in")


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


def test_the_words_that_decided_it(visit):
    """By tint, by the line under them, and in words: colour alone tells nothing."""
    page = visit()
    text = "🎬🎬 the film was superb,\nmoving — and superb 🎉 music"
    classify(page, text)
    shown = page.locator("#predict .details .text")
    assert shown.evaluate("p => p.textContent") == text
    marks = shown.locator("mark").all_text_contents()
    assert "moving" in marks and set(marks) <= set(text.split())
    lines = shown.locator("mark.for").evaluate_all(
        "all => all.map(mark => getComputedStyle(mark).textDecorationStyle)"
    )
    assert set(lines) == {"solid"}
    against = page.locator("#predict h3 mark.against")
    assert against.evaluate("mark => getComputedStyle(mark).textDecorationStyle") == "dashed"
    listed = page.get_by_role("heading", name="For pos").locator("..").get_by_role("listitem")
    assert re.fullmatch(r"(superb,?|moving)\s*\+\d\.\d\d", listed.first.inner_text())
    weights = shown.locator("mark").evaluate_all(
        "all => all.map(mark => parseFloat(mark.style.getPropertyValue('--weight')))"
    )
    assert max(weights) == 1 and min(weights) > 0


def test_the_label_does_not_wait_for_its_reasons(server, visit):
    page = visit()
    release = server.hold(explain=True)
    send(page, "a superb film")
    expect(verdict(page)).to_contain_text("pos")
    expect(page.get_by_text("The words that decided it")).to_have_count(0)
    release.set()
    expect(page.get_by_text("The words that decided it")).to_be_visible()


def test_a_label_stays_when_its_reasons_are_refused(server, visit):
    page = visit()
    server.refuse(422, "explain: not with int8", after=1)
    send(page, "a superb film")
    expect(problem(page)).to_have_text("explain: not with int8")
    expect(verdict(page)).to_contain_text("pos")
    server.refuse(422, "not read")
    send(page, "an awful film")
    expect(problem(page)).to_have_text("not read")
    expect(verdict(page)).to_be_empty()


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


def test_everything_can_be_done_by_keyboard(visit):
    page = visit()

    def focused():
        """What has the focus, which must be seen."""
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
    assert len(controls) == 8
    for control in controls:
        expect(control).to_have_accessible_name(re.compile(r"\w"))


def test_nothing_is_sent_while_there_is_no_text(server, visit):
    page = visit()
    button = page.get_by_role("button", name="Classify")
    expect(button).to_be_disabled()
    text_field(page).fill(" \n\t ")
    expect(button).to_be_disabled()
    text_field(page).press("Control+Enter")
    text_field(page).fill("superb")
    expect(button).to_be_enabled()
    assert server.asked == []


def test_markup_is_shown_as_text(server, visit):
    server.model_id = "<b>tiny</b>"
    server.labels = ["<i>neg</i>", "<i>pos</i>"]
    page = visit()
    classify(page, NASTY)
    expect(page.get_by_text("<b>tiny</b>")).to_be_visible()
    expect(verdict(page)).to_contain_text("<i>pos</i>")
    assert page.locator("#predict .details .text").inner_text() == NASTY
    fill_in(page, f"{NASTY} [MASK]")
    expect(page.locator("#recent li")).to_have_text([f"{NASTY} [MASK]", NASTY])
    server.refuse(422, NASTY)
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


@pytest.mark.parametrize(
    "script",
    [
        'localStorage.setItem(\'raybert.recent\', \'[null, {"section": "#x", "text": 3}]\')',
        "localStorage.setItem('raybert.recent', 'no JSON')",
        "for (const name of ['localStorage', 'sessionStorage'])"
        " Object.defineProperty(window, name, { get() { throw new Error('forbidden'); } });",
    ],
)
def test_a_storage_that_is_broken_or_forbidden_stops_nothing(visit, script):
    page = visit(script=script)
    classify(page, "a superb film")
    expect(verdict(page)).to_contain_text("pos")


def test_only_the_newest_request_counts(server, visit):
    page = visit()
    broken_off = []
    page.on("requestfailed", lambda request: broken_off.append(request.post_data_json["inputs"]))
    release = server.hold()
    send(page, "a superb film")
    until(lambda: len(server.asked) == 1)
    classify(page, "an awful film")
    release.set()
    classify(page, "a boring film")
    expect(verdict(page)).to_contain_text("neg")
    expect(page.locator("#predict .verdict strong")).to_have_count(1)
    assert broken_off == ["a superb film"]


def test_a_busy_server_is_asked_again_when_it_says(server, visit):
    page = visit(clock=True)
    server.refuse(429, **{"Retry-After": "30"})
    send(page, "a superb film")
    expect(problem(page)).to_have_text("The server is busy; trying again in 30 s.")
    page.clock.fast_forward(20_000)
    assert len(server.asked) == 1
    page.clock.fast_forward(20_000)
    expect(verdict(page)).to_contain_text("pos")
    expect(problem(page)).to_be_empty()
    assert server.asked[0] == server.asked[1]


def test_a_server_that_stays_busy_is_left_alone(server, visit):
    page = visit(clock=True)
    waits = [3, 4, 5, 6, 3600]
    for seconds in [*waits, 7]:
        server.refuse(429, **{"Retry-After": str(seconds)})
    send(page, "a superb film")
    for seconds in waits:
        shown = min(seconds, 60)
        expect(problem(page)).to_have_text(f"The server is busy; trying again in {shown} s.")
        page.clock.fast_forward(1000 * shown + 100)
    expect(problem(page)).to_contain_text("still busy")
    assert len(server.asked) == 6


@pytest.mark.parametrize(
    ("status", "error", "shown"),
    [
        (413, "inputs has 90,000 characters; at most 50,000", "inputs has 90,000 characters"),
        (422, "inputs: no lone surrogates", "no lone surrogates"),
        (504, "Traceback", "took too long"),
        (500, "Traceback", r"can't answer now \(500\)"),
    ],
)
def test_refusals_are_told_and_pass(server, visit, status, error, shown):
    page = visit()
    server.refuse(status, error)
    send(page, "a superb film")
    expect(problem(page)).to_contain_text(re.compile(shown))
    expect(problem(page)).not_to_contain_text("Traceback")
    expect(verdict(page)).to_be_empty()
    classify(page, "a superb film")
    expect(problem(page)).to_be_empty()


def test_an_answer_of_another_kind_is_told(server, visit):
    page = visit()
    server.refuse(200, "not what was asked")
    send(page, "a superb film")
    expect(problem(page)).to_have_text("The server's answer can't be read.")


def test_without_a_network_the_page_says_so(visit):
    page = visit()
    expect(text_field(page)).to_be_visible()
    page.context.set_offline(True)
    send(page, "a superb film")
    expect(problem(page)).to_contain_text("You are offline")
    page.context.set_offline(False)
    classify(page, "a superb film")


def test_a_key_is_asked_for_and_kept_for_the_session_only(server, visit):
    server.key = "open-sesame"
    page = visit()
    key = page.get_by_label("API key")
    expect(key).to_be_focused()
    expect(text_field(page)).to_be_hidden()
    key.fill("wrong")
    key.press("Enter")
    expect(key).to_have_value("")
    expect(key).to_be_focused()
    key.fill("open-sesame")
    key.press("Enter")
    expect(text_field(page)).to_be_focused()
    expect(key).to_be_hidden()
    classify(page, "a superb film")
    page.reload()
    classify(page, "a superb film")
    assert page.evaluate("Object.values(sessionStorage)") == ["open-sesame"]
    assert page.evaluate("JSON.stringify(localStorage)").count("sesame") == 0
    assert "sesame" not in page.url and "sesame" not in page.content()
    server.key = "another"  # it was changed meanwhile: the text that was refused is sent again
    send(page, "an awful film")
    key.fill("another")
    key.press("Enter")
    expect(verdict(page)).to_contain_text("neg")


@pytest.mark.parametrize("missing", ["labels", "mask_token"])
def test_what_the_model_can_not_do_is_not_offered(server, visit, missing):
    setattr(server, missing, None)
    page = visit()
    there, absent = text_field(page), blank_field(page)
    if missing == "labels":
        there, absent = absent, there
    expect(there).to_be_visible()
    expect(absent).to_be_hidden()


def test_a_phone_of_320_pixels_scrolls_in_one_direction(visit):
    page = visit(viewport=PHONE, has_touch=True, is_mobile=True)
    classify(page, "a superb film " + "x" * 300)
    fill_in(page, "the [MASK] was a " + "y" * 300)
    page.locator("#key-form").evaluate("form => (form.hidden = false)")
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    for button in page.get_by_role("button").all():
        assert button.bounding_box()["height"] >= 44


CONTRASTS = """
() => {
  const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 })
    .getContext("2d", { willReadFrequently: true });
  const painted = (colours) => {
    for (const colour of colours) {
      context.fillStyle = "#010203";
      context.fillStyle = colour;
      if (context.fillStyle === "#010203") throw new Error(`not a colour: ${colour}`);
      context.fillRect(0, 0, 1, 1);
    }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((part) => part / 255)
      .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (element, colour) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const { backgroundColor, opacity } = getComputedStyle(at);
      if (opacity !== "1") throw new Error("text that is seen through");
      layers.unshift(backgroundColor);
    }
    const under = luminance(painted(["white", ...layers]));
    const over = luminance(painted(["white", ...layers, colour]));
    return (Math.max(under, over) + 0.05) / (Math.min(under, over) + 0.05);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || element.getBoundingClientRect().width < 2) continue;
    found.push([text.slice(0, 40), ratio(element, getComputedStyle(element).color)]);
  }
  for (const field of document.querySelectorAll("textarea")) {
    const { color, opacity } = getComputedStyle(field, "::placeholder");
    if (opacity !== "1") throw new Error("a placeholder that is seen through");
    found.push([field.placeholder, ratio(field, color)]);
  }
  return found;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(server, visit, scheme):
    page = visit(color_scheme=scheme)
    classify(page, "a superb and moving film, though awful music and boring people")
    fill_in(page, "the [MASK] was a story")
    server.refuse(504)
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
def test_motion_is_left_out_where_it_is_not_wanted(visit, wish, name):
    page = visit(reduced_motion=wish)
    classify(page, "a superb film")
    bar = page.locator(".bar").first
    assert bar.evaluate("bar => getComputedStyle(bar, '::before').animationName") == name

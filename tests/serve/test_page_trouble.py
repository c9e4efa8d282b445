"""The page when the server rejects requests, hangs or requires a key, and without a network."""

import re

import pytest
from page_driver import classify, expect, problem, send, text_field, until, verdict

pytestmark = pytest.mark.browser


def test_only_the_newest_request_counts(stand_in, visit):
    page = visit()
    broken_off = []
    page.on("requestfailed", lambda request: broken_off.append(request.post_data_json["inputs"]))
    release = stand_in.hold()
    send(page, "a superb film")
    until(lambda: len(stand_in.asked) == 1)
    classify(page, "an awful film")
    release.set()
    classify(page, "a boring film")
    expect(verdict(page)).to_contain_text("neg")
    expect(page.locator("#predict .verdict strong")).to_have_count(1)
    assert broken_off == ["a superb film"]


def test_a_busy_server_is_retried_after_its_pause(stand_in, visit):
    page = visit(clock=True)
    stand_in.reject(429, **{"Retry-After": "30"})
    send(page, "a superb film")
    expect(problem(page)).to_have_text("The server is busy; trying again in 30 s.")
    page.clock.fast_forward(20_000)
    assert len(stand_in.asked) == 1
    page.clock.fast_forward(20_000)
    expect(verdict(page)).to_contain_text("pos")
    expect(problem(page)).to_be_empty()
    assert stand_in.asked[0] == stand_in.asked[1]


def test_retries_of_a_busy_server_are_limited(stand_in, visit):
    page = visit(clock=True)
    waits = [3, 4, 5, 6, 3600]
    for seconds in [*waits, 7]:
        stand_in.reject(429, **{"Retry-After": str(seconds)})
    send(page, "a superb film")
    for seconds in waits:
        shown = min(seconds, 60)
        expect(problem(page)).to_have_text(f"The server is busy; trying again in {shown} s.")
        page.clock.fast_forward(1000 * shown + 100)
    expect(problem(page)).to_contain_text("still busy")
    assert len(stand_in.asked) == 6


@pytest.mark.parametrize(
    ("status", "error", "shown"),
    [
        (413, "inputs has 90,000 characters; at most 50,000", "inputs has 90,000 characters"),
        (422, "inputs: no lone surrogates", "no lone surrogates"),
        (504, "Traceback", "took too long"),
        (500, "Traceback", r"can't answer now \(500\)"),
    ],
)
def test_errors_are_shown_until_the_next_request(stand_in, visit, status, error, shown):
    page = visit()
    stand_in.reject(status, error)
    send(page, "a superb film")
    expect(problem(page)).to_contain_text(re.compile(shown))
    expect(problem(page)).not_to_contain_text("Traceback")
    expect(verdict(page)).to_be_empty()
    classify(page, "a superb film")
    expect(problem(page)).to_be_empty()


def test_an_unexpected_answer_is_shown_as_an_error(stand_in, visit):
    page = visit()
    stand_in.reject(200, "not what was asked")
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


def test_a_key_is_required_and_kept_for_the_session_only(stand_in, visit):
    stand_in.key = "open-sesame"
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
    stand_in.key = "another"  # it was changed: the rejected text is sent again
    send(page, "an awful film")
    key.fill("another")
    key.press("Enter")
    expect(verdict(page)).to_contain_text("neg")


@pytest.mark.parametrize(
    "script",
    [
        'localStorage.setItem(\'raybert.recent\', \'[null, {"section": "#x", "text": 3}]\')',
        "localStorage.setItem('raybert.recent', 'no JSON')",
        "for (const name of ['localStorage', 'sessionStorage'])"
        " Object.defineProperty(window, name, { get() { throw new Error('forbidden'); } });",
    ],
)
def test_the_page_works_with_a_broken_or_forbidden_storage(visit, script):
    page = visit(script=script)
    classify(page, "a superb film")
    expect(verdict(page)).to_contain_text("pos")

"""Fixtures of the serving tests: tiny models, a browser, and visits to the page.

`page_url` is the server whose page is visited: the application, or for tests that use `stand_in` a
fake with the same interface, which fails on demand.
"""

import logging
import os

import pytest
from page_driver import TIMEOUT_MS

CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="session")
def playwright():
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"needs {CHROMIUM}: apt-get install chromium")
    return pytest.importorskip("playwright.sync_api")


@pytest.fixture
def stand_in(playwright, model, pretrained):
    from stand_in import StandIn

    with StandIn(model, pretrained) as server:
        yield server


@pytest.fixture(scope="session")
def api_url(playwright, model, pretrained):
    """The application itself, without Ray."""
    from stand_in import Running

    from raybert.serve.http.api import make_api
    from raybert.serve.http.authentication import Keys
    from raybert.serve.runtime.service import Service
    from raybert.serve.settings import ServeConfig

    config = ServeConfig(model=model.uri, fill_mask=pretrained.uri, precision="fp32")
    service = Service(config, threads=1)
    service.load()
    app = make_api(service, Keys([]), log=logging.getLogger("raybert.test"))
    with Running(app, lifespan="on") as server:
        yield server.url
    service.close()


@pytest.fixture
def page_url(request):
    uses_fake = "stand_in" in request.fixturenames
    return (
        request.getfixturevalue("stand_in").url if uses_fake else request.getfixturevalue("api_url")
    )


@pytest.fixture(scope="module")
def browser(playwright):
    playwright.expect.set_options(timeout=TIMEOUT_MS)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, page_url):
    """Open the page in a new browser context; at the end check its requests and error messages."""
    contexts, requests, errors = [], [], []

    def on_console(message):
        # The browser logs this for every response of 4xx or 5xx.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            errors.append(message.text)

    def open_page(*, clock=False, script=None, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(TIMEOUT_MS)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", on_console)
        page.on("pageerror", lambda error: errors.append(str(error)))
        if clock:
            page.clock.install()
        if script:
            page.add_init_script(script)
        page.goto(page_url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert requests
    assert [address for address in requests if not address.startswith(page_url)] == []
    assert errors == []

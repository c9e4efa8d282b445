"""What tests of serving share: tiny models, a browser, and visits to the page.

`page_url` is the server whose page is visited: the application, or for tests that ask for
`stand_in` a server that keeps to the same contract, and misbehaves on demand.
"""

import logging
import os

import pytest
from page_driver import PATIENCE_MS

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
    asks = "stand_in" in request.fixturenames
    return request.getfixturevalue("stand_in").url if asks else request.getfixturevalue("api_url")


@pytest.fixture(scope="module")
def browser(playwright):
    playwright.expect.set_options(timeout=PATIENCE_MS)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, page_url):
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
        page.goto(page_url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert requests
    assert [address for address in requests if not address.startswith(page_url)] == []
    assert complaints == []

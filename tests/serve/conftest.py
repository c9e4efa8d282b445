"""A browser, a server with tiny models, and visits to its page.

`page_url` is the server whose answers are looked at: the stand-in, which any server that keeps to
the contract can replace. Tests that ask for `stand_in` need one that misbehaves on demand.
"""

import os

import pytest
import torch
from making import finetune_job, make_corpus, pretrain_job, reviews
from page_driver import PATIENCE_MS

from raybert.storage import Folder
from raybert.train.run import execute_bare

CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="session")
def playwright():
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"needs {CHROMIUM}: apt-get install chromium")
    return pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="session")
def page_models(playwright, tmp_path_factory):
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
def stand_in(page_models):
    from stand_in import StandIn

    with StandIn(*page_models) as server:
        yield server


@pytest.fixture
def page_url(stand_in):
    return stand_in.url


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

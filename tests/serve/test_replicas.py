"""Replicas of a server: their number follows their work, and one scrape shows them all."""

import threading
import time
import urllib.request

import pytest
from making import reviews
from prometheus_client.parser import text_string_to_metric_families
from test_serving import Server

from raybert.serve.client import Client, ServerError

TEXTS = [text for text, _ in reviews(128, seed=5)]
SECONDS = 240  # until Serve must have started another replica


def scrape(server):
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {family.name: family for family in families}


def replicas_of(families):
    return {one.labels["replica"] for one in families["raybert_queued_tokens"].samples}


@pytest.mark.ray
@pytest.mark.slow
def test_lists_of_texts_start_another_replica_which_one_scrape_shows(model, tmp_path):
    """Three requests at once are few for a replica, but a hundred texts each are not."""
    settings = {"replicas": "{min: 1, max: 2, target: 1000}", "tokens_per_batch": 32}
    settings |= {"precision": "fp32", "threads": 1, "cpus": 0.5}
    options = [part for key, value in settings.items() for part in ("-s", f"serve.{key}={value}")]
    server, over = Server(tmp_path, model.uri, *options), threading.Event()
    sent = []

    def ask():
        with Client(server.url) as client:
            while not over.is_set():
                try:
                    sent.append(len(client.predict(TEXTS)))
                except ServerError as error:
                    assert error.status == 429, error

    threads = [threading.Thread(target=ask) for _ in range(3)]
    try:
        assert len(replicas_of(scrape(server))) == 1
        for thread in threads:
            thread.start()
        ends = time.monotonic() + SECONDS
        while len(replicas_of(scrape(server))) < 2:
            assert time.monotonic() < ends, "there is one replica still"
            time.sleep(1)
        time.sleep(5)  # both answer
        over.set()
        for thread in threads:
            thread.join()
        families = scrape(server)
        texts = {s.labels["replica"]: s.value for s in families["raybert_texts"].samples}
        assert len(texts) == 2 and min(texts.values()) > 0
        assert sum(texts.values()) == sum(sent)  # whichever replica a scrape reaches
        assert "raybert_refused_by_haproxy" in families
    finally:
        over.set()
        server.stop()
        server.clear()

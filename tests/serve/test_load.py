"""The load generator of the benchmarks: every request is counted, and none is repeated."""

import importlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LOAD = BENCHMARKS / "load.py"
pytest.importorskip("uvloop")


@pytest.fixture
def module(monkeypatch):
    """Import a module of the benchmarks by its name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


class Handler(BaseHTTPRequestHandler):
    """Responds as the text says: with a status, late, or by closing the connection."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        inputs = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["inputs"]
        text = inputs if isinstance(inputs, str) else "200"
        self.server.seen[text] += len(inputs) if isinstance(inputs, list) else 1
        if text == "lost":
            self.close_connection = True
            return
        if text == "slow":
            time.sleep(0.3)
        self.send_response(200 if text == "slow" else int(text))
        self.send_header("Content-Length", "2")
        if text == "503":  # as a proxy whose backend is gone
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.seen = Counter()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def start(server, tmp_path, texts, *options):
    file = tmp_path / "texts.json"
    file.write_text(json.dumps(texts))
    url = f"http://127.0.0.1:{server.server_port}/predict"
    command = [sys.executable, str(LOAD), url, "--texts", str(file), "--warmup", "0", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def load(server, tmp_path, texts, *options):
    out = start(server, tmp_path, texts, *options).communicate()[0]
    return json.loads(out.splitlines()[-1])


def test_every_response_is_counted_once(server, tmp_path):
    found = load(server, tmp_path, ["200", "429"], "--seconds", "1", "--connections", "4")
    asked = sum(server.seen.values())
    assert asked - 4 <= sum(found["statuses"].values()) <= asked  # some came after the end
    assert set(found["statuses"]) == {"200", "429"}
    assert found["failed"] == found["hung"] == found["unsent"] == 0
    assert found["requests_per_second"] == found["statuses"]["200"]
    assert 0 < found["p50"] <= found["p99"]


def test_failed_requests_are_not_repeated(server, tmp_path):
    texts = ["200", "lost", "503", "500"]
    found = load(server, tmp_path, texts, "--seconds", "1", "--connections", "1")
    assert found["failed"] == sum(server.seen[text] for text in texts[1:])
    assert {status for *_, status in found["failures"]} == {0, 500, 503}
    assert all(
        found["began"] - 0.01 <= sent <= answered <= time.time()
        for sent, answered, _ in found["failures"]
    )
    assert max(server.seen.values()) - min(server.seen.values()) <= 1


def test_an_unexpected_status_is_a_failure(server, tmp_path):
    options = ("--seconds", "1", "--connections", "1")
    found = load(server, tmp_path, ["200", "429"], *options, "--expected", "200")
    assert found["failed"] == server.seen["429"] > 0
    assert {status for *_, status in found["failures"]} == {429}


def test_it_starts_at_the_given_time(server, tmp_path):
    at = time.time() + 3  # Python has started by then
    process = start(server, tmp_path, ["200"], "--seconds", "1", "--at", str(at))
    while not server.seen:
        assert process.poll() is None
        time.sleep(0.01)
    assert time.time() >= at
    found = json.loads(process.communicate()[0].splitlines()[-1])
    assert found["began"] == pytest.approx(at, abs=0.5)
    assert len(found["good_by_tenth"]) == 10
    assert sum(found["good_by_tenth"]) == found["requests_per_second"]


def test_lists_count_every_text(server, tmp_path):
    found = load(server, tmp_path, ["200"] * 8, "--seconds", "1", "--list", "4")
    assert found["texts_per_second"] == 4 * found["requests_per_second"]
    assert server.seen["200"] % 4 == 0


def test_with_a_rate_requests_do_not_wait_for_responses(server, tmp_path):
    options = ("--seconds", "1", "--rate", "100")
    found = load(server, tmp_path, ["slow"], *options, "--connections", "100")
    assert 99 <= server.seen["slow"] <= 101
    assert found["unsent"] == 0
    server.seen.clear()
    found = load(server, tmp_path, ["slow"], *options, "--connections", "2")
    assert found["unsent"] > 50
    assert 99 <= server.seen["slow"] + found["unsent"] <= 101


def test_an_early_end_reports_the_responses_so_far(server, tmp_path):
    process = start(server, tmp_path, ["200"], "--seconds", "3600", "--connections", "2")
    while sum(server.seen.values()) < 50:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    found = json.loads(process.communicate()[0].splitlines()[-1])
    assert process.returncode == 0
    assert server.seen["200"] - 2 <= found["statuses"]["200"] <= server.seen["200"]
    assert found["requests_per_second"] > 0


def test_failures_at_a_kill_are_separated_from_others(module):
    clients = module("clients")
    failures = [
        (90.0, 99.9, 0),  # over before the kill
        (99.0, 100.2, 0),  # under way
        (100.3, 101.0, 500),  # taken by what was going down
        (100.7, 101.0, 0),  # sent when it was dead
        (199.0, 200.1, 429),  # under way at the next one
    ]
    assert [clients.in_flight(failures, struck) for struck in (100.0, 200.0)] == [2, 1]
    assert clients.otherwise(failures, [100.0, 200.0]) == 2
    assert clients.otherwise(failures, []) == 5


def test_recovery_counts_from_the_last_request_of_the_overload(module):
    faults = module("serve_faults")
    slow, fast = [5] * 13, [9] * 10
    assert faults.recovered(slow + fast, 90, gap=0.5) == 2.8  # when that second is over
    assert faults.recovered(slow + fast[1:], 90, gap=0.5) is None
    assert faults.recovered(slow + 2 * fast, 90, gap=0.5, step=10) == 3.5
    assert faults.recovered(fast[1:], 10, gap=0.5) is None  # not a second yet


def test_a_state_that_is_not_reached_ends_the_benchmark(module, monkeypatch):
    faults = module("serve_faults")
    monkeypatch.setattr(faults, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(SystemExit, match="not true after 0.2 s: all replicas answer again"):
        faults.wait_until("all replicas answer again", lambda: False)
    assert faults.wait_until("it holds", lambda: True) == 0.0


def test_the_cost_of_a_precision_is_measured_by_changed_labels(module):
    serve = module("serve")
    truth = ["a"] * 100 + ["b"] * 100
    exact = ["a"] * 90 + ["b"] * 110
    found = ["b", *exact[1:98], "a", "a", *exact[100:]]  # one is wrong now, and two are right
    lost = serve.points_lost(exact, found, truth)
    assert (lost["worse"], lost["better"], lost["points"], lost["ok"]) == (1, 2, -0.5, True)
    assert lost["at_most"] > 0  # three texts say little
    assert serve.points_lost(exact, exact, truth)["at_most"] == 0
    worse = serve.points_lost(truth, ["b"] * 2 + truth[2:], truth)
    assert worse["points"] == 1 and not worse["ok"]

"""Every task from a file of generated data to a served model, by the command line alone."""

import json
import os
import signal
import subprocess
import time
import urllib.request

import pytest
from commands import SCRIPT
from head import free_port
from made import ALL_TASKS, texts_of

CONFIG = """
run: {{storage: {folder}/runs, name: mine}}
model: {{hidden_size: 64, num_layers: 2, num_heads: 2, max_seq_len: 64}}
corpus: {{seq_len: 32, tokenizer: {{vocab_size: 300}}}}
pretrain: {{steps: 30, examples: ["the [MASK] was in"]}}
finetune:
  {{task: {task}, epochs: 8, lr: 3.0e-3, global_batch_size: 32, micro_batch_size: 16,
    evaluations: 4}}
tune: {{trials: 4, seeds: 1}}
"""
SHARE = 0.97  # of the best possible score


def raybert(*arguments):
    """Run a command; its last line of output, JSON."""
    done = subprocess.run(
        [SCRIPT, *map(str, arguments), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def post(url, body):
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def wait_until_ready(url, server, seconds=180):
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server is not ready")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("name", ALL_TASKS)
def test_a_task_is_trained_searched_served_explained_and_reported(tmp_path, name):
    made = {"train": ALL_TASKS[name](2000), "test": ALL_TASKS[name](400, seed=9)}
    for part, found in made.items():
        lines = "".join(json.dumps(row) + "\n" for row in found.rows)
        (tmp_path / f"{part}.jsonl").write_text(lines)
    config = tmp_path / "mine.yaml"
    config.write_text(CONFIG.format(folder=tmp_path, task=made["train"].task))
    data = ("--data", tmp_path / "train.jsonl")
    test = ("--set", f"evaluate.source.path={tmp_path}/test.jsonl")
    begun = time.monotonic()
    result = raybert("run", "-c", config, *data, *test)
    print(name, result["metric"], result, round(time.monotonic() - begun), "s")
    metric = made["test"].metric
    metrics = json.loads((tmp_path / "runs/mine/finetune/metrics.json").read_text())
    assert metrics[metric] >= SHARE * made["test"].best, (metrics[metric], made["test"].best)
    assert "html" in (tmp_path / "runs/mine/report.html").read_text()

    searched = raybert("tune", "-c", config, *data, *test)
    assert searched["best"]["metric"] == result["metric"]

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    text = texts_of(made["test"].rows[0])
    given = text[0] if len(text) == 1 else [text]
    command = [SCRIPT, "serve", tmp_path / "runs/mine", "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as server:
        try:
            wait_until_ready(url, server)
            assert post(f"{url}/predict", {"inputs": given})
            explained = post(f"{url}/predict", {"inputs": given, "explain": True})
            assert "predictions" in json.dumps(explained)
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)

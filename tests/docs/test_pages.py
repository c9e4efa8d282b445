"""Run the bash blocks of the documentation, page by page, as a reader types them.

Commands are those of the page. What differs from a reader's machine: the texts are made here, and
`raybert` is a script that adds `--set` with a tiny model and few steps to commands that train, and
starts `raybert serve` in the background until it answers.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import PAGES, ROOT, blocks, name
from making import reviews, write_csv
from test_docs import RUN

from raybert.storage.folder import Folder

TINY = {
    "corpus.seq_len": 16,
    "corpus.tokenizer.vocab_size": 300,
    "corpus.heldout_fraction": 0.1,
    "model.hidden_size": 16,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.max_seq_len": 64,
    "pretrain.minutes": "null",
    "pretrain.epochs": "null",
    "pretrain.tokens": "null",
    "pretrain.steps": 4,
    "pretrain.workers": 1,
    "pretrain.global_batch_size": 8,
    "pretrain.micro_batch_size": 4,
    "pretrain.evaluations": 1,
    "finetune.minutes": "null",
    "finetune.epochs": "null",
    "finetune.steps": 20,
    "finetune.seq_len": 32,
    "finetune.workers": 1,
    "finetune.global_batch_size": 16,
    "finetune.micro_batch_size": 8,
    "finetune.evaluations": 1,
    "tune.seeds": 1,
    "tune.finalists": 1,
}
TRAINS = ("demo", "run", "corpus", "pretrain", "finetune", "evaluate", "tune")
SCRIPT = """#!{python}
import subprocess, sys, time, urllib.request
arguments = sys.argv[1:]
if arguments and arguments[0] in {trains!r}:
    arguments[1:1] = [word for pair in {tiny!r} for word in ("--set", pair)]
    limit = [i for i, word in enumerate(arguments) if word == "--trials"]
    for i in limit:
        arguments[i + 1] = "2"
if arguments and arguments[0] == "serve":
    subprocess.run("for pid in $(cat servers); do kill $pid; tail --pid=$pid -f /dev/null; done; "
                   "rm -f servers", shell=True, stderr=subprocess.DEVNULL)
    server = subprocess.Popen([{python!r}, "-m", "raybert", *arguments])
    open("servers", "a").write(f"{{server.pid}}\\n")
    for _ in range(600):
        try:
            urllib.request.urlopen("http://127.0.0.1:8000/health/ready", timeout=5)
            sys.exit(0)
        except OSError:
            if server.poll() is not None:
                sys.exit(server.returncode)
            time.sleep(0.5)
    sys.exit("the server does not answer")
sys.exit(subprocess.run([{python!r}, "-m", "raybert", *arguments]).returncode)
"""


@pytest.fixture
def place(tmp_path):
    """A folder with texts under the names that the pages use, and a tiny `raybert` on the PATH."""
    folder = Folder(tmp_path)
    write_csv(folder, "reviews.csv", reviews(240))
    write_csv(folder, "test.csv", reviews(60, seed=1))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    tools = tmp_path / "tools"
    tools.mkdir()
    script = tools / "raybert"
    tiny = [f"{key}={value}" for key, value in TINY.items()]
    script.write_text(SCRIPT.format(python=sys.executable, trains=TRAINS, tiny=tiny))
    script.chmod(0o755)
    yield (
        tmp_path,
        {
            **os.environ,
            "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        },
    )
    _stop_servers(tmp_path)


def _stop_servers(folder):
    servers = folder / "servers"
    for pid in servers.read_text().split() if servers.exists() else ():
        os.kill(int(pid), signal.SIGTERM)
        subprocess.run(["tail", f"--pid={pid}", "-f", "/dev/null"], timeout=120, check=True)
    servers.unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("page", [page for page in PAGES if name(page) in RUN], ids=name)
def test_a_page_can_be_typed_from_top_to_bottom(page, place):
    folder, env = place
    for block in blocks(page):
        if block.why or block.language not in ("bash", "python"):
            continue
        command = ["bash", "-euo", "pipefail", "-c", block.code]
        if block.language == "python":
            command = [sys.executable, "-c", block.code]
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{block.code}\n{done.stdout}\n{done.stderr}"

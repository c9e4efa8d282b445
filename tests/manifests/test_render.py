"""One source: what `render.py` writes is what is committed, and every value counts."""

import shutil
import subprocess
import sys

import pytest
import yaml
from manifests import CLUSTER, VALUES, changed, walk
from render import as_yaml, files

EXPERIMENT = (CLUSTER / "experiment.yaml").read_text(encoding="utf-8")
RENDERED = files(VALUES, EXPERIMENT)
#: Values of files that are written by hand; test_laws.py holds them.
BY_HAND = {("experiment",), ("images", "python"), ("images", "prometheus"), ("images", "grafana")}
LEAVES = [path for path, value in walk(VALUES) if not isinstance(value, dict)]


def render(folder, *options):
    return subprocess.run(
        [sys.executable, str(folder / "render.py"), *options],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_committed_files_are_what_values_say():
    done = render(CLUSTER, "--check")
    assert done.returncode == 0, done.stderr
    assert {f"kuberay/{file.name}" for file in (CLUSTER / "kuberay").iterdir()} == {
        name for name in RENDERED if name.startswith("kuberay/")
    }


def test_a_file_that_was_changed_by_hand_is_named_and_written_again(tmp_path):
    folder = shutil.copytree(CLUSTER, tmp_path / "cluster")
    edited = folder / "kuberay/raycluster.yaml"
    before = edited.read_text()
    edited.write_text(before.replace("minReplicas: 1", "minReplicas: 2"))
    (folder / "serve.yaml").unlink()
    done = render(folder, "--check")
    assert done.returncode == 1
    assert done.stderr.startswith("cluster/kuberay/raycluster.yaml, cluster/serve.yaml: differ")
    assert edited.read_text() != before  # it only looked
    assert render(folder).returncode == 0
    assert edited.read_text() == before
    assert render(folder, "--check").returncode == 0


@pytest.mark.parametrize("path", [p for p in LEAVES if p not in BY_HAND], ids=".".join)
def test_every_value_counts(path):
    def other(parent, key):
        value = parent[key]
        if key == "image":
            parent[key] = "redis"
        else:
            parent[key] = value + 1 if isinstance(value, int) else f"{value}x"

    assert files(changed(VALUES, path, other), EXPERIMENT) != RENDERED


def test_a_job_starts_with_as_many_gpus_as_it_has_processes():
    values = changed(VALUES, ("nodes", "gpu", "gpus"), lambda node, key: node.update({key: 2}))
    more = EXPERIMENT.replace("workers: 2", "workers: 5")
    assert more != EXPERIMENT
    for command in ("pretrain", "tune"):
        text = files(values, more)[f"kuberay/rayjob-{command}.yaml"]
        job = list(yaml.safe_load_all(text))[-1]
        groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        assert {group["groupName"]: group["minReplicas"] for group in groups} == {
            "cpu": 1,
            "gpu": 3,
        }


def test_what_is_written_is_what_was_meant():
    tree = {"text": "a\nb: c\n", "number": "0", "flag": "yes", "same": [{"x": 1}] * 2, "none": []}
    text = as_yaml(tree)
    assert "&" not in text and "*" not in text
    assert yaml.safe_load(text) == {key: value for key, value in tree.items() if key != "none"}

"""What the tests of `cluster/` share: its files as text and as YAML, and walks through them."""

import copy
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
VALUES = yaml.safe_load((CLUSTER / "values.yaml").read_text(encoding="utf-8"))
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
LAUNCHER = sorted((CLUSTER / "launcher").glob("*.yaml"))
SLURM = sorted((CLUSTER / "slurm").glob("*.sbatch"))
COMPOSE = CLUSTER / "compose/compose.yaml"
DOCKERFILE = CLUSTER / "Dockerfile"
SERVE = CLUSTER / "serve.yaml"
README = CLUSTER / "README.md"
#: Everything that names images, commands, addresses.
TEXTS = [*KUBERAY, *LAUNCHER, *SLURM, COMPOSE, DOCKERFILE, SERVE, README]

sys.path.insert(0, str(CLUSTER))  # for `import render`, as `python cluster/render.py` finds `pods`


def name(path):
    """A file's name for the reader of a test's result."""
    return str(path.relative_to(CLUSTER))


def documents(path):
    """The YAML documents of a file."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def objects():
    """Yield every Kubernetes object as (file, object)."""
    for path in KUBERAY:
        for document in documents(path):
            yield name(path), document


def of_kind(kind):
    """Every object of a kind, as (file, object)."""
    return [(file, found) for file, found in objects() if found["kind"] == kind]


def walk(tree, path=()):
    """Yield (path, value) of everything inside a tree of mappings and lists, itself first."""
    yield path, tree
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from walk(value, (*path, key))


def changed(tree, path, change):
    """A copy of a tree in which `change` has been applied to (parent, last key) of a path."""
    whole = copy.deepcopy(tree)
    *parents, last = path
    parent = whole
    for key in parents:
        parent = parent[key]
    change(parent, last)
    return whole


def misspelt(tree, dotted):
    """A copy in which the last key of a dotted path has a letter too many."""
    path = [int(part) if part.isdigit() else part for part in dotted.split(".")]

    def misspell(parent, key):
        parent[f"{key}s"] = parent.pop(key)

    return changed(tree, path, misspell)


def uncommented(path):
    """The lines of a file that are no comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.lstrip().startswith("#")]

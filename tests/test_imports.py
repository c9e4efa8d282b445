"""The architecture, held: imports go one way, each Ray library has one home, start-up is light."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "raybert"
FILES = sorted(PACKAGE.rglob("*.py"))

# A layer may import itself and those before it. Packages of one row know nothing of each other;
# `errors`, `yaml_values`, `config` and `records` come before all of them.
LAYERS = [
    {"storage", "terminal", "cluster"},
    {"data", "model"},
    {"train"},
    {"tasks"},
    {"inference"},
    {"tune", "serve", "report"},
    {"experiment"},
    {"jobs"},
    {"pipeline"},
    {"cli", "api"},
]
BEFORE_ALL = [
    "__init__",
    "errors",
    "yaml_values",
    "config",
    "records",
]  # each imports those before it
AFTER_ALL = "__main__"

# What the rows above forbid and is wanted all the same, module by module, with the reason.
ALLOWED: set[tuple[str, str]] = set()

# Ray's libraries, and the modules that are their homes.
HOMES = {
    "ray.data": {
        "raybert.cluster.internals.data",
        "raybert.data.loader",
        "raybert.data.corpus.tokenize_job",
        "raybert.data.preprocess",
        "raybert.inference.bulk",
    },
    "ray.train": {
        "raybert.cluster.internals.train",
        "raybert.cluster.internals.train_controller",
        *(
            f"raybert.train.ray.{name}"
            for name in (
                "driver",
                "worker",
                "failures",
                "recovery",
                "torch_backend",
            )
        ),
    },
    "ray.tune": {
        "raybert.cluster.internals.tune",
        "raybert.tune.schedulers.asha",
        "raybert.tune.schedulers.hyperband",
        "raybert.tune.schedulers.pbt",
        "raybert.tune.schedulers.resumable_hyperband",
        "raybert.tune.schedulers.scheduler",
        "raybert.tune.search",
        "raybert.tune.search_session",
        "raybert.tune.trial",
    },
    "ray.serve": {
        "raybert.cluster.internals.serve",
        "raybert.serve.deploy.deployment",
        "raybert.serve.deploy.launch",
    },
    "ray.job_submission": {"raybert.jobs.ray_jobs"},
}
# Ray's core: connecting, and the modules that hand objects to its libraries.
CORE = {
    *(module for homes in HOMES.values() for module in homes),
    "raybert.cluster.session",
    "raybert.cluster.internals.core",
    "raybert.cluster.internals.private_names",
    "raybert.jobs.doctor.nodes",
    "raybert.jobs.doctor.all_reduce",
    "raybert.train.ray.driver_channel",
    "raybert.train.ray.prometheus",
}

HEAVY = [
    "torch",
    "ray",
    "pyarrow",
    "numpy",
    "tokenizers",
    "safetensors",
    "pydantic",
    "pandas",
    "sklearn",
    "matplotlib",
]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, known):
    """Yield the modules that a file imports, `from a import b` as a.b where that is a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known or node.module == "ray" else node.module


MODULES = {module_name(path) for path in FILES}


@functools.cache
def edges():
    """All imports, (importer, imported)."""
    return [(module_name(path), name) for path in FILES for name in imports(path, MODULES)]


def layer_of(module):
    parts = module.split(".")
    top = parts[1] if len(parts) > 1 else "__init__"
    if top in BEFORE_ALL:
        return top, BEFORE_ALL.index(top) - len(BEFORE_ALL)
    if top == AFTER_ALL:
        return top, len(LAYERS)
    return top, next((row for row, names in enumerate(LAYERS) if top in names), None)


def test_every_module_has_a_layer():
    assert sorted(m for m in MODULES if layer_of(m)[1] is None) == []


def violations(pairs):
    for importer, imported in pairs:
        if imported.partition(".")[0] != "raybert" or (importer, imported) in ALLOWED:
            continue
        (top, row), (other, below) = layer_of(importer), layer_of(imported)
        if below > row or (below == row and other != top):
            yield f"{importer} imports {imported}"


def test_imports_go_one_way():
    assert len(LAYERS) <= 10
    assert sorted(set(violations(edges()))) == []


def cycle(pairs):
    """Return a cycle of modules as a list that begins and ends alike, or an empty list."""
    graph = {}
    for importer, imported in pairs:
        graph.setdefault(importer, set()).add(imported)
    done, path = set(), []

    def walk(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for other in sorted(graph.get(module, ())):
            if found := walk(other):
                return found
        done.add(path.pop())
        return []

    return next((found for module in sorted(graph) if (found := walk(module))), [])


def test_no_cycle():
    ours = [edge for edge in edges() if edge[1].partition(".")[0] == "raybert"]
    assert cycle(ours) == []
    assert cycle([*ours, ("raybert.errors", "raybert.cli.commands")])


def test_what_is_allowed_is_needed():
    assert sorted(ALLOWED - set(edges())) == []


def strangers(pairs):
    for importer, imported in pairs:
        for library, homes in HOMES.items():
            if (imported + ".").startswith(library + ".") and importer not in homes:
                yield f"{importer} imports {imported}"
        if imported.partition(".")[0] == "ray" and importer not in CORE:
            yield f"{importer} imports {imported}"


def test_each_ray_library_has_one_home():
    assert sorted(set(strangers(edges()))) == []


@pytest.mark.parametrize(
    "edge",
    [
        ("raybert.model.encoder", "raybert.train.loop"),
        ("raybert.data.order", "raybert.model.encoder"),
        ("raybert.storage.folder", "raybert.data.order"),
        ("raybert.inference.bulk", "raybert.report.page"),
        ("raybert.train.loop", "raybert.cli.commands"),
    ],
)
def test_the_layers_forbid(edge):
    assert list(violations([edge]))


@pytest.mark.parametrize(
    "edge",
    [
        ("raybert.train.loop", "ray.train"),
        ("raybert.train.ray.worker", "ray.data"),
        ("raybert.cli.commands", "ray"),
        ("raybert.inference.bulk", "ray.serve"),
    ],
)
def test_the_homes_forbid(edge):
    assert list(strangers([edge]))


def loaded_by(*statements):
    """Which heavy modules are loaded after each of some statements, run in one new process."""
    code = ["import sys"]
    for statement in statements:
        code += [statement, f"print(*(m for m in {HEAVY!r} if m in sys.modules))"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return [line.split() for line in done.stdout.splitlines()]


def test_the_command_line_serves_proxies_and_the_client_start_light():
    """`raybert --help` and a misspelt option answer at once: nothing heavy is imported for them."""
    *light, probe = loaded_by(
        "import raybert.cli.commands",
        "import raybert.serve.http.middleware",
        "import raybert.serve.client",
        "import numpy",
    )
    assert light == [[]] * 3
    assert probe == ["numpy"]  # the probe sees what there is


def test_training_inference_and_the_service_need_no_ray():
    """In one process: what none of them loads, each alone does not load either."""
    *found, with_bulk, with_reports = loaded_by(
        "import raybert.train.run, raybert.tasks.masked_lm",
        "import raybert.inference.classifier, raybert.pipeline.predict_stage",
        "import raybert.serve.http.api, raybert.serve.deploy.launch",
        "import raybert.inference.bulk",
        "import raybert.report",
    )
    assert ["ray" in loaded for loaded in found] == [False] * 3
    # They take seconds, which actors of bulk prediction and `raybert --help` do without.
    assert not {"sklearn", "matplotlib"} & {*with_bulk, *with_reports}
    assert "torch" in found[0]


def test_no_module_needs_what_windows_lacks_to_be_imported():
    lacking = {"fcntl", "grp", "pwd", "resource", "termios"}
    found = {
        (module_name(path), name)
        for path in FILES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([a.name for a in node.names] + [getattr(node, "module", None)])
        if name in lacking
    }
    assert not found


# Only `config.json` of a model directory, a format of others, has a problem type elsewhere.
_WRITERS = {f"model/huggingface/{name}.py" for name in ("config_json", "config_schema", "saving")}


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.relative_to(PACKAGE).parts[0] != "tasks"],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_nothing_outside_of_tasks_tests_which_task_it_is(path):
    """A task is a plug-in: whoever needs something of it asks it, and does not know its name."""
    from raybert.tasks.registry import TASKS

    known = {name for task in TASKS.values() for name in (task.name, task.problem_type)} - {None}
    classes = {task.__name__ for task in TASKS.values()}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and node.value in {*known, "problem_type"}:
            found.add(node.value)
        if isinstance(node, ast.Name | ast.Attribute | ast.alias):
            name = node.attr if isinstance(node, ast.Attribute) else vars(node).get("id", "")
            name = node.name if isinstance(node, ast.alias) else name
            found |= {name} & {*classes, "problem_type"}
    if str(path.relative_to(PACKAGE)) not in _WRITERS:
        assert not found

"""The architecture, held: imports go one way, each Ray library has one home, start-up is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "raybert"
FILES = sorted(PACKAGE.rglob("*.py"))

# A layer may import itself and those before it. Layers of one row know nothing of each other.
LAYERS = [
    {"__init__"},
    {"errors"},
    {"entry"},
    {"config", "storage", "auth"},
    {"ray_session", "text", "model", "registry"},
    {"train"},
    {"tune", "serve", "jobs", "report"},
    {"experiment", "display"},
    {"options", "estimate"},
    {"doctor"},
    {"finetuning"},
    {"pipeline", "predict", "bench", "submit", "trials"},
    {"demo", "runs", "tuning", "ensemble"},
    {"cli_jobs", "cli_runs", "cli_serve", "cli_tune"},
    {"cli"},
    {"__main__"},
]

# What the rows above forbid and is wanted all the same, module by module, with the reason.
ALLOWED = {
    ("raybert.model.heads", "raybert.text.masking"),  # IGNORE_INDEX: one constant
    ("raybert.entry", "raybert.cli"),  # imports the command line, and nothing else
}

# Ray's libraries, and the modules that are their homes.
HOMES = {
    "ray.data": {
        "raybert.text.batches",
        "raybert.text.corpus",
        "raybert.text.pace",
        "raybert.text.tokenize_on_ray",
        "raybert.serve.batch",
    },
    "ray.train": {"raybert.train.worker", "raybert.train.recovery"},
    "ray.tune": {
        "raybert.tune.brackets",
        "raybert.tune.schedule",
        "raybert.tune.search",
        "raybert.tune.session",
        "raybert.tune.trial",
    },
    "ray.serve": {"raybert.serve.app", "raybert.serve.launch"},
    "ray.job_submission": {"raybert.jobs"},
}
# Ray's core: connecting, and the modules that hand objects to its libraries.
CORE = {
    "raybert.ray_session",
    "raybert.jobs",
    "raybert.doctor.asking",
    "raybert.doctor.nodes",
    "raybert.doctor.reduction",
    "raybert.text.batches",
    "raybert.text.corpus",
    "raybert.text.job",
    "raybert.text.pace",
    "raybert.text.tokenize_on_ray",
    "raybert.serve.batch",
    "raybert.train.board",
    "raybert.train.recovery",
    "raybert.train.telemetry",
    "raybert.train.worker",
    "raybert.tune.brackets",
    "raybert.tune.schedule",
    "raybert.tune.search",
    "raybert.tune.session",
    "raybert.tune.trial",
    "raybert.trials",  # puts what they share into the object store
    "raybert.serve.app",
    "raybert.serve.launch",
}

HEAVY = ["torch", "ray", "pyarrow", "numpy", "tokenizers", "safetensors", "pydantic", "pandas"]


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
EDGES = [(module_name(path), name) for path in FILES for name in imports(path, MODULES)]


def layer_of(module):
    parts = module.split(".")
    top = parts[1] if len(parts) > 1 else "__init__"
    return top, next((row for row, names in enumerate(LAYERS) if top in names), None)


def test_every_module_has_a_layer():
    assert sorted(m for m in MODULES if layer_of(m)[1] is None) == []


def violations(edges):
    for importer, imported in edges:
        if imported.partition(".")[0] != "raybert" or (importer, imported) in ALLOWED:
            continue
        (top, row), (other, below) = layer_of(importer), layer_of(imported)
        if below > row or (below == row and other != top):
            yield f"{importer} imports {imported}"


def test_imports_go_one_way():
    assert sorted(set(violations(EDGES))) == []


def test_what_is_allowed_is_needed():
    assert sorted(ALLOWED - set(EDGES)) == []


def strangers(edges):
    for importer, imported in edges:
        for library, homes in HOMES.items():
            if (imported + ".").startswith(library + ".") and importer not in homes:
                yield f"{importer} imports {imported}"
        if imported.partition(".")[0] == "ray" and importer not in CORE:
            yield f"{importer} imports {imported}"


def test_each_ray_library_has_one_home():
    assert sorted(set(strangers(EDGES))) == []


@pytest.mark.parametrize(
    "edge",
    [
        ("raybert.model.encoder", "raybert.train.loop"),
        ("raybert.text.order", "raybert.model.encoder"),
        ("raybert.storage", "raybert.config"),
        ("raybert.serve.batch", "raybert.report.page"),
        ("raybert.train.loop", "raybert.cli"),
    ],
)
def test_the_layers_forbid(edge):
    assert list(violations([edge]))


@pytest.mark.parametrize(
    "edge",
    [
        ("raybert.train.loop", "ray.train"),
        ("raybert.train.worker", "ray.data"),
        ("raybert.cli", "ray"),
        ("raybert.serve.batch", "ray.serve"),
    ],
)
def test_the_homes_forbid(edge):
    assert list(strangers([edge]))


def loaded_by(code):
    check = f"{code}\nimport sys\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.split()


def test_the_command_line_starts_light():
    """`raybert --help` and a misspelt option answer at once: nothing heavy is imported for them."""
    assert loaded_by("import raybert.cli") == []
    assert "numpy" in loaded_by("import numpy")  # the probe sees what there is


def test_the_loop_knows_nothing_of_ray():
    assert "ray" not in loaded_by("import raybert.train.run, raybert.train.pretrain")


def test_serving_texts_in_this_process_needs_no_ray():
    assert "ray" not in loaded_by("import raybert.serve.classifier, raybert.predict")


def test_the_service_and_its_http_need_no_ray():
    assert "ray" not in loaded_by("import raybert.serve.api, raybert.serve.launch")


def test_what_serves_proxies_import_is_light():
    assert loaded_by("import raybert.serve.edge") == []


def test_the_client_needs_nothing():
    assert loaded_by("import raybert.serve.client") == []

"""What all files of `cluster/` have in common: images, versions, paths, commands that exist."""

import re
import shlex
import tomllib

import pytest
import typer
import yaml
from manifests import (
    CLUSTER,
    COMPOSE,
    DOCKERFILE,
    README,
    ROOT,
    SERVE,
    TEXTS,
    VALUES,
    documents,
    name,
    of_kind,
    uncommented,
)

from raybert.cli.commands import app
from raybert.config import load
from raybert.experiment import Experiment
from raybert.jobs.submit import INPUT_KEYS
from raybert.tune.settings import TrialConfig
from raybert.tune.space_checks import read_space

EXPERIMENT = CLUSTER / "experiment.yaml"
IMAGES = VALUES["images"]
COMMANDS = typer.main.get_command(app).commands


# Images and versions -----------------------------------------------------------------------------


def images_in(path):
    text = path.read_text(encoding="utf-8")
    return re.findall(r"(?:^FROM|\bimage:|\b\w+_image:|docker build .* -t) ([^\s,}]+)", text, re.M)


def test_every_image_is_one_of_values():
    used = {image for path in TEXTS for image in images_in(path)}
    assert used == set(IMAGES.values())
    assert images_in(DOCKERFILE)[-1] == IMAGES["python"]


def test_versions_are_those_of_this_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for device in ("cpu", "cuda"):
        assert IMAGES[device].endswith(f":{project['version']}-{device}")
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"ray=={VALUES['ray_version']}" in pinned
    assert all(":" in image and not image.endswith(":latest") for image in IMAGES.values())


# Addresses and paths -----------------------------------------------------------------------------


def test_all_interfaces_are_named_only_where_a_key_or_a_token_is_asked_for():
    """rayservice.yaml: test_serve_config.py; compose: the token, and ports on 127.0.0.1 alone."""
    found = {
        (name(path), line.strip())
        for path in TEXTS
        for line in uncommented(path)
        if re.search(r"0\.0\.0\.0|\[?::\]?:\d", line)
    }
    assert found == {
        ("kuberay/rayservice.yaml", "host: 0.0.0.0"),
        ("kuberay/rayservice-gateway.yaml", "host: 0.0.0.0"),
        ("compose/compose.yaml", "--dashboard-host=0.0.0.0"),
    }
    (compose,) = documents(COMPOSE)
    assert "RAY_AUTH_TOKEN_PATH" in compose["services"]["head"]["environment"]
    assert any("RAY_AUTH_MODE=token" in line for line in uncommented(DOCKERFILE))


def test_the_experiment_lies_on_the_storage_that_every_node_has():
    experiment, path = load(Experiment, EXPERIMENT), VALUES["storage"]["path"]
    assert experiment.run.storage.startswith(f"{path}/")
    (serve,) = documents(SERVE)
    model = serve["applications"][0]["args"]["model"]
    assert model == f"{experiment.run.storage}/{experiment.run.name}"
    assert any(f" {path}" in line for line in uncommented(DOCKERFILE))
    (compose,) = documents(COMPOSE)
    for service in ("head", "worker"):
        assert f"runs:{path}" in compose["services"][service]["volumes"]
    (launcher,) = documents(CLUSTER / "launcher/onpremises.yaml")
    assert any(option.endswith(f":{path}") for option in launcher["docker"]["run_options"])


# Commands ----------------------------------------------------------------------------------------


def snippets(path):
    """The lines of a file that are for a shell: code, indented comments, the README's blocks."""
    text = path.read_text(encoding="utf-8")
    if path == README:
        yield from "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).splitlines()
        return
    for line in text.splitlines():
        comment = re.match(r"\s*#   (.*)", line)
        yield comment[1] if comment else line


def raybert_commands():
    """Yield every call of raybert as (file, words)."""
    for path in [*TEXTS, EXPERIMENT]:
        for line in snippets(path):
            for call in re.findall(r"(?:^raybert|python -m raybert|\.sbatch) ([a-z].*)", line):
                first, *more = re.split(r"python -m raybert ", call)
                for part in (first, *more):
                    yield name(path), shlex.split(re.split(r"\s{2,}|&&|'|;", part)[0])


def check_command(words):
    """Read a command line as raybert would, up to running it."""
    command, *rest = words
    context = COMMANDS[command].make_context(command, rest)
    options = context.params
    if command == "submit":
        assert options["command"] in INPUT_KEYS, options["command"]
    overrides = list(options.get("overrides") or ())
    load(Experiment, None, overrides)
    config = str(options.get("config") or "")
    if config.startswith("cluster/"):
        load(Experiment, ROOT / config, overrides)


def test_every_command_of_raybert_exists():
    found = list(raybert_commands())
    files = {file for file, _ in found}
    assert {"kuberay/rayjob-pretrain.yaml", "kuberay/rayjob-tune.yaml", "README.md"} <= files
    assert {"slurm/srun.sbatch", "slurm/symmetric-run.sbatch", "compose/compose.yaml"} <= files
    assert {"launcher/aws.yaml", "launcher/onpremises.yaml", "experiment.yaml"} <= files
    for _, words in found:
        check_command(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("pretrian -c x.yaml", "pretrian"),
        ("pretrain --confg x.yaml", "(?i)no such option"),
        ("pretrain --set pretrain.leraning_rate=1", "unknown key pretrain.leraning_rate"),
        ("submit serve --address http://127.0.0.1:8265", "^serve"),
    ],
)
def test_a_wrong_command_is_found(words, said):
    with pytest.raises(Exception, match=said):
        check_command(words.split())


def test_the_options_that_scripts_add_are_every_commands():
    """Slurm's scripts end in `"$@" --set run.storage=... --json`."""
    for command in ("corpus", "pretrain", "finetune", "evaluate", "tune", "run"):
        check_command([command, "--set", "run.storage=/shared/runs", "--json"])


@pytest.mark.parametrize(("file", "job"), of_kind("RayJob"))
def test_a_job_reads_the_configuration_that_it_brings(file, job, tmp_path):
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    volume = next(volume for volume in head["volumes"] if "configMap" in volume)
    (mount,) = (
        mount["mountPath"]
        for mount in head["containers"][0]["volumeMounts"]
        if mount["name"] == volume["name"]
    )
    maps = {found["metadata"]["name"]: found["data"] for _, found in of_kind("ConfigMap")}
    for key, text in maps[volume["configMap"]["name"]].items():
        assert f"-c {mount}/{key}" in job["spec"]["entrypoint"]
        path = tmp_path / key
        path.write_text(text)
        assert load(Experiment, path) == load(Experiment, EXPERIMENT)


def test_the_search_can_be_made_of_what_its_job_configures():
    words = next(words for _, words in raybert_commands() if words[0] == "tune")
    given = COMMANDS["tune"].make_context("tune", words[1:]).params
    experiment = load(Experiment, EXPERIMENT, list(given["overrides"]))
    base = TrialConfig(model=experiment.model, finetune=experiment.finetune)
    assert len(read_space(experiment.tune, base)) > 10
    assert experiment.finetune.max_workers == 1


def test_an_entrypoint_reaches_the_head_in_one_piece():
    """Through bash, which KubeRay writes it into, and `ray job submit`, which joins its words."""
    from subprocess import list2cmdline

    for _, job in of_kind("RayJob"):
        words = shlex.split(job["spec"]["entrypoint"])
        assert shlex.split(list2cmdline(words)) == words


def test_files_that_are_named_exist():
    for path in [*TEXTS, EXPERIMENT, CLUSTER / "values.yaml"]:
        for named in re.findall(r"\bcluster/[\w/.-]*\w", path.read_text(encoding="utf-8")):
            assert (ROOT / named).exists(), f"{name(path)}: {named}"


def test_the_values_are_yaml_without_surprises():
    """A version is a text, and nothing is shared by an anchor or dated by accident."""
    assert isinstance(VALUES["ray_version"], str)
    assert yaml.safe_load(yaml.safe_dump(VALUES)) == VALUES

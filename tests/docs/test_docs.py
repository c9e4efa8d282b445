"""The documentation: generated pages are current, links resolve, blocks are run."""

import json
import re
import shlex
import sys

import pytest
import yaml
from blocks import PAGES, ROOT, blocks, name
from typer.main import get_command

from raybert.cli.commands import app
from raybert.config import build, flatten
from raybert.experiment import Experiment

sys.path.insert(0, str(ROOT / "docs"))

RUN = {"README.md", "docs/quick-start.md", "docs/your-data.md", "docs/pretraining.md",
       "docs/fine-tuning.md", "docs/search.md", "docs/serving.md", "docs/python.md"}  # fmt: skip


@pytest.mark.parametrize("page", ["command-line.md", "configuration.md"])
def test_generated_pages_are_current(page):
    import generate

    assert (ROOT / "docs" / page).read_text() == generate.PAGES[page](), (
        "run python docs/generate.py"
    )


def test_the_notebook_is_of_its_cells_and_ran_without_an_error():
    written = (ROOT / "docs" / "notebook_cells.py").read_text()
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())["cells"]
    assert written.count("# %%") == len(cells), "run python docs/notebook.py"
    for cell in cells:
        prefix = "# " if cell["cell_type"] == "markdown" else ""
        lines = [f"{prefix}{line}".rstrip() for line in "".join(cell["source"]).splitlines()]
        assert "\n".join(lines) in written, "run python docs/notebook.py"
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert {"stream", "display_data"} <= {output["output_type"] for output in outputs}
    assert not re.search(r"/tmp|/home|/root|Traceback", json.dumps(outputs))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_each_block_is_run_or_says_why_not(page):
    """Bash blocks of the pages in RUN are run by `test_pages.py`; YAML and Python below."""
    for block in blocks(page):
        if block.language in ("bash", "sh"):
            assert block.why or name(page) in RUN, block.code
        else:
            assert block.language in ("python", "yaml", "", "console", "json"), block.language


def _commands(code):
    """Yield the words of each command line of a bash block, without comments and redirections."""
    for line in code.replace("\\\n", " ").splitlines():
        for command in re.split(r"\s*[;|]\s+|\s+&&\s+", line):
            words = shlex.split(re.sub(r"\s[<>].*$", "", command), comments=True)
            if words:
                yield words


def _given(words):
    """Return the group of commands that a command line names, and its own command and options."""
    command, rest = get_command(app), list(words[1:])
    while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
        assert rest[0] in command.commands, words
        command = command.commands[rest.pop(0)]
    return command, rest


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_each_command_exists_with_its_options(page):
    for block in blocks(page):
        for words in _commands(block.code) if block.language == "bash" else ():
            if words[0] != "raybert" and not words[0].endswith("/raybert"):
                continue
            command, rest = _given(words)
            known = {
                option for one in command.params for option in (*one.opts, *one.secondary_opts)
            }
            own = rest[: rest.index("--")] if "--" in rest else rest
            options = [word.partition("=")[0] for word in own if re.match(r"-{1,2}[a-z]", word)]
            assert set(options) <= known | {"--help"}, words
            for option, value in zip(own, own[1:], strict=False):
                if option in ("--set", "-s"):
                    key = value.partition("=")[0]
                    assert key in _keys() or any(k.startswith(f"{key}.") for k in _keys()), key


def _keys():
    return {key for key, _ in flatten(Experiment().model_dump(mode="json"))}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_each_yaml_block_is_a_configuration(page):
    for block in blocks(page):
        if block.language == "yaml" and not block.why:
            build(Experiment, yaml.safe_load(block.code), name(page))

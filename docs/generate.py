"""Write the reference pages: `configuration.md` from the schema, `command-line.md` from typer.

Run `python docs/generate.py` after a change of an option or a setting; a test compares the pages
with the code.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from raybert.experiment import Experiment

HERE = Path(__file__).parent


def command_line() -> str:
    """Return the reference of all commands, as typer writes it."""
    command = [sys.executable, "-m", "typer", "raybert.cli.commands", "utils", "docs"]
    done = subprocess.run(
        [*command, "--name", "raybert", "--title", "Command line"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.rstrip() + "\n"


def configuration() -> str:
    """Return a table of keys for each section of the configuration file."""
    schema = Experiment.model_json_schema()
    pages = [
        "# Configuration",
        "",
        "One YAML file holds a section for each stage. `raybert config` prints every key with its",
        "default, `raybert config --schema` the JSON schema for editors, and `--set a.b=value`",
        "overrides a key of any command. Unknown keys are refused with the nearest known one.",
    ]
    for name, section in schema["properties"].items():
        rows = list(_rows(name, _resolve(section, schema), schema))
        pages += [
            "",
            f"## {name}",
            "",
            "| key | type | default | meaning |",
            "| --- | --- | --- | --- |",
        ]
        pages += [f"| `{key}` | {kind} | {default} | {text} |" for key, kind, default, text in rows]
    return "\n".join(pages) + "\n"


def _rows(prefix: str, node: dict[str, Any], schema: dict[str, Any]) -> Any:
    """Yield (dotted key, type, default, description) of a section's keys, nested ones included."""
    for name, given in node.get("properties", {}).items():
        field = _resolve(given, schema)
        key = f"{prefix}.{name}"
        if "properties" in field:
            yield from _rows(key, field, schema)
            continue
        default = f"`{json.dumps(given['default'])}`" if "default" in given else ""
        yield key, _kind(field, schema), default, _cell(given.get("description", ""))


def _resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference, if the node is one; keep the node's own keys."""
    if "$ref" in node:
        return {**schema["$defs"][node["$ref"].rpartition("/")[2]], **node}
    return node


def _kind(node: dict[str, Any], schema: dict[str, Any]) -> str:
    """Return a type in words: `int`, `"a" or "b"`, `a section`, ..."""
    node = _resolve(node, schema)
    for name in ("anyOf", "oneOf"):
        if name in node:
            return " or ".join(dict.fromkeys(_kind(one, schema) for one in node[name]))
    if "enum" in node:
        return " or ".join(f"`{value}`" for value in node["enum"])
    if "const" in node:
        return f"`{node['const']}`"
    if "properties" in node:
        return "{" + ", ".join(node["properties"]) + "}"
    return str(node.get("type", "any"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


PAGES = {"command-line.md": command_line, "configuration.md": configuration}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (HERE / name).write_text(make(), encoding="utf-8")

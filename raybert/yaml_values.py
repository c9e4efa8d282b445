"""Read and write YAML: plain values only, in one spelling whatever the version of YAML.

Text that is not YAML is a ConfigError of one line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from raybert.errors import UNEXPECTED, ConfigError, one_line, printable

_TAG = "tag:yaml.org,2002:"
_BOOLEAN, _INTEGER, _FLOAT = f"{_TAG}bool", f"{_TAG}int", f"{_TAG}float"
_REPLACED = {_INTEGER, _FLOAT, f"{_TAG}timestamp", f"{_TAG}value"}  # a plain = is a value
_MAX_VALUES = 1_000_000  # of a file; a few anchors can stand for billions


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, with the numbers and booleans of YAML 1.2.

    `1e-4` is a number, and `labels: [no, yes]` are words; a setting that is a boolean accepts them.
    `2024-01-31` and `12:30` are texts, and so is `0123`, as of a postal code.
    """

    yaml_implicit_resolvers = {
        first: [
            found
            for found in resolvers
            if found[0] not in _REPLACED and (found[0] != _BOOLEAN or first in "tTfF")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """PyYAML's, except that it quotes Unicode line breaks, which would be read as plain ones."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        _INTEGER,
        re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+)$"),
        list("-+0123456789"),
    )
    _yaml.add_implicit_resolver(
        _FLOAT,
        re.compile(
            r"""^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
            |[0-9][0-9_]*[eE][-+]?[0-9]+
            |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
            |\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
            re.X,
        ),
        list("-+0123456789."),
    )
_Dumper.add_representer(str, _represent_text)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML; a syntax error is raised as a ConfigError that names `source` and the line."""
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
        size = _expanded_size(value, {})
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{where}: not valid YAML: {printable(problem)}") from None
    except UNEXPECTED as error:  # by a tag such as !!int, brackets in brackets, a long number
        raise ConfigError(f"{source}: not valid YAML: {one_line(error)}") from None
    if size > _MAX_VALUES:
        raise ConfigError(f"{source}: its anchors stand for {size:,} values; write them out")
    return value


def _expanded_size(value: Any, known: dict[int, int]) -> int:
    """How many values a YAML value has if each anchor is written out; 1 for one in itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = 1
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_expanded_size(part, known) for part in parts)
    return known[id(value)]


def write_yaml(values: Mapping[str, Any]) -> str:
    """Return plain values as YAML that `parse_yaml` reads as the same values, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)

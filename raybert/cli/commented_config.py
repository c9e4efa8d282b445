"""A configuration as YAML with what each key means above it, from the settings' descriptions."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from raybert.config import Settings
from raybert.yaml_values import write_yaml

_WIDTH = 100


def dump_commented(settings: Settings) -> str:
    """As `config.dump`, with comments; it is read as the same configuration."""
    return "\n".join(_lines(settings, "")) + "\n"


def _lines(settings: Settings, indent: str) -> Iterator[str]:
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        text = field.description or (_summary(value) if isinstance(value, Settings) else "")
        if not indent and name != next(iter(type(settings).model_fields)):
            yield ""
        for line in textwrap.wrap(text, _WIDTH - len(indent) - 2, break_on_hyphens=False):
            yield f"{indent}# {line}"
        if isinstance(value, Settings):
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        else:
            shown = write_yaml({name: settings.model_dump(mode="json", include={name})[name]})
            yield from textwrap.indent(shown.rstrip("\n"), indent).split("\n")


def _summary(settings: Settings) -> str:
    """The first line of a section's docstring."""
    return (type(settings).__doc__ or "").strip().split("\n")[0]

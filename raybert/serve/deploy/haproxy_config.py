"""Adapt the configuration that Ray renders for HAProxy; runs as a script before HAProxy starts.

Ray's template binds HAProxy's statistics and metrics pages to all interfaces. Every `bind` must be
one that is known here, and every known one must be there: a template that has changed stops the
start with an error and never opens a port. Imports nothing but the standard library, since
it also runs as `python haproxy_config.py FILE DEFAULTS RULES TABLE`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

_SECTION = re.compile(r"(global|defaults|frontend|backend|listen)\b")
#: Sections whose port is for this machine alone, with the address that Ray's template gives them.
_LOCAL = {"frontend prometheus": ":", "listen stats": "*:"}
#: Sections for clients; Serve's `host` setting is their address.
_PUBLIC = {"frontend http_frontend", "frontend grpc_frontend"}
_REQUIRED = {*_LOCAL, "frontend http_frontend"}


class TemplateChangedError(Exception):
    """Ray's configuration lacks a line that must be adapted, or has a port that is not known."""

    def __init__(self, difference: str) -> None:
        super().__init__(
            f"the HAProxy configuration of this Ray version is not the expected one: {difference}; "
            "set serve.ingress=proxy, or install the Ray version that raybert requires"
        )


def adapt(text: str, *, defaults: str = "", rules: str = "", table: str = "") -> str:
    """Bind the internal ports of Ray's configuration to 127.0.0.1, and insert our lines.

    `defaults` replaces Ray's `errorfile` lines, `rules` is inserted into each backend, `table` is
    appended. TemplateChangedError: an expected line is missing, or a `bind` is unknown.
    """
    lines: list[str] = []
    section, bound, sections = "", [], set()
    for line in text.splitlines():
        words = line.split()
        if _SECTION.match(line):
            section = " ".join(words)
            sections.add(section)
            lines.append(line)
            if section == "defaults":
                lines.append(defaults.rstrip("\n"))
            elif words[0] == "backend":
                lines.append(rules.rstrip("\n"))
        elif words[:1] == ["bind"]:
            lines.append(_adapt_bind(section, line))
            bound.append(section)
        elif words[:1] != ["errorfile"]:
            lines.append(line)
    for required in sorted(_REQUIRED):
        if bound.count(required) != 1:
            raise TemplateChangedError(
                f"section `{required}` has {bound.count(required)} lines `bind`, expected 1"
            )
    if "defaults" not in sections:
        raise TemplateChangedError("section `defaults` is missing")
    return "\n".join([*lines, table])


def _adapt_bind(section: str, line: str) -> str:
    if section in _PUBLIC:
        return line
    expected = _LOCAL.get(section)
    indent, _, address = line.partition("bind ")
    if expected is None or not address.startswith(expected):
        raise TemplateChangedError(f"section `{section}` has the unknown line `{line.strip()}`")
    return f"{indent}bind 127.0.0.1:{address.removeprefix(expected)}"


def check_template(template: str) -> None:
    """Raise TemplateChangedError if Ray's template can't be adapted."""
    marker = "    # rules of raybert"
    if marker not in adapt(template, rules=marker):
        raise TemplateChangedError("there is no section `backend`")


def main(arguments: list[str]) -> int:
    """Adapt FILE in place; return the exit status."""
    try:
        text, defaults, rules, table = (Path(file).read_text("utf-8") for file in arguments)
        adapted = adapt(text, defaults=defaults, rules=rules, table=table)
        Path(arguments[0]).write_text(adapted, encoding="utf-8")
    except (TemplateChangedError, OSError, ValueError) as error:
        print(f"raybert: HAProxy is not started: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The fenced code blocks of the documentation, and how tests run them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "cluster/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
    if path.name not in ("CHANGELOG.md", "command-line.md", "configuration.md")  # two are generated
)
_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.M | re.S,
)


@dataclass
class Block:
    """A fenced block, and the reason why no test runs it, if there is one."""

    language: str
    code: str
    why: str | None


def blocks(page):
    return [Block(m["language"], m["code"], m["why"]) for m in _BLOCK.finditer(page.read_text())]


def name(page):
    return str(page.relative_to(ROOT))

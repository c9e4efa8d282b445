"""The console script: imports the command line where Ctrl-C can already be told in one line."""

from __future__ import annotations

import sys

INTERRUPTED = 130


def main() -> None:
    """Run `raybert`."""
    try:
        from raybert import cli
    except KeyboardInterrupt:
        print("raybert: interrupted; nothing was begun", file=sys.stderr)
        sys.exit(INTERRUPTED)
    cli.main()

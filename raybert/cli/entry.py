"""The console script: handles Ctrl-C and SIGTERM before the imports of the command line."""

from __future__ import annotations

from raybert.cluster import interrupts


def main() -> None:
    """Run `raybert`."""
    interrupts.install("interrupted; nothing was started")
    from raybert.cli import commands

    interrupts.say(commands.INTERRUPTED_MESSAGE)
    commands.main()

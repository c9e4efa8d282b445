"""The console script: handles Ctrl-C and SIGTERM before the imports of the command line."""

from __future__ import annotations

import signal
import sys
from types import FrameType

from raybert.errors import INTERRUPTED


def _handle_sigterm(signum: int, frame: FrameType | None) -> None:
    """Treat SIGTERM, which Ray sends to a stopped job, as Ctrl-C: write a checkpoint and exit."""
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(signum, frame)
    else:  # ignored, as in a shell's background job
        raise KeyboardInterrupt


def main() -> None:
    """Run `raybert`."""
    signal.signal(signal.SIGTERM, _handle_sigterm)
    try:
        from raybert.cli import commands
    except KeyboardInterrupt:
        print("raybert: interrupted; nothing was started", file=sys.stderr)
        sys.exit(INTERRUPTED)
    commands.main()

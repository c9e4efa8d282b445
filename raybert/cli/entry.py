"""The console script: imports the command line where Ctrl-C can already be told in one line."""

from __future__ import annotations

import signal
import sys
from types import FrameType

from raybert.errors import INTERRUPTED


def _as_ctrl_c(signum: int, frame: FrameType | None) -> None:
    """A cluster that stops a job asks for what Ctrl-C does: a checkpoint, and the end."""
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(signum, frame)
    else:  # ignored, as in a shell's background
        raise KeyboardInterrupt


def main() -> None:
    """Run `raybert`."""
    signal.signal(signal.SIGTERM, _as_ctrl_c)
    try:
        from raybert.cli import commands
    except KeyboardInterrupt:
        print("raybert: interrupted; nothing was begun", file=sys.stderr)
        sys.exit(INTERRUPTED)
    commands.main()

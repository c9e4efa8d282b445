"""Progress on standard error: one rewritten line on a terminal, plain lines in a log.

Standard output is reserved for results, so that `--json` can be piped. A thread shows the last
progress again, with the time since, while nothing newer comes: Ray and its workers start silently.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from raybert.records import (
    EvalRecord,
    Record,
    TrainRecord,
    format_mean,
    headline,
    longest_data_wait,
    metric_of,
)
from raybert.terminal.formats import clock, escape_controls

PLAIN_SECONDS = 10.0  # between lines of progress without a terminal
TICK_SECONDS = 1.0  # between looks at whether the last progress is to be shown again
FOLLOWED_SECONDS = 2.0  # the same in a submitted job, whose log is followed on a terminal
#: Set in a submitted job: its progress lines are marked, and the follower rewrites them.
FOLLOWED = "RAYBERT_FOLLOWED"
_WAITS = 0.05  # the share of a step from which waiting for data is shown
_SLOW = 1.25  # a rank that works so much longer than the mean is shown
_PROGRESS = "\x1f"  # first character of such a line; invisible when printed


class Display:
    """Shows the progress of a stage."""

    def __init__(self, quiet: bool = False) -> None:
        """Write to standard error; `quiet` writes nothing."""
        self._console = Console(
            stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True
        )
        self._quiet = quiet
        self._live = self._console.is_terminal and not quiet
        self._followed = bool(os.environ.get(FOLLOWED))
        self._stage = ""
        self._panel: Live | None = None
        self._begun = self._last_plain = time.monotonic()
        self._text: str | None = None  # of the last progress; None: it is not shown any more
        self._lock = threading.RLock()

    @contextmanager
    def stage(self, name: str, begins: str = "starting") -> Iterator[None]:
        """Begin a stage; its name and duration precede its lines. `begins`: what it does first."""
        self._stage, self._begun = name, time.monotonic()
        self._last_plain = 0.0
        self.progress(begins)
        ended = threading.Event()
        ticking = threading.Thread(target=self._tick, args=(ended,), daemon=True)
        if not self._quiet:
            ticking.start()
        try:
            yield
        finally:
            ended.set()
            with self._lock:
                if self._panel is not None:
                    self._panel.stop()
                    self._panel = None
                self._clear()
                self._stage, self._text = "", None

    def _tick(self, ended: threading.Event) -> None:
        """Show the last progress again every second; without a terminal, as often as others."""
        while not ended.wait(TICK_SECONDS):
            with self._lock:
                if self._text is not None and self._panel is None and not ended.is_set():
                    self._show(self._text)

    def progress(self, text: str) -> None:
        """Show progress: rewrite the live line; without a terminal, print it every few seconds."""
        if self._quiet:
            return
        with self._lock:
            self._text = text
            self._show(text)

    def _show(self, text: str) -> None:
        spent = clock(time.monotonic() - self._begun)
        self._write_progress(f"{self._stage:<9} {spent:>6}  {escape_controls(text)}")

    def panel(self, content: RenderableType, text: str) -> None:
        """Show a renderable that is rewritten; without a terminal, show `text` as progress."""
        if not self._live:
            self.progress(text)
            return
        with self._lock:
            self._update_panel(content, text)

    def _update_panel(self, content: RenderableType, text: str) -> None:
        if self._panel is None:
            self._clear()
            self._panel = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._panel.start()
        spent = clock(time.monotonic() - self._begun)
        self._panel.update(Group(Text(f"{self._stage:<9} {spent:>6}  {text}"), content))
        self._panel.refresh()

    def forward(self, line: str) -> None:
        """Show a line of a followed job's log: rewrite progress, print the rest."""
        if line.startswith(_PROGRESS):
            self._write_progress(escape_controls(line.removeprefix(_PROGRESS)))
        else:
            self.print(line)

    def _write_progress(self, text: str) -> None:
        if self._live:
            shown = Text(text)
            shown.truncate(self._console.width - 1, overflow="ellipsis")
            sys.stderr.write(f"\r\x1b[2K{shown.plain}")
            sys.stderr.flush()
            return
        pause = FOLLOWED_SECONDS if self._followed else PLAIN_SECONDS
        if time.monotonic() - self._last_plain >= pause:
            self._last_plain = time.monotonic()
            self._console.print((_PROGRESS if self._followed else "") + text)

    def print(self, text: str) -> None:
        """Print a permanent line."""
        with self._lock:
            self._clear()
            if not self._quiet:
                self._console.print(escape_controls(text))

    def record(self, record: Record) -> None:
        """Show a record of the training loop."""
        total = record.get("total_steps")
        if record["kind"] == "train":
            self.progress(_format_train(record, total))
        elif record["kind"] == "eval":
            self.print(f"{self._stage:<9} step {record['step']:>6,}  {_format_eval(record)}")
            for example in record.get("fillings", []):
                expected = f" (in the text: {e})" if (e := example.get("expected")) else ""
                tokens = _format_tokens(example["tokens"])
                self.print(f"{'':<9} {example['text']}  ->  {tokens}{expected}")
        elif record["kind"] == "event" and record["event"] != "start":
            self.print(f"{self._stage:<9} step {record['step']:>6,}  {record.get('message', '')}")

    def _clear(self) -> None:
        if self._live and self._panel is None:  # rich moves a panel below printed lines
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()


def printable_log(text: str) -> str:
    """The log of a job, without the marks of its lines of progress."""
    return escape_controls(text.replace(_PROGRESS, ""))


def _format_train(record: TrainRecord, total: int | None) -> str:
    steps = f"{record['step']:,}" + (f"/{total:,}" if total else "")
    parts = [
        f"step {steps}",
        f"loss {format_mean(record['loss'], 3)}",
        f"lr {record['lr']:.1e}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
    ]
    if record.get("mfu"):
        parts.append(f"mfu {record['mfu']:.0%}")
    wait, rank = longest_data_wait(record)
    share = wait / max(1e-9, record["step_seconds"])
    if share >= _WAITS:
        parts.append(f"waiting for data {share:.0%}" + (f" (rank {rank})" if rank else ""))
    mean, most = record.get("own_seconds", 0.0), record.get("own_seconds_max", 0.0)
    if most > _SLOW * mean > 0:
        parts.append(f"rank {record.get('own_seconds_rank')} {most / mean:.1f}x slower")
    if total:
        parts.append(f"ETA {clock((total - record['step']) * record['step_seconds'])}")
    return "  ".join(parts)


def _format_eval(record: EvalRecord) -> str:
    parts = [f"held-out loss {format_mean(record['loss'])}"]
    if format_mean(record["loss"]) == "none":
        parts.append("(nothing held out was predicted)")
    elif "unigram_loss" in record:
        parts.append(f"(unigram {record['unigram_loss']:.4f})")
    if metric_of(record) in record and metric_of(record) != "loss":
        parts.append(headline(record))
    return "  ".join(parts)


def _format_tokens(tokens: list[dict[str, Any]]) -> str:
    return ", ".join(f"{token['token']} {token['probability']:.2f}" for token in tokens)

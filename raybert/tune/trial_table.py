"""The table of trials on a terminal, and the line that stands for it in a log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from raybert.tune.trial_store import TrialRecord, count_states, ranked

_ROWS = 16  # trials shown: those that run, and the best of the others
_COLUMNS = 5  # searched keys shown, the first ones of the space
_STYLES = {"running": "bold", "finished": "green", "stopped": "dim", "failed": "red"}


def table_of(entries: Sequence[TrialRecord], keys: Sequence[str]) -> Table:
    """Show the trials that run, and the best of the others."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("trial", "state", "epoch", "best", "now"):
        table.add_column(name, justify="left" if name in ("trial", "state") else "right")
    for key in keys[:_COLUMNS]:
        table.add_column(key.rpartition(".")[2], justify="right", overflow="ellipsis")
    running = [entry for entry in entries if entry.state == "running"]
    others = [entry for entry in ranked(entries) if entry.state != "running"]
    failed = [entry for entry in entries if entry.state == "failed"]
    for entry in [*running, *others, *failed][:_ROWS]:
        now = entry.evaluations[-1].accuracy if entry.evaluations else None
        table.add_row(
            entry.name,
            _state(entry),
            f"{entry.epoch:.2f}" if entry.evaluations else "",
            "" if entry.best is None else f"{entry.best.accuracy:.4f}",
            "" if now is None else f"{now:.4f}",
            *(show_value(entry.values.get(key, "")) for key in keys[:_COLUMNS]),
            style=_STYLES.get(entry.state),
        )
    return table


def line_of(entries: Sequence[TrialRecord], limit: int | None) -> str:
    """Say in a line how far the search has come."""
    counts = count_states(entries)
    over = sum(counts[state] for state in ("finished", "stopped", "failed"))
    parts = [f"{over}/{limit} trials" if limit else f"{over} trials"]
    for state in ("running", "stopped", "failed"):
        if counts.get(state):
            parts.append(f"{counts[state]} {state}")
    best = next(iter(ranked(entries)), None)
    if best is not None and best.best is not None:
        parts.append(f"best {best.best.accuracy:.4f} ({best.name})")
    return "  ".join(parts)


def ended_line(entry: TrialRecord) -> str:
    """Say in a line how a trial ended."""
    took = f"{(entry.ended or time.time()) - entry.begun:.0f} s"
    if entry.state == "failed":
        return f"trial {entry.name}  failed: {entry.why}"
    accuracy = "" if entry.best is None else f"accuracy {entry.best.accuracy:.4f}  "
    why = f"  {entry.why}" if entry.why else ""
    values = "  ".join(
        f"{key.rpartition('.')[2]} {show_value(v)}" for key, v in entry.values.items()
    )
    return f"trial {entry.name}  {accuracy}{took}{why}  {values}"


def show_value(value: Any) -> str:
    """A value in few characters."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return "null" if value is None else str(value)


def _state(entry: TrialRecord) -> str:
    if entry.state == "running" and entry.total_steps:
        return f"running {entry.step / entry.total_steps:.0%}"
    return entry.state

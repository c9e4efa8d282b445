"""The table of trials on a terminal, and the lines that replace it in a log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from raybert.tune.trial_store import ENDED, TrialRecord, count_states, rank_trials

_ROWS = 16  # trials shown: running ones, and the best of the others
_COLUMNS = 5  # searched keys shown: the first ones of the space
_STYLES = {"running": "bold", "finished": "green", "stopped": "dim", "failed": "red"}


def trial_table(trials: Sequence[TrialRecord], keys: Sequence[str]) -> Table:
    """A table of the running trials and the best of the others."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("trial", "state", "epoch", "best", "now"):
        table.add_column(name, justify="left" if name in ("trial", "state") else "right")
    for key in keys[:_COLUMNS]:
        table.add_column(key.rpartition(".")[2], justify="right", overflow="ellipsis")
    running = [trial for trial in trials if trial.state == "running"]
    others = [trial for trial in rank_trials(trials) if trial.state != "running"]
    failed = [trial for trial in trials if trial.state == "failed"]
    for trial in [*running, *others, *failed][:_ROWS]:
        total = trial.total_steps if trial.state == "running" else None
        progress = f" {trial.step / total:.0%}" if total else ""
        now = trial.evaluations[-1].value if trial.evaluations else None
        table.add_row(
            trial.name,
            trial.state + progress,
            f"{trial.epoch:.2f}" if trial.evaluations else "",
            "" if trial.best is None else f"{trial.best.value:.4f}",
            "" if now is None else f"{now:.4f}",
            *(format_value(trial.values.get(key, "")) for key in keys[:_COLUMNS]),
            style=_STYLES.get(trial.state),
        )
    return table


def format_progress(trials: Sequence[TrialRecord], limit: int | None) -> str:
    """The progress of the search in a line; `limit` is the number of trials in all."""
    counts = count_states(trials)
    ended = sum(counts[state] for state in ENDED)
    parts = [f"{ended}/{limit} trials" if limit else f"{ended} trials"]
    for state in ("running", "stopped", "failed"):
        if counts.get(state):
            parts.append(f"{counts[state]} {state}")
    best = next(iter(rank_trials(trials)), None)
    if best is not None and best.best is not None:
        parts.append(f"best {best.best.value:.4f} ({best.name})")
    return "  ".join(parts)


def format_end(trial: TrialRecord) -> str:
    """How a trial ended, in a line."""
    took = f"{(trial.ended or time.time()) - trial.started:.0f} s"
    if trial.state == "failed":
        return f"trial {trial.name}  failed: {trial.reason}"
    best = "" if trial.best is None else f"{trial.best.metric} {trial.best.value:.4f}  "
    reason = f"  {trial.reason}" if trial.reason else ""
    values = "  ".join(
        f"{key.rpartition('.')[2]} {format_value(v)}" for key, v in trial.values.items()
    )
    return f"trial {trial.name}  {best}{took}{reason}  {values}"


def format_value(value: Any) -> str:
    """A value in few characters."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return "null" if value is None else str(value)

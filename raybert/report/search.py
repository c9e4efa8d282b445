"""The results of a hyperparameter search: headline numbers, finalists, exchanges, all trials."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raybert.report.elements import Table, Tile, format_value
from raybert.report.search_plots import MAX_TRIALS, Trial, best_first, search_plots
from raybert.report.stage_files import number
from raybert.terminal.formats import format_duration

STATES = ("finished", "stopped", "failed", "running", "waiting")


def search_tiles(search: Mapping[str, Any]) -> Iterator[Tile]:
    """The headline numbers of a search."""
    trials = search.get("trials") or []
    if not trials:
        return
    counts = {state: sum(t.get("state") == state for t in trials) for state in STATES}
    note = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    yield Tile("Trials", format_value(len(trials)), note)
    finalists = search.get("finalists") or []
    if finalists:
        trial = f"trial {finalists[0].get('trial')}, validation"
        yield _finalist_tile("Winner", finalists[0], trial)
        default = next((f for f in finalists if f.get("configured")), None)
        if default is not None and default is not finalists[0]:
            yield _finalist_tile("Configured values", default, "validation")
    cost = search.get("cost") or {}
    if number(cost.get("core_hours")) is not None:
        gpu = number(cost.get("gpu_hours")) or 0.0
        label, hours = ("GPU hours", gpu) if gpu else ("Core hours", cost["core_hours"])
        yield Tile(label, f"{hours:.2f}", "of all trials and the finalists' runs")


def search_section(search: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the template shows of a search, in the order of the page; None if there was none."""
    trials = [t for t in search.get("trials") or [] if isinstance(t, Mapping)]
    if not trials:
        return None
    keys = [dimension["key"] for dimension in search.get("dimensions") or []]
    return dict(
        method=f"{search.get('searcher')} search, {search.get('scheduler')} scheduler",
        figures=search_plots(search, trials),
        finalists=_finalist_table(search.get("finalists") or [], keys),
        exchanges=_exchange_table(trials),
        trials=_trial_table(trials, keys),
    )


def _finalist_tile(label: str, finalist: Mapping[str, Any], note: str) -> Tile:
    mean, _, deviation = _mean(finalist).partition(" ± ")
    # The deviation goes into the note: a tile's value is one short line.
    return Tile(label, mean, f"± {deviation}, {note}" if deviation else note)


def _finalist_table(finalists: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> Table:
    rows = []
    for finalist in finalists:
        seeds, values = finalist.get("seeds") or {}, finalist.get("config") or {}
        scores = (_mean(finalist), _mean(finalist, "loss"))
        name = str(finalist.get("trial"))
        rows.append((name, format_value(seeds.get("n")), *scores, *_values_of(values, keys)))
    return Table("Finalists", rows, ("trial", "seeds", "accuracy", "loss", *keys))


def _exchange_table(trials: Sequence[Trial]) -> Table:
    """The exploit steps of population-based training, with hashes and rates that verify each."""
    rows = []
    for trial in trials:
        for exchange in trial.get("exchanges") or []:
            before, after = exchange.get("before") or {}, exchange.get("after") or {}
            changed = ", ".join(
                f"{key.rpartition('.')[2]} {format_value(before.get(key))} → {format_value(value)}"
                for key, value in after.items()
            )
            weights, loaded = exchange.get("weights"), exchange.get("weights_after")
            trained = exchange.get("trained") or {}
            rate = trained.get("lr")
            rows.append(
                (
                    str(trial.get("trial")),
                    str(exchange.get("from")),
                    format_value(exchange.get("step")),
                    changed,
                    _comparison(str(weights)[:12], weights, loaded),
                    _comparison(format_value(rate), trained.get("due"), rate),
                )
            )
    head = (
        *("trial", "took over", "at step", "values", "weights: SHA-256, and those loaded"),
        "rate of the first logged step, and the schedule's",
    )
    return Table("Exchanges", rows, head)


def _comparison(text: str, expected: Any, found: Any) -> str:
    if found is None:
        return "not logged"
    return f"{text}, {'equal' if found == expected else 'NOT equal'}"


def _trial_table(trials: Sequence[Trial], keys: Sequence[str]) -> Table:
    scored = best_first(trials)
    others = [trial for trial in trials if trial not in scored]
    rows = []
    for trial in [*scored, *others][:MAX_TRIALS]:
        accuracy = number(trial.get("accuracy"))
        rows.append(
            (
                str(trial.get("trial")),
                str(trial.get("state")),
                "" if accuracy is None else f"{accuracy:.4f}",
                format_value(trial.get("epoch")),
                format_duration(number(trial.get("seconds")) or 0.0),
                *_values_of(trial.get("values") or {}, keys),
                str(trial.get("why") or ""),
            )
        )
    head = ("trial", "state", "accuracy", "epochs", "took", *keys, "why")
    return Table("All trials", rows, head)


def _values_of(values: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    return [format_value(values[key]) if key in values else "" for key in keys]


def _mean(finalist: Mapping[str, Any], key: str = "accuracy") -> str:
    """The mean of a finalist's runs, with its standard deviation."""
    spread = (finalist.get("seeds") or {}).get(key) or {}
    mean, deviation = number(spread.get("mean")), number(spread.get("std"))
    if mean is None:
        return "none"
    return f"{mean:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")

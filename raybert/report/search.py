"""The results of a hyperparameter search: headline numbers, plots, finalists, exploits, trials."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raybert.records import metric_of
from raybert.report.elements import Figure, Table, Tile, format_value, metric_name
from raybert.report.plots import GRID, MAIN, MUTED, PALE, SECOND, draw_figure
from raybert.report.stage_files import number
from raybert.terminal.formats import format_duration, mean_and_deviation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_TRIALS = 60  # lines of a plot and rows of the table: the best ones
MAX_KEYS = 8  # axes of the parallel coordinates: the most important ones
_BEST_SHARE = 0.2  # of the trials, drawn in colour
STATES = ("finished", "stopped", "failed", "running", "waiting")

Trial = Mapping[str, Any]


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
        metric = metric_of(search)
        trial = f"trial {finalists[0].get('trial')}, validation"
        yield _finalist_tile("Winner", finalists[0], metric, trial)
        default = next((f for f in finalists if f.get("configured")), None)
        if default is not None and default is not finalists[0]:
            yield _finalist_tile("Configured values", default, metric, "validation")
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
    metric = metric_of(search)
    return dict(
        method=f"{search.get('searcher')} search, {search.get('scheduler')} scheduler",
        figures=search_plots(search, trials),
        finalists=_finalist_table(search.get("finalists") or [], keys, metric),
        exchanges=_exploit_table(trials),
        trials=_trial_table(trials, keys, metric),
    )


def _finalist_tile(label: str, finalist: Mapping[str, Any], metric: str, note: str) -> Tile:
    mean, _, deviation = _mean(finalist, metric).partition(" ± ")
    # The deviation goes into the note: a tile's value is one short line.
    return Tile(label, mean, f"± {deviation}, {note}" if deviation else note)


def _finalist_table(
    finalists: Sequence[Mapping[str, Any]], keys: Sequence[str], metric: str
) -> Table:
    rows = []
    for finalist in finalists:
        seeds, values = finalist.get("seeds") or {}, finalist.get("config") or {}
        scores = (_mean(finalist, metric), _mean(finalist, "loss"))
        name = str(finalist.get("trial"))
        rows.append((name, format_value(seeds.get("n")), *scores, *_values_of(values, keys)))
    return Table("Finalists", rows, ("trial", "seeds", metric_name(metric), "loss", *keys))


def _exploit_table(trials: Sequence[Trial]) -> Table:
    """The exploit steps of population-based training, with hashes and rates that verify each."""
    rows = []
    for trial in trials:
        for exploit in trial.get("exchanges") or []:
            before, after = exploit.get("before") or {}, exploit.get("after") or {}
            changed = ", ".join(
                f"{key.rpartition('.')[2]} {format_value(before.get(key))} → {format_value(value)}"
                for key, value in after.items()
            )
            weights, loaded = exploit.get("weights"), exploit.get("weights_after")
            trained = exploit.get("trained") or {}
            rate = trained.get("lr")
            rows.append(
                (
                    str(trial.get("trial")),
                    str(exploit.get("from")),
                    format_value(exploit.get("step")),
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


def _trial_table(trials: Sequence[Trial], keys: Sequence[str], metric: str) -> Table:
    scored = best_first(trials)
    others = [trial for trial in trials if trial not in scored]
    rows = []
    for trial in [*scored, *others][:MAX_TRIALS]:
        value = number(trial.get(metric))
        rows.append(
            (
                str(trial.get("trial")),
                str(trial.get("state")),
                "" if value is None else f"{value:.4f}",
                format_value(trial.get("epoch")),
                format_duration(number(trial.get("seconds")) or 0.0),
                *_values_of(trial.get("values") or {}, keys),
                str(trial.get("why") or ""),
            )
        )
    head = ("trial", "state", metric_name(metric), "epochs", "took", *keys, "why")
    return Table("All trials", rows, head)


def _values_of(values: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    return [format_value(values[key]) if key in values else "" for key in keys]


def _mean(finalist: Mapping[str, Any], key: str) -> str:
    """The mean of a finalist's runs, with its standard deviation."""
    spread = (finalist.get("seeds") or {}).get(key) or {}
    return mean_and_deviation({key: number(spread.get(key)) for key in ("mean", "std")})


def search_plots(search: Mapping[str, Any], trials: Sequence[Trial]) -> list[Figure]:
    """All plots of a search; those without data are left out."""
    importance, metric = search.get("importance") or {}, metric_of(search)
    shares = importance.get("shares") or {}
    return [
        *_over_time(trials, metric),
        *_finalists(search.get("finalists") or [], metric),
        *_parallel_coordinates(search.get("dimensions") or [], trials, shares, metric),
        *_importance(importance),
    ]


def best_first(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that have a score and can win, the best one first."""
    known = [t for t in trials if _can_win(t) and number(t.get("score")) is not None]
    return sorted(known, key=lambda t: -float(t["score"]))


def _can_win(trial: Trial) -> bool:
    """Whether a trial has a model: one that failed has none, whatever its score was before."""
    return trial.get("state") != "failed"


def _over_time(trials: Sequence[Trial], metric: str) -> list[Figure]:
    """Every evaluation, and the best one so far by score, over the time since the first trial."""
    begun = min((b for t in trials if (b := number(t.get("begun")))), default=None)
    points = sorted(
        (float(when) - begun, float(value), t.get("state") == "stopped", number(score))
        for t in filter(_can_win, trials)
        for _, score, value, when in t.get("evaluations") or []
        if begun is not None and number(value) is not None and number(when) is not None
    )
    if not points:
        return []

    def draw(axes: Axes) -> None:
        for stopped, color, label in ((True, PALE, "of stopped trials"), (False, MAIN, "")):
            some = [(x / 60, y) for x, y, is_stopped, _ in points if is_stopped == stopped]
            if some:
                label = label or "of the others"
                axes.plot(*zip(*some, strict=True), "o", color=color, markersize=3, label=label)
        best, steps = (-math.inf, math.nan), []
        for x, y, _, score in points:
            best = max(best, (y if score is None else score, y))
            steps.append((x / 60, best[1]))
        axes.step(*zip(*steps, strict=True), where="post", color=SECOND, label="best so far")
        axes.set_xlabel("minutes since the first trial began")

    return [draw_figure(f"Validation {metric_name(metric)} over time", draw, "search/time")]


def _finalists(finalists: Sequence[Mapping[str, Any]], metric: str) -> list[Figure]:
    """The scores of each finalist's runs, with mean and standard deviation."""
    rows = []
    for finalist in finalists:
        spread = ((finalist.get("seeds") or {}).get(metric)) or {}
        values = [v for v in spread.get("values") or [] if number(v) is not None]
        if values:
            rows.append((str(finalist.get("trial")), values, spread))
    if not rows:
        return []

    def draw(axes: Axes) -> None:
        for at, (_, values, spread) in enumerate(rows):
            axes.plot([at] * len(values), values, "o", color=PALE, markersize=4)
            axes.errorbar(
                [at], [spread["mean"]], yerr=[spread.get("std") or 0.0], fmt="s", color=MAIN,
                capsize=3, markersize=4,
            )  # fmt: skip
        axes.set_xticks(range(len(rows)), [name for name, _, _ in rows])
        axes.set_xlim(-0.5, len(rows) - 0.5)
        axes.set_xlabel("trial; squares are means, bars one standard deviation")

    return [draw_figure("Finalists, each with several seeds", draw, "search/finalists")]


def _parallel_coordinates(
    dimensions: Sequence[Mapping[str, Any]],
    trials: Sequence[Trial],
    shares: Mapping[str, Any],
    metric: str,
) -> list[Figure]:
    """A line for each trial over the most important keys; the best ones in colour."""
    order = sorted(dimensions, key=lambda d: -(number(shares.get(d["key"])) or 0.0))[:MAX_KEYS]
    ranked = [t for t in best_first(trials) if number(t.get(metric)) is not None][:MAX_TRIALS]
    if len(order) < 2 or len(ranked) < 2:
        return []
    values = [float(trial[metric]) for trial in ranked]
    low, high = min(values), max(values)
    best = max(1, round(_BEST_SHARE * len(ranked)))

    def draw(axes: Axes) -> None:
        for at, trial in reversed(list(enumerate(ranked))):
            values = trial.get("values") or {}
            heights = [_height(d, values.get(d["key"])) for d in order]
            heights.append((float(trial[metric]) - low) / ((high - low) or 1.0))
            color, width = (MAIN, 1.4) if at < best else (GRID, 0.8)
            axes.plot(range(len(heights)), heights, color=color, linewidth=width)
        names = [d["key"].rpartition(".")[2] for d in order] + [metric_name(metric)]
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_yticks([])
        axes.set_ylim(-0.08, 1.08)
        axes.grid(axis="x", color=MUTED, linewidth=0.6)
        for at, dimension in enumerate(order):
            for y, text in zip((0, 1), _ends(dimension), strict=True):
                beside = (0, 4 if y else -9)
                axes.annotate(
                    text, (at, y), xytext=beside, textcoords="offset points", ha="center",
                    fontsize=6, color=MUTED,
                )  # fmt: skip

    title = f"Values of the {len(ranked)} best trials; in colour the best {best}"
    return [draw_figure(title, draw, "search/parallel")]


def _height(dimension: Mapping[str, Any], value: Any) -> float:
    """The position of a value on its axis, 0 to 1; NaN, a gap in the line, if it has none."""
    if dimension["kind"] == "choice":
        choices = list(dimension["choices"])
        return choices.index(value) / max(1, len(choices) - 1) if value in choices else math.nan
    at = number(value)
    if at is None or at <= 0 and dimension["kind"].startswith("log"):
        return math.nan
    low, high = float(dimension["low"]), float(dimension["high"])
    if dimension["kind"].startswith("log"):
        at, low, high = math.log(at), math.log(low), math.log(high)
    return min(max((at - low) / (high - low), 0.0), 1.0)


def _ends(dimension: Mapping[str, Any]) -> tuple[str, str]:
    """The labels at the two ends of an axis."""
    if dimension["kind"] == "choice":
        choices = dimension["choices"]
        return str(choices[0])[:8], str(choices[-1])[:8]
    return f"{dimension['low']:g}", f"{dimension['high']:g}"


def _importance(importance: Mapping[str, Any]) -> list[Figure]:
    """The share of the scores' variance that each key explains alone."""
    shares = importance.get("shares") or {}
    known = sorted((float(v), str(k)) for k, v in shares.items() if number(v) is not None)
    if not known:
        return []

    def draw(axes: Axes) -> None:
        axes.barh(range(len(known)), [share for share, _ in known], color=MAIN)
        axes.set_yticks(range(len(known)), [key.rpartition(".")[2] for _, key in known], fontsize=7)
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of variance explained")

    note = str(importance.get("method"))
    return [draw_figure("Importance of each key", draw, "search/importance", note)]

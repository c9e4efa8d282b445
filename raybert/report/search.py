"""What a search found: scores over time, which keys matter, who was stopped, what it cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raybert.report.markup import Html, duration, fold, join, show, table, tag
from raybert.report.plots import GRID, MAIN, MUTED, PALE, SECOND, figure
from raybert.report.stage_files import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_TRIALS = 60  # lines of a plot and rows of the table; of more, the best
MAX_KEYS = 8  # axes of the parallel coordinates: those that matter most
_BEST_SHARE = 0.2  # of the trials, drawn in colour

Trial = Mapping[str, Any]


def search_tiles(search: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The headline numbers of a search: label, value, note."""
    trials = search.get("trials") or []
    if not trials:
        return
    counts = {state: sum(t.get("state") == state for t in trials) for state in _STATES}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    yield "Trials", show(len(trials)), told
    finalists = search.get("finalists") or []
    if finalists:
        yield _tile("Winner", finalists[0], f"trial {finalists[0].get('trial')}, validation")
        default = next((f for f in finalists if f.get("configured")), None)
        if default is not None and default is not finalists[0]:
            yield _tile("Configured values", default, "validation")
    cost = search.get("cost") or {}
    if number(cost.get("core_hours")) is not None:
        gpu = number(cost.get("gpu_hours")) or 0.0
        unit = ("GPU hours", gpu) if gpu else ("Core hours", cost["core_hours"])
        yield unit[0], f"{unit[1]:.2f}", "of all trials and the finalists' runs"


def _tile(name: str, finalist: Mapping[str, Any], of: str) -> tuple[str, str, str]:
    """A finalist's mean; the deviation stands below, for a tile has no room for both in a line."""
    mean, _, deviation = _mean(finalist).partition(" ± ")
    return name, mean, f"± {deviation}, {of}" if deviation else of


_STATES = ("finished", "stopped", "failed", "running", "waiting")


def searched(search: Mapping[str, Any]) -> Html:
    """Everything that is known of a search; nothing where there was none."""
    trials = [t for t in search.get("trials") or [] if isinstance(t, Mapping)]
    if not trials:
        return Html()
    keys = [d["key"] for d in search.get("dimensions") or []]
    shares = (search.get("importance") or {}).get("shares") or {}
    finalists = search.get("finalists") or []
    figures = [
        *_over_time(trials),
        *_finalists(finalists),
        *_parallel(search.get("dimensions") or [], trials, shares),
        *_importance(search.get("importance") or {}),
    ]
    how = f"{search.get('searcher')} search, {search.get('scheduler')} scheduler"
    return join(
        [
            tag("p", tag("small", how)),
            tag("div", *figures, class_="plots"),
            _finalist_table(finalists, keys),
            _exchanges(trials),
            fold("All trials", _trial_table(trials, keys)),
        ]
    )


def _best_first(trials: Sequence[Trial]) -> list[Trial]:
    known = [t for t in trials if _counts(t) and number(t.get("score")) is not None]
    return sorted(known, key=lambda t: -float(t["score"]))


def _counts(trial: Trial) -> bool:
    """Whether a trial may win: one that failed has no model, whatever it had reached before."""
    return trial.get("state") != "failed"


def _over_time(trials: Sequence[Trial]) -> list[Html]:
    """Every evaluation, and the best so far, over the time since the first trial began."""
    begun = min((b for t in trials if (b := number(t.get("begun")))), default=None)
    points = sorted(
        (float(when) - begun, float(accuracy), t.get("state") == "stopped")
        for t in filter(_counts, trials)
        for _, _, accuracy, when in t.get("evaluations") or []
        if begun is not None and number(accuracy) is not None and number(when) is not None
    )
    if not points:
        return []

    def draw(axes: Axes) -> None:
        for stopped, color, label in ((True, PALE, "of stopped trials"), (False, MAIN, "")):
            some = [(x / 60, y) for x, y, is_stopped in points if is_stopped == stopped]
            if some:
                label = label or "of the others"
                axes.plot(*zip(*some, strict=True), "o", color=color, markersize=3, label=label)
        best, steps = -math.inf, []
        for x, y, _ in points:
            best = max(best, y)
            steps.append((x / 60, best))
        axes.step(*zip(*steps, strict=True), where="post", color=SECOND, label="best so far")
        axes.set_xlabel("minutes since the first trial began")

    return [figure("Validation accuracy over time", draw, "search/time")]


def _finalists(finalists: Sequence[Mapping[str, Any]]) -> list[Html]:
    """Each finalist's runs, with mean and standard deviation."""
    rows = []
    for finalist in finalists:
        spread = ((finalist.get("seeds") or {}).get("accuracy")) or {}
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

    return [figure("Finalists, each with several seeds", draw, "search/finalists")]


def _parallel(
    dimensions: Sequence[Mapping[str, Any]], trials: Sequence[Trial], shares: Mapping[str, Any]
) -> list[Html]:
    """A line a trial over the keys that matter most; the best ones in colour."""
    order = sorted(dimensions, key=lambda d: -(number(shares.get(d["key"])) or 0.0))[:MAX_KEYS]
    ranked = _best_first(trials)[:MAX_TRIALS]
    if len(order) < 2 or len(ranked) < 2:
        return []
    scores = [float(t["accuracy"]) for t in ranked if number(t.get("accuracy")) is not None]
    low, high = min(scores), max(scores)
    best = max(1, round(_BEST_SHARE * len(ranked)))

    def draw(axes: Axes) -> None:
        for at, trial in reversed(list(enumerate(ranked))):
            values = trial.get("values") or {}
            heights = [_height(d, values.get(d["key"])) for d in order]
            heights.append((float(trial.get("accuracy") or low) - low) / ((high - low) or 1.0))
            color, width = (MAIN, 1.4) if at < best else (GRID, 0.8)
            axes.plot(range(len(heights)), heights, color=color, linewidth=width)
        names = [d["key"].rpartition(".")[2] for d in order] + ["accuracy"]
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
    return [figure(title, draw, "search/parallel")]


def _height(dimension: Mapping[str, Any], value: Any) -> float:
    """Where on its axis a value lies, 0 to 1; NaN breaks the line where a key did not matter."""
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
    if dimension["kind"] == "choice":
        choices = dimension["choices"]
        return str(choices[0])[:8], str(choices[-1])[:8]
    return f"{dimension['low']:g}", f"{dimension['high']:g}"


def _importance(importance: Mapping[str, Any]) -> list[Html]:
    """How much of the scores' variance each key explains alone."""
    shares = importance.get("shares") or {}
    known = sorted((float(v), str(k)) for k, v in shares.items() if number(v) is not None)
    if not known:
        return []

    def draw(axes: Axes) -> None:
        axes.barh(range(len(known)), [share for share, _ in known], color=MAIN)
        axes.set_yticks(range(len(known)), [key.rpartition(".")[2] for _, key in known], fontsize=7)
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of variance explained")

    drawn = figure("Importance of each key", draw, "search/importance")
    note = tag("small", str(importance.get("method")))
    return [Html(drawn.removesuffix("</figure>") + note + "</figure>")]


def _finalist_table(finalists: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> Html:
    if not finalists:
        return Html()
    head = tag("tr", *(tag("th", t) for t in ("trial", "seeds", "accuracy", "loss", *keys)))
    body = []
    for finalist in finalists:
        seeds, values = finalist.get("seeds") or {}, finalist.get("config") or {}
        cells = [str(finalist.get("trial")), show(seeds.get("n")), _mean(finalist)]
        cells.append(_mean(finalist, "loss"))
        cells += [show(values[key]) if key in values else "" for key in keys]
        body.append(tag("tr", *(tag("td", cell) for cell in cells)))
    return join([tag("h3", "Finalists"), table(head, body)])


def _exchanges(trials: Sequence[Trial]) -> Html:
    """Which trial took over whose weights, and what proves it."""
    body = []
    for trial in trials:
        for exchange in trial.get("exchanges") or []:
            before, after = exchange.get("before") or {}, exchange.get("after") or {}
            changed = ", ".join(
                f"{key.rpartition('.')[2]} {show(before.get(key))} → {show(value)}"
                for key, value in after.items()
            )
            trained = exchange.get("trained") or {}
            cells = (
                str(trial.get("trial")),
                str(exchange.get("from")),
                show(exchange.get("step")),
                changed,
                _compared(
                    str(exchange.get("weights"))[:12],
                    exchange.get("weights"),
                    exchange.get("weights_after"),
                ),
                _compared(show(trained.get("lr")), trained.get("due"), trained.get("lr")),
            )
            body.append(tag("tr", *(tag("td", cell) for cell in cells)))
    if not body:
        return Html()
    names = (
        *("trial", "took over", "at step", "values", "weights: SHA-256, and those loaded"),
        "rate of the first logged step, and the schedule's",
    )
    head = tag("tr", *(tag("th", name) for name in names))
    return join([tag("h3", "Exchanges"), table(head, body)])


def _compared(text: str, due: Any, found: Any) -> str:
    if found is None:
        return "not logged"
    return f"{text}, {'equal' if found == due else 'NOT equal'}"


def _trial_table(trials: Sequence[Trial], keys: Sequence[str]) -> Html:
    names = ("trial", "state", "accuracy", "epochs", "took", *keys, "why")
    head = tag("tr", *(tag("th", name) for name in names))
    scored = _best_first(trials)
    rest = [t for t in trials if t not in scored]
    body = []
    for trial in [*scored, *rest][:MAX_TRIALS]:
        values = trial.get("values") or {}
        accuracy = number(trial.get("accuracy"))
        cells = [
            str(trial.get("trial")),
            str(trial.get("state")),
            "" if accuracy is None else f"{accuracy:.4f}",
            show(trial.get("epoch")),
            duration(number(trial.get("seconds")) or 0.0),
            *(show(values[key]) if key in values else "" for key in keys),
            str(trial.get("why") or ""),
        ]
        body.append(tag("tr", *(tag("td", cell) for cell in cells)))
    return table(head, body)


def _mean(finalist: Mapping[str, Any], key: str = "accuracy") -> str:
    spread = (finalist.get("seeds") or {}).get(key) or {}
    mean, deviation = number(spread.get("mean")), number(spread.get("std"))
    if mean is None:
        return "none"
    return f"{mean:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")

"""Plots of training and calibration, as inline SVG that follows the reader's light or dark theme.

matplotlib draws with placeholder colours, which are replaced by CSS variables. Users' texts are not
drawn: matplotlib's font covers few scripts, the browser's cover all.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup, escape

from raybert.records import metric_of
from raybert.report.elements import Figure, metric_name
from raybert.report.stage_files import Points, Stage, curve, last, number, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 400  # of a curve: more are not visible at a plot's width
MAX_EVENTS = 50  # marked in a plot; the table has all

# Placeholders of CSS variables, which matplotlib can't write.
INK, MUTED, GRID, MAIN, PALE, SECOND, WARN = (f"#0{i}0{i}0{i}" for i in range(1, 8))
_VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "line", MAIN: "main", PALE: "pale", SECOND: "second",
    WARN: "warn",
}  # fmt: skip
_PLOT_STYLE = {
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), GRID),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), MUTED),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "text.color": INK,
    "svg.fonttype": "none",
    "font.size": 9,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
}


class Line(NamedTuple):
    """One curve of a plot."""

    points: Points
    color: str
    label: str = ""
    dots: bool = False
    dashed: bool = False
    width: float = 1.6


def training_plots(stage: Stage) -> list[Figure]:
    """A stage's plots over steps, and its reliability diagram; those without data are left out."""
    train, evals = stage.of_kind("train"), stage.of_kind("eval")
    # A run's first start and its number of steps are not marked.
    events = [
        r["step"]
        for r in stage.of_kind("event")
        if r.get("event") != "budget" and (r.get("event") != "start" or r["step"] > 0)
    ]
    # The unit of a loss on labels is its task's.
    loss = "Loss" if last(evals, "unigram_loss") is None else "Loss, nats"
    titled = {
        loss: _loss_lines(train, evals),
        "Validation score": _score_lines(evals),
        "Learning rate": [Line(curve(train, "lr"), MAIN)],
        "Throughput, tokens/s": [Line(curve(train, "tokens_per_second"), MAIN)],
        "Gradient norm": [Line(curve(train, "grad_norm"), MAIN)],
    }
    free_axis = (loss, "Validation score")  # the others start at zero
    figures = [
        over_steps(f"{stage.name}/{title}", title, lines, events, from_zero=title not in free_axis)
        for title, lines in titled.items()
        if any(line.points[0] for line in lines)
    ]
    return [*figures, *_reliability(stage.scores)]


def _score_lines(evals: list[dict[str, Any]]) -> list[Line]:
    """The metric that selects, and macro F1 where there is one."""
    metric = metric_of(evals[-1]) if evals else ""
    names = dict.fromkeys([metric, "f1_macro"] if metric else [])
    return [
        Line(curve(evals, name), color, metric_name(name), dots=True)
        for name, color in zip(names, (MAIN, SECOND), strict=False)
        if name != "loss"  # has a plot of its own
    ]


def _loss_lines(train: list[dict[str, Any]], evals: list[dict[str, Any]]) -> list[Line]:
    steps, losses = curve(train, "loss")
    validation, unigram = curve(evals, "loss"), last(evals, "unigram_loss")
    lines = [
        Line((steps, losses), PALE, width=0.8),
        Line((steps, smoothed(losses)), MAIN, "training, smoothed"),
        Line(validation, SECOND, "validation", dots=True),
    ]
    if unigram is not None:
        seen = steps + validation[0] or [0.0]
        level = ([min(seen), max(seen)], [unigram, unigram])
        lines.append(Line(level, MUTED, "unigram model", dashed=True, width=1))
    return lines


def over_steps(
    salt: str, title: str, lines: Sequence[Line], events: Sequence[int], *, from_zero: bool
) -> Figure:
    """Draw curves over steps, with a mark at each event."""

    def draw(axes: Axes) -> None:
        for line in lines:
            if line.points[0]:
                axes.plot(
                    *_thin(line.points),
                    color=line.color,
                    label=line.label or None,
                    marker="o" if line.dots or len(line.points[0]) == 1 else None,
                    markersize=3,
                    linestyle="--" if line.dashed else "-",
                    linewidth=line.width,
                )
        for step in events[:MAX_EVENTS]:
            axes.axvline(step, color=WARN, linewidth=0.9, linestyle=":")
        if from_zero:
            axes.set_ylim(bottom=0)
        _step_axis(axes)

    return draw_figure(title, draw, salt)


def _reliability(scores: Mapping[str, Any]) -> list[Figure]:
    """Accuracy against confidence by bin, and each bin's share of the rows."""
    bins = [b for b in scores.get("bins") or [] if b.get("count")]
    if not bins:
        return []

    def draw(axes: Axes) -> None:
        centers = [(b["lower"] + b["upper"]) / 2 for b in bins]
        width = (bins[0]["upper"] - bins[0]["lower"]) * 0.9
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, ls="--", label="perfectly calibrated")
        axes.bar(centers, [b["accuracy"] for b in bins], width, color=MAIN, label="accuracy")
        total = sum(b["count"] for b in bins)
        shares = [b["count"] / total for b in bins]
        axes.plot(centers, shares, ".-", color=SECOND, linewidth=1, label="share of rows")
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence")

    error = number(scores.get("expected_calibration_error"))
    title = "Reliability" + (f", calibration error {error:.4f}" if error is not None else "")
    return [draw_figure(title, draw, salt=title)]


def draw_figure(title: str, draw: Callable[[Axes], None], salt: str, note: str = "") -> Figure:
    """Draw a plot as inline SVG, with a caption and a note below.

    `salt` differs between the plots of a page, so that the ids in their SVG do.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    # A fixed salt: the same data gives the same file.
    with matplotlib.rc_context({**_PLOT_STYLE, "svg.hashsalt": salt}):
        canvas = Canvas(figsize=(4.8, 2.7), layout="constrained")
        axes = canvas.subplots()
        draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            canvas.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"|<metadata>.*?</metadata>', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same ids in every plot
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return Figure(title, Markup(svg), note)


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean over a centred window around each value, 3% of the curve wide.

    The window shrinks towards both ends, so that it stays centred and the curve is not delayed, as
    an exponential moving average would be.
    """
    sums = [0.0, *itertools.accumulate(values)]
    n, widest = len(values), max(1, round(0.015 * len(values)))
    result = []
    for i in range(n):
        reach = min(widest, i, n - 1 - i)
        result.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return result


def _step_axis(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1e3 else f"{y:g}")
    )


def _thin(points: Points) -> Points:
    kept = spread(list(zip(*points, strict=True)), MAX_POINTS)
    return [x for x, _ in kept], [y for _, y in kept]

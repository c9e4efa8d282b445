"""Several runs side by side: their scores, intervals of the differences, and their curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from raybert.errors import RaybertError, UserError
from raybert.inference import scored_texts
from raybert.inference.scored_texts import ScoredTexts
from raybert.records import measures, metric_of
from raybert.report.elements import Figure, Table, format_value, metric_name
from raybert.report.page import TITLES
from raybert.report.plots import INK, MAIN, MUTED, SECOND, WARN, Line, over_steps
from raybert.report.rendering import render_page
from raybert.report.stage_files import Stage, curve, read_stages
from raybert.storage.folder import Folder
from raybert.storage.missing import near_names
from raybert.tasks.comparison import Difference, paired_difference, take

_COLORS = (MAIN, SECOND, WARN, INK, MUTED)
_NO_MEASURES = {"temperature", "time", "epoch", "seconds"}
_MOST_MEASURES = 6  # of a stage, in the table


@dataclass
class ComparedRun:
    """A run, or an experiment with a run in each stage's folder."""

    name: str
    stages: list[Stage]
    scored: ScoredTexts | None = None
    problem: str | None = None  # why there are no scored texts
    values: dict[str, float] = field(default_factory=dict)  # of the table


def read_runs(folders: Sequence[Folder]) -> list[ComparedRun]:
    """Read runs, each with a name of its own: the last parts of their paths that differ.

    Raises:
        UserError: a folder holds no run.
    """
    paths = [folder.path.rstrip("/").split("/") for folder in folders]
    longest = max(map(len, paths))
    parts = next(
        (n for n in range(1, longest) if len({tuple(p[-n:]) for p in paths}) == len(paths)), longest
    )
    found = []
    for folder, path in zip(folders, paths, strict=True):
        stages = read_stages(folder) if folder.exists() else []
        if not stages:
            near = "" if folder.exists() else near_names(folder.uri)
            raise UserError(f"{folder}: no run here{near}; name runs or experiments to compare")
        if stages[0].name == "" and path[-1] in TITLES:  # a stage's own folder
            stages[0].name = path[-1]
        run = ComparedRun("/".join(path[-parts:]), stages)
        _read_scored(run, folder)
        run.values = _values(run)
        found.append(run)
    return found


def _read_scored(run: ComparedRun, folder: Folder) -> None:
    for inner in (folder, folder / "finetune"):
        try:
            run.scored = run.scored or scored_texts.load(inner)
        except RaybertError as error:
            run.problem = str(error)
    if run.scored is None and run.problem is None:
        run.problem = "no outputs of evaluated texts are stored: delete metrics.json, and evaluate"


def _values(run: ComparedRun) -> dict[str, float]:
    """The numbers of a run by what they are: of each stage, the last validation, then the test."""
    found: dict[str, float] = {}
    for stage in run.stages:
        title = TITLES.get(stage.name, stage.name)
        prefix = f"{title}: " if title else ""
        evals = stage.of_kind("eval")
        sources = [("", stage.scores)] if stage.scores else []
        if evals:
            best = max(evals, key=lambda r: r["score"] if r.get("score") is not None else -np.inf)
            sources.append(("validation ", best))
        for kind, values in sources:
            shown = {k: v for k, v in measures(values).items() if k not in _NO_MEASURES}
            named = list(shown.items())[:_MOST_MEASURES]
            found |= {f"{prefix}{kind}{metric_name(name)}": value for name, value in named}
        seconds = curve(stage.of_kind("train"), "seconds")[1]
        if seconds:
            found[f"{prefix}training, minutes"] = round(seconds[-1] / 60, 1)
    return found


def score_table(runs: Sequence[ComparedRun]) -> Table:
    """A row for each number, a column for each run."""
    names = list(dict.fromkeys(name for run in runs for name in run.values))
    rows = [
        [name, *(format_value(run.values[name]) if name in run.values else "" for run in runs)]
        for name in names
    ]
    return Table("Scores", rows, ("", *(run.name for run in runs)), has_row_headers=True)


@dataclass(frozen=True)
class ComparedPair:
    """A run against the first one, on the texts that both were evaluated on."""

    first: str
    second: str
    metric: str = ""
    difference: Difference | None = None  # of the second from the first, positive: better
    texts: int = 0
    problem: str = ""  # why there is none

    def describe(self) -> str:
        """The pair in one line."""
        if self.difference is None:
            return f"{self.second} against {self.first}: no interval: {self.problem}"
        value, low, high = self.difference
        verdict = "better" if value > 0 else "worse"
        if low <= 0 <= high:
            verdict = "not certainly different"
        return (
            f"{self.second} against {self.first}: {verdict}, {self.metric} {value:+.4f} "
            f"(95% interval {low:+.4f} to {high:+.4f}, {self.texts:,} texts)"
        )


def compare_pairs(runs: Sequence[ComparedRun]) -> list[ComparedPair]:
    """Each run against the first one, by a paired bootstrap."""
    return [_compare_pair(runs[0], run) for run in runs[1:]]


def _compare_pair(first: ComparedRun, second: ComparedRun) -> ComparedPair:
    names = (first.name, second.name)
    for run in (first, second):
        if run.scored is None:
            return ComparedPair(*names, problem=f"{run.name}: {run.problem}")
    assert first.scored is not None and second.scored is not None
    tasks = [run.predictions.task for run in (first.scored, second.scored)]
    if (tasks[0].name, tasks[0].labels) != (tasks[1].name, tasks[1].labels):
        return ComparedPair(*names, problem="their tasks or labels differ")
    # The texts of both, each occurrence once, in the order of the first.
    rows: dict[tuple[int, int], int] = {
        key: row for row, key in enumerate(_occurrences(second.scored))
    }
    both = [(row, rows[key]) for row, key in enumerate(_occurrences(first.scored)) if key in rows]
    if not both:
        return ComparedPair(*names, problem="they were evaluated on other texts")
    ours, theirs = (
        take(run.predictions, np.array([pair[side] for pair in both]))
        for side, run in enumerate((first.scored, second.scored))
    )
    difference = paired_difference(theirs, ours)
    return ComparedPair(*names, tasks[0].default_metric, difference, len(both))


def _occurrences(scored: ScoredTexts) -> list[tuple[int, int]]:
    """Each text's hash with the number of its copies before it."""
    seen: dict[int, int] = {}
    found = []
    for text in scored.texts.tolist():
        seen[text] = seen.get(text, -1) + 1
        found.append((text, seen[text]))
    return found


def curves(runs: Sequence[ComparedRun]) -> list[Figure]:
    """The validation loss, the metric and the training loss of each stage, a line for each run."""
    figures = []
    names = dict.fromkeys(stage.name for run in runs for stage in run.stages)
    for name in names:
        stages = [
            (run.name, stage, _COLORS[at % len(_COLORS)], at >= len(_COLORS))
            for at, run in enumerate(runs)
            for stage in run.stages
            if stage.name == name
        ]
        metrics = {metric_of(e[-1]): None for _, s, _, _ in stages if (e := s.of_kind("eval"))}
        wanted = [("eval", key) for key in dict.fromkeys(["loss", *metrics])]
        for kind, key in [*wanted, ("train", "loss"), ("train", "tokens_per_second")]:
            lines = [
                Line(curve(stage.of_kind(kind), key), color, run, kind == "eval", dashed)
                for run, stage, color, dashed in stages
            ]
            lines = [line for line in lines if line.points[0]]
            if lines:
                what = "validation" if kind == "eval" else "training"
                title = f"{TITLES.get(name, name)} · {what} {metric_name(key)}".strip(" ·")
                figures.append(
                    over_steps(f"{name}/{kind}/{key}", title, lines, (), from_zero=False)
                )
    return figures


def render_comparison(
    runs: Sequence[ComparedRun], pairs: Sequence[ComparedPair], *, with_curves: bool
) -> str:
    """The page as HTML."""
    differences = Table("Differences", [[pair.describe()] for pair in pairs])
    return render_page(
        "compare.html",
        title=" · ".join(run.name for run in runs),
        tables=[differences, score_table(runs)],
        figures=curves(runs) if with_curves else [],
    )

"""The report's page: a section for each stage, rendered by a Jinja2 template that escapes all text.

The page has no script, and its content security policy forbids requests.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from raybert.errors import DamagedError, UserError, damaged_file
from raybert.records import measures
from raybert.report.elements import (
    Cell,
    Table,
    format_time,
    format_value,
    key_value_table,
    metric_name,
)
from raybert.report.plots import training_plots
from raybert.report.rendering import render_page
from raybert.report.search import search_section
from raybert.report.stage_files import (
    STAGE_FILES,
    Stage,
    as_mapping,
    last,
    number,
    read_stages,
    spread,
)
from raybert.report.tiles import HARDWARE_KEYS, corpus_facts, headline_label, stage_tiles
from raybert.storage.folder import Folder
from raybert.tasks.registry import tables_of

FILE = "report.html"
TITLES = {
    "corpus": "Corpus",
    "pretrain": "Pretraining",
    "finetune": "Fine-tuning",
    "tune": "Search",
    "ensemble": "Ensemble",
    "folds": "Folds",
    "evaluate": "Evaluation",
}
HEADLINES = ("Macro F1", "Masked-token loss", "First prediction")  # after the stages' metrics
MAX_EVALUATIONS = 10  # rows of a table of predicted tokens
MAX_LABELS = 20  # of a confusion matrix; with more labels, as many of the most frequent confusions
MAX_MISTAKES = 12
MAX_TEXT = 700  # characters of an example


def check_report() -> None:
    """Raise UserError if matplotlib, an extra, is not installed, before any work is done."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            f"{FILE} needs matplotlib, which is not installed; pip install 'raybert[report]'"
        )


def write_report(run: Folder, result: Mapping[str, Any] | None = None) -> None:
    """Write `report.html` into the folder of a run, or of a pipeline with a run in each subfolder.

    `result` is the run's if it is not written yet: it is written after the report. UserError:
    matplotlib is not installed, or the folder holds nothing to report on.
    """
    check_report()
    stages = read_stages(run)
    if not stages:
        raise UserError(
            f"{run}: there is nothing to report on: no {', '.join(sorted(STAGE_FILES))}, here or "
            "in a folder inside; name the folder of a run"
        )
    if result is not None:
        stages[0].result = dict(result)
    run.write_text(FILE, render(run.path.rstrip("/").rsplit("/", 1)[-1], stages))


def render(title: str, stages: Sequence[Stage]) -> str:
    """Render the page as HTML."""
    sections = [_section(stage, alone=len(stages) == 1) for stage in stages]
    tiles = {tile.label: tile for section in sections for tile in section["tiles"]}
    labels = dict.fromkeys([*map(headline_label, stages), *HEADLINES])
    return render_page(
        "report.html",
        title=title,
        sections=sections,
        headlines=[tiles[label] for label in labels if label in tiles],
    )


def _section(stage: Stage, alone: bool) -> dict[str, Any]:
    """What the template shows of a stage, in the order of the page."""
    problems = list(stage.problems)

    def show(what: str, make: Callable[[], Any], nothing: Any) -> Any:
        """A part of the section; `nothing`, and a problem, where its file is damaged."""
        try:
            with damaged_file(what):
                return make()
        except DamagedError as error:
            problems.append(str(error))
            return nothing

    none = Table("", ())
    parts: dict[str, Any] = dict(
        tiles=show("a result", lambda: stage_tiles(stage), []),
        figures=show("a metrics log", lambda: training_plots(stage), []),
        search=show("trials.json", lambda: search_section(stage.search), None),
        predicted_tokens=show("a metrics log", lambda: _predicted_tokens(stage), []),
        confusion=show("metrics.json", lambda: _confusion_table(stage.scores), none),
        tables=show("metrics.json", lambda: _task_tables(stage.scores), []),
        slices=show("metrics.json", lambda: _slice_table(stage.scores), none),
        behaviour=show("metrics.json", lambda: _behaviour_tables(stage.scores), []),
        label_errors=show("metrics.json", lambda: _label_error_table(stage.scores), none),
        folds=show("result.json", lambda: _fold_table(stage.result), none),
        mistakes=show("metrics.json", lambda: _confident_mistakes(stage.scores), []),
        events=show("a metrics log", lambda: _events(stage), none),
        corpus=show("manifest.json", lambda: _corpus_table(stage), none),
        result=show("result.json", lambda: _result_table(stage), none),
        configuration=show("manifest.json", lambda: _configuration(stage), ""),
        hardware=show("result.json", lambda: _hardware_table(stage), none),
    )
    status, is_finished = show("a metrics log", lambda: _status(stage), ("damaged", False))
    return dict(
        id=stage.name or "summary",
        title=TITLES.get(stage.name, stage.name) or ("Run" if alone else "Summary"),
        status=status,
        is_finished=is_finished,
        problems=list(dict.fromkeys(problems)),
        **parts,
    )


def _corpus_table(stage: Stage) -> Table:
    return key_value_table("Corpus facts", corpus_facts(stage.manifest))


def _result_table(stage: Stage) -> Table:
    hidden = ("fillings", "folds", *HARDWARE_KEYS)  # shown in tables of their own
    result = {key: value for key, value in stage.result.items() if key not in hidden}
    return key_value_table("Result", result)


def _hardware_table(stage: Stage) -> Table:
    sources = (stage.result, as_mapping(stage.manifest.get("info")))
    found = {key: source[key] for source in sources for key in HARDWARE_KEYS if source.get(key)}
    return key_value_table("Versions and hardware", found)


def _status(stage: Stage) -> tuple[str, bool]:
    """The status of a stage, and whether it is finished."""
    if stage.result or (stage.manifest and not stage.records):
        return "finished", True
    if not stage.records:
        return "" if stage.scores else "no result", False
    # The record of a checkpoint is written some steps later: the last record is not the last step.
    step = max(record["step"] for record in stage.records)
    total = last(stage.records, "total_steps")
    of_total = f" of {format_value(total)}" if total else ""
    return f"unfinished: step {format_value(step)}{of_total}", False


def _predicted_tokens(stage: Stage) -> list[Table]:
    """For each example sentence, the tokens predicted for its mask at each evaluation."""
    evaluations: dict[str, list[tuple[int, list[dict[str, Any]]]]] = {}
    for record in stage.of_kind("eval"):
        for example in record.get("fillings") or []:
            history = evaluations.setdefault(str(example.get("text", "")), [])
            history.append((record["step"], example.get("tokens") or []))
    tables = []
    for text, history in evaluations.items():
        rows: list[list[str | Cell]] = [
            [format_value(step), *map(_token_cell, tokens)]
            for step, tokens in spread(history, MAX_EVALUATIONS)
        ]
        width = max(len(tokens) for _, tokens in history)
        head = ("step", *(f"prediction {i + 1}" for i in range(width)))
        tables.append(Table(f"“{text}”", rows, head, has_row_headers=True))
    return tables


def _token_cell(prediction: Mapping[str, Any]) -> Cell:
    probability = number(prediction.get("probability")) or 0.0
    return Cell(str(prediction.get("token", "")), f"{probability:.1%}", probability)


def _events(stage: Stage) -> Table:
    """Restarts, skipped steps and the like."""
    rows = []
    for record in stage.of_kind("event"):
        attempt = f"attempt {record['attempt']}" if "attempt" in record else ""
        text = str(record.get("event", "")), str(record.get("message") or attempt)
        rows.append((format_value(record["step"]), format_time(record.get("time")), *text))
    return Table("Events, dotted in the plots", rows, ("step", "time", "event", "message"))


def _configuration(stage: Stage) -> str:
    """The configuration as YAML; a corpus has it in its manifest."""
    config = as_mapping(stage.manifest.get("info")).get("config")
    return stage.config or (yaml.safe_dump(config, sort_keys=False) if config else "")


class _Mistake(NamedTuple):
    """A wrong prediction."""

    predicted: str
    probability: str  # empty where there is none
    label: str
    text: str


def _confusion_table(scores: Mapping[str, Any]) -> Table:
    """The confusion matrix, shaded by the share of the true label; empty if there is none."""
    matrix, names = scores.get("confusion"), _label_names(scores)
    if scores.get("confusions"):
        return _confusion_list(scores["confusions"], names)
    if not matrix or len(names) != len(matrix):
        return Table("Confusion matrix", ())
    if len(names) > MAX_LABELS:
        counts = ((i, j, c) for i, row in enumerate(matrix) for j, c in enumerate(row) if i != j)
        found = sorted((each for each in counts if each[2]), key=lambda each: each[2])
        return _confusion_list(found[::-1], names)
    rows: list[list[str | Cell]] = []
    for name, counts in zip(names, matrix, strict=True):
        shares = [count / max(1, sum(counts)) for count in counts]
        cells = (
            Cell(format_value(count), f"{share:.1%}", share)
            for count, share in zip(counts, shares, strict=True)
        )
        rows.append([name, *cells])
    head = ("label \\ predicted", *names)
    return Table("Confusion matrix", rows, head, has_row_headers=True)


def _confusion_list(found: Sequence[Sequence[int]], names: Sequence[str]) -> Table:
    """The most frequent confusions, given (label, predicted, count), the most frequent first."""
    rows = [(names[i], names[j], format_value(count)) for i, j, count in found[:MAX_LABELS]]
    return Table("Most frequent confusions", rows, ("label", "predicted", "rows"))


def _task_tables(scores: Mapping[str, Any]) -> list[Table]:
    """What the task shows of its scores: of each label, target or type of entity."""
    return [
        Table(table.title, table.rows, table.head, has_row_headers=True)
        for table in tables_of(scores)
    ]


def _fold_table(result: Mapping[str, Any]) -> Table:
    """The metrics of each fold of a cross-validation; empty if there are none."""
    folds = [as_mapping(fold) for fold in result.get("folds") or []]
    names = list(dict.fromkeys(name for fold in folds for name in measures(fold)))
    rows = [[format_value(f.get("fold")), *(format_value(f.get(n)) for n in names)] for f in folds]
    head = ("fold", *map(metric_name, names))
    return Table("Each fold", rows, head, has_row_headers=True)


def _slice_table(scores: Mapping[str, Any]) -> Table:
    """The metric of groups of texts, by length and by the columns of `keep_columns`."""
    rows = [
        [str(s["by"]), str(s["value"]), format_value(s["texts"]), format_value(s["score"])]
        for s in scores.get("slices") or []
    ]
    metric = metric_name(str(scores.get("metric", "score")))
    return Table("Slices", rows, ("by", "value", "texts", metric))


def _behaviour_tables(scores: Mapping[str, Any]) -> list[Table]:
    """Pass rates of behavioural tests, and the metric of texts that are cut."""
    found = as_mapping(scores.get("behaviour"))
    tests = [
        [t["name"], t["kind"], format_value(t["texts"]), f"{t['passed']:.1%}", t["failed"] or ""]
        for t in found.get("tests") or []
    ]
    cut = [
        [f"{row['share']:.0%}", format_value(row["score"])] for row in found.get("truncated") or []
    ]
    metric = metric_name(str(scores.get("metric", "score")))
    return [
        Table("Behaviour", tests, ("test", "kind", "texts", "passed", "one that failed")),
        Table("Texts that are cut", cut, ("first part", metric)),
    ]


def _label_error_table(scores: Mapping[str, Any]) -> Table:
    """The labels that are probably wrong."""
    found = as_mapping(scores.get("label_errors"))
    rows = [
        [str(e["label"]), str(e["suggested"]), f"{e['probability']:.1%}", _shorten(str(e["text"]))]
        for e in found.get("examples") or []
    ]
    title = f"Labels that may be wrong: {format_value(found.get('count', 0))}"
    return Table(title, rows, ("label", "suggested", "probability", "text"))


def _confident_mistakes(scores: Mapping[str, Any]) -> list[_Mistake]:
    """The wrong predictions with the highest probabilities, or those without one as they are."""
    names = _label_names(scores)

    def name(label: Any) -> str:
        is_index = isinstance(label, int) and 0 <= label < len(names)
        return names[label] if is_index else str(label)

    def probability(example: Mapping[str, Any]) -> float:
        return number(example.get("probability")) or 0.0

    found = [
        (probability(e), name(e.get("predicted")), name(e.get("label")), str(e.get("text", "")))
        for e in scores.get("examples") or []
    ]
    wrong = [example for example in found if example[1] != example[2]]
    wrong.sort(key=lambda example: example[0], reverse=True)
    return [
        _Mistake(predicted, f"{share:.1%}" if share else "", label, _shorten(text))
        for share, predicted, label, text in wrong[:MAX_MISTAKES]
    ]


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT].rsplit(" ", 1)[0] + " …"


def _label_names(scores: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in scores.get("label_names") or scores.get("per_class") or []]

"""The page: a section for each stage, each with what is known of it.

It has no script, and its policy forbids requests of any kind.
"""

from __future__ import annotations

import datetime
import importlib.util
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from raybert import __version__
from raybert.errors import UserError
from raybert.report.confusion import confusion, mistakes
from raybert.report.markup import (
    Html,
    big,
    clock,
    duration,
    facts,
    fold,
    join,
    rows,
    show,
    table,
    tag,
)
from raybert.report.plots import plots
from raybert.report.search import search_tiles, searched
from raybert.report.stage_files import TRACES, Stage, curve, last, number, read_stages, spread
from raybert.report.style import STYLE
from raybert.storage.folder import Folder

FILE = "report.html"
TITLES = {
    "corpus": "Corpus",
    "pretrain": "Pretraining",
    "finetune": "Fine-tuning",
    "tune": "Search",
    "ensemble": "Ensemble",
    "evaluate": "Evaluation",
}
SURROUNDINGS = ("environment", "machine", "versions", "hardware")  # keys of a result
HEADLINES = ("Accuracy", "Macro F1", "Masked-token loss", "First guess")
MAX_FILLING_ROWS = 10


def check_report() -> None:
    """Make sure that a report can be made, before anything is read or any work is done.

    Raises:
        UserError: matplotlib, an extra, is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            f"{FILE} needs matplotlib, which is not installed; pip install 'raybert[report]'"
        )


def write_report(run: Folder, result: Mapping[str, Any] | None = None) -> None:
    """Write `report.html` into the folder of a run, or of a pipeline with a run in each subfolder.

    Args:
        run: the folder.
        result: of the run, where it is not written yet: the report is to be there before it.

    Raises:
        UserError: matplotlib is not installed, or the folder holds nothing to report on.
    """
    check_report()
    stages = read_stages(run)
    if not stages:
        raise UserError(
            f"{run}: there is nothing to report on: no {', '.join(sorted(TRACES))}, here or in a "
            "folder inside; name the folder of a run"
        )
    if result is not None:
        stages[0].result = dict(result)
    run.write_text(FILE, render(run.path.rstrip("/").rsplit("/", 1)[-1], stages))


def render(title: str, stages: Sequence[Stage]) -> str:
    """Lay out the page."""
    sections = [section(stage, alone=len(stages) == 1) for stage in stages]
    links = [tag("a", _title(s, False), href=f"#{s.name or 'summary'}") for s in stages]
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    )
    body = tag(
        "body",
        tag(
            "header",
            tag("p", "raybert report", class_="kicker"),
            tag("h1", title),
            *((tag("nav", *links), _headline(stages)) if len(stages) > 1 else ()),
        ),
        tag("main", *sections),
        tag("footer", f"Written by raybert {__version__} on {now}."),
    )
    return (
        f"{head}{tag('title', f'{title} · raybert')}<style>{STYLE}</style></head>\n{body}</html>\n"
    )


def _headline(stages: Sequence[Stage]) -> Html:
    """The few numbers of all stages that answer what came of it."""
    found = {tile[0]: tile for stage in stages for tile in tiles(stage)}
    return _cells([found[label] for label in HEADLINES if label in found])


def section(stage: Stage, alone: bool) -> Html:
    """Everything that is known of one stage."""
    scores = stage.scores
    shown_elsewhere = {"fillings", *SURROUNDINGS}
    parts = [
        tag("h2", _title(stage, alone), " ", _status(stage)),
        *(tag("p", problem, class_="problem") for problem in stage.problems),
        _cells(tiles(stage)),
        plots(stage),
        searched(stage.search),
        fillings(stage),
        confusion(scores),
        mistakes(scores),
        fold("Events, dotted in the plots", events(stage)),
        facts("Corpus facts", corpus_facts(stage.manifest)),
        fold("Result", rows({k: v for k, v in stage.result.items() if k not in shown_elsewhere})),
        fold("Configuration", _configuration(stage)),
        fold("Versions and hardware", rows(_surroundings(stage))),
    ]
    return tag("section", *parts, id=stage.name or "summary")


def _title(stage: Stage, alone: bool) -> str:
    if not stage.name:
        return "Run" if alone else "Summary"
    return TITLES.get(stage.name, stage.name)


def _status(stage: Stage) -> Html:
    if stage.result or (stage.manifest and not stage.records):
        return tag("span", "finished", class_="badge done")
    if not stage.records:
        return tag("span", "no result", class_="badge") if not stage.scores else Html()
    # A checkpoint's record comes when it is written, some steps later.
    step = max(record["step"] for record in stage.records)
    total = last(stage.records, "total_steps")
    of_total = f" of {show(total)}" if total else ""
    return tag("span", f"unfinished: step {show(step)}{of_total}", class_="badge")


Tile = tuple[str, str, str]  # label, value, note


def tiles(stage: Stage) -> list[Tile]:
    """The headline numbers of a stage."""
    return [
        *_score_tiles(stage),
        *search_tiles(stage.search),
        *_training_tiles(stage),
        *_corpus_tiles(stage),
    ]


def _cells(found: Sequence[Tile]) -> Html:
    cells = (
        tag("div", tag("small", label), tag("b", value), tag("small", note), class_="tile")
        for label, value, note in found
    )
    return tag("div", *cells, class_="tiles") if found else Html()


def _score_tiles(stage: Stage) -> Iterator[Tile]:
    scores, result = stage.scores, stage.result
    # A fine-tuning run's own result is that of its validation, which has a tile.
    source = scores if scores or stage.records else result
    accuracy = number(source.get("accuracy"))
    if accuracy is not None:
        n = scores.get("n")
        yield "Accuracy", f"{accuracy:.2%}", f"on {show(n)} held-out rows" if n else ""
    if (f1 := number(scores.get("f1_macro"))) is not None:
        yield "Macro F1", f"{f1:.4f}", ""
    if (error := number(scores.get("expected_calibration_error"))) is not None:
        yield "Calibration error", f"{error:.4f}", ""


def _training_tiles(stage: Stage) -> Iterator[Tile]:
    train, evals = stage.of_kind("train"), stage.of_kind("eval")
    if (loss := last(evals, "loss")) is not None:
        unigram = last(evals, "unigram_loss")
        if unigram is None:
            yield "Validation loss", f"{loss:.3f}", "nats"
        else:
            side = "under" if loss <= unigram else "over"
            note = f"nats, {abs(unigram - loss):.2f} {side} the unigram model's"
            yield "Masked-token loss", f"{loss:.3f}", note
    if example := next((e for r in reversed(evals) for e in r.get("fillings") or []), None):
        if example.get("tokens"):
            guess = str(example["tokens"][0].get("token", ""))
            yield "First guess", guess, str(example.get("text", ""))
    if accuracies := curve(evals, "accuracy")[1]:
        yield "Validation accuracy", f"{max(accuracies):.2%}", "best evaluation"
    if speeds := curve(train, "tokens_per_second")[1]:
        mfu = last(train, "mfu")
        stepping = sum(curve(train, "step_seconds")[1])
        waited = sum(curve(train, "data_wait")[1]) / stepping if stepping else None
        notes = [
            "median",
            f"{mfu:.1%} of peak" if mfu else "",
            f"{waited:.1%} waiting for data" if waited is not None else "",
        ]
        yield "Tokens a second", f"{statistics.median(speeds):,.0f}", ", ".join(filter(None, notes))
    if (seconds := last(train, "seconds")) is not None:
        tokens = last(train, "tokens")
        yield "Training time", duration(seconds), f"{big(tokens)} tokens" if tokens else ""


def _corpus_tiles(stage: Stage) -> Iterator[Tile]:
    found = corpus_facts(stage.manifest)
    for key in ("tokens", "rows", "documents", "vocab_size"):
        value = found.get(key)
        if isinstance(value, Mapping):  # by split
            value = sum(number(v) or 0 for v in value.values())
        if (total := number(value)) is not None:
            yield key.replace("vocab_size", "vocabulary").capitalize(), big(total), ""


def fillings(stage: Stage) -> Html:
    """How the guesses for the example sentences changed: a row an evaluation, best guess first."""
    tables: dict[str, list[tuple[int, list[dict[str, Any]]]]] = {}
    for record in stage.of_kind("eval"):
        for filling in record.get("fillings") or []:
            history = tables.setdefault(str(filling.get("text", "")), [])
            history.append((record["step"], filling.get("tokens") or []))
    shown = []
    for text, history in tables.items():
        body = [
            tag("tr", tag("th", show(step), scope="row"), *map(_guess, guesses))
            for step, guesses in spread(history, MAX_FILLING_ROWS)
        ]
        width = max(len(guesses) for _, guesses in history)
        head = tag("tr", tag("th", "step"), *(tag("th", f"guess {i + 1}") for i in range(width)))
        shown += [tag("h3", f"“{text}”"), table(head, body)]
    return join(shown)


def _guess(guess: Mapping[str, Any]) -> Html:
    probability = number(guess.get("probability")) or 0.0
    return tag(
        "td",
        str(guess.get("token", "")),
        " ",
        tag("small", f"{probability:.1%}"),
        class_="heat",
        style=f"--heat:{probability:.3f}",
    )


def events(stage: Stage) -> Html:
    """Restarts, skipped steps and the like."""
    body = [
        tag(
            "tr",
            tag("td", show(record["step"])),
            tag("td", clock(record.get("time"))),
            tag("td", str(record.get("event", ""))),
            tag("td", str(record.get("message") or _attempt(record))),
        )
        for record in stage.of_kind("event")
    ]
    head = tag("tr", *(tag("th", t) for t in ("step", "time", "event", "message")))
    return table(head, body) if body else Html()


def corpus_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of the corpus, without the layout of its parts."""
    splits, info = _mapping(manifest.get("splits")), _mapping(manifest.get("info"))
    found = {key: v for key, v in manifest.items() if key not in ("splits", "info")}
    if splits:
        found["rows"] = {name: _mapping(split).get("rows") for name, split in splits.items()}
    # `inputs` are sizes and times of files; the configuration names them better.
    return found | {k: v for k, v in info.items() if k not in ("config", "inputs", *SURROUNDINGS)}


def _configuration(stage: Stage) -> Html:
    made_by = _mapping(stage.manifest.get("info")).get("config")
    text = stage.config or (yaml.safe_dump(made_by, sort_keys=False) if made_by else "")
    return tag("pre", text) if text else Html()


def _surroundings(stage: Stage) -> dict[str, Any]:
    sources = (stage.result, _mapping(stage.manifest.get("info")))
    return {key: source[key] for source in sources for key in SURROUNDINGS if source.get(key)}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _attempt(record: Mapping[str, Any]) -> str:
    return f"attempt {record['attempt']}" if "attempt" in record else ""

"""The page: a section for each stage, each with what is known of it.

It has no script, and its policy forbids requests of any kind.
"""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from raybert import __version__
from raybert.errors import UserError
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
from raybert.report.stages import TRACES, Stage, curve, last, number, read_stages, spread
from raybert.report.style import STYLE
from raybert.storage import Folder

FILE = "report.html"
TITLES = {
    "corpus": "Corpus",
    "pretrain": "Pretraining",
    "finetune": "Fine-tuning",
    "evaluate": "Evaluation",
}
SURROUNDINGS = ("environment", "versions", "hardware")  # keys of a result
MAX_LABELS = 20  # of a confusion matrix; beyond that the worst pairs say more
MAX_FILLING_ROWS = 10
MAX_MISTAKES = 12
MAX_TEXT = 700  # characters of an example


def write_report(run: Folder) -> None:
    """Write `report.html` into the folder of a run, or of a pipeline with a run in each subfolder.

    Raises:
        UserError: matplotlib is not installed, or the folder holds nothing to report on.
    """
    try:
        import matplotlib  # noqa: F401 - an extra: asked for before anything is read
    except ImportError:
        raise UserError(
            f"{FILE} needs matplotlib, which is not installed; pip install 'raybert[report]'"
        ) from None
    stages = read_stages(run)
    if not stages:
        raise UserError(
            f"{run}: there is nothing to report on: no {', '.join(sorted(TRACES))}, here or in a "
            "folder inside; name the folder of a run"
        )
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
            tag("nav", *links) if len(stages) > 1 else Html(),
        ),
        tag("main", *sections),
        tag("footer", f"Written by raybert {__version__} on {now}."),
    )
    return (
        f"{head}{tag('title', f'{title} · raybert')}<style>{STYLE}</style></head>\n{body}</html>\n"
    )


def section(stage: Stage, alone: bool) -> Html:
    """Everything that is known of one stage."""
    scores = stage.scores
    parts = [
        tag("h2", _title(stage, alone), " ", _status(stage)),
        *(tag("p", problem, class_="problem") for problem in stage.problems),
        tiles(stage),
        plots(stage),
        fillings(stage),
        confusion(scores),
        mistakes(scores),
        fold("Events, dotted in the plots", events(stage)),
        facts("Corpus facts", corpus_facts(stage.manifest)),
        facts("Result", {k: v for k, v in stage.result.items() if k not in SURROUNDINGS}),
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
    step, total = stage.records[-1]["step"], last(stage.records, "total_steps")
    of_total = f" of {show(total)}" if total else ""
    return tag("span", f"unfinished: step {show(step)}{of_total}", class_="badge")


Tile = tuple[str, str, str]  # label, value, note


def tiles(stage: Stage) -> Html:
    """The headline numbers."""
    found = [*_score_tiles(stage), *_training_tiles(stage), *_corpus_tiles(stage)]
    cells = (
        tag("div", tag("small", label), tag("b", value), tag("small", note), class_="tile")
        for label, value, note in found
    )
    return tag("div", *cells, class_="tiles") if found else Html()


def _score_tiles(stage: Stage) -> Iterator[Tile]:
    scores, result = stage.scores, stage.result
    accuracy = number(scores.get("accuracy", result.get("accuracy")))
    if accuracy is not None:
        n = scores.get("n")
        yield "Accuracy", f"{accuracy:.2%}", f"on {show(n)} held-out rows" if n else ""
    if (f1 := number(scores.get("f1_macro"))) is not None:
        yield "Macro F1", f"{f1:.4f}", ""
    if (error := number(scores.get("expected_calibration_error"))) is not None:
        yield "Calibration error", f"{error:.4f}", ""
    if isinstance(guesses := result.get("fill_mask"), list) and guesses:
        best = guesses[0]
        token = best.get("token") if isinstance(best, Mapping) else best
        yield "First guess", str(token), "for the example sentence"
    if isinstance(seconds := result.get("seconds"), Mapping):
        yield "Time", duration(sum(number(s) or 0 for s in seconds.values())), "all stages"


def _training_tiles(stage: Stage) -> Iterator[Tile]:
    train, evals = stage.of_kind("train"), stage.of_kind("eval")
    if (loss := last(evals, "loss")) is not None:
        unigram = last(evals, "unigram_loss")
        note = f"{unigram - loss:.2f} under the unigram model's" if unigram else "nats"
        yield "Validation loss", f"{loss:.3f}", note
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
            rows = tables.setdefault(str(filling.get("text", "")), [])
            rows.append((record["step"], filling.get("tokens") or []))
    shown = []
    for text, rows in tables.items():
        body = [
            tag("tr", tag("th", show(step), scope="row"), *map(_guess, guesses))
            for step, guesses in spread(rows, MAX_FILLING_ROWS)
        ]
        width = max(len(guesses) for _, guesses in rows)
        head = tag("tr", tag("th", "step"), *(tag("th", f"guess {i + 1}") for i in range(width)))
        shown.append(tag("h3", f"“{text}”") + table(head, body))
    return join(map(Html, shown))


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


def confusion(scores: Mapping[str, Any]) -> Html:
    """The confusion matrix, its colours the share of the true label; and the scores per class."""
    matrix, names = scores.get("confusion"), _label_names(scores)
    if not matrix or len(names) != len(matrix):
        return Html()
    if len(names) > MAX_LABELS:
        pairs = sorted(
            ((c, i, j) for i, row in enumerate(matrix) for j, c in enumerate(row) if i != j and c),
            reverse=True,
        )[:MAX_LABELS]
        head = tag("tr", *(tag("th", t) for t in ("label", "predicted", "rows")))
        body = [
            tag("tr", tag("td", names[i]), tag("td", names[j]), tag("td", show(count)))
            for count, i, j in pairs
        ]
        title = "Most frequent confusions"
    else:
        head = tag("tr", tag("th", "label \\ predicted"), *(tag("th", name) for name in names))
        body = []
        for name, row in zip(names, matrix, strict=True):
            shares = [count / max(1, sum(row)) for count in row]
            cells = (
                tag("td", show(count), " ", tag("small", f"{share:.1%}"), class_="heat",
                    style=f"--heat:{share:.3f}")
                for count, share in zip(row, shares, strict=True)
            )  # fmt: skip
            body.append(tag("tr", tag("th", name, scope="row"), *cells))
        title = "Confusion matrix"
    ratios = ("precision", "recall", "f1")
    classes = [
        tag("tr", tag("th", name, scope="row"), *(tag("td", f"{s[r]:.4f}") for r in ratios),
            tag("td", show(s["support"])))
        for name, s in scores.get("per_class", {}).items()
    ]  # fmt: skip
    class_head = tag("tr", tag("th", "label"), *(tag("th", t) for t in (*ratios, "rows")))
    return join(
        [
            tag("h3", title),
            table(head, body),
            fold("Scores per class", table(class_head, classes) if classes else Html()),
        ]
    )


def mistakes(scores: Mapping[str, Any]) -> Html:
    """The wrong predictions that the classifier was surest of."""
    names = _label_names(scores)

    def name(label: Any) -> str:
        known = isinstance(label, int) and 0 <= label < len(names)
        return names[label] if known else str(label)

    wrong = [
        e for e in scores.get("examples") or [] if name(e.get("label")) != name(e.get("predicted"))
    ]
    wrong.sort(key=lambda e: number(e.get("probability")) or 0.0, reverse=True)
    if not wrong:
        return Html()
    cards = [
        tag(
            "li",
            tag(
                "p",
                tag("b", name(e.get("predicted"))),
                f" with {number(e.get('probability')) or 0.0:.1%}, in truth ",
                tag("b", name(e.get("label"))),
            ),
            tag("blockquote", _shorten(str(e.get("text", "")))),
        )
        for e in wrong[:MAX_MISTAKES]
    ]
    return join([tag("h3", "Most confident mistakes"), tag("ol", *cards, class_="cards")])


def events(stage: Stage) -> Html:
    """Restarts, skipped steps and the like."""
    rows = [
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
    return table(head, rows) if rows else Html()


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT].rsplit(" ", 1)[0] + " …"


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


def _label_names(scores: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in scores.get("label_names") or scores.get("per_class") or []]


def _attempt(record: Mapping[str, Any]) -> str:
    return f"attempt {record['attempt']}" if "attempt" in record else ""

"""The report: complete, escaped, and made of whatever files a run has."""

import json
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from examples import examples
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from json_documents import json_documents
from markupsafe import Markup

from raybert.errors import UserError
from raybert.report import write_report
from raybert.report.elements import Figure, format_value
from raybert.report.plots import smoothed
from raybert.report.stage_files import spread
from raybert.storage.folder import Folder
from raybert.tasks.classification_metrics import classification_scores
from raybert.terminal.formats import format_count, format_duration

NASTY = '<br /><script>alert("1")</script> & <b>loved</b> it'


class Page(HTMLParser):
    """The page's structure: tags, which must be closed, ids, addresses, and the visible text."""

    VOID = {"meta"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.addresses, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.ids += [v for k, v in attributes if k == "id"]
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        if name not in self.VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.handle_starttag(name, attributes)
        if name not in self.VOID:
            self.handle_endtag(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.text += data


def write(root, name, value):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def write_lines(root, name, records):
    write(root, name, "".join(json.dumps(record) + "\n" for record in records))


def train(step, loss, **more):
    return {"kind": "train", "step": step, "time": 1e9 + step, "loss": loss, "lr": 1e-3} | {
        "tokens_per_second": 12_345.0, "grad_norm": 1.0, "mfu": None, "data_wait": 0.01,
        "step_seconds": 0.5, "tokens": step * 100, "seconds": step * 0.5, "total_steps": 40,
    } | more  # fmt: skip


def fillings(probability):
    guess = {"token": "<movie>", "probability": probability}
    return [{"text": "I liked this [MASK].", "tokens": [guess]}]


def make_pretraining(root):
    write(root, "config.yaml", "pretrain:\n  note: a <b>config</b>\n")
    write_lines(
        root,
        "metrics/0001.jsonl",
        [{"kind": "event", "step": 0, "time": 1e9, "event": "start", "attempt": 1}]
        + [train(step, 9 - step / 10) for step in range(1, 31)],
    )
    write_lines(
        root,
        "metrics/0002.jsonl",
        [{"kind": "event", "step": 20, "time": 1e9, "event": "start", "attempt": 2}]
        + [train(step, 7 - step / 20) for step in range(21, 41)]
        + [
            {"kind": "event", "step": 33, "time": 1e9, "event": "skipped step", "message": NASTY},
            {"kind": "eval", "step": 40, "time": 1e9, "loss": 4.25, "unigram_loss": 6.5}
            | {"fillings": fillings(0.75)},
            {"kind": "checkpoint", "step": 36, "time": 1e9, "stalled": 0.1, "written": 2.0}
            | {"bytes": 5},
        ],
    )


def make_finetuning(root):
    write_lines(
        root,
        "metrics/0001.jsonl",
        [
            train(10, 0.6),
            {"kind": "eval", "step": 10, "time": 1.0, "loss": 0.5, "accuracy": 0.875},
        ],
    )
    scores = classification_scores(
        np.array([[3.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]]), [0, 1, 1, 1], ["neg", "<pos>"]
    )
    examples = [
        {"text": "right", "label": "neg", "predicted": "neg", "probability": 0.99},
        {"text": "less sure", "label": 1, "predicted": 0, "probability": 0.6},
        {"text": NASTY + " word" * 400, "label": "<pos>", "predicted": "neg", "probability": 0.9},
    ]
    write(root, "metrics.json", scores | {"examples": examples})
    write(root, "result.json", {"accuracy": 0.75, "seconds": 65.0, "versions": {"torch": "2.13"}})


def make_pipeline(root):
    make_pretraining(root / "pretrain")
    make_finetuning(root / "finetune")
    info = {"tokens": {"train": 900_000, "heldout": 100_000}, "duplicates": 3, "config": {"a": 1}}
    splits = {"train": {"rows": 90, "parts": [{"name": "0"}]}, "heldout": {"rows": 10, "parts": []}}
    write(root / "corpus", "manifest.json", {"vocab_size": 8192, "splits": splits, "info": info})
    (root / "pretrain" / "model").mkdir()
    write(root / "pretrain" / "model", "config.json", {})
    write(root, "result.json", {"seconds": {"pretrain": 61}})


def report(root):
    write_report(Folder(root))
    return (root / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "my run"
    make_pipeline(root)
    return report(root)


def test_the_page_has_a_section_and_the_numbers_of_each_stage(full):
    page = Page(full)
    for expected in (
        "my run", "Summary", "Corpus", "Pretraining", "Fine-tuning",
        "1.00M", "100", "8,192",  # tokens and rows of both splits, vocabulary
        "4.250", "2.25 under the unigram model's", "12,345", "2.0% waiting for data",
        "I liked this [MASK].", "<movie>", "75.0%",
        "attempt 2", "skipped step", "a <b>config</b>", "torch", "2.13",
        "87.50%", "on 4 held-out rows", "Confusion matrix", "Reliability, calibration error",
        "unfinished: step 40 of 40",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert page.text.index("Corpus") < page.text.index("Pretraining") < page.text.index("Fine-t")
    assert page.tags.count("svg") == 4 + 6


def test_of_several_ranks_those_that_wait_and_work_longest_are_named(tmp_path):
    ranks = {"data_wait_max": 0.25, "data_wait_rank": 3, "own_seconds": 0.3}
    ranks |= {"own_seconds_max": 0.45, "own_seconds_rank": 1}
    start = {"kind": "event", "event": "start", "step": 0, "time": 1.0, "workers": 4}
    records = [start, train(10, 5.0, **ranks), train(20, 4.0, **ranks), train(30, 4.0)]
    write_lines(tmp_path / "pretrain", "metrics/0001.jsonl", records)
    text = Page(report(tmp_path)).text
    assert "waiting for data (mostly rank 3)" in text
    assert "the slowest of 4 ranks takes 1.50x the mean (mostly rank 1)" in text


def test_the_header_has_the_headline_numbers(full):
    header = Page(full[full.index("<header") : full.index("</header>") + len("</header>")]).text
    for expected in ("75.00%", "Masked-token loss4.250", "First prediction<movie>"):
        assert expected in header


def test_examples_and_events_are_escaped(full):
    page = Page(full)
    assert NASTY in page.text
    assert not {"script", "br", "i", "img", "iframe", "link"} & set(page.tags)


def test_the_page_requests_nothing(full):
    page = Page(full)
    assert all(address.startswith("#") for address in page.addresses)
    assert "http://" not in full and "https://" not in full and "@import" not in full
    assert "default-src 'none'" in full


def test_ids_are_unique_and_links_have_targets(full):
    page = Page(full)
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses} <= set(page.ids)


def test_colours_follow_the_theme(full):
    svgs = full[full.index("<svg") : full.rindex("</svg>")]
    assert "var(--main)" in svgs
    assert not [f"#0{i}0{i}0{i}" for i in range(1, 8) if f"#0{i}0{i}0{i}" in svgs]
    assert "#000000" not in svgs


def test_mistakes_are_shortened_and_sorted_by_confidence(full):
    text = Page(full).text
    assert text.index("with 90.0%") < text.index("with 60.0%")
    assert "right" not in text[text.index("Most confident mistakes") :]
    assert text.count(" word") < 200


def test_steps_of_a_killed_attempt_are_replaced_by_the_next_one(tmp_path):
    make_pretraining(tmp_path / "a")
    make_pretraining(tmp_path / "b")
    # Without the steps after 20, which the killed attempt logged.
    write_lines(
        tmp_path / "b",
        "metrics/0001.jsonl",
        [{"kind": "event", "step": 0, "time": 1e9, "event": "start", "attempt": 1}]
        + [train(step, 9 - step / 10) for step in range(1, 21)],
    )
    figures = [text[text.index("<figure") : text.rindex("</figure>")]
               for text in (report(tmp_path / "a"), report(tmp_path / "b"))]  # fmt: skip
    assert figures[0] == figures[1]


FILES = (
    "result.json", "corpus/manifest.json", "pretrain/config.yaml", "pretrain/metrics/0001.jsonl",
    "pretrain/metrics/0002.jsonl", "finetune/metrics.json", "finetune/result.json",
    "finetune/metrics/0001.jsonl",
)  # fmt: skip


@pytest.fixture
def undrawn(monkeypatch):
    """Skip the drawing, which takes seconds, in tests of the text."""
    empty = Figure("", Markup())
    for module in ("plots", "search"):
        monkeypatch.setattr(f"raybert.report.{module}.draw_figure", lambda *args, **kwargs: empty)


@pytest.mark.parametrize("name", FILES)
def test_without_a_file_the_rest_is_shown(tmp_path, undrawn, name):
    make_pipeline(tmp_path)
    (tmp_path / name).unlink()
    assert "Pretraining" in Page(report(tmp_path)).text


@pytest.mark.parametrize("name", [n for n in FILES if n.endswith((".json", ".jsonl"))])
def test_a_truncated_json_file_is_reported_and_the_rest_is_shown(tmp_path, undrawn, name):
    make_pipeline(tmp_path)
    content = (tmp_path / name).read_text()
    (tmp_path / name).write_text(content[: len(content) // 2])
    text = Page(report(tmp_path)).text
    assert (f"{name} is damaged" in text) == name.endswith(".json")


JSON = json_documents(
    "step kind time loss event metric accuracy per_class bins confusion label_names examples "
    "fillings tokens trials finalists seeds mean values dimensions key folds seconds splits info "
    "config task n state cost importance shares train eval",
    max_size=5,
    max_leaves=20,
)
JSON_FILES = [*(n for n in FILES if n.endswith((".json", ".jsonl"))), "tune/trials.json"]


@given(name=st.sampled_from(JSON_FILES), value=JSON)
@example(name="pretrain/result.json", value=[])
@example(name="evaluate/metrics.json", value={"confusion": 3, "label_names": ["a"], "bins": [1]})
@example(name="pretrain/metrics.jsonl", value={"kind": "event", "step": 1, "time": 1e300})
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=examples(12))
def test_a_damaged_file_is_reported_and_the_rest_is_shown(tmp_path_factory, undrawn, name, value):
    root = tmp_path_factory.mktemp("report")
    make_pipeline(root)
    lines = value if isinstance(value, list) and name.endswith(".jsonl") else [value]
    write(root, name, "\n".join(map(json.dumps, lines)))
    text = Page(report(root)).text
    for title in ("Pretraining", "Fine-tuning", "Corpus"):
        assert title in text


@pytest.mark.parametrize("content", ["[]", "[" * 100_000, "1"])
def test_a_result_that_is_none_is_named(tmp_path, undrawn, content):
    make_pipeline(tmp_path)
    write(tmp_path, "pretrain/result.json", content)
    assert "pretrain/result.json is damaged: it is" in Page(report(tmp_path)).text


@pytest.mark.parametrize("name", FILES)
def test_any_single_file_is_enough(tmp_path, name):
    make_pipeline(tmp_path / "all")
    write(tmp_path / "one", name, (tmp_path / "all" / name).read_text())
    assert Page(report(tmp_path / "one")).text


def test_undefined_values_are_left_out(tmp_path):
    records = [train(1, 5.0), train(2, None, grad_norm=None), train(3, 4.0), {"kind": "train"}]
    records.append({"kind": "eval", "step": 3, "time": None, "loss": None, "fillings": None})
    write_lines(tmp_path, "metrics/0001.jsonl", [r | {"step": r.get("step", 0)} for r in records])
    assert "unfinished: step" in Page(report(tmp_path)).text


def test_many_labels_are_shown_by_their_most_frequent_confusions(tmp_path):
    names = [f"label {i}" for i in range(60)]
    logits = np.eye(60)[[0] * 5 + list(range(60))]
    scores = classification_scores(logits, [7] * 5 + list(range(60)), names)
    write(tmp_path, "metrics.json", scores)
    page = Page(report(tmp_path))
    assert "Most frequent confusions" in page.text
    assert "label 7label 05" in page.text
    assert "No result" not in page.text


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nothing to report on"):
        write_report(Folder(tmp_path))


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'raybert\[report\]'"):
        write_report(Folder(tmp_path))


def test_text_from_every_file_is_escaped(tmp_path, undrawn):
    """Every string that a run's files hold, as a value and as a key."""

    def replaced(value, key=""):
        if isinstance(value, dict):
            return {k: replaced(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [replaced(v, key) for v in value]
        keep = key in ("kind", "key", "choices", "state")  # of which the report has a fixed set
        return NASTY if isinstance(value, str) and not keep else value

    root = tmp_path / NASTY.replace("/", "")
    make_pipeline(root)
    make_search(root / "tune")
    for path in root.rglob("*.json*"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("\n".join(json.dumps(replaced(record)) for record in records))
    (root / "pretrain" / "config.yaml").write_text(NASTY)
    (root / "finetune" / "result.json").write_text(json.dumps({NASTY: NASTY}))
    text = report(root)
    page = Page(text)
    assert page.text.count(NASTY) > 30
    assert not {"script", "br", "i", "img", "iframe", "link"} & set(page.tags)
    assert "<script" not in text and 'onload="' not in text


def test_smoothing_keeps_levels_and_slopes():
    assert smoothed([2.0] * 100) == pytest.approx([2.0] * 100)
    line = [float(i) for i in range(500)]
    assert smoothed(line) == pytest.approx(line)
    assert smoothed([]) == []
    noise = np.random.default_rng(0).normal(size=1000)
    assert np.std(smoothed(list(noise))) < 0.3


def test_spread_keeps_the_ends():
    assert spread([1, 2], 5) == [1, 2]
    assert spread(list(range(1000)), 3) == [0, 500, 999]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min"), (754, "12 min 34 s"), (11_100, "3 h 05 min")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_values_as_text():
    assert format_value([0.5, True, None, "a"]) == "0.5, yes, none, a"
    assert [format_value(x) for x in (360_450.0, 1234, 0.123456)] == ["360,450", "1,234", "0.12346"]
    assert format_value(90.0, "seconds") == format_value(90.0, "seconds.pretrain") == "1 min 30 s"
    assert [format_count(n) for n in (950, 9_999, 10_000, 999_999, 14_310_000)] == [
        "950", "9,999", "10.0k", "1,000k", "14.3M",
    ]  # fmt: skip


# Searches ----------------------------------------------------------------------------------------


def trial(name, accuracy, state="finished", **more):
    score = None if accuracy is None else accuracy - 1e-6
    evaluations = [] if accuracy is None else [[1.0, score, accuracy, 1e9 + 60 * int(name)]]
    return {
        "trial": name, "state": state, "why": "", "score": score, "accuracy": accuracy, "loss": 0.5,
        "values": {"finetune.lr": 1e-3 * (1 + int(name)), "finetune.head.pooling": "mean"},
        "seed": 0, "epoch": 1.0, "begun": 1e9 + int(name), "ended": 1e9 + 90, "seconds": 61.0,
        "evaluations": evaluations, "exchanges": [],
    } | more  # fmt: skip


def finalist(name, *accuracies):
    spread = {"mean": sum(accuracies) / len(accuracies), "std": 0.01, "values": list(accuracies)}
    seeds = {"n": len(accuracies), "score": spread, "accuracy": spread, "loss": spread}
    return {
        "trial": name, "configured": name == "0000", "config": {"finetune.lr": 2e-3},
        "seeds": seeds,
    }  # fmt: skip


def make_search(root):
    exchange = {
        "from": "0001", "step": 40, "weights": "ab" * 32, "weights_after": "ab" * 32,
        "trained": {"step": 50, "lr": 4e-4, "due": 4e-4},
        "before": {"finetune.lr": 1e-3}, "after": {"finetune.lr": 8e-4},
    }  # fmt: skip
    write(
        root,
        "trials.json",
        {
            "searcher": "tpe",
            "scheduler": "asha",
            "dimensions": [
                {"key": "finetune.lr", "kind": "log_uniform", "low": 1e-4, "high": 1e-1},
                {"key": "finetune.head.pooling", "kind": "choice", "choices": ["cls", "mean"]},
            ],
            "trials": [
                trial("0000", 0.80),
                trial("0001", 0.90, exchanges=[exchange]),
                trial("0002", 0.70, "stopped", why="stopped at epoch 1"),
                trial("0003", None, "failed", why=NASTY, values={"finetune.lr": 1e-3}),
            ],
            "finalists": [finalist("0001", 0.88, 0.9), finalist("0000", 0.8, 0.82)],
            "importance": {"method": "rank correlation", "shares": {"finetune.lr": 0.75}},
            "cost": {"trial_seconds": 244.0, "core_hours": 0.07, "gpu_hours": 0.0},
        },
    )
    write(root, "result.json", {"seconds": 300.0, "trials": {"finished": 2}})


def test_a_search_has_its_numbers_plots_and_tables(tmp_path):
    make_search(tmp_path / "tune")
    page = Page(report(tmp_path))
    for expected in (
        "Search", "tpe search, asha scheduler", "2 finished, 1 stopped, 1 failed",
        "Winner0.8900± 0.0100, trial", "Configured values0.8100± 0.0100, validation",
        "Core hours0.07", "Finalists",
        "All trials", "Exchanges", "lr 0.001 → 0.0008", "abababababab, equal", "0.0004, equal",
        "stopped at epoch 1", "rank correlation", "Importance of each key",
        "Validation accuracy over time", NASTY,
    ):  # fmt: skip
        assert expected in page.text, expected
    assert page.tags.count("svg") == 4
    assert not {"script", "br", "i", "img"} & set(page.tags)


def test_a_trial_that_failed_is_not_among_the_best(tmp_path):
    make_search(tmp_path / "tune")
    path = tmp_path / "tune" / "trials.json"
    search = json.loads(path.read_text())
    search["trials"].append(trial("0004", 0.99, "failed", why="its worker was lost"))
    path.write_text(json.dumps(search))
    text = Page(report(tmp_path)).text
    assert "Values of the 3 best trials" in text
    assert text.index("stopped at epoch 1") < text.index("its worker was lost")


@pytest.mark.parametrize("left", ["dimensions", "finalists", "importance", "cost", "trials"])
def test_a_search_without_a_part_shows_the_rest(tmp_path, left):
    make_search(tmp_path / "tune")
    path = tmp_path / "tune" / "trials.json"
    values = json.loads(path.read_text())
    del values[left]
    path.write_text(json.dumps(values))
    assert "Search" in Page(report(tmp_path)).text


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"weights_after": "c"}, "abababababab, NOT equal"),
        ({"weights_after": None}, "not logged"),
        ({"trained": {"step": 50, "lr": 5e-4, "due": 4e-4}}, "0.0005, NOT equal"),
        ({"trained": None}, "not logged"),
    ],
)
def test_an_exchange_that_does_not_match_its_record_is_marked(tmp_path, found, words):
    make_search(tmp_path / "tune")
    path = tmp_path / "tune" / "trials.json"
    search = json.loads(path.read_text())
    search["trials"][1]["exchanges"][0] |= found
    path.write_text(json.dumps(search))
    assert words in Page(report(tmp_path)).text

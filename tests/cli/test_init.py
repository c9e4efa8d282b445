"""`raybert init` on files of newcomers, and what they run after it."""

import csv
import json
import random
import signal
import subprocess
import sys
import urllib.request

import pytest
import yaml
from commands import refused
from hypothesis import given
from hypothesis import strategies as st
from made import TASKS
from making import reviews

from raybert.config import build, load
from raybert.data.sources.documents import documents
from raybert.data.sources.row_table import parse_label
from raybert.data.sources.settings import EvaluationSource, SourceConfig
from raybert.experiment import Experiment
from raybert.pipeline.data_summary import choose_text, describe_column, possible_labels
from raybert.pipeline.named_sources import with_sources
from raybert.pipeline.stages import find_shared_file
from raybert.yaml_values import parse_yaml

QUEUES = {
    "billing": "I was charged twice for my invoice",
    "login": "my password does not work and the account is locked",
    "shipping": "the parcel with my order has not arrived",
}


def write_tickets(path, count=120):
    draw = random.Random(0)
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["ticket_id", "created", "subject", "body", "priority", "queue"])
        for number in range(count):
            queue = draw.choice(list(QUEUES))
            words = [*QUEUES[queue].split(), *draw.choices(QUEUES["login"].split(), k=3)]
            draw.shuffle(words)
            table.writerow([number, f"2026-01-{number % 28 + 1:02}", "a ticket", " ".join(words),
                            draw.randint(1, 3), queue])  # fmt: skip
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_table_of_tickets_is_understood(raybert, place):
    write_tickets(place / "tickets.csv")
    done = raybert("init", "tickets.csv")
    assert done.code == 0, done.err
    for words in ("body: ", "<- text", "queue: 3 different values", "<- label", "scripts   Latin",
                  "task      single_label", "billing ", "may also name priority\n", "Next:",
                  "pretrain ", " steps, up to ",
                  "run -c tickets.yaml", "serve runs/tickets"):  # fmt: skip
        assert words in done.out, words
    text = (place / "tickets.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=raybert.schema.json\n")
    assert json.loads((place / "raybert.schema.json").read_text())["title"] == "Experiment"
    found = with_sources(load(Experiment, place / "tickets.yaml"))
    assert found.corpus.source.text_column == found.finetune.source.text_column == "body"
    assert found.finetune.source.label_column == found.evaluate.source.label_column == "queue"
    assert find_shared_file(found.finetune.source, found.evaluate.source) is None
    assert "tickets.yaml exists already" in refused(raybert("init", "tickets.csv"))
    assert raybert("init", "tickets.csv", "--force", "--json").json["rows"] == 120


def test_options_decide_and_are_checked(raybert, place):
    write_tickets(place / "tickets.csv")
    told = raybert("init", "tickets.csv", "--label-column", "priority", "-n", "urgent", "--json")
    assert told.json["label_column"] == "priority" and told.json["config"] == "urgent.yaml"
    assert set(told.json["labels"]) == {"1", "2", "3"}
    wrong = raybert("init", "tickets.csv", "--text-column", "bdoy", "-o", "x.yaml")
    assert refused(wrong).startswith("--text-column bdoy: no such column; there are ticket_id, ")
    assert "no such file" in refused(raybert("init", "none.csv"))
    plain = raybert("init", "tickets.csv", "--no-labels", "-o", "y.yaml", "--json").json
    assert plain["task"] is None and plain["next"][-1].endswith("pretrain -c y.yaml")


@pytest.mark.parametrize("name", TASKS)
def test_rows_of_each_task_are_recognized(raybert, place, name):
    rows = "".join(json.dumps(row) + "\n" for row in TASKS[name](60).rows)
    (place / "rows.jsonl").write_text(rows)
    found = raybert("init", "rows.jsonl", "--json").json
    assert found["task"] == ("single_label" if name == "pairs" else name)
    experiment = with_sources(load(Experiment, place / "rows.yaml"))
    assert (experiment.finetune.source.pair_column is not None) == (name == "pairs")


def test_bad_rows_copies_and_other_scripts_are_told(raybert, place):
    rows = [("хороший фильм о людях", "pos"), ("плохой фильм", "neg"), ("плохой фильм", "pos"),
            ("", "neg"), ("映画はとても良い", "pos"), *reviews(40)]  # fmt: skip
    with open(place / "mixed.csv", "w", newline="") as file:
        csv.writer(file).writerows([("review", "label"), *rows])
    done = raybert("init", "mixed.csv")
    assert "skipped   1 rows: empty" in done.out
    assert "copies    1 texts occur again, 1 with several labels" in done.out
    assert "Cyrillic" in done.out
    assert parse_yaml((place / "mixed.yaml").read_text(), "")["corpus"]["source"]["on_bad_row"]


def test_texts_without_labels_are_for_pretraining(raybert, place):
    (place / "notes.txt").write_text("".join(f"{text}\n" for text, _ in reviews(50)))
    found = raybert("init", "notes.txt", "--json").json
    assert found["task"] is None and found["rows"] == 50
    assert "finetune" not in yaml.safe_load((place / "notes.yaml").read_text())


COLUMNS = {
    "id": [str(i) for i in range(100)],
    "kind": ["a", "b"] * 50,
    "comment": [f"some words about {i} things" for i in range(100)],
    "price": [f"{i}.5" for i in range(100)],
}


@given(st.permutations(list(COLUMNS)))
def test_the_order_of_columns_decides_nothing(names):
    columns = [describe_column(name, COLUMNS[name]) for name in names]
    assert choose_text(columns).name == "comment"
    assert [column.name for column in possible_labels(columns, "comment")] == ["kind"]


def read(path, hold_out, kind=SourceConfig, **more):
    config = build(kind, {"path": str(path), "hold_out": hold_out, **more}, "test")
    return [text for table in documents(config) for text in table["text"].to_pylist()]


@given(
    st.lists(st.sampled_from([text for text, _ in reviews(60)]), min_size=1, max_size=80),
    st.sampled_from([0.1, 0.5, 0.9]),
)
def test_held_out_rows_and_the_others_are_all_rows_and_share_no_text(
    tmp_path_factory, texts, share
):
    path = tmp_path_factory.mktemp("held") / "texts.csv"
    path.write_text("text\n" + "".join(f"{text}\n" for text in texts))
    parts = [_or_none(path, share, kind) for kind in (SourceConfig, EvaluationSource)]
    assert sorted(parts[0] + parts[1]) == sorted(texts)
    assert not set(parts[0]) & set(parts[1])
    assert read(path, 0.0) == texts


def _or_none(path, share, kind):
    from raybert.errors import DataError

    try:
        return read(path, share, kind)
    except DataError as error:
        assert "no documents" in str(error)
        return []


def test_the_share_that_is_held_out_and_its_groups(tmp_path):
    path = tmp_path / "texts.csv"
    rows = "".join(f"text {i},{i % 50}\n" for i in range(2000))
    path.write_text("text,author\n" + rows)
    assert 320 < len(read(path, 0.2, EvaluationSource)) < 480
    held = read(path, 0.2, EvaluationSource, group_column="author")
    rest = read(path, 0.2, group_column="author")
    authors = [{int(text.split()[1]) % 50 for text in part} for part in (held, rest)]
    assert len(held) + len(rest) == 2000 and not authors[0] & authors[1]
    sample = read(path, 0.2, limit=100)
    assert len(sample) == 100 and not set(sample) & set(read(path, 0.2, EvaluationSource))


def test_version_and_comments(raybert, place):
    from raybert import __version__

    assert raybert("--version").out == f"raybert {__version__}\n"
    plain = raybert("config").out
    commented = raybert("config", "--commented").out
    assert parse_yaml(commented, "") == parse_yaml(plain, "")
    lines = commented.splitlines()
    assert "  # peak learning rate" in lines and "finetune:" in lines
    assert max(map(len, lines)) <= 110


@pytest.mark.slow
@pytest.mark.ray
def test_three_commands_lead_from_a_table_to_a_server(tmp_path):
    write_tickets(tmp_path / "tickets.csv", 400)
    command = [sys.executable, "-m", "raybert"]
    for arguments in (["init", "tickets.csv"], ["run", "-c", "tickets.yaml"]):
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "runs/tickets/finetune/metrics.json").read_text())
    assert metrics["seen_in_training"] is False and 50 < metrics["n"] < 110
    assert metrics["accuracy"] > 0.8
    server = subprocess.Popen(
        [*command, "serve", "runs/tickets", "--port", "8471"], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        for line in server.stdout:
            if "8471" in line:
                break
        request = urllib.request.Request(
            "http://127.0.0.1:8471/predict",
            json.dumps({"inputs": ["I was charged twice"]}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert answer.status == 200
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(120)
        server.stdout.close()


def test_a_table_without_a_header_is_written_as_a_run_reads_it(raybert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{text},{label}\r\n" for text, label in reviews(60))
    (tmp_path / "Müller.csv").write_text(rows, encoding="latin-1")
    found = raybert("init", "Müller.csv", "--json").json
    assert (found["rows"], found["config"], found["labels"].keys()) == (
        60,
        "Muller.yaml",
        {"neg", "pos"},
    )
    experiment = load(Experiment, tmp_path / "Muller.yaml")
    sources = with_sources(experiment)
    parts = sources.finetune.source, sources.evaluate.source
    read = [sum(t.num_rows for t in documents(p, labels=parse_label)) for p in parts]
    assert sum(read) == 60 and min(read) > 0


def test_a_folder_of_tables_and_texts_is_looked_at(raybert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.csv").write_text("text,label\na film,x\nanother,y\n")
    (tmp_path / "in/b.txt").write_text("a text\n")
    found = raybert("init", "in", "--json").json
    assert (found["rows"], found["task"]) == (3, None)
    assert "run.name='a\\nb' is not a valid" in refused(raybert("init", "in", "-n", "a\nb"))
    both = ("--text-column", "text", "--label-column", "text")
    assert "are both 'text'" in refused(raybert("init", "in/a.csv", *both))

"""What preparing the labelled texts would refuse after pretraining is refused before Ray starts."""

import json
import re

import pytest
from commands import refused
from making import reviews, write_csv

from raybert.storage.folder import Folder

ROWS = reviews(160)
HELD = ("--set", "corpus.source.hold_out=0.2")
RUN = ("run", "--data")


def late(label):
    """The texts with another label in a row far behind."""
    return [(text, label if at == 150 else name) for at, (text, name) in enumerate(ROWS)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = Folder(tmp_path)
    write_csv(here, "good.csv", ROWS)
    write_csv(here, "three.csv", ROWS[:3])
    write_csv(here, "one.csv", [(text, "pos") for text, _ in ROWS])
    write_csv(here, "copies.csv", [("a film", name) for _, name in ROWS])
    write_csv(here, "new.csv", late("new"))
    write_csv(here, "empty.csv", late(""))
    pairs = "".join(f"{text},{text},{name}\n" for text, name in ROWS)
    (tmp_path / "pairs.csv").write_text(f"sentence1,sentence2,label\n{pairs}")
    tagged = {"text": "", "label": [{"start": 0, "end": 1, "label": "X"}]}
    lines = (json.dumps({**tagged, "text": f"{text} {at}"}) for at, (text, _) in enumerate(ROWS))
    (tmp_path / "tags.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([*RUN, "three.csv", *HELD], "sets 0 of 3 labelled texts apart for validation"),
        ([*RUN, "one.csv", *HELD], "every row has the label 'pos'"),
        ([*RUN, "copies.csv", *HELD], "sets (all|0) of"),
        ([*RUN, "empty.csv", *HELD], "row 151: no label"),
        (
            [*RUN, "good.csv", "--set", "evaluate.source.path=new.csv"],
            "row 151: label 'new' is not",
        ),
        (
            [*RUN, "good.csv", *HELD, "--set", "finetune.validation.path=new.csv"],
            "row 151: label 'new' is not one of",
        ),
        (["tune", "--data", "good.csv"], "does not exist yet; run `raybert pretrain` first"),
    ],
)
def test_a_late_mistake_of_a_small_file_is_found_first(folder, raybert, command, words):
    done = raybert(*command)
    assert "Ray" not in done.err
    assert re.search(words, refused(done))


UNLABELLED = ("--set", "finetune.unlabelled.path=good.csv")


@pytest.mark.parametrize("command", ["run", "finetune"])
@pytest.mark.parametrize("data", ["pairs.csv", "tags.jsonl"])
def test_unlabelled_texts_of_other_tasks_are_refused_first(folder, raybert, command, data):
    column = "sentence1" if data == "pairs.csv" else "text"
    done = raybert(command, "--data", data, "--text-column", column, *HELD, *UNLABELLED)
    assert "finetune.unlabelled has no effect on" in refused(done)
    assert "starting" not in done.err


def test_a_search_says_that_it_leaves_unlabelled_texts_out(folder, raybert):
    done = raybert("tune", "--data", "good.csv", *UNLABELLED)
    assert "finetune.unlabelled is left out" in done.err
    assert "run `raybert pretrain` first" in refused(done)

"""`raybert baseline`: fits on the labelled texts and scores the test texts, without a corpus."""

import json

import pytest
from made import TASKS


@pytest.mark.parametrize("name", TASKS)
def test_it_scores_the_test_texts_of_every_task(raybert, tmp_path, name):
    made = TASKS[name](300)
    for part, rows in (("train", made.rows), ("test", TASKS[name](60, seed=1).rows)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{part}.jsonl").write_text(lines)
    values = {
        "run.storage": tmp_path / "runs",
        "finetune.source.path": tmp_path / "train.jsonl",
        "evaluate.source.path": tmp_path / "test.jsonl",
    }
    options = [f"--set={key}={json.dumps(str(value))}" for key, value in values.items()]
    found = raybert("baseline", "-n", "mine", *options, "--json")
    assert found.code == 0, found.err
    assert found.json["n"] == 60 and "regression on" in found.json["model"]
    assert found.json[made.metric] >= 0.45  # of pairs of a topic words tell next to nothing
    assert (tmp_path / "runs/mine/baseline/linear.json").exists()
    assert found.json["model"] in found.err

"""Listing and deleting experiments: all are listed, and nothing else is ever touched."""

import json
import os
import shutil
import tempfile
import time

import pytest
from examples import examples
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from json_documents import json_documents
from making import Attempt, make_corpus, pretrain_job, reviews

from raybert.errors import UserError
from raybert.pipeline import runs
from raybert.storage.folder import Folder
from raybert.train.run import train_in_process
from raybert.train.task import Stopped

HOUR = 3600


def age(path, seconds=HOUR):
    """Set the modification time of all files below a path to that long ago."""
    at = time.time() - seconds
    for root, _, names in os.walk(path):
        for name in names:
            os.utime(os.path.join(root, name), (at, at))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A storage with three experiments: pretrained `done`, stopped `begun`, corpus `texts`."""
    path = tmp_path_factory.mktemp("runs")
    storage = Folder(path)
    make_corpus(storage / "texts" / "corpus")
    job = pretrain_job(storage / "texts" / "corpus", checkpoint_steps=1)
    train_in_process(job, storage / "done" / "pretrain", on_progress=lambda record: None)
    for stop_at in (1, 3):
        with pytest.raises(Stopped):
            Attempt(job, storage / "begun" / "pretrain", stop_at=stop_at).run()
    storage.write_text("registry/a/1/config.json", "{}")
    storage.write_text("a-file", "")
    storage.write_text(".hidden/corpus/x", "")
    age(path)
    return path


@pytest.fixture
def storage(made, tmp_path):
    """A copy of the storage that may be changed."""
    shutil.copytree(made, tmp_path / "runs", copy_function=shutil.copy2)
    return Folder(tmp_path / "runs")


def tree(path):
    return {os.path.join(root, name) for root, _, names in os.walk(path) for name in names}


def test_searches_and_ensembles_are_listed_with_their_figures(tmp_path):
    storage = Folder(tmp_path)
    for name in ("trials/0000", "trials/0001", "seeds/0000-s1"):
        storage.write_json(f"e/tune/{name}/trial.json", {})
    storage.write_json("e/ensemble/members/s0/trial.json", {})
    [run] = runs.list_runs(storage)
    assert [(s.name, s.state, s.figures) for s in run.stages] == [
        ("tune", "begun", {"trials": 2}),
        ("ensemble", "begun", {"members": 1}),
    ]
    best = {"seeds": {"accuracy": {"mean": 0.8}}}
    storage.write_json("e/tune/result.json", {"best": best, "test": {"accuracy": 0.7}})
    storage.write_json("e/ensemble/result.json", {"ensemble": {"accuracy": 0.9}})
    [run] = runs.list_runs(storage)
    assert [(s.name, s.state, s.figures) for s in run.stages] == [
        ("tune", "finished", {"trials": 2, "accuracy": 0.8, "test_accuracy": 0.7}),
        ("ensemble", "finished", {"members": 1, "accuracy": 0.9}),
    ]


def test_figures_are_named_by_the_metric_of_the_task(tmp_path):
    storage = Folder(tmp_path)
    best = {"metric": "rmse", "seeds": {"rmse": {"mean": 90.5}}}
    test = {"metric": "rmse", "rmse": 95.5}
    storage.write_json("e/tune/result.json", {"best": best, "test": test})
    ensemble = {"metric": "f1", "ensemble": {"f1": 0.75, "loss": 0.5}}
    storage.write_json("e/ensemble/result.json", ensemble)
    storage.write_json("e/finetune/result.json", {"metric": "f1", "f1": 0.5, "loss": 1.5})
    storage.write_json("e/finetune/metrics.json", {"metric": "f1", "f1": 0.25})
    [run] = runs.list_runs(storage)
    assert {stage.name: stage.figures for stage in run.stages} == {
        "finetune": {"f1": 0.5, "loss": 1.5, "test_f1": 0.25},
        "tune": {"trials": 0, "rmse": 90.5, "test_rmse": 95.5},
        "ensemble": {"members": 0, "f1": 0.75},
    }


def test_every_experiment_is_listed_and_nothing_else(made):
    found = {run.name: run for run in runs.list_runs(Folder(made))}
    assert list(found) == ["begun", "done", "texts"]
    for name, run in found.items():
        on_disk = [os.path.getsize(path) for path in tree(made / name)]
        assert run.bytes == sum(on_disk)
        assert run.bytes == sum(stage.bytes for stage in run.stages)
        assert time.time() - run.changed == pytest.approx(HOUR, abs=HOUR / 2)


def test_stages_report_their_progress(made):
    found = {run.name: run.stages for run in runs.list_runs(Folder(made))}
    [corpus], [done], [begun] = found["texts"], found["done"], found["begun"]
    assert (corpus.name, corpus.state) == ("corpus", "finished")
    assert corpus.figures["rows"] > 10
    assert (done.state, done.step, done.attempts) == ("finished", 4, 1)
    result = json.loads((made / "done" / "pretrain" / "result.json").read_text())
    assert done.figures == {"loss": result["loss"]}
    assert (begun.state, begun.step, begun.total_steps, begun.attempts) == ("begun", 3, 4, 2)


def test_without_a_log_the_step_of_the_last_checkpoint_is_reported(storage):
    storage.delete("begun/pretrain/metrics")
    [stage] = runs.find_run(storage, "begun").stages
    assert (stage.step, stage.total_steps) == (3, None)


DEEP = "[" * 100_000
JSON = json_documents(
    "step total_steps loss metric accuracy best seeds test mean folds members ensemble splits rows "
    "format_version kind time",
    max_size=4,
    max_leaves=12,
)
CONTENTS = JSON.map(json.dumps) | st.text(max_size=8) | st.just(DEEP)
FILES = ["corpus/manifest.json", "pretrain/result.json", "finetune/result.json",
         "finetune/metrics.json", "finetune/metrics.jsonl", "tune/result.json",
         "ensemble/result.json", "folds/result.json"]  # fmt: skip


@given(contents=st.dictionaries(st.sampled_from(FILES), CONTENTS, min_size=1, max_size=4))
@example(contents={"pretrain/result.json": "[]"})
@example(contents={"finetune/result.json": '{"step": 1}', "finetune/metrics.json": "{}"})
@example(contents={"tune/result.json": "{}", "folds/result.json": '{"folds": [], "mean": "x"}'})
@example(contents={"corpus/manifest.json": DEEP, "finetune/metrics.jsonl": '{"step": 1e300}'})
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=examples(10))
def test_a_damaged_run_is_listed_as_damaged_and_the_others_as_they_are(raybert, contents):
    """Whatever its files hold."""
    with tempfile.TemporaryDirectory() as path:
        storage = Folder(path)
        make_corpus(storage / "texts" / "corpus")
        storage.write_text("bad/corpus/notes", "")
        for name, content in contents.items():
            storage.write_bytes(f"bad/{name}", content.encode("utf-8", "surrogatepass"))
        bad, good = runs.list_runs(storage)
        assert (bad.name, [stage.state for stage in good.stages]) == ("bad", ["finished"])
        done = raybert("runs", "ls", "--storage", path)
        assert done.code == 0, done.err
        for stage in bad.stages:
            assert (stage.problem is not None) == (stage.state == "damaged")


@pytest.mark.parametrize(
    ("name", "content"),
    [("pretrain/result.json", "[]"), ("pretrain/result.json", "{}"), ("pretrain/result.json", DEEP),
     ("pretrain/result.json", '{"step": 1e300}'), ("pretrain/metrics.json", "{}"),
     ("pretrain/metrics.json", '{"accuracy": "high"}')],
)  # fmt: skip
def test_the_file_of_a_damaged_run_is_named(raybert, storage, name, content):
    storage.write_text(f"done/{name}", content)
    listed = {run.name: run.stages for run in runs.list_runs(storage)}
    [stage] = listed["done"]
    assert stage.state == "damaged" and f"{storage.join('done')}/{name} is damaged" in stage.problem
    assert [s.state for s in listed["texts"] + listed["begun"]] == ["finished", "begun"]
    shown = raybert("runs", "ls", "--storage", storage.path).out
    assert f"damaged: {storage.join('done')}/{name} is damaged" in shown


def test_the_command_line_lists_experiments(raybert, made):
    listed = raybert("runs", "ls", "--storage", made, "--json").json
    assert listed["storage"] == str(made)
    assert [run["name"] for run in listed["runs"]] == ["begun", "done", "texts"]
    shown = raybert("runs", "ls", "--storage", made).out.splitlines()
    assert "begun step 3/4, 2 attempts" in shown[1]
    assert "finished step 4, loss" in shown[3]
    nothing = raybert("runs", "ls", "--storage", made / "nowhere")
    assert (nothing.code, nothing.out) == (0, "")
    assert "has no experiments" in nothing.err


def test_one_experiment_is_deleted_and_the_others_stay(raybert, storage):
    before = tree(storage.path)
    done = raybert("runs", "rm", "done", "--storage", storage.path, "--yes", "--json")
    assert done.code == 0, done.err
    assert done.json["deleted"] is True
    assert "done: pretrain (finished);" in done.err
    assert tree(storage.path) == {p for p in before if not p.startswith(f"{storage.path}/done/")}
    assert not os.path.exists(f"{storage.path}/done")


@pytest.mark.parametrize(("answer", "deleted"), [(b"y\n", True), (b"n\n", False)])
def test_deleting_needs_a_confirmation(raybert, storage, answer, deleted):
    done = raybert("runs", "rm", "done", "--storage", storage.path, "--json", stdin=answer)
    assert done.code == 0, done.err
    assert f"Delete {storage.path}/done: pretrain (finished); " in done.err
    assert done.json["deleted"] is deleted
    assert os.path.exists(f"{storage.path}/done") is not deleted


def test_without_an_answer_nothing_is_deleted(raybert, storage):
    done = raybert("runs", "rm", "done", "--storage", storage.path)
    assert done.code == 2
    assert done.err.splitlines()[-1].endswith(
        "is not deleted: no answer on standard input; pass --yes"
    )
    assert os.path.exists(f"{storage.path}/done")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("..", "run.name='..' is not a valid folder name"),
        ("../runs/done", "is not a valid folder name"),
        ("done/pretrain", "is not a valid folder name"),
        ("/etc", "is not a valid folder name"),
        ("", "is not a valid folder name"),
        (".hidden", "is not a valid folder name"),
        ("registry", "is the folder of registered models"),
        ("a-file", "has no experiment named a-file"),
        ("none", "has no experiment named none"),
    ],
)
def test_only_experiments_can_be_deleted(raybert, storage, name, words):
    before = tree(storage.path)
    done = raybert("runs", "rm", "--storage", storage.path, "--yes", "--force", "--", name)
    assert done.code == 2
    assert words in done.err.splitlines()[-1]
    assert tree(storage.path) == before


def test_links_are_not_followed(storage, tmp_path):
    os.rename(f"{storage.path}/done", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", f"{storage.path}/done")
    with pytest.raises(UserError, match="done is a link"):
        runs.find_run(storage, "done")
    os.unlink(f"{storage.path}/done")
    # A link inside is deleted, its target stays.
    os.symlink(tmp_path / "elsewhere", f"{storage.path}/begun/link")
    before = tree(tmp_path / "elsewhere")
    storage.delete(runs.find_run(storage, "begun").name)
    assert not os.path.exists(f"{storage.path}/begun")
    assert tree(tmp_path / "elsewhere") == before


def test_an_active_experiment_is_deleted_only_with_force(raybert, storage):
    storage.write_text("begun/pretrain/metrics/0003.jsonl", "")
    at = ("runs", "rm", "begun", "--storage", storage.path, "--yes")
    busy = raybert(*at)
    assert busy.code == 2
    assert " s ago; stop the run (`raybert stop`) and wait" in busy.err
    assert os.path.exists(f"{storage.path}/begun")
    assert raybert(*at, "--force").code == 0
    assert not os.path.exists(f"{storage.path}/begun")


def test_files_are_found_at_any_depth(tmp_path):
    folder = Folder(tmp_path)
    assert (folder / "none").files() == []
    data = b"".join(text.encode() for text, _ in reviews(3))
    folder.write_bytes("a/b/c", data)
    folder.write_bytes(".d", b"")
    found = folder.files()
    assert [(file.name, file.bytes) for file in found] == [(".d", 0), ("a/b/c", len(data))]
    assert folder.read_bytes(found[1].name) == data
    assert abs(found[0].changed - time.time()) < HOUR

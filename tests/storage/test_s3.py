"""Object stores: every stage on S3, and runs that survive a broken connection."""

import json
import os
import signal
import time

import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from commands import Experiment, refused, start
from making import labelled, make_corpus, pretrain_job, reviews, same_tensors, write_csv

from raybert.data.sources import documents
from raybert.data.sources.settings import SourceConfig
from raybert.errors import UserError
from raybert.storage.folder import Folder
from raybert.train.checkpoint import CheckpointStore
from raybert.train.metrics_log import read_metrics
from raybert.train.run import train_in_process
from raybert.train.run_folder import read_digests


def last_weights(run):
    store = CheckpointStore(run, 99, 2)
    return store.load(store.steps()[-1])


def same_state(one, other):
    return same_tensors(one.model, other.model) and same_tensors(one.optimizer, other.optimizer)


def contents(folder):
    """Every file below a folder: path -> bytes."""
    infos = folder.filesystem.get_file_info(pafs.FileSelector(folder.path, recursive=True))
    paths = [info.path for info in infos if info.type == pafs.FileType.File]
    return {path: folder.read_bytes(path[len(folder.path) + 1 :]) for path in paths}


# The command line --------------------------------------------------------------------------------


@pytest.mark.ray
def test_every_stage_on_an_object_store(raybert, ray_session, bucket, tmp_path, credentials):
    experiment = Experiment(tmp_path, corpus=False, folder=bucket)
    at, outputs = ("-c", experiment.config), []

    def done(*arguments):
        result = raybert(*arguments)
        assert result.code == 0, result.err
        outputs.append(result.out + result.err)
        return result

    made = done("corpus", *at, "--json")
    assert made.json["rows"]["train"] > 50
    assert "is built already" in done("corpus", *at).err
    done("pretrain", *at, "--bare")
    done("finetune", *at, "--bare")
    assert "is finished already" in done("finetune", *at, "--bare").err
    measured = done("evaluate", *at, "--json").json
    assert measured["accuracy"] > 0.9 and measured["n"] == 80
    beside = measured["baseline"]
    assert beside["metrics"]["accuracy"] + beside["difference"] == measured["accuracy"]
    low, high = beside["interval"]
    assert low <= beside["difference"] <= high
    card = (experiment.folder / "finetune" / "model").read_text("README.md")
    assert "1- and 2-grams" in card
    again = done("evaluate", *at)
    assert "is evaluated already" in again.err
    (a, b), (c, d) = measured["confusion"]
    assert [line.split() for line in again.out.splitlines()[-3:]] == [
        ["label", "\\", "predicted", "neg", "pos"],
        ["neg", str(a), str(b)],
        ["pos", str(c), str(d)],
    ]

    run = experiment.folder
    texts = [text for text, _ in reviews(80, seed=1)]
    assert [json.loads(line)["label"] for line in
            done("predict", "-m", run.uri, "a superb film", "an awful film").out.splitlines()
            ] == ["pos", "neg"]  # fmt: skip
    source, output = (bucket / "test.csv").uri, (bucket / "out" / "labels.parquet").uri
    assert done("predict", "-m", run.uri, "-i", source, "-o", output).json["texts"] == 80
    with (bucket / "out").open_input("labels.parquet") as file:
        assert pq.read_table(file)["text"].to_pylist() == texts
    ran = done("run", *at, "--json").json  # every stage is finished: it collects their results
    assert ran["accuracy"] == measured["accuracy"]
    assert set(ran["seconds"]) == {"corpus", "pretrain", "finetune", "evaluate", "all"}
    assert (len(ran["fill_mask"]), ran["run"]) == (5, run.uri)
    assert done("report", run.uri, "--json").json == {"report": (run / "report.html").uri}
    assert "<html" in run.read_text("report.html")

    assert os.listdir(tmp_path) == ["tiny.yaml"]  # nothing was written beside the configuration
    secret = credentials["AWS_SECRET_ACCESS_KEY"]
    assert not any(secret.encode() in data for data in contents(bucket).values())
    assert not any(secret in text for text in outputs)


def test_a_killed_run_resumes_from_an_object_store(raybert, bucket, tmp_path):
    killed = Experiment(tmp_path, folder=bucket / "killed")
    more = ("--bare", "--set", "pretrain.schedule=constant", "--set", "pretrain.warmup_fraction=0")
    command = ("pretrain", "-c", killed.config, *more)
    run = killed.folder / "pretrain"
    process = start(*command, "--set", "pretrain.steps=100000")
    try:
        store, end = CheckpointStore(run, 99, 2), time.monotonic() + 120
        while not store.steps():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end, "no checkpoint comes"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    reached = store.steps()[-1]
    total = f"pretrain.steps={reached + 5}"
    done = raybert(*command, "--set", total, "--json")
    assert done.code == 0, done.err
    assert (done.json["step"], done.json["restarts"]) == (reached + 5, 1)
    (tmp_path / "whole").mkdir()
    whole = Experiment(tmp_path / "whole", folder=bucket / "whole")
    assert raybert("pretrain", "-c", whole.config, *more, "--set", total).code == 0
    assert same_state(last_weights(run), last_weights(whole.folder / "pretrain"))


def test_credentials_in_an_option_are_refused(raybert):
    hidden = "s3://AKIA:hush@bucket/x"
    for arguments in (
        ("report", hidden),
        ("predict", "-m", hidden, "a text"),
        ("pretrain", "--bare", "--set", f"run.storage={hidden}"),
        ("corpus", "--data", hidden),
    ):
        message = refused(raybert(*arguments))
        assert "holds a key or a password" in message
        assert "hush" not in message


# Sources -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["", "*.csv", "two words.csv"])
def test_texts_are_found_and_read(bucket, pattern):
    rows = reviews(20)
    write_csv(bucket / "texts", "two words.csv", rows)
    (bucket / "texts").write_text("README", "not a text")
    address, _, query = (bucket / "texts").uri.partition("?")
    source = SourceConfig(path=f"{address}/{pattern}?{query}")
    found = labelled(source)
    assert found.texts.to_pylist() == [text for text, _ in rows]
    [[name, size, _]] = documents.fingerprint(source)
    assert name.partition("?")[0] == f"{address}/two words.csv" and size > 0


# Connections that break --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("s3")) / "corpus"
    make_corpus(folder)
    return folder


def ten_steps(corpus, **settings):
    values = {"steps": 10, "checkpoint_steps": 2, "digests": True, **settings}
    return pretrain_job(corpus, {"dropout": 0.1}, **values)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    run = Folder(tmp_path_factory.mktemp("undisturbed"))
    train_in_process(ten_steps(corpus), run, on_progress=lambda record: None)
    return run


class Outage:
    """Breaks the connection of a run from the checkpoint of step 2 to step 7; keeps its events."""

    def __init__(self, run, connection, how):
        self._store, self._connection, self._how = CheckpointStore(run, 99, 2), connection, how
        self.events = []

    def __call__(self, record):
        if record["kind"] == "event":
            self.events.append((record["event"], record["message"]))
        elif record["kind"] == "train" and record["step"] == 3:
            end = time.monotonic() + 60
            while self._store.steps() != [2] or not self._connection.is_idle:
                assert time.monotonic() < end, "the checkpoint of step 2 does not come"
                time.sleep(0.01)
            if self._how == "cut":
                self._connection.cut(after=5_000)  # less than a checkpoint's first file
            else:
                self._connection.refuse()
        elif record["kind"] == "train" and record["step"] == 7:
            self._connection.mend()


@pytest.mark.parametrize("how", ["cut", "busy"])
def test_a_run_survives_a_store_that_fails_for_a_while(
    corpus, bucket, proxy, undisturbed, monkeypatch, how
):
    monkeypatch.setattr("raybert.train.line_log.RETRY_SECONDS", 0.0)
    through, connection = proxy
    outage = Outage(bucket, connection, how)
    result = train_in_process(ten_steps(corpus), through, on_progress=outage)
    assert (result["step"], result["restarts"]) == (10, 0)
    events = [event for event, _ in outage.events]
    assert events.count("checkpoint failed") == events.count("checkpoint written") == 1
    assert "that of step 2 is kept" in dict(outage.events)["checkpoint failed"]
    assert same_state(last_weights(bucket), last_weights(undisturbed))
    assert read_digests(bucket) == read_digests(undisturbed)
    steps = [r["step"] for r in read_metrics(bucket) if r["kind"] == "train"]
    assert steps == list(range(1, 11))


class Died(Exception):
    """Ends an attempt as the death of its process would."""


@pytest.mark.parametrize("how", ["cut", "busy"])
def test_an_attempt_that_dies_while_the_store_fails_loses_no_older_checkpoint(
    corpus, bucket, proxy, undisturbed, how
):
    through, connection = proxy
    outage = Outage(bucket, connection, how)

    def until_6(record):
        outage(record)
        if record["kind"] == "train" and record["step"] == 6:
            raise Died

    with pytest.raises(Died):
        train_in_process(ten_steps(corpus), through, on_progress=until_6)
    assert CheckpointStore(bucket, 99, 2).load_latest(pytest.fail).step == 2
    result = train_in_process(ten_steps(corpus), bucket, on_progress=lambda record: None)
    assert (result["step"], result["restarts"]) == (10, 1)
    assert same_state(last_weights(bucket), last_weights(undisturbed))


def test_a_run_set_to_stop_at_a_failed_checkpoint_stops_and_resumes(
    corpus, bucket, proxy, undisturbed
):
    through, connection = proxy
    job = ten_steps(corpus, on_checkpoint_failure="stop")
    with pytest.raises(UserError, match="run it again to resume from the checkpoint of step 2"):
        train_in_process(job, through, on_progress=Outage(bucket, connection, "busy"))
    connection.mend()
    result = train_in_process(job, through, on_progress=lambda record: None)
    assert (result["step"], result["restarts"]) == (10, 1)
    assert same_state(last_weights(bucket), last_weights(undisturbed))

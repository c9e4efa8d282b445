"""The command line: from raw reviews to answers, and one clear line for whatever goes wrong."""

import json
import os
import shlex
import shutil
import signal
import socket
import tarfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from commands import Experiment, refused, start, wait_for
from making import reviews, tokenizer_of, write_csv

from raybert.cli import commands
from raybert.cli.options import load_experiment, print_json
from raybert.pipeline.run_stages import check_sources
from raybert.storage.folder import Folder


@pytest.fixture
def experiment(tmp_path):
    return Experiment(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An experiment that is pretrained and fine-tuned in this process."""
    from raybert.config import load
    from raybert.experiment import Experiment as Configured
    from raybert.pipeline import stages
    from raybert.terminal.display import Display

    torch.set_num_threads(1)
    experiment = Experiment(tmp_path_factory.mktemp("trained"))
    configured = load(Configured, experiment.config)
    stages.pretrain(configured, Display(quiet=True), in_process=True)
    stages.finetune(configured, Display(quiet=True), in_process=True)
    return experiment


# What a user asks --------------------------------------------------------------------------------


def test_a_classifier_answers_raw_texts(raybert, trained):
    done = raybert("predict", "-m", trained.run, "a wonderful superb film", "an awful boring film")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["label"] for row in rows] == ["pos", "neg"]
    assert rows[0]["score"] > 0.9
    assert sum(rows[0]["scores"].values()) == pytest.approx(1, abs=1e-5)


def test_texts_come_from_standard_input_too(raybert, trained):
    done = raybert("predict", "-m", trained.run, stdin=b"superb, moving\n\n  \nclumsy, tedious\n")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [(row["row"], row["label"]) for row in rows] == [(0, "pos"), (3, "neg")]


def test_every_command_can_end_in_one_json_object(raybert, trained):
    assert raybert("predict", "-m", trained.run, "--json", "superb", "awful").json["row"] == 1
    assert raybert("report", trained.run, "--json").json == {
        "report": str(trained.run / "report.html")
    }
    shown = raybert("config", "-c", trained.config, "--json").json
    assert shown["pretrain"]["steps"] == 4
    assert raybert("config", "--schema", "--json").json["additionalProperties"] is False
    assert raybert("version", "--json").json["torch"] == torch.__version__


def test_what_json_does_not_have_is_null(capsys):
    print_json({"loss": float("nan"), "by": [float("inf"), 1, {"x": -1.5}]})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "by": [None, 1, {"x": -1.5}]}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "tune.space={finetune.lrr: {uniform: [0.1, 0.2]}}",
            "tune.space: unknown key finetune.lrr; did you mean finetune.lr?",
        ),
        ("tune.space.finetune.lr={uniform: [2, 1]}", "finetune.lr: uniform=[2, 1] is empty;"),
        ("tune.space.finetune.dropout={uniform: [0, 7]}", "finetune.dropout=7.0: input should be"),
        ("tune.trials=0", "tune.trials=0: input should be greater than or equal to 1"),
        ("tune.scheduler.kind=asah", "tune.scheduler.kind='asah'"),
    ],
)
def test_a_search_that_can_not_be_is_refused_before_any_trial(raybert, trained, override, words):
    done = raybert("tune", "-c", trained.config, "--set", override)
    assert words in refused(done)
    assert not (trained.run / "tune").exists()


def test_a_search_wants_its_test_texts_at_once(raybert, trained):
    done = raybert("tune", "-c", trained.config, "--set", "evaluate.source.path=/typo.csv")
    assert refused(done) == "/typo.csv: no such file or folder"


def test_a_model_is_promoted_and_rolled_back(raybert, trained, tmp_path):
    at = ("-c", trained.config, "--set", f"run.storage={tmp_path}", "--json")
    first = raybert("promote", "reviews", "-m", trained.run, *at).json
    assert (first["version"], first["versions"]) == (1, [1])
    assert first["from"] == str(trained.run / "finetune" / "model")
    assert raybert("predict", "-m", first["model"], "superb").code == 0
    raybert("promote", "reviews", "-m", trained.run / "pretrain", *at)
    back = raybert("rollback", "reviews", *at).json
    assert (back["version"], back["versions"]) == (1, [1, 2])
    again = raybert("rollback", "reviews", "--to", 2, *at[:-1])
    assert again.out.startswith("reviews: version 2 of 2 is current: ")
    assert "has no version 9; it has 1, 2" in refused(
        raybert("rollback", "reviews", "--to", 9, *at)
    )
    assert "has no model 'films'; it has reviews" in refused(raybert("rollback", "films", *at))


def test_a_broken_model_is_not_promoted(raybert, trained, tmp_path):
    shutil.copytree(trained.run / "finetune" / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    done = raybert("promote", "reviews", "-m", tmp_path / "model", "-c", trained.config,
                   "--set", f"run.storage={tmp_path}")  # fmt: skip
    assert refused(done).startswith(f"{weights} is damaged: ")
    assert not (tmp_path / "registry").exists()


def test_a_diverged_model_is_neither_promoted_nor_predicts(raybert, trained, tmp_path):
    shutil.copytree(trained.run / "finetune" / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors["classifier.bias"][0] = float("nan")
    safetensors.torch.save_file(tensors, weights)
    at = ("-m", tmp_path / "model")
    promoted = raybert("promote", "reviews", *at, "-c", trained.config,
                       "--set", f"run.storage={tmp_path}")  # fmt: skip
    evaluated = raybert("evaluate", *at, "-c", trained.config)
    for done in (promoted, raybert("predict", "a film", *at), evaluated):
        assert "classifier.bias has values that are not finite" in refused(done)
    assert not (tmp_path / "registry").exists()


def test_the_fine_tuned_model_is_what_is_promoted_without_a_search(raybert, trained, tmp_path):
    shutil.copytree(trained.run, tmp_path / "tiny")
    done = raybert("promote", "reviews", "-c", trained.config, "--set",
                   f"run.storage={tmp_path}", "--json")  # fmt: skip
    assert done.json["from"] == str(tmp_path / "tiny" / "finetune" / "model")


def test_seeds_run_on_ray(raybert, trained):
    done = raybert("finetune", "-c", trained.config, "--seeds", 2, "--bare")
    assert "--seeds trains several seeds at a time on Ray" in refused(done)


def test_a_student_learns_from_a_teacher(raybert, trained, tmp_path):
    shutil.copytree(trained.run, tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "finetune")
    at = ("-c", trained.config, "--bare", "--json", "--set", f"run.storage={tmp_path}")
    done = raybert("finetune", *at, "--distill-from", trained.run)
    assert done.code == 0, done.err
    assert done.json["accuracy"] > 0.8
    config = json.loads(
        raybert("config", "-c", tmp_path / "tiny/finetune/config.yaml", "--json").out
    )
    assert config["finetune"]["distill"]["teacher"] == str(trained.run)
    gone = raybert("finetune", *at, "-n", "other", "--distill-from", "/none")
    assert "other/pretrain/model does not exist yet" in refused(gone)
    shutil.rmtree(tmp_path / "tiny" / "finetune")
    gone = raybert("finetune", *at, "--distill-from", "/none")
    assert refused(gone) == (
        "finetune.distill.teacher=/none: no such folder; name a model/ or a run"
    )


def test_a_student_learns_from_the_linear_model(raybert, trained, tmp_path):
    shutil.copytree(trained.run, tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "finetune")
    at = ("-c", trained.config, "--bare", "--json", "--set", f"run.storage={tmp_path}")
    mixed = raybert("finetune", *at, "--set", "finetune.distill.teacher=[baseline, /none]")
    assert refused(mixed).startswith(
        "finetune.distill.teacher=baseline,/none: baseline teaches alo"
    )
    given = ["finetune.distill.teacher=baseline", f"run.storage={tmp_path}"]
    check_sources(load_experiment(trained.config, given, None))  # as `run` does before it starts
    done = raybert("finetune", *at, "--distill-from", "baseline")
    assert done.code == 0, done.err
    assert done.json["accuracy"] > 0.8
    again = raybert("finetune", *at, "--distill-from", "baseline")
    assert (again.code, again.json) == (0, done.json)


def test_a_mask_is_filled(raybert, trained):
    done = raybert("fill-mask", "-m", trained.run, "the [MASK] was superb", "--json", "--top", 3)
    [guesses] = done.json["masks"]
    assert len(guesses) == 3
    assert guesses[0]["probability"] >= guesses[1]["probability"]


def test_three_masks_are_filled_each(raybert, trained):
    done = raybert("fill-mask", "-m", trained.run, "[MASK] [MASK] was [MASK]", "--json")
    assert [len(guesses) for guesses in done.json["masks"]] == [5, 5, 5]


def test_more_guesses_than_words_are_all_words(raybert, trained):
    done = raybert("fill-mask", "-m", trained.run, "a [MASK]", "--json", "--top", 100000)
    assert (
        len(done.json["masks"][0])
        == json.loads((trained.run / "corpus" / "manifest.json").read_text())["vocab_size"]
    )


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_finished_run_says_so_and_gives_its_result(raybert, trained, stage):
    before = {path: path.stat().st_mtime_ns for path in (trained.run / stage).rglob("*")}
    done = raybert(stage, "-c", trained.config, "--bare", "--json")
    assert done.code == 0
    assert "is finished already, at step" in done.err
    assert (
        done.json["step"] == json.loads((trained.run / stage / "result.json").read_text())["step"]
    )
    assert before == {path: path.stat().st_mtime_ns for path in (trained.run / stage).rglob("*")}


@pytest.mark.parametrize(
    ("stage", "override", "words"),
    [
        ("pretrain", "pretrain.lr=0.5", "is finished with other settings (pretrain.lr: 0.001 ->"),
        ("pretrain", "model.num_layers=2", "(model.num_layers: 1 -> 2); set them back, or choose"),
        ("finetune", "finetune.label_smoothing=0.1", "finetune.label_smoothing: 0.0 -> 0.1"),
    ],
)
def test_a_finished_run_refuses_other_settings(raybert, trained, stage, override, words):
    done = raybert(stage, "-c", trained.config, "--bare", "--set", override)
    assert words in refused(done)


def test_a_report_is_written(raybert, trained):
    done = raybert("report", trained.run)
    assert done.code == 0, done.err
    path = Path(done.out.strip())
    assert "<html" in path.read_text()
    assert path.parent == trained.run


def test_a_run_ends_with_its_report_and_what_to_do_next(raybert, trained, monkeypatch):
    from raybert.config import load
    from raybert.experiment import Experiment as Configured
    from raybert.pipeline.run_stages import format_run

    result = {
        "metric": "accuracy", "accuracy": 0.875, "texts": 80, "seconds": {"all": 61.0},
        "report": str(trained.run / "report.html"), "model": str(trained.run / "finetune"/ "model"),
    }  # fmt: skip
    options = ["run", "-c", str(trained.config), "--data", "my texts.csv"]
    monkeypatch.setattr("sys.argv", ["raybert", *options])
    shown = format_run(load(Configured, trained.config), result).splitlines()
    assert shown[:3] == [
        "Accuracy on 80 texts  0.8750",
        "Took 1:01.",
        f"Report: {result['report']}",
    ]
    predict, serve, tune = (shlex.split(line, comments=True)[1:] for line in shown[4:])
    assert serve == ["serve", str(trained.run)]
    assert tune == ["tune", *options[1:]]
    assert raybert(*predict).json["text"] == "a text"
    without = format_run(load(Configured, trained.config), {**result, "report": None})
    assert "Report" not in without


def test_config_prints_what_it_reads(raybert, experiment, tmp_path):
    done = raybert("config", "-c", experiment.config, "--set", "pretrain.lr=1e-5")
    (tmp_path / "again.yaml").write_text(done.out)
    again = raybert("config", "-c", tmp_path / "again.yaml")
    assert again.out == done.out
    assert "lr: 1.0e-05" in done.out


def test_a_stored_configuration_takes_other_texts(raybert, experiment, tmp_path):
    """No default split stands in the way of a file that has none; archives give their test."""
    from raybert.config import load
    from raybert.data.sources import documents
    from raybert.experiment import Experiment as Configured
    from raybert.pipeline import run_stages
    from raybert.pipeline.named_sources import with_sources

    (tmp_path / "mine.yaml").write_text(raybert("config").out)

    def splits(*overrides):
        found = with_sources(load(Configured, tmp_path / "mine.yaml", overrides)).evaluate.source
        return [shard.splits for shard in documents.shards(found, labels=True)]

    assert splits("corpus.source.path=sample:imdb") == [("test",)]
    assert splits(f"evaluate.source.path={experiment.texts}") == [()]
    assert splits("evaluate.source.path=sample:all") == [("test",)]
    given = load_experiment(None, None, None, "sample:rotten-tomatoes")
    assert [s.splits for s in documents.shards(given.evaluate.source, labels=True)] == [("test",)]
    run_stages.check_sources(given)


@pytest.mark.parametrize(
    "key", ["corpus.source", "corpus.overlap", "finetune.source", "finetune.validation",
            "evaluate.source"],
)  # fmt: skip
def test_a_typo_ends_a_run_before_any_stage(raybert, experiment, key):
    done = raybert("run", "-c", experiment.config, "--set", f"{key}.path=/typo.csv")
    assert refused(done) == "/typo.csv: no such file or folder"
    assert "starting" not in done.err
    assert os.listdir(experiment.run) == ["corpus"]


def test_pretraining_does_not_need_the_raw_text(raybert, experiment):
    os.remove(experiment.texts)
    assert raybert("pretrain", "-c", experiment.config, "--bare").code == 0
    changed = raybert("pretrain", "-c", experiment.config, "--bare", "--set", "corpus.seq_len=8",
                      "-n", "tiny")  # fmt: skip
    assert "is finished with other settings (corpus.seq_len: 16 -> 8)" in refused(changed)


def test_serving_refuses_what_it_can_not_serve_before_ray_is_started(raybert, tmp_path, trained):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    missing = raybert("serve", tmp_path / "none", "--port", port)
    assert "none: no such folder" in refused(missing)
    opened = raybert("serve", trained.run, "--port", port, "--host", "0.0.0.0")
    assert "serve.host=0.0.0.0: others can connect there" in refused(opened)
    told = refused(raybert("serve", trained.run, "--set", "serve.prot=1"))
    assert "unknown key serve.prot; did you mean serve.port?" in told


def test_what_a_precision_costs_is_measured_and_kept(raybert, tmp_path, trained, monkeypatch):
    from raybert.inference import precision_choice

    shutil.copytree(trained.run / "finetune" / "model", tmp_path / "model")
    monkeypatch.setattr(precision_choice, "available_precisions", lambda device: ("fp32", "bf16"))
    at = ("bench", "serve", "-c", trained.config, "-m", tmp_path / "model", "--texts", "60")
    found = raybert(*at, "--json").json
    assert set(found["measured"]) == {"fp32", "bf16"}
    assert found["texts"] == 60 and found["stored"]
    assert found["measured"]["fp32"]["accuracy"] > 0.5
    shown = raybert(*at).out
    assert "texts/s" in shown and "stored with the model" in shown
    assert "(+0.00 points)" in shown and "-0.00" not in shown  # of fp32 against itself


def test_finished_runs_say_so_when_what_made_them_is_gone(raybert, tmp_path, trained):
    shutil.copytree(trained.run, tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "corpus")
    at = ("-c", trained.config, "--bare", "--set", f"run.storage={tmp_path}", "--json")
    assert raybert("pretrain", *at).json["step"] == 4
    shutil.rmtree(tmp_path / "tiny" / "pretrain")
    done = raybert("finetune", *at)
    assert "is finished already, at step" in done.err
    assert done.json["accuracy"] > 0.5


def test_pretraining_starts_from_a_model_wherever_the_workers_run(
    raybert, experiment, trained, monkeypatch
):
    monkeypatch.chdir(trained.path)
    at = ("pretrain", "-c", experiment.config, "--bare", "--json")
    # The model's own shape counts, not the section `model`.
    done = raybert(*at, "--set", "pretrain.initialize_from=runs/tiny", "--set",
                   "model.hidden_size=32")  # fmt: skip
    assert done.code == 0, done.err
    card = (Path(done.json["model"]) / "README.md").read_text()
    assert "16 hidden" in card and "Started from: tiny\n" in card  # no path of this machine
    shutil.copytree(experiment.run / "corpus", trained.path / "more" / "tiny" / "corpus")
    gone = raybert(*at, "--set", "run.storage=more", "--set", "pretrain.initialize_from=none")
    assert refused(gone).startswith("pretrain.initialize_from=none: no model here")


def test_a_model_with_a_vocabulary_alone_is_fine_tuned(raybert, trained, tmp_path):
    start = tmp_path / "bert"
    shutil.copytree(trained.run / "pretrain" / "model", start)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (start / name).unlink()
    size = json.loads((start / "config.json").read_text())["vocab_size"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word for text, _ in reviews(200) for word in text.split()}
    special += sorted(words)[: size - len(special)]
    (start / "vocab.txt").write_text("\n".join([*special, *map(str, range(size - len(special)))]))
    changes = (f"run.storage={tmp_path}", f"finetune.initialize_from={start}")
    options = [option for change in changes for option in ("--set", change)]
    done = raybert("finetune", "-c", trained.config, "--bare", "--json", *options)
    assert done.code == 0, done.err
    answered = raybert("predict", "-m", done.json["model"], "a superb film")
    assert answered.code == 0, answered.err


def test_a_measurement_counts_for_its_texts_and_weights_alone(
    raybert, trained, tmp_path, monkeypatch
):
    from raybert.model.huggingface import weights_hash
    from raybert.pipeline import stages

    shutil.copytree(trained.run, tmp_path / "tiny")
    texts = shutil.copy(trained.path / "test.csv", tmp_path / "t.csv")
    measured = []

    def measure(experiment, model, display, **options):
        measured.append(1)
        inputs = stages._evaluation_inputs(experiment, weights_hash(model))
        return {"accuracy": 0.5, "n": 1, "made_from": inputs}

    monkeypatch.setattr(stages, "evaluate_model", measure)
    at = ("-c", trained.config, "--set", f"run.storage={tmp_path}", "--json")

    def evaluate(path=texts):
        return raybert("evaluate", *at, "--set", f"evaluate.source.path={path}")

    assert "trained on" not in evaluate().err
    assert "is evaluated already" in evaluate().err
    assert len(measured) == 1
    with open(texts, "a") as file:
        file.write("one more superb film,pos\n")
    evaluate()
    assert len(measured) == 2
    weights = tmp_path / "tiny" / "finetune" / "model" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    evaluate()
    evaluate()
    assert len(measured) == 3
    seen = evaluate(trained.texts)
    assert f"{trained.texts} was used for training: the scores do not measure new texts" in seen.err
    assert seen.json["seen_in_training"] is True


def test_a_summary_without_a_unigram_loss():
    from raybert.experiment import Experiment as Configured
    from raybert.pipeline.run_stages import _format_summary

    result = {
        "masked_loss": 4.0, "unigram_loss": None, "fill_mask": [], "texts": 9, "accuracy": 0.5,
        "example": None, "answer": {"text": "x", "label": "pos", "score": 0.5},
        "seconds": {"all": 3}, "report": "r",
    }  # fmt: skip
    assert "loss  4.000 nats\n" in _format_summary(Configured(), result)
    assert "2.00 below the unigram model's 6.000" in _format_summary(
        Configured(), {**result, "unigram_loss": 6.0}
    )
    other = {"metric": "f1_micro", "f1_micro": 0.25, "answer": {"text": "x", "labels": ["a"]}}
    shown = _format_summary(Configured(), {**result, **other})
    assert "F1_micro on 9 test reviews  0.2500" in shown
    assert '\'x\'  ->  {"labels": ["a"]}' in shown


def test_the_schema_is_json(raybert):
    assert raybert("config", "--schema").code == 0
    schema = json.loads(raybert("config", "--schema").out)
    assert schema["additionalProperties"] is False
    assert "pretrain" in schema["properties"]


def test_versions_are_shown(raybert):
    assert [line.split()[0] for line in raybert("version").out.splitlines()][:2] == [
        "raybert",
        "ray",
    ]


# What goes wrong: the configuration and the model ------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pretrain.stps=3", "unknown key pretrain.stps; did you mean pretrain.steps?"),
        (
            "pretrain.micro_batch_size=3",
            "pretrain.global_batch_size=8 is not a multiple of pretrain.micro_batch_size=3; "
            "use 6 or 9",
        ),
        ("pretrain.lr", "--set pretrain.lr: expected `key=value`"),
        ("pretrain.examples=[no mask]", "'no mask' has no [MASK]: put one where a word is"),
        ("model.max_seq_len=8", "corpus.seq_len=16 is past model.max_seq_len=8; set model.max_"),
        ("corpus.seq_len=8", "was made with corpus.seq_len=16, now it is 8"),
    ],
)
def test_a_configuration_that_does_not_fit(raybert, experiment, override, words):
    done = raybert("pretrain", "-c", experiment.config, "--bare", "--set", override)
    assert words in refused(done)
    assert not (experiment.run / "pretrain" / "config.yaml").exists()


def test_a_configuration_that_is_not_there(raybert):
    assert refused(raybert("pretrain", "-c", "/none.yaml")) == (
        "--config /none.yaml: No such file or directory"
    )


def test_a_corpus_that_is_not_there(raybert, tmp_path):
    bare = Experiment(tmp_path, corpus=False)
    words = "no corpus here (manifest.json is missing); make one with `raybert corpus`"
    assert words in refused(raybert("pretrain", "-c", bare.config, "--bare"))


def test_a_corpus_of_another_tokenizer(raybert, experiment):
    tokenizer_of(["other words altogether"]).save(experiment.folder / "corpus")
    done = raybert("pretrain", "-c", experiment.config, "--bare")
    assert "tokenizer.json is not the one that made the corpus" in refused(done)


def test_a_part_cut_short(raybert, experiment):
    part = experiment.run / "corpus" / "train-00000.parquet"
    data = part.read_bytes()
    part.write_bytes(data[:-100])
    message = refused(raybert("pretrain", "-c", experiment.config, "--bare"))
    assert f"{part} has {len(data) - 100:,} bytes, its manifest says {len(data):,}" in message
    part.unlink()
    message = refused(raybert("pretrain", "-c", experiment.config, "--bare"))
    assert f"{part} is missing" in message


def test_fine_tuning_before_pretraining(raybert, experiment):
    done = raybert("finetune", "-c", experiment.config, "--bare")
    assert "does not exist yet; run `raybert pretrain` first" in refused(done)


def test_fine_tuning_past_the_models_length(raybert, trained, tmp_path):
    done = raybert(
        "finetune", "-c", trained.config, "--bare", "-n", "other", "--set",
        f"finetune.initialize_from={trained.run}/pretrain", "--set", "finetune.seq_len=65",
    )  # fmt: skip
    assert "finetune.seq_len=65 exceeds the model's 64 tokens" in refused(done)


def test_a_model_that_is_not_there(raybert, tmp_path):
    for command in (["predict", "-m", tmp_path, "x"], ["fill-mask", "-m", tmp_path, "[MASK]"]):
        assert "no model here (config.json is missing)" in refused(raybert(*command))


def test_an_experiment_that_has_only_been_pretrained(raybert, trained, tmp_path):
    shutil.copytree(trained.run / "pretrain", tmp_path / "pretrain")
    told = f"{tmp_path}: no model of finetune here, but one of pretrain; name {tmp_path}/pretrain"
    assert refused(raybert("predict", "-m", tmp_path, "x")) == told
    assert refused(raybert("serve", tmp_path, "--port", "10999")) == told


def test_a_model_of_the_other_kind(raybert, trained):
    refused(raybert("predict", "-m", trained.run / "pretrain", "a text"))
    refused(raybert("fill-mask", "-m", trained.run / "finetune", "a [MASK]"))


def test_weights_cut_short(raybert, trained, tmp_path):
    shutil.copytree(trained.run / "finetune" / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    assert "model.safetensors is damaged" in refused(
        raybert("predict", "-m", tmp_path / "model", "x")
    )


def test_a_text_without_a_mask_and_one_too_long(raybert, trained):
    def fill(text):
        return refused(raybert("fill-mask", "-m", trained.run, text))

    assert fill("no mask at all") == (
        "'no mask at all' has no [MASK]: put one where a word is to be predicted"
    )
    assert fill("film " * 50_000 + "[MASK]").startswith(
        "the text has 50,003 tokens, the model reads 64; shorten it around the [MASK]"
    )


def test_standard_input_that_is_not_utf8(raybert, trained):
    message = refused(raybert("predict", "-m", trained.run, stdin=b"good\nb\xffd\n"))
    assert message.startswith("standard input: line 2 is not UTF-8")


def test_nothing_to_label(raybert, trained):
    def predict(*texts):
        return refused(raybert("predict", "-m", trained.run, *texts, stdin=b" \n\n"))

    assert "standard input has no text" in predict()
    assert "text 2 is empty" in predict("good", " ")


def test_a_demo_of_no_sentence(raybert):
    assert "--text is empty" in refused(raybert("demo", "--text", " "))


def test_input_without_output(raybert, trained):
    message = refused(raybert("predict", "-m", trained.run, "-i", trained.texts))
    assert message.startswith("--input needs --output")


def test_a_report_on_nothing(raybert, tmp_path):
    assert "no such folder" in refused(raybert("report", tmp_path / "none"))


# What goes wrong: labelled texts -----------------------------------------------------------------


def damaged_rows():
    good = "".join(f'"{text}",{label}\n' for text, label in reviews(40)).encode()
    head = b"text,label\n"
    return {
        "missing column": (b"body,label\n" + good, "text"),
        "missing label column": (b"text,sentiment\n" + good, "label"),
        "no label": (head + good + b"a film,\n", "no label"),
        "empty": (head + good + b",pos\n", "empty"),
        "white space": (head + good + b'"  \t ",pos\n', "empty"),
        "not UTF-8": (head + good + b"a f\xfflm,pos\n", "not UTF-8"),
        "one label": (head + b"a,pos\nb,pos\n", "every row has the label 'pos'"),
        "nothing": (head, "no documents"),
    }


@pytest.mark.parametrize("kind", damaged_rows())
def test_labelled_texts_that_can_not_be_used(raybert, trained, tmp_path, kind):
    data, words = damaged_rows()[kind]
    path = tmp_path / "bad.csv"
    path.write_bytes(data)
    message = refused(finetune(raybert, trained, path))
    assert words in message
    assert str(path) in message
    if kind in ("no label", "empty", "white space", "not UTF-8"):
        assert "row 41" in message or "line 42" in message


def finetune(raybert, trained, path, *more):
    return raybert(
        "finetune", "-c", trained.config, "--bare", "-n", path.stem, "--set",
        f"finetune.initialize_from={trained.run}/pretrain", "--set",
        f"finetune.source.path={path}", "--set", "finetune.epochs=0.1", *more,
    )  # fmt: skip


def test_a_file_that_is_not_there(raybert, trained, tmp_path):
    assert str(tmp_path / "none.csv") in refused(finetune(raybert, trained, tmp_path / "none.csv"))


def test_a_label_that_is_not_in_the_set(raybert, trained, tmp_path):
    path = write_csv(Folder(tmp_path), "third.csv", [*reviews(40), ("so so", "meh")])
    done = finetune(raybert, trained, Path(path), "--set", "finetune.source.labels=[neg, pos]")
    assert "label 'meh' is not one of labels=['neg', 'pos']" in refused(done)


def test_an_archive_cut_short(raybert, trained, tmp_path):
    path = tmp_path / "aclImdb.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for index, (text, label) in enumerate(reviews(200)):
            file = tmp_path / "review.txt"
            file.write_text(text + os.urandom(64).hex())
            archive.add(file, f"aclImdb/train/{label}/{index}_1.txt")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    message = refused(finetune(raybert, trained, path))
    assert "aclImdb.tar.gz" in message


def test_bad_rows_are_skipped_and_counted_if_so_configured(raybert, trained, tmp_path):
    path = tmp_path / "skips.csv"
    path.write_bytes(damaged_rows()["not UTF-8"][0] + b",pos\n,neg\n")
    done = finetune(raybert, trained, path, "--set", "finetune.source.on_bad_row=skip")
    assert done.code == 0, done.err
    assert "1 skipped (not UTF-8)" in done.err
    assert "2 skipped (empty)" in done.err


def test_texts_are_made_anew_while_the_run_has_not_begun(raybert, trained, tmp_path):
    """A setting that was refused late leaves nothing behind that the next try would use."""
    path = Path(write_csv(Folder(tmp_path), "late.csv", reviews(60)))
    bad = finetune(raybert, trained, path, "--set", "finetune.class_weights=[1.0]")
    assert "finetune.class_weights has 1 values, the data 2 labels" in refused(bad)
    data = trained.path / "runs" / "late" / "finetune" / "data" / "data.json"
    assert json.loads(data.read_text())["train"]["rows"] == 54
    done = finetune(raybert, trained, path, "--set", "finetune.validation_fraction=0.5")
    assert done.code == 0, done.err
    assert json.loads(data.read_text())["train"]["rows"] == 30


def test_prepared_texts_cut_short_say_what_to_delete(raybert, trained, tmp_path):
    path = Path(write_csv(Folder(tmp_path), "hurt.csv", reviews(60)))
    assert finetune(raybert, trained, path).code == 0
    run = trained.path / "runs" / "hurt" / "finetune"
    (run / "result.json").unlink()
    file = run / "data" / "train.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    message = refused(finetune(raybert, trained, path))
    assert f"{file} is damaged; delete {run}/data and run the command again" in message
    shutil.rmtree(run / "data")
    assert finetune(raybert, trained, path).code == 0


# What goes wrong in between ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],  # of one handler
)
def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(raybert, experiment, asked):
    command = ("pretrain", "-c", experiment.config, "--bare", "--set", "pretrain.steps=100000")
    process = start(*command)
    try:
        wait_for(experiment.run / "pretrain" / "checkpoints" / "step-*.json", process)
        process.send_signal(asked)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "raybert: interrupted; run the same command again to resume"
    assert "Traceback" not in err
    commits = sorted((experiment.run / "pretrain" / "checkpoints").glob("*.json"))
    commit = json.loads(commits[-1].read_text())
    reached = commit["step"]

    changed = raybert(*command, "--set", "pretrain.lr=0.5")
    assert "has begun with other settings (pretrain.lr: 0.001 -> 0.5)" in refused(changed)

    # The newest checkpoint is cut short: it is named, and the one before is taken.
    weights = commits[-1].parent / commit["folder"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    done = raybert(*command[:-1], f"pretrain.steps={reached + 2}")
    assert done.code == 0, done.err
    assert f"{weights} is cut short" in done.err
    assert json.loads((experiment.run / "pretrain" / "result.json").read_text())["restarts"] == 1


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml"])
def test_a_full_disk_is_one_line(raybert, experiment, monkeypatch, name):
    import errno

    from raybert.storage import folder

    new_file = folder.new_file

    def full(path, *place):
        if path.endswith(f"/{name}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return new_file(path, *place)

    monkeypatch.setattr(folder, "new_file", full)
    at = ("-c", experiment.config, "--set", "pretrain.collective_timeout_s=0.1")
    message = refused(raybert("pretrain", *at, "--bare"))
    assert message.startswith("writing ")
    assert f"{name} failed: No space left on device" in message
    if name == "model.safetensors":  # of the checkpoints, too
        assert message.endswith("there is no checkpoint yet: fix the storage, and run it again")
    monkeypatch.undo()
    assert raybert("pretrain", *at, "--bare").code == 0


def test_debug_shows_the_traceback(raybert, monkeypatch):
    from raybert.errors import ConfigError

    monkeypatch.setattr(commands, "_DEBUG", False)
    with pytest.raises(ConfigError):
        raybert("--debug", "pretrain", "-c", "/none.yaml")
    commands._DEBUG = False


# All stages; test_s3.py has the quick one of its kind, on an object store -------------------------


@pytest.mark.ray
@pytest.mark.slow
def test_from_raw_reviews_to_a_measured_classifier(raybert, ray_session, tmp_path):
    experiment = Experiment(tmp_path, corpus=False)
    at = ("-c", experiment.config)
    made = raybert("corpus", *at, "--json")
    assert made.code == 0, made.err
    assert made.json["rows"]["train"] > 50
    again = raybert("corpus", *at, "--json")
    assert "is built already" in again.err
    assert again.json["rows"] == made.json["rows"]
    assert raybert("pretrain", *at, "--bare").code == 0
    assert raybert("finetune", *at, "--bare").code == 0

    measured = raybert("evaluate", *at, "--json")
    assert measured.code == 0, measured.err
    assert measured.json["n"] == 80
    assert measured.json["accuracy"] > 0.9
    tests = {test["name"]: test for test in measured.json["behaviour"]["tests"]}
    assert tests["last punctuation mark"]["texts"] == 80 and "behaviour typos" in measured.err
    again = raybert("evaluate", *at)
    assert "is evaluated already" in again.err
    (a, b), (c, d) = measured.json["confusion"]
    matrix = [line.split() for line in again.out.splitlines()[-3:]]
    assert matrix == [
        ["label", "\\", "predicted", "neg", "pos"],
        ["neg", str(a), str(b)],
        ["pos", str(c), str(d)],
    ]
    by_model = raybert("evaluate", *at, "-m", experiment.run, "--json")
    assert by_model.json["accuracy"] == measured.json["accuracy"]

    ran = raybert("run", *at, "--json")  # every stage is finished: what comes of them all
    assert ran.code == 0, ran.err
    assert ran.json["accuracy"] == measured.json["accuracy"]
    assert set(ran.json["seconds"]) == {"corpus", "pretrain", "finetune", "evaluate", "all"}
    assert Path(ran.json["report"]).exists()
    assert [len(ran.json["fill_mask"]), ran.json["run"]] == [5, str(experiment.run)]

    output = tmp_path / "labels.jsonl"
    done = raybert("predict", *at, "-m", experiment.run, "-i", tmp_path / "test.csv", "-o", output)
    assert done.json["texts"] == 80
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["text"] for row in rows] == [text for text, _ in reviews(80, seed=1)]
    right = [
        row["label"] == label for row, (_, label) in zip(rows, reviews(80, seed=1), strict=True)
    ]
    assert sum(right) / 80 == measured.json["accuracy"]

    write_csv(Folder(tmp_path), "test.csv", [*reviews(20, seed=2), ("so so", "meh")])
    unknown = raybert("evaluate", *at, "-m", experiment.run)
    assert "label 'meh' is not one of labels=['neg', 'pos']" in refused(unknown)
    assert raybert("report", experiment.run).code == 0

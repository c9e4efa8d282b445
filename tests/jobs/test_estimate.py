"""The estimate of a run: counts are exact, what is unknown is said to be, and time follows work."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import Attempt, make_corpus, pretrain_job

from raybert.config import build
from raybert.data.corpus.manifest import Manifest
from raybert.errors import StorageError
from raybert.experiment import Experiment
from raybert.jobs.estimate import (
    estimate,
    estimate_lines,
    estimate_storage,
    format_estimate,
    measured_speed,
    shape_of,
)
from raybert.model.cost import flops_per_token, num_parameters
from raybert.model.encoder import Encoder
from raybert.model.heads import Classifier, MaskedLM
from raybert.model.settings import ModelConfig
from raybert.storage.folder import Folder
from raybert.terminal.formats import size
from raybert.train.distributed import Group
from raybert.train.run import train_in_process
from raybert.train.task import LoaderConfig, Stopped
from raybert.train.throughput import gpu_peak_flops

H100 = {"CPU": 256, "GPU": 8, "accelerator_type:H100": 8}
CPUS = {"CPU": 16}

SHAPES = [
    {"hidden_size": 64, "num_layers": 2, "num_heads": 4},
    {"hidden_size": 96, "num_layers": 3, "num_heads": 3, "global_attention_every": 3},
    {"hidden_size": 128, "num_layers": 2, "num_heads": 8, "layout": "classic", "max_seq_len": 64},
]


def experiment_of(path, **sections):
    values = {"run": {"name": "e", "storage": str(path)}, **sections}
    return build(Experiment, values, "test")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A storage whose experiment `e` has a corpus."""
    path = tmp_path_factory.mktemp("estimate")
    make_corpus(Folder(path) / "e" / "corpus")
    return path


# What is stored ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.get("layout", "modern"))
@pytest.mark.parametrize("kind", ["standard", "keras"])
def test_parameters_equal_those_of_the_model(tmp_path, shape, kind):
    experiment = experiment_of(
        tmp_path, model=shape, finetune={"initialize_from": "scratch", "head": {"kind": kind}}
    )
    vocab_size = experiment.corpus.tokenizer.vocab_size
    encoder = Encoder(experiment.model, vocab_size)
    for stage, module in (
        ("pretrain", MaskedLM(encoder)),
        ("finetune", Classifier(encoder, 2, experiment.finetune.head)),
    ):
        found = estimate_storage(experiment, stage, shape_of(experiment, stage))
        assert found.parameters == num_parameters(module)
        assert found.model == sum(p.numel() * p.element_size() for p in module.parameters())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.get("layout", "modern"))
def test_the_size_of_a_checkpoint_is_estimated_closely(tmp_path, corpus, shape):
    job = pretrain_job(Folder(corpus) / "e" / "corpus", shape, steps=1)
    run = Folder(tmp_path)
    Attempt(job, run).run()
    written = sum(file.bytes for file in (run / "checkpoints").files())
    said = estimate_storage(
        experiment_of(tmp_path), "pretrain", (job.model, job.manifest.vocab_size)
    ).checkpoint
    assert said == pytest.approx(written, rel=0.01)


def test_the_number_of_checkpoints_at_once_is_the_estimate(tmp_path, corpus):
    """The most that there ever are: looked at whenever a file is about to be written."""
    job = pretrain_job(
        Folder(corpus) / "e" / "corpus", steps=12, checkpoint_steps=1, evaluations=4,
        keep_checkpoints=2,
    )  # fmt: skip
    run, most = Folder(tmp_path), 0
    attempt = Attempt(job, run)
    write = attempt.store._prune

    def look(*args):
        nonlocal most
        names = (run / "checkpoints").names()
        most = max(most, sum(not name.endswith(".json") for name in names))
        write(*args)

    attempt.store._prune = look
    attempt.run()
    said = estimate_storage(experiment_of(tmp_path), "pretrain", (job.model, 100)).checkpoints
    assert most == said == 4


# What is computed --------------------------------------------------------------------------------


def test_steps_tokens_and_flops_equal_those_of_the_task(corpus):
    experiment = experiment_of(
        corpus,
        corpus={"seq_len": 16},
        model={"hidden_size": 16, "num_layers": 1, "num_heads": 2},
        pretrain={"epochs": 3, "global_batch_size": 8, "micro_batch_size": 4},
    )
    job = pretrain_job(experiment.folder / "corpus", global_batch_size=8, micro_batch_size=4)
    task = job.make_task(Group(), LoaderConfig())
    made = estimate(experiment, "pretrain", H100)
    assert made.steps == 3 * task.steps_per_epoch
    assert made.tokens == pytest.approx(3 * task.tokens_per_epoch)
    vocab_size = Manifest.read(experiment.folder / "corpus").vocab_size
    rate = experiment.pretrain.masking.mask_rate
    each = flops_per_token(experiment.model, 16, vocab_size, rate)
    assert made.flops == pytest.approx(made.tokens * each)


@settings(max_examples=20, deadline=None)
@given(workers=st.integers(1, 64))
def test_gpu_hours_do_not_depend_on_the_number_of_gpus(workers):
    experiment = experiment_of(
        "/nonexistent",
        pretrain={"steps": 1000, "workers": workers, "global_batch_size": 2048, "gpu": "yes"},
    )
    alone = experiment_of(
        "/nonexistent", pretrain={"steps": 1000, "global_batch_size": 2048, "gpu": "yes"}
    )
    many = estimate(experiment, "pretrain", {"CPU": 1000, "GPU": 64, "accelerator_type:A100": 64})
    one = estimate(alone, "pretrain", {"CPU": 1000, "GPU": 64, "accelerator_type:A100": 64})
    assert many.gpu and one.gpu
    assert many.seconds * workers == pytest.approx(one.seconds)
    assert many.seconds > many.flops / (workers * gpu_peak_flops("A100"))


def test_cpus_are_divided_among_workers():
    for more, cores in (({"workers": 4}, 16), ({"workers": 3}, 15), ({"threads": 2}, 2)):
        experiment = experiment_of("/nonexistent", pretrain={"steps": 9, **more})
        made = estimate(experiment, "pretrain", CPUS)
        assert made.gpu is False
        assert made.basis == f"assumed 50 GFLOP/s on each of {cores} cores"
        assert made.seconds == pytest.approx(made.flops / (cores * 50e9))
        assert "GPU" not in format_estimate(made)[1]


@pytest.mark.parametrize(
    ("pretrain", "resources", "reason"),
    [
        ({"epochs": 2}, H100, "an epoch's steps are not known"),
        ({"steps": 2}, {}, "the cluster's resources are unknown"),
        (
            {"steps": 2, "gpu": "yes"},
            {"CPU": 8, "GPU": 8, "accelerator_type:H20x": 8},
            "of type H20x",
        ),
        ({"steps": 2, "gpu": "yes"}, {"CPU": 8, "GPU": 8}, "of type unknown"),
    ],
)
def test_an_unknown_time_is_reported_with_its_reason(pretrain, resources, reason):
    made = estimate(experiment_of("/nonexistent", pretrain=pretrain), "pretrain", resources)
    assert made.seconds is None
    assert made.size is not None
    assert reason in format_estimate(made)[1]
    assert "time unknown" in format_estimate(made)[1]


def test_a_model_that_cannot_be_read_is_unknown():
    for sections in (
        {"corpus": {"tokenizer": {"kind": "file", "path": "/none.json"}}},
        {"pretrain": {"initialize_from": "/none"}},
    ):
        made = estimate(experiment_of("/nonexistent", **sections), "pretrain", H100)
        assert (made.size, made.flops) == (None, None)
        assert "unknown" in format_estimate(made)[0]


def test_a_storage_that_only_the_cluster_reads_gives_an_estimate_without_it():
    lines = estimate_lines(
        experiment_of("hdfs://nowhere:1/runs", pretrain={"steps": 5}), "pretrain", CPUS
    )
    assert len(lines) == 3
    assert lines[0].startswith("hdfs://nowhere:1/runs cannot be read here: ")
    assert "parameters" in lines[1] and "5 steps" in lines[2]


@pytest.mark.parametrize("start", ["pretrain", "scratch", "s3://elsewhere/model"])
def test_an_unreachable_storage_is_tried_once(monkeypatch, start):
    """Each question would take all of Arrow's patience."""
    asked = []

    def away(self, *name, **more):
        asked.append(self.uri)
        raise StorageError("looking up /e failed: no connection")

    for question in ("exists", "size", "names", "sizes", "files", "read_bytes", "open_input"):
        monkeypatch.setattr(Folder, question, away)
    experiment = experiment_of(
        "/nonexistent", pretrain={"steps": 5}, finetune={"steps": 5, "initialize_from": start}
    )
    lines = estimate_lines(experiment, "run", CPUS)
    assert asked == ["/nonexistent/e"]
    assert lines[0] == "/nonexistent cannot be read here: looking up /e failed: no connection"
    assert len(lines) == 5
    assert estimate_lines(experiment, "corpus", CPUS) == []
    assert len(asked) == 1


def test_remaining_minutes_are_the_limit_less_the_time_trained():
    experiment = experiment_of("/nonexistent", pretrain={"minutes": 90, "gpu": "yes", "workers": 2})
    made = estimate(experiment, "pretrain", {})
    assert made.seconds == 5400
    assert (
        "about 1 h 30 min on 2 GPUs = 3.0 GPU-hours (pretrain.minutes=90)"
        in format_estimate(made)[1]
    )


def test_the_measured_speed_of_a_begun_run_replaces_the_assumed_one(tmp_path):
    make_corpus(Folder(tmp_path) / "e" / "corpus")
    values = {"steps": 20, "global_batch_size": 8, "micro_batch_size": 4}
    experiment = experiment_of(tmp_path, pretrain=values, corpus={"seq_len": 16})
    run = experiment.folder / "pretrain"
    job = pretrain_job(experiment.folder / "corpus", checkpoint_steps=1, **values)
    with pytest.raises(Stopped):
        Attempt(job, run, stop_at=8).run()
    was = measured_speed(run)
    assert was.step == 8
    made = estimate(experiment, "pretrain", H100)
    assert made.steps == 12
    assert made.basis.startswith("measured by an earlier attempt")
    assert made.seconds == pytest.approx(12 * was.step_seconds)

    train_in_process(job, run, on_progress=lambda record: None)
    assert estimate_lines(experiment, "pretrain", H100) == ["pretrain: finished already"]


def test_a_command_that_trains_nothing_has_no_estimate():
    assert estimate_lines(experiment_of("/nonexistent"), "corpus", CPUS) == []
    both = estimate_lines(experiment_of("/nonexistent"), "run", CPUS)
    assert [line.partition(":")[0] for line in both] == ["pretrain"] * 2 + ["finetune"] * 2


def test_a_search_is_estimated_by_its_runs():
    tune = {"trials": 12, "minutes": 20, "finalists": 2, "seeds": 3}
    experiment = experiment_of("/nonexistent", finetune={"steps": 400}, tune=tune)
    first, stored, work = estimate_lines(experiment, "tune", CPUS)
    assert first == (
        "tune: 12 trials in 20 minutes, then up to 9 runs of the finalists; each of them as "
        "configured:"
    )
    assert stored.startswith("tune: ") and "parameters" in stored
    assert work.startswith("tune: 400 steps")


# Words -------------------------------------------------------------------------------------------


@given(st.floats(0, 1e15, allow_nan=False))
def test_formatted_sizes_are_short_and_within_rounding(count):
    number, unit = size(count).split()
    factor = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(number) * factor == pytest.approx(count, rel=0.06, abs=0.5)
    assert len(number) <= 4


def test_the_type_of_the_gpus_is_read_from_the_resources_of_ray():
    experiment = experiment_of("/nonexistent", pretrain={"steps": 2})
    resources = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:L4": 2.0}
    assert "121 TFLOP/s of an L4" in estimate(experiment, "pretrain", resources).basis
    assert estimate(experiment, "pretrain", {"CPU": 4.0}).gpu is False
    assert math.isclose(gpu_peak_flops("NVIDIA L40S"), 362e12)
    assert math.isclose(gpu_peak_flops("L4"), 121e12)


def test_the_shape_of_a_model_to_start_from_is_read(corpus, tmp_path):
    """Fine-tuning starts from the pretrained model's shape, not from the section `model`."""
    storage = Folder(tmp_path)
    job = pretrain_job(Folder(corpus) / "e" / "corpus", {"hidden_size": 32}, steps=1)
    train_in_process(job, storage / "e" / "pretrain", on_progress=lambda record: None)
    shape, vocab_size = shape_of(experiment_of(tmp_path), "finetune")
    assert isinstance(shape, ModelConfig)
    assert (shape.hidden_size, vocab_size) == (32, job.manifest.vocab_size)

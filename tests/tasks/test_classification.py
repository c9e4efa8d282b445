"""Fine-tuning as a task: its texts, its weights, its layers, what it learns."""

import numpy as np
import pytest
import torch
from making import (
    Attempt,
    finetune_job,
    make_corpus,
    pretrain_job,
    reviews,
    same_tensors,
    write_csv,
)

from raybert.data.preprocess import Preprocessing
from raybert.data.tokenizer import Tokenizer
from raybert.errors import ConfigError, DamagedError, DataError
from raybert.model import huggingface
from raybert.storage.folder import Folder
from raybert.tasks.texts import DistillConfig, Texts, prepare_data
from raybert.train.distributed import Group
from raybert.train.run import LoaderConfig, execute_bare


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def task_of(job, rank=0, world_size=1):
    return job.make_task(Group(rank, world_size), LoaderConfig())


def test_a_classifier_learns_what_decides_the_label(folder):
    job = finetune_job(folder, rows=reviews(300), steps=None, epochs=6, lr=1e-2)
    result = execute_bare(job, folder / "run", on_progress=lambda record: None)
    assert result["accuracy"] > 0.9
    model, labels = huggingface.load_classifier(folder / "run" / "model")
    assert labels == ["neg", "pos"]
    assert huggingface.read_preprocessing(folder / "run" / "model")["seq_len"] == 32
    assert huggingface.read_temperature(folder / "run" / "model") == result["temperature"]


@pytest.mark.parametrize(
    ("epochs", "batch", "expected"), [(2, 8, [1, 2]), (3, 8, [1, 2, 3]), (3, 16, [1, 2, 3])]
)
def test_trials_of_any_length_are_evaluated_at_the_same_epochs(folder, epochs, batch, expected):
    """What a search's scheduler compares them at."""
    job = finetune_job(folder, steps=None, epochs=epochs, global_batch_size=batch, evaluations=None)
    attempt = Attempt(job, folder / "run")
    attempt.run()
    assert [record["epoch"] for record in attempt.of_kind("eval")] == expected


def test_texts_are_read_as_they_were_written(folder):
    texts = Texts([np.array([3, 70_000], np.uint32), np.array([1], np.uint32)], np.array([1, 0]))
    file = texts.save(folder, "t.parquet")
    found = Texts.load(folder, file)
    assert [ids.tolist() for ids in found.input_ids] == [[3, 70_000], [1]]
    assert found.labels.tolist() == [1, 0]
    folder.write_bytes("t.parquet", folder.read_bytes("t.parquet")[:-1])
    with pytest.raises(DamagedError, match=f"t.parquet is damaged; delete {folder} and run"):
        Texts.load(folder, file)


def test_texts_travel_as_they_are(folder):
    import pickle

    texts = Texts(
        [np.array([3, 70_000], np.uint32), np.array([1], np.uint32)],
        np.array([1, -1]),
        np.array([[0.5, -1.0], [2.0, 0.0]], np.float32),
    )
    file = texts.save(folder, "t.parquet")
    for found in (pickle.loads(pickle.dumps(texts)), Texts.load(folder, file)):
        assert [ids.tolist() for ids in found.input_ids] == [[3, 70_000], [1]]
        assert found.labels.tolist() == [1, -1]
        assert found.teacher.tolist() == texts.teacher.tolist()
    assert pickle.loads(pickle.dumps(Texts([], np.empty(0, np.int64)))).input_ids == []


def test_whole_texts_are_shortened_to_what_short_ones_were_prepared_as(folder):
    rows = [(f"{text} " * 3, label) for text, label in reviews(60)]
    job = finetune_job(folder, rows=rows)
    tokenizer = Tokenizer.load(job.tokenizer)
    files = {}
    for name, seq_len in (("whole", 1 << 20), ("short", 16)):
        prepared = prepare_data(job.config, tokenizer, seq_len, 0, folder / name)
        files[name] = (Texts.load(folder / name, prepared.train), prepared)
    short, how = files["short"]
    whole = files["whole"][0].shortened(16, how.head_tokens)
    assert max(files["whole"][0].lengths) > 16
    assert [ids.tolist() for ids in whole.input_ids] == [ids.tolist() for ids in short.input_ids]


def test_shared_inputs_give_the_weights_of_inputs_that_are_read(folder):
    from dataclasses import replace

    from raybert.tasks.classification import SharedInputs

    texts = [text for text, _ in reviews(80)]
    make_corpus(folder / "corpus", texts=texts)
    start = execute_bare(
        pretrain_job(folder / "corpus", steps=2), folder / "pre", on_progress=lambda record: None
    )
    model = Folder(start["model"])
    job = replace(finetune_job(folder, steps=3), start=model, tokenizer=model)
    shared = replace(job, shared=SharedInputs.read(job))
    attempts = [Attempt(j, folder / name) for j, name in ((job, "read"), (shared, "shared"))]
    for attempt in attempts:
        attempt.run()
    one, two = (attempt.store.load(3).model for attempt in attempts)
    assert same_tensors(one, two)


def test_unlabelled_texts_are_learned_from_a_teacher_alone(folder):
    more = [f"{text} indeed" for text, _ in reviews(20, seed=3)]
    known = [text for text, _ in reviews(80)][:5]  # labelled elsewhere: they are left out
    path = folder.join("more.txt")
    folder.write_text("more.txt", "\n".join([*more, *known]) + "\n")
    settings = {"distill": {"teacher": "a", "unlabelled": {"path": path}}}
    asked = []

    def teach(texts, names):
        asked.append((texts.to_pylist(), names))
        return np.tile(np.array([[0.0, 4.0]], np.float32), (len(texts), 1))

    job = finetune_job(folder)
    config = job.config.model_copy(
        update={"distill": DistillConfig.model_validate(settings["distill"])}
    )
    tokenizer = Tokenizer.load(job.tokenizer)
    data = folder / "taught"

    def prepare(identity):
        return prepare_data(config, tokenizer, 32, 0, data, teach=teach, teacher=identity)

    prepared = prepare("one")
    assert prepare("one") == prepared and len(asked) == 1
    prepare("two")
    assert len(asked) == 2
    texts = Texts.load(data, prepared.train)
    assert (texts.labels == -1).sum() == len(more)
    assert prepared.skipped == {"labelled elsewhere": len(known)}
    assert asked[0][0][-len(more) :] == more and asked[0][1] == ["neg", "pos"]
    from dataclasses import replace

    task = task_of(replace(job, config=config, data=data, prepared=prepared))
    stream = task.batches(0, None)
    batches = [b for _ in range(task.steps_per_epoch) for b in next(stream)]
    assert sum(batch.count for batch in batches) == prepared.train.rows
    assert all(batch.teacher.shape == (len(batch.labels), 2) for batch in batches)
    assert torch.isfinite(task.loss(task.model, batches[0]))


def test_unlabelled_texts_need_a_teacher(folder):
    with pytest.raises(ConfigError, match="need an answer to learn; name a model with finetune"):
        finetune_job(folder, distill={"unlabelled": {"path": "x.txt"}})


def test_a_compiled_model_would_not_notice_a_shift(folder):
    with pytest.raises(ConfigError, match=r"adversarial=1 shifts embeddings, which a compiled"):
        finetune_job(folder, compile=True, adversarial=1.0)


def test_texts_are_prepared_once_and_anew_when_what_decides_them_changes(folder):
    job = finetune_job(folder)
    path = folder.join("data/train.parquet")
    from pathlib import Path

    from raybert.data.tokenizer import Tokenizer

    def prepare(seq_len=32, **changes):
        config = job.config.model_copy(update=changes)
        return prepare_data(config, Tokenizer.load(job.tokenizer), seq_len, config.seed, job.data)

    before = Path(path).stat().st_mtime_ns
    assert prepare(lr=0.5, steps=9) == job.prepared
    assert Path(path).stat().st_mtime_ns == before
    for changed in (prepare(validation_fraction=0.4), prepare(seed=5), prepare(seq_len=8)):
        assert changed.train.sha256 != job.prepared.train.sha256
    assert prepare() == job.prepared
    with open(folder.join("labelled.csv"), "a") as file:
        file.write("one more superb film,pos\n")
    assert prepare().train.rows + prepare().validation.rows == 81


def test_too_few_texts_to_choose_by(folder):
    with pytest.raises(DataError, match=r"finetune.validation_fraction=0.1 sets 0 of 4 labelled"):
        finetune_job(folder, rows=reviews(4))
    with pytest.raises(DataError, match="sets 4 of 4 .* and leaves 0 to train on; change it"):
        finetune_job(folder, rows=reviews(4), validation_fraction=0.99)


@pytest.mark.parametrize(("breaks", "equal"), [("space", True), ("keep", False)])
def test_line_breaks_are_trained_on_as_they_are_served(folder, breaks, equal):
    rows = [(f"{text}<br />superb", label) for text, label in reviews(40)]
    source = {"path": write_csv(folder, "breaks.csv", rows), "html_breaks": breaks}
    job = finetune_job(folder, rows=rows, source=source)
    tokenizer = Tokenizer.load(job.tokenizer)
    result = execute_bare(job, folder / "run", on_progress=lambda record: None)
    kept = huggingface.read_preprocessing(Folder(result["model"]))
    served = Preprocessing.read(kept, 64).encode(tokenizer, [text for text, _ in rows])
    trained = [
        ids.tobytes()
        for file in (job.prepared.train, job.prepared.validation)
        for ids in Texts.load(job.data, file).input_ids
    ]
    assert sorted(ids.astype(np.uint32).tobytes() for ids in served) == sorted(trained)
    spaced = Preprocessing(32, 8, "space").encode(tokenizer, [text for text, _ in rows])
    assert (sorted(i.astype(np.uint32).tobytes() for i in spaced) == sorted(trained)) is equal


def test_training_and_validation_texts_are_disjoint(folder):
    job = finetune_job(folder, validation_fraction=0.25)
    train, held = (Texts.load(job.data, f) for f in (job.prepared.train, job.prepared.validation))
    assert (len(train.labels), len(held.labels)) == (60, 20)
    seen = {ids.tobytes() for ids in train.input_ids}
    assert not seen & {ids.tobytes() for ids in held.input_ids}


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_reads_every_text_once_however_many_ranks(folder, world_size):
    job = finetune_job(folder, rows=reviews(77))
    rows = []
    for rank in range(world_size):
        task = task_of(job, rank, world_size)
        stream = task.batches(0, None)
        for _ in range(task.steps_per_epoch):
            rows += [row for batch in next(stream) for row in batch.row_ids.tolist()]
    assert sorted(rows) == list(range(job.prepared.train.rows))


def test_lower_layers_learn_slower(folder):
    task = task_of(finetune_job(folder, model={"num_layers": 2}, layer_decay=0.5))
    names = [name for name, _ in task.model.named_parameters()]
    scales = {name: task.lr_scale(name) for name in names}
    assert {s for n, s in scales.items() if n.startswith("encoder.embeddings")} == {0.125}
    assert {s for n, s in scales.items() if n.startswith("encoder.layers.0.")} == {0.25}
    assert {s for n, s in scales.items() if n.startswith("encoder.layers.1.")} == {0.5}
    assert {s for n, s in scales.items() if not n.startswith("encoder.")} == {1.0}
    attempt = Attempt(finetune_job(folder, layer_decay=0.5), folder / "run")
    assert {group["scale"] for group in attempt.loop.optimizer.param_groups} == {0.25, 0.5, 1.0}


def test_class_weights_smoothing_and_empty_batches_in_the_loss(folder):
    rows = [row for row in reviews(120) if row[1] == "pos" or len(row[0]) % 3]
    plain = task_of(finetune_job(folder, rows=rows))
    [batch, *_] = next(plain.batches(0, None))
    with torch.inference_mode():
        there = batch.attention_mask
        ids = torch.from_numpy(batch.input_ids)
        logits = plain.model.eval()(ids, None if there is None else torch.from_numpy(there))
        log = logits.float().log_softmax(-1)
        each = -log[torch.arange(len(log)), torch.from_numpy(batch.labels)]
        assert float(plain.loss(plain.model, batch)) == pytest.approx(float(each.sum()), rel=1e-4)
        assert float(plain.loss(plain.model, plain.empty_batch())) == 0
        weighted = task_of(finetune_job(folder, rows=rows, class_weights=[2.0, 0.5]))
        weighted.model.load_state_dict(plain.model.state_dict())
        weights = torch.tensor([2.0, 0.5])[torch.from_numpy(batch.labels)]
        got = float(weighted.loss(weighted.model.eval(), batch))
        assert got == pytest.approx(float((each * weights).sum()), rel=1e-4)
    balanced = task_of(
        finetune_job(folder, rows=rows, class_weights="balanced")
    )._objective.class_weights
    counts = np.bincount(balanced_labels(folder, rows))
    assert balanced.numpy() == pytest.approx(counts.sum() / (2 * counts))


def balanced_labels(folder, rows):
    job = finetune_job(folder, rows=rows)
    return Texts.load(job.data, job.prepared.train).labels


def test_class_weights_must_be_as_many_as_labels(folder):
    with pytest.raises(ConfigError, match="has 3 values, the data 2 labels"):
        finetune_job(folder, class_weights=[1.0, 1.0, 1.0]).check()


def test_a_pretrained_encoder_is_taken_over(folder):
    from dataclasses import replace

    texts = [text for text, _ in reviews(80)]
    make_corpus(folder / "corpus", texts=texts)
    result = execute_bare(
        pretrain_job(folder / "corpus", steps=2), folder / "pre", on_progress=lambda record: None
    )
    model = Folder(result["model"])
    job = replace(finetune_job(folder), start=model, tokenizer=model)
    task = task_of(job)
    expected = huggingface.load_masked_lm(model).encoder.state_dict()
    assert same_tensors(task.model.encoder.state_dict(), expected)


def test_evaluation_scores_every_text_once_whatever_the_batches(folder):
    found = []
    for micro in (1, 4):
        task = task_of(finetune_job(folder, micro_batch_size=micro, validation_fraction=0.3))
        with torch.inference_mode():
            task.model.eval()
            found.append(task.evaluate())
    assert found[0]["accuracy"] == found[1]["accuracy"]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], abs=1e-5)

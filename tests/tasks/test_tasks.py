"""Laws of every task: chosen by its data, trained alike on any ranks, resumed, read elsewhere."""

import json

import numpy as np
import pytest
import torch
from made import ALL_TASKS as MADE
from made import spec_of, texts_of
from making import Attempt, tokenizer_of

from raybert.config import build
from raybert.errors import ConfigError, DamagedError, DataError, UserError
from raybert.inference.classifier import TextClassifier
from raybert.inference.explanations import Explainer
from raybert.storage.folder import Folder
from raybert.tasks.finetune import FinetuneSpec
from raybert.tasks.labelled import resolve_source
from raybert.tasks.prepared_texts import prepare_texts
from raybert.tasks.protocol import AnswerOptions
from raybert.tasks.registry import read_task, task_of_config_json
from raybert.tasks.settings import FinetuneConfig
from raybert.tasks.tokenized_texts import TokenizedTexts
from raybert.train.distributed import Group
from raybert.train.run import train_in_process
from raybert.train.task import LoaderConfig

NAMES = list(MADE)
CHOSEN = {"pairs": "single_label"}  # the task of pairs with labels


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


@pytest.fixture(scope="module", params=[(n, x) for n in NAMES for x in ("modern", "classic")])
def trained(request, tmp_path_factory):
    """A model of each task and layout, with rows that it was trained on."""
    name, layout = request.param
    torch.set_num_threads(1)
    folder = Folder(tmp_path_factory.mktemp("task"))
    spec = spec_of(folder, name, layout=layout, steps=60, lr=5e-3)
    train_in_process(spec, folder / "run", on_progress=lambda record: None)
    texts = [texts_of(row) for row in MADE[name](12, seed=5).rows]
    given = [tuple(text) if len(text) == 2 else text[0] for text in texts]
    return name, folder / "run" / "model", given


@pytest.mark.parametrize("name", NAMES)
def test_the_data_chooses_the_task(folder, name):
    spec = spec_of(folder, name)
    assert spec.prepared.task == CHOSEN.get(name, name)
    assert spec.prepared.has_pairs == (name == "pairs")
    assert spec.prepared.description


def test_a_configured_task_replaces_the_chosen_one(folder):
    spec = spec_of(folder, "single_label", task="multi_label")
    assert spec.prepared.task == "multi_label"
    assert spec.prepared.labels == ["art", "food", "sport", "travel"]


@pytest.mark.parametrize("name", NAMES)
def test_saved_texts_are_read_back(folder, name):
    spec = spec_of(folder, name)
    texts, _ = spec.read_texts()
    file = texts.save(folder, "again.parquet")
    assert file.sha256 == spec.prepared.train.sha256
    found = TokenizedTexts.load(folder, file)
    for one, other in zip(texts.labels, found.labels, strict=True):
        assert np.array_equal(one, other, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(folder, name, stop_at):
    spec = spec_of(folder, name, steps=6, deterministic=True)
    whole = Attempt(spec, folder / "whole")
    whole.run()
    try:
        Attempt(spec, folder / "parts", stop_at=stop_at).run()
    except Exception as error:
        assert "stopped" in str(error)
    again = Attempt(spec, folder / "parts")
    again.run()
    for key, tensor in whole.task.model.state_dict().items():
        assert torch.equal(tensor, again.task.model.state_dict()[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_sum_to_the_loss_of_the_global_batch(folder, name):
    """The global count: any division into micro-batches gives the same step."""
    losses, counts = [], []
    for micro in (1, 2, 8):
        task = spec_of(folder, name, micro_batch_size=micro).make_task(Group(), LoaderConfig())
        task.model.eval()
        batches = next(task.batches(0, None))
        losses.append(sum(float(task.loss(task.model, batch).detach()) for batch in batches))
        counts.append(sum(batch.count for batch in batches))
    assert len(set(counts)) == 1 and counts[0] > 0
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_reads_every_text_once_with_uneven_ranks(folder, name):
    spec = spec_of(folder, name, count=77)
    rows = []
    for rank in range(3):
        task = spec.make_task(Group(rank, 3), LoaderConfig())
        stream = task.batches(0, None)
        for _ in range(task.steps_per_epoch):
            rows += [row for batch in next(stream) for row in batch.row_ids.tolist()]
    assert sorted(rows) == list(range(spec.prepared.train.rows))


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_has_no_loss_and_no_gradient(folder, name):
    task = spec_of(folder, name).make_task(Group(), LoaderConfig())
    batch = task.empty_batch()
    loss = task.loss(task.model, batch)
    loss.backward()
    assert batch.count == 0 and float(loss.detach()) == 0
    assert all(p.grad is None or not p.grad.any() for p in task.model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_regularisers_work_for_every_task(folder, name):
    spec = spec_of(folder, name, r_drop=1.0, adversarial=1.0, label_smoothing=0.05)
    task = spec.make_task(Group(), LoaderConfig())
    [batch, *_] = next(task.batches(0, None))
    loss = task.loss(task.model, batch)
    loss.backward()
    assert np.isfinite(float(loss.detach()))


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_may_select_the_best_weights(folder, name):
    spec = spec_of(folder, name, steps=2)
    for metric in spec.prepared.make_task().selection_metrics:
        config = spec.config.model_copy(update={"metric": metric})
        attempt = Attempt(
            FinetuneSpec(**{**vars(spec), "config": config}), folder / f"run-{metric}"
        )
        result = attempt.run()
        assert result["metric"] == metric
        assert np.isfinite(result["score"])


def test_an_unknown_metric_is_one_line(folder):
    with pytest.raises(ConfigError, match="finetune.metric=f2 is no metric of single_label"):
        spec_of(folder, "single_label", metric="f2").check()


def test_transformers_computes_the_same(trained):
    transformers = pytest.importorskip("transformers")
    name, folder, texts = trained
    config = json.loads(folder.read_text("config.json"))
    classifier = TextClassifier(folder, precision="fp32")
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder.path).eval()
    task = classifier.task
    assert model.config.problem_type == task.problem_type
    rows = classifier.encode(texts)
    for row, ours in zip(rows, classifier.score(rows), strict=True):
        with torch.no_grad():
            theirs = model(torch.tensor(row.astype(np.int64))[None]).logits[0].numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_its_pipeline_gives_our_answers(trained):
    transformers = pytest.importorskip("transformers")
    name, folder, texts = trained
    classifier = TextClassifier(folder, precision="fp32")
    task = classifier.task
    answers = classifier.answers(texts, AnswerOptions())
    options = {"aggregation_strategy": "first"} if task.is_per_token else {"top_k": None}
    pipeline = transformers.pipeline(task.pipeline_tag, model=folder.path, device="cpu", **options)
    given = [{"text": t[0], "text_pair": t[1]} if isinstance(t, tuple) else t for t in texts]
    for text, ours in zip(given, answers, strict=True):
        theirs = pipeline(text)
        theirs = (
            theirs[0]
            if isinstance(theirs[0:1], list) and theirs and isinstance(theirs[0], list)
            else theirs
        )
        assert len(theirs) == len(ours)
        if task.is_per_token:
            keys = ("entity_group", "start", "end")
            assert [[e[k] for k in keys] for e in theirs] == [[e[k] for k in keys] for e in ours]
            continue
        found = {each["label"]: each["score"] for each in theirs}
        for each in ours:
            assert each["score"] == pytest.approx(found[each["label"]], abs=1e-4, rel=1e-4)


def test_the_words_that_decided_are_explained(trained):
    name, folder, texts = trained
    explanation = Explainer(TextClassifier(folder, precision="fp32")).explain(texts[0])
    assert explanation.words
    assert explanation.error <= 0.05 * max(1.0, abs(explanation.margin))
    whole = texts[0] if isinstance(texts[0], tuple) else (texts[0],)
    for word in explanation.words:
        assert whole[word.input][word.start : word.end] == word.text


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            [{"text": "a", "label": "x"}],
            {"pair_column": "other"},
            "no column 'other'; set pair_column to one of: text, label",
        ),
        (
            [{"sentence1": "a", "sentence2": "", "label": "x"}],
            {},
            "line 1: pair: empty",
        ),
        (
            [{"tokens": ["a", "b"], "tags": ["O"]}],
            {},
            r"line 1: tags do not fit the words \(1 tags, 2 words\)",
        ),
        (
            [{"text": "a", "label": 0.5}, {"text": "b", "label": float("nan")}],
            {"task": "regression"},
            r"line 2: target is not finite \(nan\)",
        ),
        (
            [{"text": "Anna and Bob", "label": [[0, 8, "P"], [5, 12, "P"]]}],
            {"task": "token_classification"},
            r"line 1: spans overlap \(\[0, 8, 'P'\] and \[5, 12, 'P'\]\)",
        ),
        (
            [{"text": "Anna", "label": [[0, 9, "P"]]}],
            {"task": "token_classification"},
            "line 1: span is outside of the text",
        ),
        (
            [{"text": "a", "label": "low"}, {"text": "b", "label": "high"}],
            {"task": "ordinal"},
            "labels such as 'low' is not known; list all labels from the lowest to the highest",
        ),
        (
            [{"text": "a", "label": ["x"]}, {"text": "b", "label": ["z"]}],
            {"labels": ["x", "y"]},
            r"line 2: label 'z' is not one of labels=\['x', 'y'\]",
        ),
    ],
)
def test_bad_rows_are_one_line(folder, rows, settings, message):
    folder.write_text("bad.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    task = settings.pop("task", "auto")
    source = {"path": (folder / "bad.jsonl").uri, **settings}
    config = build(FinetuneConfig, {"source": source, "task": task}, "test")
    with pytest.raises(DataError, match=message):
        resolved = resolve_source(config.source, task)
        tokenizer = tokenizer_of(["a b"])
        prepare_texts(config, tokenizer, 32, 0, folder / "data")
        raise AssertionError(resolved)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("regression", {"label_smoothing": 0.1}, "finetune.label_smoothing=0.1 has no effect on"),
        ("regression", {"class_weights": "balanced"}, "finetune.class_weights=balanced has no"),
        ("token_classification", {"head_share": 0.5}, "finetune.head_share=0.5 has no effect on"),
        ("token_classification", {"head": {"pooling": "max"}}, "finetune.head.pooling=max has no"),
    ],
)
def test_settings_without_effect_are_refused(folder, name, settings, message):
    with pytest.raises(ConfigError, match=message):
        spec_of(folder, name, steps=2, **settings).check()
    spec_of(folder, name, steps=2).check()


def test_patience_ends_training_early(folder):
    spec = spec_of(folder, "single_label", steps=200, evaluations=50, patience=2, lr=0.5)
    attempt = Attempt(spec, folder / "run")
    attempt.run()
    assert attempt.loop.progress.step < 100
    assert "stopped early" in attempt.events()


def test_a_directory_of_an_unknown_problem_is_one_line(folder):
    config = {"architectures": ["BertForSequenceClassification"], "problem_type": "ranking"}
    with pytest.raises(UserError, match="problem_type=ranking .*; raybert reads .*regression"):
        task_of_config_json(config, ["a", "b"], "there")


@pytest.mark.parametrize(
    ("config", "labels", "expected"),
    [
        ({}, 2, "single_label"),
        ({"problem_type": "single_label_classification"}, 1, "single_label"),
        ({}, 1, "multi_label"),  # one output without a problem type: a sigmoid, as in transformers
        ({"problem_type": "multi_label_classification"}, 3, "multi_label"),
        ({"problem_type": "regression"}, 1, "regression"),
        ({"architectures": ["ModernBertForTokenClassification"]}, 5, "token_classification"),
    ],
)
def test_directories_of_others_are_recognized(config, labels, expected):
    names = [f"LABEL_{i}" for i in range(labels)]
    assert task_of_config_json(config, names, "there").name == expected


@pytest.mark.parametrize("name", ["single_label", "multi_label", "regression"])
@pytest.mark.parametrize("head", [{"kind": "keras"}, {"pooling": "max"}])
def test_models_that_transformers_can_not_load_are_read_back(folder, name, head):
    spec = spec_of(folder, name, steps=2, head=head)
    train_in_process(spec, folder / "run", on_progress=lambda record: None)
    classifier = TextClassifier(folder / "run" / "model", precision="fp32")
    assert classifier.task.name == name
    assert classifier.answers(["the team"], AnswerOptions())


def test_pairs_are_refused_by_a_task_on_tokens(folder):
    folder.write_text("a.jsonl", '{"text": "a", "other": "b", "label": [[0, 1, "X"]]}\n')
    source = {"path": (folder / "a.jsonl").uri, "pair_column": "other"}
    config = build(FinetuneConfig, {"source": source, "task": "token_classification"}, "test")
    with pytest.raises(DataError, match="pair_column=other: token_classification reads one text"):
        resolve_source(config.source, config.task)


def test_a_damaged_temperature_is_one_line(folder):
    spec = spec_of(folder, "single_label", steps=2)
    train_in_process(spec, folder / "run", on_progress=lambda record: None)
    model = folder / "run" / "model"
    config = model.read_json("config.json")
    assert "temperature" not in {**config["raybert"], **config["raybert"]["task"]["fitted"]}
    config["raybert"]["temperature"] = "hot"
    model.write_json("config.json", config)
    with pytest.raises(
        DamagedError, match="raybert.temperature='hot': input should be a valid number"
    ):
        read_task(model)

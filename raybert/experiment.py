"""The configuration file: a section for each stage, from raw text to serving."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from raybert.cluster.session import RayConfig
from raybert.config import KeyOf, Settings, flatten
from raybert.data.corpus.settings import CorpusConfig
from raybert.data.sources.settings import EvaluationSource
from raybert.errors import UserError
from raybert.model.settings import ModelConfig
from raybert.model.sizes import with_size
from raybert.serve.settings import ServeConfig
from raybert.storage.folder import Folder, check_address
from raybert.storage.registry import REGISTRY
from raybert.tasks.settings import FinetuneConfig, PretrainConfig
from raybert.train.trackers import TRACKERS
from raybert.tune.settings import TuneConfig

TrackerName = Annotated[str, KeyOf(TRACKERS)]


class RunConfig(Settings):
    """Name and location of an experiment."""

    name: str = Field(
        "default", description="name of the experiment's folder; the same name resumes"
    )
    storage: str = Field(
        "runs", description="the folder of all experiments: a path, or a URI that pyarrow reads"
    )

    license: str | None = Field(
        None, description="of the models, as apache-2.0, for their cards; null: not stated"
    )
    language: str | None = Field(
        None, description="of the texts, as en or de, for model cards; null: not stated"
    )
    trackers: list[TrackerName] = Field(
        [],
        description="where the curves of training are shown as well: tensorboard (in the run's "
        "folder), mlflow, wandb; these two by their own environment variables; one that is not "
        "installed, down or slow costs a warning",
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError(
                f"run.name={value!r} is not a valid folder name; use letters, digits, . _ -"
            )
        if value == REGISTRY:
            raise ValueError(
                f"run.name={value!r} is the folder of registered models; choose another"
            )
        return value


class EvaluateConfig(Settings):
    """Evaluation of the finished classifier."""

    source: EvaluationSource = Field(
        EvaluationSource(),
        description="labelled test texts, which no stage uses for training or selection",
    )
    behaviour_texts: int = Field(
        200,
        ge=0,
        description="test texts that are changed (typos, case, names, negation, cut) to see "
        "whether the answers stay; 0: none",
    )


class Experiment(Settings):
    """All settings of a configuration file."""

    run: RunConfig = RunConfig()
    corpus: CorpusConfig = CorpusConfig()
    model: ModelConfig = ModelConfig()
    pretrain: PretrainConfig = PretrainConfig.model_validate({})
    finetune: FinetuneConfig = FinetuneConfig.model_validate({})
    tune: TuneConfig = TuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    serve: ServeConfig = ServeConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_in_size(cls, values: Any) -> Any:
        return with_size(values) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _check_credentials(self) -> Self:
        for key, value in flatten(self.model_dump(mode="json")):
            for text in value if isinstance(value, list) else [value]:
                try:
                    check_address(str(text))
                except UserError as error:
                    raise ValueError(f"{key}: {error}") from None
        return self

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        for key, source in (
            ("corpus.overlap", self.corpus.overlap),
            ("finetune.validation", self.finetune.validation),
            ("finetune.distill.unlabelled", self.finetune.distill.unlabelled),
            ("finetune.unlabelled", self.finetune.unlabelled),
        ):
            if source is not None and source.path is None:
                raise ValueError(f"{key}.path is not set; name its texts, or leave {key} out")
        return self

    @property
    def folder(self) -> Folder:
        """The experiment's folder, which holds a folder for each stage."""
        return Folder(self.run.storage) / self.run.name

"""The settings of `pretrain`, and of `finetune` with its texts and its teacher."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raybert.config import KeyOf, Settings
from raybert.data.masking import MaskingConfig
from raybert.data.sources.settings import SourceConfig
from raybert.model.settings import HeadConfig
from raybert.tasks.registry import TASKS
from raybert.train.settings import TrainConfig
from raybert.train.sharding import Sharding

TaskName = Annotated[str, KeyOf(TASKS, "auto")]


class PretrainConfig(TrainConfig):
    """How an encoder is pretrained."""

    section: ClassVar = "pretrain"
    default_epochs: ClassVar = 10

    epochs: float | None = Field(None, gt=0, description="limit in passes over the corpus")
    masking: MaskingConfig = MaskingConfig()
    packed_documents: Literal["separate", "joined"] = Field(
        "separate",
        description="whether documents packed into one row attend to each other; in equal time, "
        "separate ones end 0.07 nats lower (benchmarks/results/packed-20261125.json)",
    )
    initialize_from: str | None = Field(
        None, description="a model/ folder whose weights training starts from; null: random"
    )
    milestones: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=list,
        description="steps whose checkpoints are kept for ever, for runs that branch from them",
    )
    branch_from: str | None = Field(
        None,
        description="a checkpoint of another run of pretraining that this one goes on from, as "
        "runs/base@5000; what may differ is what may on resume, as its length",
    )
    sharding: Sharding = Field(
        "none",
        description="what each worker has only a part of; optimizer: the optimizer's states and "
        "the summed gradients (ZeRO), as many bytes sent as without; full: the weights, too, each "
        "layer's gathered before it computes (FSDP)",
    )
    evaluation_rows: int = Field(2048, ge=1, description="held-out rows that are evaluated on")
    examples: list[str] | None = Field(
        None,
        description="sentences with [MASK] whose five most probable fillings are logged at every "
        "evaluation; null: three of the held-out text",
    )

    @property
    def shards(self) -> Sharding:
        """What each worker has only a part of."""
        return self.sharding

    @property
    def kept_steps(self) -> frozenset[int]:
        """Steps whose checkpoints are kept for ever."""
        return frozenset(self.milestones)


class DistillConfig(Settings):
    """What a teacher adds to the labels (arXiv 1503.02531)."""

    teacher: str | list[str] | None = Field(
        None,
        description="a model that teaches, an ensemble, or several models whose probabilities are "
        "averaged; baseline: a linear model on n-grams, of the other folds of the texts; null: "
        "labels alone",
    )
    share: float = Field(
        0.5, gt=0, le=1, description="share of the teacher in the loss of a labelled text"
    )
    temperature: float = Field(2.0, gt=0, description="divisor of both models' logits")
    unlabelled: SourceConfig | None = Field(
        None, description="further texts without labels, which are learned from the teacher alone"
    )

    @model_validator(mode="after")
    def _unlabelled_texts_need_a_teacher(self) -> Self:
        if self.unlabelled is not None and self.teacher is None:
            raise ValueError(
                "unlabelled texts need an answer to learn; name a model with finetune.distill."
                "teacher"
            )
        return self

    @property
    def teachers(self) -> list[str]:
        """The configured models as a list."""
        given = self.teacher or []
        return [given] if isinstance(given, str) else given


class TextsConfig(Settings):
    """Which labelled texts a model is trained and selected on, and how much of each it reads."""

    task: TaskName = Field(
        "auto",
        description="what is learned: single_label, multi_label, regression, token_classification; "
        "auto: what the labels look like",
    )
    source: SourceConfig = Field(SourceConfig(), description="labelled texts to train on")
    validation: SourceConfig | None = Field(
        None, description="labelled texts to validate on; null: a share of the source is set apart"
    )
    validation_fraction: float = Field(
        0.1, gt=0, lt=1, description="share of the source that is set apart for validation"
    )
    validation_split: Literal["random", "stratified"] = Field(
        "random",
        description="how that share is chosen: by a hash of the text, or as much of each label",
    )
    seq_len: int | None = Field(None, ge=8, description="most tokens of a text; null: the model's")
    head_share: float = Field(
        0.25, gt=0, le=1, description="share of the tokens that a longer text keeps from its start"
    )
    distill: DistillConfig = DistillConfig()


class LoraConfig(Settings):
    """LoRA: adapters learn in place of the encoder, and are merged into the finished model."""

    rank: int = Field(
        0,
        ge=0,
        description="rank of the adapters (arXiv 2106.09685) that learn in place of the encoder's "
        "matrices, 8 for instance, with a learning rate about ten times as high, as --from sets "
        "it; the optimizer then holds states of adapters and head alone; 0: the whole encoder "
        "learns",
    )
    alpha: float = Field(16.0, gt=0, description="factor of the adapters, divided by their rank")


class FinetuneConfig(TextsConfig, TrainConfig):
    """How a classifier is fine-tuned: the settings of training, with other defaults, and more."""

    section: ClassVar = "finetune"
    default_epochs: ClassVar = 3

    initialize_from: str = Field(
        "pretrain",
        description="pretrain: the model of this experiment's pretraining; scratch: random "
        "weights; or a folder with a model/ of raybert's or of Hugging Face's",
    )
    unlabelled: SourceConfig | None = Field(
        None,
        description="further texts without labels: the fine-tuned model labels them, and students "
        "learn from its probabilities; the best on the validation texts is kept",
    )
    rounds: int = Field(
        2, ge=1, description="students one after the other, each taught by the one before"
    )
    head: HeadConfig = HeadConfig()
    dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="dropout probability in the encoder; higher than in pretraining, because "
        "each text is seen in several epochs",
    )
    lora: LoraConfig = LoraConfig()
    frozen_epochs: float = Field(0, ge=0, description="epochs in which only the head learns")
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="factor of each layer's learning rate relative to the layer above it",
    )
    metric: str | None = Field(
        None,
        description="the validation metric that selects the best weights and the winner of a "
        "search, as f1_macro; null: the task's own",
    )
    baseline: bool = Field(
        True,
        description="whether a linear model on n-grams is fitted on the same texts, which takes "
        "seconds, and shown beside the model",
    )
    ngrams: Literal["auto", "on", "off"] = Field(
        "auto",
        description="whether the model keeps that linear model beside its encoder and answers with "
        "both; auto: if that is better on the validation texts by more than chance",
    )
    focal_gamma: float = Field(
        0.0,
        ge=0,
        description="focal loss (arXiv 1708.02002): weight of hard texts or tokens, 2 for instance",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of the target that is spread over all labels"
    )
    class_weights: Literal["balanced"] | list[float] | None = Field(
        None, description="weight of each label's loss; balanced: by inverse frequency"
    )
    r_drop: float = Field(
        0.0,
        ge=0,
        description="R-Drop (arXiv 2106.14448): weight of the divergence between two passes with "
        "different dropout, 1 for instance; a step takes twice as long",
    )
    adversarial: float = Field(
        0.0,
        ge=0,
        description="virtual adversarial training (arXiv 1605.07725): weight of the divergence "
        "that an adversarial shift of the embeddings causes, 1 for instance; a step takes three "
        "times as long",
    )
    adversarial_size: float = Field(
        0.03, gt=0, description="norm of that shift, as a share of the norm of the embeddings"
    )

    global_batch_size: int = Field(32, ge=1, description="texts in an optimizer step")
    micro_batch_size: int = Field(16, ge=1, description="texts in one forward pass")
    epochs: float | None = Field(None, gt=0, description="limit in passes over the texts")
    lr: float = Field(5e-4, gt=0, description="peak learning rate")
    evaluations: int | None = Field(
        None, ge=1, description="evaluations spread evenly over the run; null: after every epoch"
    )

    @model_validator(mode="after")
    def _one_teacher(self) -> Self:
        if self.unlabelled is not None and self.distill.teacher is not None:
            raise ValueError(
                "unlabelled texts are labelled by this run's own model; leave "
                "finetune.distill.teacher out, or name the texts as finetune.distill.unlabelled"
            )
        return self

    @model_validator(mode="after")
    def _adversarial_needs_an_uncompiled_model(self) -> Self:
        if self.compile and self.adversarial > 0:
            raise ValueError(
                f"adversarial={self.adversarial:g} shifts embeddings, which a compiled model does "
                "not notice; set compile=false, or adversarial=0"
            )
        return self

"""Masked pretraining with Hugging Face's Trainer and BertForMaskedLM, after its documentation.

The collator draws the masks of each batch; the model projects every position onto the vocabulary.
Trainer's defaults are kept (fused AdamW, clipping at 1.0, no compilation); saving, reporting and
the progress bar are off, which can only make it faster.
"""

from __future__ import annotations

import tempfile

from common import MASK_RATE, Shape, Stopwatch, parse_arguments, random_rows

ARGUMENTS = parse_arguments(__doc__.splitlines()[0], precisions=("bf16", "fp32"))

import torch  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


def build_model(shape: Shape) -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            intermediate_size=shape.intermediate_size,
            max_position_embeddings=shape.seq_len,
        )
    )


def build_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """A tokenizer of invented words: the collator needs its special ids and its size."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + [f"word{i}" for i in range(len(special), shape.vocab_size)]
    vocabulary = {word: i for i, word in enumerate(words)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


class Clock(TrainerCallback):
    """Stops training when enough steps are timed."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Count the step."""
        if self.stopwatch.step_ended():
            control.should_training_stop = True


def main() -> None:
    shape = ARGUMENTS.shape
    torch.set_num_threads(ARGUMENTS.threads)
    torch.manual_seed(0)
    model = build_model(shape)
    stopwatch = Stopwatch(ARGUMENTS)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                use_cpu=True,
                bf16=ARGUMENTS.precision == "bf16",
                per_device_train_batch_size=shape.batch_size,
                learning_rate=1e-3,
                max_steps=1_000_000,  # Clock stops it
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=[{"input_ids": row} for row in random_rows(shape)],
            data_collator=DataCollatorForLanguageModeling(
                build_tokenizer(shape), mlm_probability=MASK_RATE
            ),
            callbacks=[Clock(stopwatch)],
        )
        outcome = trainer.train()
    stopwatch.print_result(
        outcome.training_loss,  # the mean over all steps
        ("transformers", "accelerate", "torch"),
        parameters=model.num_parameters(),
    )


if __name__ == "__main__":
    main()

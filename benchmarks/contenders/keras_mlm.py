"""The model of Keras' example "End-to-end Masked Language Modeling with BERT", trained by `fit`.

Reimplemented from the example's description: the sum of token and position embeddings, post-norm
encoder layers, and a softmax over the vocabulary at *every* position, with a loss of weight 1 at
masked positions and 0 elsewhere. The masks are drawn once before training, as in the example.
Keras' defaults are kept (on TensorFlow, `jit_compile="auto"` compiles the step). The environment
variable KERAS_BACKEND selects the backend: tensorflow or torch.

Legend: B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import os

from common import MASK_ID, MASK_RATE, NUM_SPECIAL, Shape, Stopwatch, parse_arguments, random_rows

ARGUMENTS = parse_arguments(__doc__.splitlines()[0])  # before Keras: it sets the thread pools
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras  # noqa: E402
import numpy as np  # noqa: E402

LEARNING_RATE = 1e-3
DROPOUT = 0.1


class PositionEmbedding(keras.layers.Layer):
    """Adds a trained vector for each position."""

    def build(self, input_shape: tuple[int | None, int, int]) -> None:
        """Create the table [T, D]."""
        self.table = self.add_weight(shape=input_shape[1:], initializer="glorot_uniform")

    def call(self, embedded):
        """Add it: [B, T, D] -> [B, T, D]."""
        return embedded + self.table


class MaskedLanguageModel(keras.Model):
    """Averages the cross-entropy over masked positions, by sample weights that are 0 elsewhere."""

    cross_entropy = keras.losses.SparseCategoricalCrossentropy(reduction=None)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Labels [B, T], probabilities [B, T, V], weights [B, T] -> mean over the masked."""
        loss = self.cross_entropy(y, y_pred, sample_weight=sample_weight)  # [B, T]
        return keras.ops.sum(loss) / keras.ops.sum(sample_weight)


def build_model(shape: Shape) -> keras.Model:
    ids = keras.Input((shape.seq_len,), dtype="int64")
    states = keras.layers.Embedding(shape.vocab_size, shape.hidden_size)(ids)  # [B, T, D]
    states = PositionEmbedding()(states)
    for _ in range(shape.num_layers):
        states = encoder_layer(states, shape)
    words = keras.layers.Dense(shape.vocab_size, activation="softmax")(states)  # [B, T, V]
    model = MaskedLanguageModel(ids, words)
    model.compile(optimizer=keras.optimizers.Adam(LEARNING_RATE))
    return model


def encoder_layer(states, shape: Shape):
    """Attention, then the feed-forward network, each with dropout, residual and norm: [B, T, D]."""
    attended = keras.layers.MultiHeadAttention(
        num_heads=shape.num_heads, key_dim=shape.hidden_size // shape.num_heads
    )(states, states)
    attended = keras.layers.Dropout(DROPOUT)(attended)
    states = keras.layers.LayerNormalization(epsilon=1e-6)(states + attended)
    hidden = keras.layers.Dense(shape.intermediate_size, activation="relu")(states)
    hidden = keras.layers.Dropout(DROPOUT)(keras.layers.Dense(shape.hidden_size)(hidden))
    return keras.layers.LayerNormalization(epsilon=1e-6)(states + hidden)


def mask(ids: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Replace 80% of the selected ids by [MASK], 10% by random ones: inputs and weights, [n, T]."""
    rng = np.random.default_rng(1)
    chosen = rng.random(ids.shape) < MASK_RATE
    fate = rng.random(ids.shape)
    inputs = np.where(chosen & (fate < 0.8), MASK_ID, ids)
    words = rng.integers(NUM_SPECIAL, vocab_size, ids.shape)
    inputs = np.where(chosen & (fate >= 0.8) & (fate < 0.9), words, inputs)
    return inputs, chosen.astype(np.float32)


class Clock(keras.callbacks.Callback):
    """Stops `fit` when enough steps are timed."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        super().__init__()
        self.stopwatch = stopwatch
        self.loss = float("nan")

    def on_train_batch_end(self, batch: int, logs: dict[str, float]) -> None:
        """Count the step; reading the loss waits for it to be computed."""
        self.loss = float(logs["loss"])
        if self.stopwatch.step_ended():
            self.model.stop_training = True


def main() -> None:
    shape = ARGUMENTS.shape
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(ARGUMENTS.threads)
        tf.config.threading.set_inter_op_parallelism_threads(ARGUMENTS.threads)
        packages = ("keras", "tensorflow-cpu")
    else:
        import torch

        torch.set_num_threads(ARGUMENTS.threads)
        packages = ("keras", "torch")
    keras.utils.set_random_seed(0)
    ids = random_rows(shape)
    inputs, weights = mask(ids, shape.vocab_size)
    model = build_model(shape)
    clock = Clock(Stopwatch(ARGUMENTS))
    model.fit(
        inputs,
        ids,
        sample_weight=weights,
        batch_size=shape.batch_size,
        epochs=1_000_000,  # Clock stops it
        callbacks=[clock],
        verbose=0,
    )
    clock.stopwatch.print_result(
        clock.loss,
        packages,
        backend=keras.backend.backend(),
        jit_compile=bool(model.jit_compile),
        parameters=model.count_params(),
    )


if __name__ == "__main__":
    main()

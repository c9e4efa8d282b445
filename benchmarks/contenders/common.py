"""Shapes, data and timing that all peers share.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

MASK_RATE = 0.15
NUM_SPECIAL = 5  # ids 0..4, in BERT's order: [PAD] [UNK] [CLS] [SEP] [MASK]
MASK_ID = 4
NUM_BATCHES = 16  # distinct ones, which peers repeat until the time is over


@dataclass(frozen=True)
class Shape:
    """An encoder and the batches that it trains on."""

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    batch_size: int  # sequences
    seq_len: int

    @property
    def tokens_per_step(self) -> int:
        """B * T: every position counts, masked or not."""
        return self.batch_size * self.seq_len


SHAPES = {
    "keras": Shape(1, 128, 8, 128, 30_000, 32, 256),
    "small": Shape(4, 256, 4, 1024, 8_192, 64, 128),
}


@dataclass(frozen=True)
class Arguments:
    """The command-line arguments of a peer."""

    shape: Shape
    seconds: float
    min_steps: int
    warmup_steps: int
    threads: int
    precision: str


def parse_arguments(description: str, precisions: tuple[str, ...] = ("fp32",)) -> Arguments:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shape", choices=SHAPES, default="keras")
    parser.add_argument("--seconds", type=float, default=30, help="measure for at least this long")
    parser.add_argument("--min-steps", type=int, default=4, help="and at least this many steps")
    parser.add_argument("--warmup-steps", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=precisions, default=precisions[0])
    values = vars(parser.parse_args())
    # Read once, when NumPy, TensorFlow and torch create their thread pools.
    os.environ["OMP_NUM_THREADS"] = str(values["threads"])
    return Arguments(**values | {"shape": SHAPES[values["shape"]]})


def random_rows(shape: Shape, seed: int = 0) -> np.ndarray:
    """Uniformly random ids without special ones: [NUM_BATCHES * B, T] int64.

    Speed does not depend on the ids; random ones need neither data nor tokenizer.
    """
    rng = np.random.default_rng(seed)
    size = (NUM_BATCHES * shape.batch_size, shape.seq_len)
    return rng.integers(NUM_SPECIAL, shape.vocab_size, size)


class Stopwatch:
    """Times steps after the warm-up, until both the seconds and the steps are reached."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        self.seen = 0
        self.started = self.ended = 0.0

    @property
    def steps(self) -> int:
        """Steps measured so far."""
        return max(self.seen - self.arguments.warmup_steps, 0)

    def step_ended(self) -> bool:
        """Count a step; return True once enough is measured."""
        self.seen += 1
        self.ended = time.perf_counter()
        if self.steps == 0:
            self.started = self.ended
            return False
        elapsed = self.ended - self.started
        return elapsed >= self.arguments.seconds and self.steps >= self.arguments.min_steps

    def print_result(self, loss: float, packages: tuple[str, ...], **more: object) -> None:
        """Print the peer's result as JSON, the last line of its standard output."""
        result: Mapping[str, object] = {
            "tokens_per_second": self.steps
            * self.arguments.shape.tokens_per_step
            / (self.ended - self.started),
            "steps": self.steps,
            "seconds": self.ended - self.started,
            "warmup_steps": self.arguments.warmup_steps,
            "threads": self.arguments.threads,
            "precision": self.arguments.precision,
            "loss": loss,
            "versions": {name: version(name) for name in packages},
            **more,
        }
        print(json.dumps(result), flush=True)

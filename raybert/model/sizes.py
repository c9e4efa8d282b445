"""`model.size`: the shape of an encoder, and learning rates and batches that suit its width.

The rules only fill in what a configuration leaves out. Widths and depths are those of BERT (arXiv
1810.04805) and of its small versions (arXiv 1908.08962).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

SizeName = Literal["tiny", "mini", "small", "base", "large"]


class Shape(NamedTuple):
    """Layers and width of an encoder."""

    num_layers: int
    hidden_size: int


SHAPES: dict[str, Shape] = {
    "tiny": Shape(2, 128),
    "mini": Shape(4, 256),
    "small": Shape(4, 512),
    "base": Shape(12, 768),
    "large": Shape(24, 1024),
}
#: What a size decides where the configuration does not, by section.
DECIDED = {
    "model": ("hidden_size", "num_layers", "num_heads"),
    "pretrain": ("lr", "global_batch_size", "micro_batch_size"),
    "finetune": ("lr", "micro_batch_size"),
}
HEAD_SIZE = 64  # dimensions of an attention head, in BERT models of all sizes


def heads_of(width: int) -> int:
    """The most attention heads of at least 64 dimensions that divide a width evenly."""
    most = max(1, width // HEAD_SIZE)
    return next(n for n in range(most, 0, -1) if width % n == 0)


def pretraining_lr(width: int) -> float:
    """The peak learning rate of pretraining: 2e-3 at width 128, and inversely to the width.

    Adam's best rate for a matrix falls with its width (arXiv 2203.03466). 2e-3 is the demo's, and
    at 768 the rule gives 3.3e-4: BERT has 1e-4, ModernBERT with larger batches 8e-4.
    """
    return _rounded(2e-3 * 128 / width)


def finetuning_lr(width: int) -> float:
    """The peak learning rate of fine-tuning: 1e-3 at width 128, falling faster than the width.

    It joins the demo's 1e-3 with BERT's 5e-5 at 768: the larger a model, the more of what it knows
    a large rate would destroy.
    """
    return _rounded(1e-3 * (128 / width) ** 1.5)


def continued_lr(width: int) -> float:
    """The peak learning rate of pretraining a published encoder further: half of the rule's.

    At width 768 that is 1.7e-4; arXiv 2004.10964 has 1e-4 to 5e-4.
    """
    return _rounded(1e-3 * 128 / width)


def published_lr(width: int) -> float:
    """The peak learning rate of fine-tuning a published encoder: half of the rule's.

    Pretrained far longer than a model of one's own, it has more to lose: 3.4e-5 at width 768, where
    BERT's authors searched 2e-5 to 5e-5.
    """
    return _rounded(0.5e-3 * (128 / width) ** 1.5)


def pretraining_batch(width: int) -> int:
    """Sequences in a step: the power of two nearest to half the width, 64 at 128, 512 at 768.

    A small model on a small budget gains more from many steps than from exact gradients.
    """
    return _power_of_two(width / 2, 64, 512)


def micro_batch(width: int, most: int) -> int:
    """Sequences in one forward pass: fewer in wide models, whose activations take more memory."""
    return min(most, _power_of_two(16_384 / width, 1, most))


def with_size(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a configuration with those that its `model.size` decides and it leaves out.

    Raises:
        ValueError: width and layers are set, too, and neither is the size's.
    """
    filled = dict(values)
    model = _section(values, "model")
    shape = SHAPES.get(str(model.get("size")))
    if shape is None:
        return filled
    given = {name: model[name] for name in Shape._fields if model.get(name) is not None}
    if len(given) == 2 and all(getattr(shape, name) != value for name, value in given.items()):
        shown = " and ".join(f"model.{name}={value}" for name, value in given.items())
        raise ValueError(
            f"model.size={model['size']} decides width and layers, and {shown} are set, too; "
            "remove them, or leave model.size out"
        )
    width = given.get("hidden_size", shape.hidden_size)
    if not isinstance(width, int) or width < 1:  # which is refused later
        return filled
    decided: dict[str, dict[str, Any]] = {
        "model": {**shape._asdict(), "num_heads": heads_of(width)},
        "pretrain": {"lr": pretraining_lr(width), **_batches(values, "pretrain", width)},
        "finetune": {"lr": finetuning_lr(width), **_batches(values, "finetune", width)},
    }
    return fill(filled, decided)


def fill(values: Mapping[str, Any], decided: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The values of a configuration, with those of sections that it leaves out."""
    filled = dict(values)
    for name, settings in decided.items():
        own = filled.get(name) or {}
        if isinstance(own, Mapping):  # anything else is refused later
            filled[name] = {**own, **{k: v for k, v in settings.items() if own.get(k) is None}}
    return filled


def _batches(values: Mapping[str, Any], section: str, width: int) -> dict[str, int]:
    """Batch sizes that divide, also where one of them is set."""
    own, most = _section(values, section), 32 if section == "pretrain" else 16
    batch = own.get("global_batch_size")
    micro = own.get("micro_batch_size") or micro_batch(width, most)
    if not isinstance(micro, int) or micro < 1:
        return {}
    if batch is None:
        batch = pretraining_batch(width) if section == "pretrain" else 32
        return {"global_batch_size": -(-batch // micro) * micro, "micro_batch_size": micro}
    while isinstance(batch, int) and micro > 1 and batch % micro:
        micro //= 2
    return {"micro_batch_size": micro}


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}


def _power_of_two(value: float, least: int, most: int) -> int:
    """The power of two nearest to a value, as a ratio, within bounds."""
    power = 1
    while power * 2**0.5 < value:
        power *= 2
    return min(max(power, least), most)


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")

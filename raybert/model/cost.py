"""The size of a model and the arithmetic of training it."""

from __future__ import annotations

from torch import nn

from raybert.model.settings import ModelConfig


def num_parameters(model: nn.Module) -> int:
    """Count a model's parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(
    config: ModelConfig, seq_len: int, vocab_size: int = 0, masked_fraction: float = 0.0
) -> float:
    """Floating-point operations of training on one token, forward and backward, for MFU.

    A matrix product costs 2 operations per weight and token, and its backward pass twice as much:
    6 in all. Attention adds two products of T x H per head and token: 4 T D per layer forward, 12
    with backward (PaLM, arXiv 2204.02311, appendix B, without its causal half); a local layer's T
    is its window. The prediction head, D^2 + D V weights, runs on the masked positions only;
    `vocab_size` is V, 0 without that head. Embedding look-ups, norms and activations are not
    counted.
    """
    hidden, feed_forward = config.hidden_size, config.feed_forward_size
    matrices = 3 if config.layout == "modern" else 2
    layer = 4 * hidden**2 + matrices * hidden * feed_forward
    seq_len = min(seq_len, config.max_seq_len)
    window = min(seq_len, config.local_attention // 2 * 2 + 1)
    seen = [window if config.is_local(i) else seq_len for i in range(config.num_layers)]
    attention = 2 * hidden * sum(seen) / config.num_layers
    head = masked_fraction * (hidden**2 + hidden * vocab_size) if vocab_size else 0.0
    return 6.0 * (config.num_layers * (layer + attention) + head)

"""What `/info` tells: which models a replica holds, with text-embeddings-inference's keys."""

from __future__ import annotations

from typing import Any

from raybert import __version__
from raybert.serve.runtime.loaded_models import LoadedModels
from raybert.serve.settings import ServeConfig


def describe(config: ServeConfig, catalog: LoadedModels) -> dict[str, Any]:
    """What is served, with the keys of text-embeddings-inference where it has them."""
    first, filler, canary = catalog.first, catalog.filler, catalog.canary
    labels = first.labels if first else []
    found: dict[str, Any] = {
        "model_id": first.name if first else catalog.filler_name,
        "labels": labels,
        "max_input_length": first.classifier.longest if first else filler and filler.longest,
        "mask_token": filler and filler.mask_token,
        "explain": config.explain and first is not None,
        "long_texts": config.long_texts,
        "max_client_batch_size": config.max_texts,
        "models": [{"name": s.name, "version": s.version} for s in catalog.served.values()],
        "version": __version__,
    }
    if first:
        found |= {
            "model_sha": first.weights,
            "model_dtype": first.classifier.precision,
            "model_type": {
                "classifier": {
                    "id2label": {str(i): label for i, label in enumerate(labels)},
                    "label2id": {label: i for i, label in enumerate(labels)},
                }
            },
            "temperature": first.classifier.temperature,
            "max_batch_tokens": first.classifier.tokens_per_batch,
        }
    if canary and config.canary:
        share = config.canary.share
        found["canary"] = {"name": canary.name, "version": canary.version, "share": share}
    return found

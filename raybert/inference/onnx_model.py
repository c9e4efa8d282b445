"""A classifier as an ONNX graph: written, quantized to int8, and run by onnxruntime.

The graph has the inputs `input_ids` and `attention_mask`, int64 [B, T], and the output `logits`,
fp32 [B, L] or [B, T, L]; B and T are dynamic. An n-gram part is not in it.

Shapes: B texts, T tokens, L labels.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raybert.errors import UserError
from raybert.inference.classifier import TextClassifier
from raybert.model.heads import Classifier
from raybert.storage.folder import Folder

_OPSET = 18
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_ONE_FILE_BYTES = 1_800_000_000  # of weights; protobuf's messages have 2 GiB at most


def check_onnx() -> None:
    """Raise UserError if what the export needs is not installed."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format onnx needs {', '.join(missing)}, which is not installed; "
            "pip install 'raybert[onnx]'"
        )


class _Graph(nn.Module):
    """What is exported: int64 inputs, as those of transformers' models."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids, attention_mask.bool())
        return logits


def write_onnx(folder: Folder, path: Path) -> None:
    """Write the classifier of a model directory as an ONNX file."""
    from raybert.model import huggingface

    model, _ = huggingface.load_classifier(folder)
    longest, pad_id = model.encoder.config.max_seq_len, model.encoder.pad_id
    model.make_traceable()
    # Sizes that nothing else has, so that no dimension is taken for a constant.
    ids = torch.full((3, min(longest, 7)), pad_id)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=longest)}
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter about itself
            program: Any = torch.onnx.export(
                _Graph(model).eval(),
                (ids, torch.ones_like(ids)),
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes=(axes, axes),
                opset_version=_OPSET,
                dynamo=True,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    program.save(str(path), external_data=weights > _ONE_FILE_BYTES)


def quantize(path: Path, output: Path) -> None:
    """Write a copy of an ONNX file with int8 weights of its matrix products.

    Activations are quantized when the graph runs. Weights have 7 bits: sums of products of 8 bits
    overflow on x86 CPUs without VNNI.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it advises on the root logger
    try:
        quantize_dynamic(
            str(path),
            str(output),
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        logger.setLevel(level)


class OnnxClassifier(TextClassifier):
    """A classifier of a model directory whose encoder and head are an ONNX file's."""

    def __init__(self, folder: Folder, path: Path, threads: int | None = None) -> None:
        """Load the file; `threads` of onnxruntime, by default one for each core."""
        import onnxruntime

        super().__init__(folder, precision="fp32")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

        def compute(ids: Tensor, present: Tensor | None) -> Tensor:
            mask = torch.ones_like(ids) if present is None else present.long()
            inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
            return torch.from_numpy(session.run(["logits"], inputs)[0])

        self._compute = compute  # type: ignore[assignment]
        self._concatenates = False

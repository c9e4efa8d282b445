"""`raybert export`: a model in another format, checked against PyTorch on its validation texts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raybert.data.preprocess import Preprocessing
from raybert.errors import RaybertError, UserError
from raybert.inference.classifier import Row, TextClassifier
from raybert.inference.precision_choice import MAX_POINTS_LOST, points_lost, random_rows
from raybert.model.huggingface.config_schema import CONFIG_JSON
from raybert.model.huggingface.saving import TOKENIZER_FILES
from raybert.storage.folder import Folder
from raybert.tasks.prepared_texts import read_prepared_texts
from raybert.tasks.protocol import Outputs, Targets
from raybert.tasks.registry import read_task
from raybert.tasks.tokenized_texts import TokenizedTexts
from raybert.terminal.display import Display

MAX_DIFFERENCE = 1e-3  # of fp32 logits from PyTorch's
FP32_FILE, INT8_FILE, MEASURED = "model.onnx", "model_quantized.onnx", "onnx.json"
_MOST_TEXTS = 5000
_PASSES, _SECONDS = 3, 5.0  # over the texts, until so many seconds are spent


def export_onnx(model: Folder, output: Path, display: Display, *, int8: bool) -> dict[str, Any]:
    """Write a folder with the ONNX graph, the tokenizer and what was measured of it.

    Raises:
        UserError: a package is missing, or the folder can't be written.
        RaybertError: the graph's logits differ from PyTorch's.
    """
    from raybert.inference.onnx_model import OnnxClassifier, check_onnx, quantize, write_onnx

    check_onnx()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output} can't be written: {error.strerror}") from None
    classifier = TextClassifier(model, precision="fp32")
    task, _ = read_task(model)  # of the encoder, without an n-gram part
    rows, targets = _validation_texts(model, classifier)
    with display.stage("export"):
        display.progress("PyTorch's outputs")
        expected, seconds = _scored(classifier, rows)
        display.progress("tracing the model")
        write_onnx(model, output / FP32_FILE)
        files = {"fp32": FP32_FILE}
        if int8:
            display.progress("quantizing")
            quantize(output / FP32_FILE, output / INT8_FILE)
            files["int8"] = INT8_FILE
        metric = task.default_metric
        before = None if targets is None else task.evaluate(expected, targets)[metric]
        measured: dict[str, dict[str, float]] = {}
        for name, file in files.items():
            display.progress(f"onnxruntime, {name}: {len(rows):,} texts")
            outputs, took = _scored(OnnxClassifier(model, output / file), rows)
            found = {
                "max_difference": _difference(outputs, expected),
                "texts_per_second": round(len(rows) / took, 1),
            }
            if targets is not None and before is not None:
                found[metric] = float(task.evaluate(outputs, targets)[metric])
                found["points_lost"] = points_lost(task, before, found[metric])
            measured[name] = found
    for name in (*TOKENIZER_FILES, CONFIG_JSON):
        (output / name).write_bytes(model.read_bytes(name))
    result = {
        "folder": str(output),
        "files": list(files.values()),
        "texts": len(rows),
        "texts_from": "random words" if targets is None else "validation",
        "metric": metric,
        "pytorch": {
            **({} if before is None else {metric: float(before)}),
            "texts_per_second": round(len(rows) / seconds, 1),
        },
        "onnx": measured,
        "without_ngrams": classifier.ngrams is not None,
    }
    Folder(str(output)).write_json(MEASURED, result)
    difference = measured["fp32"]["max_difference"]
    if not difference <= MAX_DIFFERENCE:
        raise RaybertError(
            f"{output / FP32_FILE}: its logits differ from PyTorch's by up to {difference:.2g}, "
            f"more than {MAX_DIFFERENCE:g}; do not use it"
        )
    return result


def format_export(result: dict[str, Any]) -> str:
    """The measures, in lines."""
    metric, before = result["metric"], result["pytorch"]
    lines = [f"{result['folder']}: {', '.join(result['files'])}, the tokenizer, config.json"]
    of = "validation texts" if result["texts_from"] == "validation" else "texts of random words"
    lines.append(f"Measured on {result['texts']:,} {of}:")
    for name, found in (("PyTorch", before), *result["onnx"].items()):
        shown = f"{name:<8}{found['texts_per_second']:>10,.1f} texts/s"
        if metric in found:
            shown += f"  {metric} {found[metric]:.4f}"
        if "max_difference" in found:
            shown += f"  logits within {found['max_difference']:.2g}"
        lines.append(shown)
    lost = result["onnx"].get("int8", {}).get("points_lost", 0.0)
    if lost > MAX_POINTS_LOST:
        lines.append(f"warning: int8 loses {lost:.2f} points of {metric}; use {FP32_FILE}")
    if result["without_ngrams"]:
        lines.append("warning: the model's n-gram part is not in the graph; its scores are above")
    return "\n".join(lines)


def _validation_texts(
    model: Folder, classifier: TextClassifier
) -> tuple[list[Row], Targets | None]:
    """Token ids and targets of the texts that the model's run has prepared; else random words."""
    data = Folder.of_file(model.uri)[0] / "data"
    prepared = read_prepared_texts(data)
    if prepared is None or prepared.labels != classifier.labels:
        return list(random_rows(classifier)), None
    how = Preprocessing(prepared.seq_len, prepared.head_tokens)
    texts = TokenizedTexts.load(data, prepared.validation).shortened(how, classifier.tokenizer)
    return texts.input_ids[:_MOST_TEXTS], texts.labels[:_MOST_TEXTS]


def _scored(classifier: TextClassifier, rows: Sequence[Row]) -> tuple[Outputs, float]:
    """The outputs of rows, and the seconds that they took; of a few, when kernels are selected."""
    seconds: list[float] = []
    while not seconds or (len(seconds) < _PASSES and sum(seconds) < _SECONDS):
        begun = time.perf_counter()
        outputs = classifier.score(rows)
        seconds.append(time.perf_counter() - begun)
    return outputs, min(seconds)


def _difference(one: Outputs, other: Outputs) -> float:
    return max(float(np.abs(a - b).max(initial=0.0)) for a, b in zip(one, other, strict=True))

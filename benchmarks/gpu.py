"""Measure training and inference on one GPU, in 8 minutes at most, with PyTorch alone.

    python benchmarks/gpu.py --json results.json

Neither Ray nor pydantic nor a network is needed. It measures the ceiling of matrix products,
pretraining of several shapes (eager and compiled, both layouts, packed documents), memory, the loss
in bf16 against fp32, where the time of a step goes, and inference. What does not fit into the time
is left out, and what fails is named; the last line is one JSON object. `--device cpu --short` runs
every part of it on a small model in a minute.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def allow_no_pydantic() -> None:
    """Where pydantic is absent, make settings plain classes with the same defaults."""
    try:
        import pydantic  # noqa: F401
        import yaml  # noqa: F401
    except ImportError:
        pydantic = types.ModuleType("pydantic")
        pydantic.Field = lambda default=None, **_: default  # type: ignore[attr-defined]
        pydantic.model_validator = lambda **_: lambda method: method  # type: ignore[attr-defined]
        config = types.ModuleType("raybert.config")
        config.KeyOf = lambda *_: None  # type: ignore[attr-defined]
        config.Settings = type(  # type: ignore[attr-defined]
            "Settings", (), {"__init__": lambda self, **values: vars(self).update(values)}
        )
        sys.modules |= {"pydantic": pydantic, "raybert.config": config}


allow_no_pydantic()

from raybert.cluster.machine import device_name, keep_freed_memory  # noqa: E402
from raybert.model.cost import flops_per_token, num_parameters  # noqa: E402
from raybert.model.encoder import Encoder  # noqa: E402
from raybert.model.heads import MaskedLM  # noqa: E402
from raybert.model.settings import ModelConfig  # noqa: E402
from raybert.train.compiled_layers import CompiledLayers  # noqa: E402
from raybert.train.optimizers import OptimizerConfig, make_optimizer  # noqa: E402
from raybert.train.peaks import peak_flops  # noqa: E402

MASKED, DOCUMENT = 0.2, 230  # share of predicted tokens, and mean tokens of a packed document
SHAPES = {  # layers, hidden, heads, vocabulary
    "micro": (2, 64, 2, 1000),
    "tiny": (4, 256, 4, 30_522),
    "small": (6, 512, 8, 30_522),
    "base": (12, 768, 12, 30_522),
    "large": (24, 1024, 16, 30_522),
}


@dataclass(frozen=True)
class Case:
    """A model, its batches, and how it is run."""

    shape: str = "base"
    seq_len: int = 512
    rows: int = 64
    layout: str = "modern"
    compile: bool = False
    packed: bool = True  # documents are kept apart
    precision: str = "bf16"
    local: int = 1  # layers 0, n, 2n, ... attend globally
    optimizer: str = "adamw"

    def model(self, device: torch.device) -> MaskedLM:
        """The model with the same random weights each time."""
        layers, hidden, heads, vocabulary = SHAPES[self.shape]
        config = ModelConfig(
            layout=self.layout,
            num_layers=layers,
            hidden_size=hidden,
            num_heads=heads,
            max_seq_len=self.seq_len,
            global_attention_every=self.local,
        )
        torch.manual_seed(0)
        return MaskedLM(Encoder(config, vocabulary)).to(device)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.seq_len


CASES = [
    Case(),
    Case(compile=True),
    Case(compile=True, packed=False),
    Case(layout="classic", compile=True),
    Case("large", rows=32, compile=True),
    Case(seq_len=1024, rows=32, compile=True),
    Case("large", seq_len=1024, rows=16, compile=True),
    Case("small", compile=True),
    Case("tiny", rows=128, compile=True),
    Case("tiny", rows=128),
    Case(seq_len=8192, rows=4, compile=True, local=3),
    Case(compile=True, optimizer="muon"),
    Case(layout="classic"),
    Case("large", rows=32),
    Case(precision="fp32", rows=32),
]
SHORT = [
    Case("micro", 64, 4),
    Case("micro", 64, 4, compile=True),
    Case("micro", 64, 4, layout="classic", packed=False),
    Case("micro", 1024, 1, local=2, optimizer="muon", precision="fp32"),
]


class Trainer:
    """Takes steps on random batches, each with another number of predicted tokens."""

    def __init__(self, case: Case, device: torch.device, backend: str) -> None:
        self.case, self.device = case, device
        self.model = case.model(device)
        self.optimizer = make_optimizer(self.model, OptimizerConfig(optimizer=case.optimizer))
        self.compiled = CompiledLayers(self.model, backend) if case.compile else None
        self.draws = torch.Generator().manual_seed(1)
        most = case.tokens * MASKED + 6 * math.sqrt(case.tokens * MASKED)
        self.size = min(case.tokens, 64 * math.ceil(most / 64))

    def batch(self) -> dict[str, Any]:
        """Arguments of the model: token ids, and the positions and ids of predicted tokens."""
        case, draws = self.case, self.draws
        ids = torch.randint(5, SHAPES[case.shape][3], (case.rows, case.seq_len), generator=draws)
        at = (torch.rand(case.tokens, generator=draws) < MASKED).nonzero()[: self.size, 0]
        positions, labels = torch.zeros(self.size).long(), torch.full((self.size,), -100)
        positions[: len(at)], labels[: len(at)] = at, ids.flatten()[at]
        ids.view(-1)[at] = 4
        arguments: dict[str, Any] = {"labels": labels, "positions": positions, "input_ids": ids}
        if case.packed:
            starts = torch.rand(ids.shape, generator=draws) < 1 / DOCUMENT
            starts[:, 0] = True
            with autocast(self.device, case.precision):
                by_lengths = self.model.encoder.has_varlen_kernel(self.device)
            if by_lengths:
                begins = [*starts.flatten().nonzero()[:, 0].tolist(), case.tokens]
                arguments["lengths"] = [b - a for a, b in zip(begins, begins[1:], strict=False)]
                arguments["input_ids"] = ids.view(1, -1)
            else:
                arguments["document_ids"] = starts.long().cumsum(1)
        return {key: self.put(value) for key, value in arguments.items()}

    def put(self, value: Any) -> Any:
        """Copy a tensor to the device, for which nobody waits."""
        if not isinstance(value, torch.Tensor) or self.device.type == "cpu":
            return value
        return value.pin_memory().to(self.device, non_blocking=True)

    def step(self, batch: dict[str, Any]) -> torch.Tensor:
        """Forward, backward, clipping and the optimizer; the mean loss of a predicted token."""
        with (
            autocast(self.device, self.case.precision),
            nullcontext() if self.compiled is None else self.compiled.in_use(),
        ):
            total, _ = self.model(**batch)
        loss = total / (self.case.tokens * MASKED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], device: torch.device, least: float) -> float:
    """The median seconds of some work, over `least` seconds."""
    work()
    times: list[float] = []
    while sum(times) < least or len(times) < 3:
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def ceiling(device: torch.device, short: bool) -> dict[str, float]:
    """Operations per second of square matrix products, in TFLOP/s."""
    size = 512 if short else 8192
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = seconds_of(lambda a=a, b=b: a @ b, device, 0.1 if short else 1.0)
        found[str(dtype).removeprefix("torch.")] = round(2 * size**3 / seconds / 1e12, 2)
    return found


def train(case: Case, device: torch.device, short: bool, top: float) -> dict[str, Any]:
    """Train one case; `top` is the ceiling in FLOP/s."""
    backend = "aot_eager" if short else "inductor"
    trainer = Trainer(case, device, backend)
    batches = [trainer.batch() for _ in range(4)]
    began = time.perf_counter()
    for number in range(3):
        trainer.step(batches[number])
    synchronize(device)
    warm = time.perf_counter() - began
    counters = recompilations() if case.compile else {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        reserved = torch.cuda.memory_reserved()
    count, begin = 0, time.perf_counter()
    while count < 4 or time.perf_counter() - begin < (0.5 if short else 8):
        trainer.step(trainer.batch() if count % 8 == 0 else batches[count % 4])
        count += 1
        if count % 8 == 0:
            synchronize(device)  # so that the clock above is the GPU's
    synchronize(device)
    seconds = (time.perf_counter() - begin) / count
    layers, hidden, heads, vocabulary = SHAPES[case.shape]
    config = trainer.model.encoder.config
    flops = flops_per_token(config, case.seq_len, vocabulary, MASKED) * case.tokens / seconds
    peak = peak_flops(device)
    result = {
        "tokens_per_second": round(case.tokens / seconds),
        "milliseconds": round(1000 * seconds, 2),
        "parameters": num_parameters(trainer.model),
        "tflops": round(flops / 1e12, 3),
        "mfu": round(flops / peak, 4) if peak else None,
        "of_ceiling": round(flops / top, 4),
        "warm_up_seconds": round(warm, 1),
    }
    if case.compile:
        found = recompilations()
        result["graph_breaks"] = found["graph_breaks"]
        result["recompilations"] = found["graphs"] - counters["graphs"]
    if device.type == "cuda":
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        result["reserved_growth_gib"] = round((torch.cuda.memory_reserved() - reserved) / 2**30, 3)
    return result


def recompilations() -> dict[str, int]:
    from torch._dynamo.utils import counters

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }


def loss_curve(device: torch.device, short: bool) -> dict[str, Any]:
    """Losses of the same steps in fp32, in bf16, and compiled."""
    steps = 5 if short else 40
    curves = {}
    for name, settings in {
        "fp32": {"precision": "fp32"},
        "bf16": {},
        "bf16, compiled": {"compile": True},
    }.items():
        case = Case("micro" if short else "tiny", 64 if short else 256, 8, **settings)
        trainer = Trainer(case, device, "aot_eager" if short else "inductor")
        batch = trainer.batch()
        curves[name] = [round(float(trainer.step(batch)), 4) for _ in range(steps)]
    exact = curves["fp32"]
    errors = {
        name: max(abs(a - b) / b for a, b in zip(losses, exact, strict=True))
        for name, losses in curves.items()
    }
    return {"losses": curves, "largest_relative_error": {k: round(v, 5) for k, v in errors.items()}}


def where_time_goes(device: torch.device, short: bool) -> list[dict[str, Any]]:
    """The operators, or the kernels of a GPU, that take most of two steps."""
    case = Case("micro", 64, 4) if short else Case(compile=True)
    trainer = Trainer(case, device, "inductor")
    batch = trainer.batch()
    for _ in range(3):
        trainer.step(batch)
    with torch.profiler.profile() as profiler:
        for _ in range(2):
            trainer.step(batch)
        synchronize(device)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    return [
        {
            "name": event.key[:100],
            "share": round(getattr(event, key) / total, 4),
            "calls": event.count,
        }
        for event in events[:15]
    ]


def inference(device: torch.device, short: bool) -> dict[str, Any]:
    """Texts per second of an encoder: 64 texts of 20 to 400 tokens in a row, without padding."""
    case = Case("micro" if short else "base", 512)
    model = case.model(device).encoder.eval()
    draws = torch.Generator().manual_seed(2)
    lengths = torch.randint(20, 100 if short else 400, (64,), generator=draws).tolist()
    ids = torch.randint(5, 999, (1, sum(lengths)), generator=draws).to(device)
    found: dict[str, Any] = {"tokens": sum(lengths)}
    for precision in ("fp32", "bf16"):
        with torch.inference_mode(), autocast(device, precision):
            seconds = seconds_of(lambda: model(ids, lengths=lengths), device, 0.2 if short else 3)
        found[precision] = round(len(lengths) / seconds, 1)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--short", action="store_true", help="small models, for a test")
    parser.add_argument("--minutes", type=float, default=7.5, help="begin nothing afterwards")
    parser.add_argument("--json", type=Path, help="write the result to this file, too")
    arguments = parser.parse_args()
    device, short = torch.device(arguments.device), arguments.short
    if device.type == "cpu":
        keep_freed_memory()
    else:
        torch.set_float32_matmul_precision("high")
    began, log = time.perf_counter(), list[str]()
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "short": short,
        "training": [],
        "errors": {},
    }

    def attempt(name: str, work: Callable[[], Any]) -> Any:
        """Do a part of it while there is time; its error is one of the results."""
        elapsed = time.perf_counter() - began
        if elapsed > 60 * arguments.minutes:
            result["errors"][name] = "no time was left"
            return None
        found = None
        try:
            found = work()
        except Exception as error:
            result["errors"][name] = f"{type(error).__name__}: {error}"[:500]
        line = f"{time.perf_counter() - began:6.1f} s  {name}: {found or result['errors'][name]}"
        print(line[:400], file=sys.stderr, flush=True)
        log.append(line)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    result["ceiling_tflops"] = attempt("ceiling", lambda: ceiling(device, short)) or {}
    top = 1e12 * result["ceiling_tflops"].get("bfloat16", math.inf)
    cases = SHORT if short else CASES
    parts: dict[str, Callable[[torch.device, bool], Any]] = {
        "loss_curve": loss_curve,
        "where_time_goes": where_time_goes,
        "inference": inference,
    }
    for number, case in enumerate(cases):
        if number == 2:  # what matters most comes first
            for name, part in parts.items():
                result[name] = attempt(name, lambda part=part: part(device, short))
        found = attempt(str(case), lambda case=case: train(case, device, short, top))
        result["training"].append({**asdict(case), **(found or {})})
    result["seconds"], result["log"] = round(time.perf_counter() - began, 1), log
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return int(bool(result["errors"]))


if __name__ == "__main__":
    sys.exit(main())

"""Time a bare training step on random data: forward, backward, clipping, AdamW.

    python benchmarks/step.py --shape keras --json

Two variants alternate, so that drift of the machine's speed affects both: `raybert`, and `plain`,
the same model with PyTorch's linear layer and cross-entropy on the masked positions. The last line
is one JSON object with the medians: `tokens_per_second`, and `milliseconds` per step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from raybert.cluster.machine import keep_freed_memory
from raybert.data.masking import IGNORE_INDEX
from raybert.model.cost import flops_per_token
from raybert.model.encoder import Encoder
from raybert.model.heads import MaskedLM
from raybert.model.settings import ModelConfig

MASKED = 0.15
# name -> (shape, vocabulary, rows, tokens a row)
SHAPES = {
    "keras": (
        {"hidden_size": 128, "num_layers": 1, "num_heads": 8, "intermediate_size": 128},
        30_000,
        32,
        256,
    ),
    "small": (
        {"hidden_size": 256, "num_layers": 4, "num_heads": 4, "intermediate_size": 1024},
        8_192,
        64,
        128,
    ),
}


def plain_loss(
    model: MaskedLM, input_ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, int]:
    positions = labels.flatten() != IGNORE_INDEX
    x = model.head(model.encoder(input_ids).flatten(0, 1)[positions])
    logits = F.linear(x, model.encoder.embeddings.tokens.weight, model.bias)
    targets = labels.flatten()[positions]
    return F.cross_entropy(logits.float(), targets, reduction="sum"), len(targets)


def stepper(
    model: MaskedLM, loss_of: Callable[..., tuple[torch.Tensor, int]], precision: str
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, fused=True)

    def step(input_ids: torch.Tensor, labels: torch.Tensor) -> None:
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=precision == "bf16"):
            total, count = loss_of(model, input_ids, labels)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="keras")
    parser.add_argument("--layout", choices=("classic", "modern"), default="classic")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each variant")
    parser.add_argument("--steps", type=int, default=3, help="steps per turn")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    arguments = parser.parse_args()

    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    shape, vocab_size, rows, seq_len = SHAPES[arguments.shape]
    config = ModelConfig(layout=arguments.layout, max_seq_len=seq_len, **shape)
    input_ids = torch.randint(1, vocab_size, (rows, seq_len), device=arguments.device)
    masked = torch.rand(rows, seq_len, device=arguments.device) < MASKED
    labels = input_ids.masked_fill(~masked, IGNORE_INDEX)

    steps = {}
    for name, loss_of in (("raybert", MaskedLM.forward), ("plain", plain_loss)):
        model = MaskedLM(Encoder(config, vocab_size)).to(arguments.device)
        steps[name] = stepper(model, loss_of, arguments.precision)
        for _ in range(2):  # the first steps allocate
            steps[name](input_ids, labels)

    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.repeats):
        for name, step in steps.items():
            for _ in range(arguments.steps):
                start = time.perf_counter()
                step(input_ids, labels)
                if arguments.device != "cpu":
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)

    seconds = {name: statistics.median(values) for name, values in times.items()}
    flops = flops_per_token(config, seq_len, vocab_size, MASKED)
    result = {
        "shape": arguments.shape,
        "layout": arguments.layout,
        "precision": arguments.precision,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "milliseconds": {name: round(1000 * value, 1) for name, value in seconds.items()},
        "tokens_per_second": {
            name: round(rows * seq_len / value) for name, value in seconds.items()
        },
        "gflops_per_second": round(flops * rows * seq_len / seconds["raybert"] / 1e9, 1),
        "ratio": round(seconds["plain"] / seconds["raybert"], 2),
    }
    if not arguments.json:
        for name, value in seconds.items():
            print(f"{name:8} {1000 * value:7.1f} ms {rows * seq_len / value:9,.0f} tokens/s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

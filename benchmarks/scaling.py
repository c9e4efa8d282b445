"""The step time of 1, 2 and 4 gloo ranks on this machine, beside that of the model of step time.

    python benchmarks/scaling.py --json

Trains a small encoder with one thread a rank, on random rows. Steps of one rank give the speed of
its arithmetic and a step's fixed cost, those of one micro-batch on two ranks the bandwidth. All
other rows are predictions beside the median. Needs an idle core for each rank; where the machine
has fewer, numbers of ranks are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from origin import origin

from raybert.cluster.machine import cores
from raybert.jobs.step_time import Machines, Work, step_time
from raybert.model.cost import flops_per_token, num_parameters
from raybert.model.encoder import Encoder
from raybert.model.heads import MaskedLM
from raybert.model.settings import ModelConfig
from raybert.train.distributed import Group
from raybert.train.sharding import accumulating

VOCAB_SIZE, SEQ_LEN, MASKED = 8192, 128, 0.2
MODEL = ModelConfig(hidden_size=256, num_layers=4, num_heads=4, max_seq_len=SEQ_LEN)


MICRO_BATCHES = (1, 4)  # on each rank


def measure(rank: int, ranks: int, folder: str, rows: int, steps: int) -> None:
    """Take steps of micro-batches of `rows` rows on each rank; rank 0 writes their seconds."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if ranks > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks
        )
    torch.manual_seed(0)
    model = MaskedLM(Encoder(MODEL, VOCAB_SIZE))
    module: Any = Group.current(torch.device("cpu")).wrap(model, deterministic=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    ids = torch.randint(1, VOCAB_SIZE, (rows, SEQ_LEN))
    labels = torch.where(torch.rand(rows, SEQ_LEN) < MASKED, ids, -1)
    seconds: dict[int, list[float]] = {count: [] for count in MICRO_BATCHES}
    for step in range(steps):  # in turns: drift of the machine's speed affects both
        for count in MICRO_BATCHES:
            began = time.perf_counter()
            for index in range(count):
                with accumulating(module, "none") if index < count - 1 else nullcontext():
                    module(ids, labels)[0].div(rows).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step >= steps // 3:
                seconds[count].append(time.perf_counter() - began)
    if rank == 0:
        (Path(folder) / "seconds.json").write_text(json.dumps([*seconds.items()]))
    if ranks > 1:
        dist.destroy_process_group()


def steps_of(ranks: int, rows: int, steps: int) -> dict[tuple[int, int], list[float]]:
    """The seconds of the steps after the first third, by ranks and micro-batches of each."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (ranks, folder, rows, steps), nprocs=ranks)
        found = json.loads((Path(folder) / "seconds.json").read_text())
        return {(ranks, count): seconds for count, seconds in found}


def main() -> None:
    """Measure, fit and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    model = MaskedLM(Encoder(MODEL, VOCAB_SIZE))
    tokens = arguments.rows * SEQ_LEN
    flops = tokens * flops_per_token(MODEL, SEQ_LEN, VOCAB_SIZE, MASKED)
    measured: dict[tuple[int, int], list[float]] = {}
    for ranks in (1, 2, 4):
        if ranks <= cores():
            measured |= steps_of(ranks, arguments.rows, arguments.steps)
    medians = {key: statistics.median(value) for key, value in measured.items()}
    # Four micro-batches cost three more than one does: the rest of a step is its fixed cost.
    one = (medians[1, 4] - medians[1, 1]) / 3
    local = Machines(
        gpus=1,
        gpus_per_node=64,
        flops=flops / one,
        fixed=max(0.0, medians[1, 1] - one),
        latency=0.0,
        input_rate=1e12,
    )
    parameters = num_parameters(model)

    def said(machines: Machines, ranks: int, micro_batches: int) -> float:
        count = micro_batches * ranks
        work = Work(
            flops=flops * count,
            tokens=tokens * count,
            parameters=parameters,
            micro_batches=count,
            checkpoint_seconds=None,
        )
        return step_time(work, dataclasses.replace(machines, gpus=ranks)).seconds

    def misses(bandwidth: float) -> float:
        machines = dataclasses.replace(local, node_bandwidth=bandwidth)
        return abs(said(machines, 2, 1) - medians.get((2, 1), 0.0))

    bandwidth = min((10 ** (6 + 0.01 * step) for step in range(601)), key=misses)
    local = dataclasses.replace(local, node_bandwidth=bandwidth)
    rows = [
        {
            "ranks": ranks,
            "micro_batches": micro_batches,
            "median": round(statistics.median(seconds), 5),
            "least": round(min(seconds), 5),
            "spread": round(statistics.pstdev(seconds) / statistics.mean(seconds), 3),
            "model": round(said(local, ranks, micro_batches), 5),
        }
        for (ranks, micro_batches), seconds in measured.items()
    ]
    fitted = {"flops": local.flops, "bytes_per_second": bandwidth, "fixed_seconds": local.fixed}
    print(
        json.dumps({"origin": origin(), "parameters": parameters, "fitted": fitted, "rows": rows})
    )


if __name__ == "__main__":
    main()

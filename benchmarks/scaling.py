"""The step time of 1, 2 and 4 gloo ranks on this machine, beside that of the model of step time.

    python benchmarks/scaling.py --json

Trains a small encoder with one thread a rank, on generated rows. Of one rank, the speed of its
arithmetic is taken; of two ranks, the bandwidth of an all-reduce. The model then says what a step
takes on four ranks and with other batches, and both are printed, with their difference. Needs as
many idle cores as ranks; others are left out.
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
    rows = []
    for (ranks, micro_batches), seconds in measured.items():
        work = Work(
            flops=flops * micro_batches * ranks,
            tokens=tokens * micro_batches * ranks,
            parameters=parameters,
            micro_batches=micro_batches * ranks,
            checkpoint_seconds=None,
        )
        said = step_time(work, local_with(local, ranks, medians, work))
        rows.append(
            {
                "ranks": ranks,
                "micro_batches": micro_batches,
                "median": round(statistics.median(seconds), 5),
                "least": round(min(seconds), 5),
                "spread": round(statistics.pstdev(seconds) / statistics.mean(seconds), 3),
                "model": round(said.seconds, 5),
            }
        )
    print(json.dumps({"origin": origin(), "parameters": parameters, "rows": rows}))


def local_with(
    local: Machines, ranks: int, medians: dict[tuple[int, int], float], work: Work
) -> Machines:
    """The machine with `ranks`, and the bandwidth that a step of one micro-batch on two shows."""
    if (2, 1) not in medians:
        return dataclasses.replace(local, gpus=ranks)
    exposed = max(1e-6, medians[2, 1] - medians[1, 1])
    # On CPUs nothing is hidden: the ranks that sum gradients are those that compute them.
    bandwidth = 2 * 0.5 * 4 * work.parameters / (exposed + 2 / 3 * work.flops / local.flops / ranks)
    return dataclasses.replace(local, gpus=ranks, node_bandwidth=bandwidth)


if __name__ == "__main__":
    main()

"""Sharded over 2 and 3 ranks: the losses of replicas, whoever wrote the checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from making import make_corpus
from sharding_workers import SHARDINGS, STEPS, STOP

from raybert.storage.folder import Folder

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The results of all scenarios: {(world_size, rank): {name: result}}."""
    folder = tmp_path_factory.mktemp("sharding")
    make_corpus(Folder(folder / "corpus"), documents=51)
    path = f"{HERE}:{HERE.parent}:{HERE.parents[1]}"
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    results = {}
    for size in (2, 3, 1):  # each goes on from checkpoints of the one before
        workers = []
        for rank in range(size):
            command = [sys.executable, HERE / "sharding_workers.py", str(rank), folder, str(size)]
            with (folder / f"stderr-{size}-{rank}").open("w") as stderr:
                workers.append(subprocess.Popen(command, env=env, stderr=stderr))
        try:
            for rank, worker in enumerate(workers):
                error = folder / f"stderr-{size}-{rank}"
                assert worker.wait(timeout=600) == 0, error.read_text()[-3000:]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        for rank in range(size):
            path = folder / f"found-{size}-{rank}.pt"
            results[size, rank] = torch.load(path, weights_only=False)  # our own, just written
    return results


RANKS = [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]


@pytest.mark.parametrize("key", RANKS)
@pytest.mark.parametrize("sharding", SHARDINGS[1:])
def test_the_losses_are_those_of_replicas(found, sharding, key):
    expected, got = found[key]["long"]["none"], found[key]["long"][sharding]
    assert got["losses"] == pytest.approx(expected["losses"], abs=1.1e-5)  # they are rounded
    assert got["evaluations"] == pytest.approx(expected["evaluations"], abs=1.1e-5)
    if key[1] == 0:
        assert len(got["losses"]) == STEPS


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("sharding", SHARDINGS[1:])
def test_the_memory_of_a_rank_is_its_share(found, sharding, size):
    for what in ("optimizer", "averages", "trained"):
        whole = found[size, 0]["long"]["none"]["bytes"][what]
        parts = [found[size, rank]["long"][sharding]["bytes"][what] for rank in range(size)]
        assert max(parts) <= 1.05 * whole / size
        assert sum(parts) == pytest.approx(whole, rel=0.05)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("before", SHARDINGS)
@pytest.mark.parametrize("after", SHARDINGS)
def test_a_checkpoint_is_resumed_by_the_others(found, before, after, size):
    whole = found[size, 0]["long"][before]["losses"]
    resumed = found[size, 0]["long"][f"{before} to {after}"]["losses"]
    assert resumed.keys() == set(range(STOP + 1, STEPS + 1))
    assert resumed == pytest.approx({s: whole[s] for s in resumed}, abs=1.1e-5)


@pytest.mark.parametrize("size", [3, 1])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_checkpoint_is_resumed_by_another_number_of_ranks(found, sharding, size):
    expected = found[size, 0]["long"]["none"]["losses"]
    resumed = found[size, 0]["taken over"][sharding]["losses"]
    assert resumed.keys() == set(range(STOP + 1, STEPS + 1))
    # Other numbers of ranks add gradients in another order.
    assert resumed == pytest.approx({s: expected[s] for s in resumed}, abs=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_compiled_layers_recompute_and_are_sharded(found, sharding, size):
    eager, compiled = (found[size, 0]["compiled"][sharding, how] for how in (False, True))
    assert len(eager) == 4
    assert compiled == pytest.approx(eager, abs=1e-4)


def test_gradients_that_are_summed_in_bf16_are_rounded(found):
    exact = found[2, 0]["long"]["none"]["norms"][0]
    for sharding in SHARDINGS:
        norms = found[2, 0]["bf16"][sharding]["norms"]
        assert norms[0] != exact
        assert norms[0] == pytest.approx(exact, rel=0.01)

"""Two gloo processes compute what one computes, and take the same decisions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from group_workers import work
from making import make_corpus, same_tensors

from raybert.data.corpus.manifest import Manifest
from raybert.data.order import assign_to_ranks
from raybert.storage.folder import Folder
from raybert.train.distributed import Group, use_threads

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The results of all scenarios: {(world_size, rank): {name: result}}."""
    folder = tmp_path_factory.mktemp("group")
    make_corpus(Folder(folder / "corpus"), documents=51)
    env = {
        **os.environ,
        "PYTHONPATH": f"{HERE}:{HERE.parent}:{HERE.parents[1]}",
        "OMP_NUM_THREADS": "1",
    }
    workers = []
    for rank in range(2):
        with (folder / f"stderr-{rank}").open("w") as stderr:
            command = [sys.executable, HERE / "group_workers.py", str(rank), folder, "2"]
            workers.append(subprocess.Popen(command, env=env, stderr=stderr))
    try:
        work(0, folder, 1)
        for worker in workers:
            assert worker.wait(timeout=180) == 0, (folder / "stderr-0").read_text()
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
    results = {}
    for key in ((1, 0), (2, 0), (2, 1)):
        path = folder / f"found-{key[0]}-{key[1]}.pt"
        results[key] = torch.load(path, weights_only=False)  # our own, just written
    results["corpus"] = folder / "corpus"
    return results


def test_two_ranks_compute_the_gradients_of_one(found):
    alone = found[1, 0]["uneven"]["gradients"]
    for rank in range(2):
        together = found[2, rank]["uneven"]["gradients"]
        assert len(alone) == len(together) == 2
        # The first step only: AdamW's update magnifies differences near zero.
        for name, gradient in alone[0].items():
            torch.testing.assert_close(together[0][name], gradient, rtol=1e-4, atol=1e-6)


def test_ranks_hold_the_same_weights(found):
    for name in ("uneven", "deterministic", "not_a_number", "fine_tuning"):
        assert same_tensors(found[2, 0][name]["weights"], found[2, 1][name]["weights"])


def test_averaging_in_rank_order_equals_plain_averaging(found):
    plain, ordered = (found[2, 0][name]["gradients"] for name in ("uneven", "deterministic"))
    for name, gradient in plain[0].items():
        torch.testing.assert_close(ordered[0][name], gradient, rtol=1e-6, atol=1e-9)


def test_gradients_sent_in_bf16_are_those_in_fp32_rounded(found):
    exact, rounded = (found[2, 0][name]["gradients"][0] for name in ("uneven", "bf16_gradients"))
    assert not same_tensors(exact, rounded)
    for name, gradient in exact.items():
        assert (rounded[name] - gradient).norm() <= 0.01 * gradient.norm()
    assert same_tensors(*(found[2, rank]["bf16_gradients"]["weights"] for rank in range(2)))


def test_all_ranks_skip_a_step_whose_loss_is_nan_on_one(found):
    assert [found[key]["not_a_number"]["skipped"] for key in ((1, 0), (2, 0), (2, 1))] == [1, 1, 1]
    weights = found[2, 0]["not_a_number"]["weights"]
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_all_ranks_stop_where_one_is_asked_to(found):
    assert [found[2, rank]["stop_on_one_rank"]["step"] for rank in range(2)] == [2, 2]
    assert found[2, 0]["stop_on_one_rank"]["saved"] == [2]


def test_with_stop_a_non_finite_loss_on_one_rank_ends_all(found):
    for rank in range(2):
        assert "step 0: the gradient's norm is" in found[2, rank]["stop_for_good"]["error"]


def test_with_stop_a_checkpoint_that_rank_0_can_not_write_ends_all(found):
    first, second = (found[2, rank]["broken_checkpoint"] for rank in range(2))
    assert first["step"] == second["step"] >= 2
    assert (first["error"], second["error"]) == ("UserError", "Stopped")  # one has the reason


def test_an_epoch_may_end_with_a_step_in_which_a_rank_has_no_rows(found):
    rows = Manifest.read(Folder(found["corpus"])).splits["train"]
    assert rows.rows % 2 == 1, "the scenario needs an odd number of rows"
    expected = found[1, 0]["whole_epoch"]
    assert expected["tokens"] == 2 * rows.rows * 16
    for rank in range(2):
        got = found[2, rank]["whole_epoch"]
        assert (got["tokens"], got["step"]) == (expected["tokens"], expected["step"])
        assert got["loss"] == pytest.approx(expected["loss"], abs=0.05)


def test_fine_tuning_on_two_ranks_reads_the_same_tokens_as_on_one(found):
    expected = found[1, 0]["fine_tuning"]
    for rank in range(2):
        got = found[2, rank]["fine_tuning"]
        assert (got["step"], got["tokens"]) == (expected["step"], expected["tokens"])


@pytest.mark.parametrize("key", [(1, 0), (2, 0), (2, 1)])
def test_a_resumed_deterministic_run_has_equal_weights(found, key):
    result = found[key]["resumed"]
    assert same_tensors(result["whole"], result["parted"])


def test_ranks_go_by_the_checkpoints_that_rank_0_read(found):
    """In resumption and rollback, where the storage's listing lags behind on the other rank."""
    alone, first, second = (found[key]["lagging_listing"] for key in ((1, 0), (2, 0), (2, 1)))
    assert alone["found"] == {"step": 6, "best_step": 2, "skipped": 1, "restarts": 1}
    assert first["found"] == second["found"] == alone["found"]
    assert same_tensors(first["weights"], second["weights"])


def test_replicas_that_differ_end_all_ranks_at_the_next_evaluation(found):
    assert found[1, 0]["altered_on_one_rank"]["error"] is None
    for rank in range(2):
        ended = found[2, rank]["altered_on_one_rank"]
        assert ended["step"] == 2
        assert "the weights of rank 1 differ from those of rank 0" in ended["error"]


def test_the_rank_that_waits_and_the_one_that_works_slowly_are_named(found):
    [alone] = found[1, 0]["slow_ranks"]
    assert (alone["data_wait_rank"], alone["own_seconds_rank"]) == (0, 0)
    [record] = found[2, 0]["slow_ranks"]
    assert (record["data_wait_rank"], record["own_seconds_rank"]) == (1, 0)
    assert record["data_wait_max"] > record["data_wait"]
    assert record["own_seconds_max"] > record["own_seconds"] > record["data_wait_max"]
    assert found[2, 1]["slow_ranks"] == []


def test_a_state_is_read_by_rank_0_however_long_it_takes(found):
    """When it resumes, rolls back and ends; the other rank is sent what was read."""
    alone, first, second = (found[key]["slow_storage"] for key in ((1, 0), (2, 0), (2, 1)))
    assert alone["found"] == {"step": 6, "best_step": 2, "skipped": 1, "restarts": 1}
    assert first["found"] == alone["found"]
    assert first["read"].keys() == alone["read"].keys()
    assert first["read"]["model.safetensors"] == alone["read"]["model.safetensors"] > 0
    assert second["read"] == {}


def test_an_error_of_reading_on_rank_0_ends_all_ranks(found):
    for key in ((1, 0), (2, 0), (2, 1)):
        ended = found[key]["damaged_everywhere"]
        assert "every checkpoint of" in ended["error"]
        assert ended["left"] == [1, 2]


# Sharded over two ranks ------------------------------------------------------------------------


def assert_close(found, expected, what, abs=1e-5):
    """Rounded to 5 decimals, or so."""
    for key in what:
        assert found[key] == pytest.approx(expected[key], abs=1.1 * abs), key


@pytest.mark.parametrize(
    ("name", "sharding"),
    [("sharding", "optimizer"), ("sharding", "full"), ("sharding_muon", "full")],
)
def test_a_sharded_model_learns_as_one_that_is_not(found, name, sharding):
    expected = found[2, 0][name]["none"]
    assert len(expected["losses"]) == len(expected["norms"]) == 4
    for rank in range(2):
        got = found[2, rank][name][sharding]
        assert_close(got, found[2, rank][name]["none"], ("losses", "norms", "evaluations"))
        assert got["weights"].keys() == expected["weights"].keys()
        assert same_tensors(got["weights"], found[2, 0][name][sharding]["weights"])


def test_a_checkpoint_is_resumed_under_another_sharding(found):
    expected, got = found[2, 0]["sharding"]["none"], found[2, 0]["sharding_in_turn"]
    assert got["losses"].keys() == {1, 2, 3, 4}
    assert got["losses"] == pytest.approx(expected["losses"], abs=1.1e-5)
    assert got["evaluations"][-1] == pytest.approx(expected["evaluations"][-1], abs=1.1e-5)


@pytest.mark.parametrize("name", ["sharding", "sharding_muon"])
@pytest.mark.parametrize("what", ["optimizer", "averages", "trained"])
def test_each_rank_holds_its_share_of_what_is_sharded(found, name, what):
    whole = found[2, 0][name]["none"]["bytes"][what]
    parts = [found[2, rank][name]["full"]["bytes"][what] for rank in range(2)]
    assert 0 < max(parts) <= 0.52 * whole
    assert sum(parts) == pytest.approx(whole, rel=0.02)


def test_a_sharded_step_that_is_not_finite_is_taken_back_and_the_best_weights_are_kept(found):
    for rank in range(2):
        plain, sharded = (found[2, rank]["sharding_nan"][kind] for kind in ("none", "full"))
        assert plain["skipped"] == sharded["skipped"] == 1
        assert plain["best_step"] == sharded["best_step"] == 2
        for name, weight in sharded["weights"].items():
            torch.testing.assert_close(weight, plain["weights"][name], rtol=1e-4, atol=1e-5)


def test_a_sharded_deterministic_run_is_resumed_bit_for_bit(found):
    for rank in range(2):
        whole, parted = found[2, rank]["sharding_deterministic"]
        assert same_tensors(whole["weights"], parted["weights"])


# One process -------------------------------------------------------------------------------------


def test_a_group_of_one_needs_no_collectives():
    group = Group()
    assert group.sum([1, 2.5, True]) == [1, 2.5, True]
    assert group.gather("x") == ["x"]
    assert list(group.share(range(3))) == [0, 1, 2]
    module = torch.nn.Linear(1, 1)
    assert group.wrap(module, deterministic=True) is module


@pytest.mark.parametrize("world_size", range(1, 6))
def test_shares_and_micro_batches_are_disjoint_and_complete(world_size):
    shares = [list(Group(rank, world_size).share(range(17))) for rank in range(world_size)]
    assert sorted(sum(shares, [])) == list(range(17))
    indices = assign_to_ranks(7, world_size)
    assert sum(indices, []) == list(range(7))
    assert max(map(len, indices)) - min(map(len, indices)) <= 1


def test_threads_are_configured_or_the_cores_divided_by_the_workers():
    before = torch.get_num_threads()
    try:
        assert use_threads(3, 1) == torch.get_num_threads() == 3
        cores = len(os.sched_getaffinity(0))
        assert use_threads(None, 1) == cores
        assert use_threads(None, 10 * cores) == 1
    finally:
        torch.set_num_threads(before)

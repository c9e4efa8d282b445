"""What proves that a trial went on from another's weights, at its own rate."""

import pytest
from making import Attempt, finetune_job

from raybert.storage.folder import Folder
from raybert.train.checkpoint import CheckpointStore, begin_attempt, hash_tensors
from raybert.train.metrics_log import read_metrics
from raybert.train.run import execute_bare
from raybert.tune.schedulers.pbt_evidence import FRESH, evidence, is_open

STEP, TOTAL, MUTATED = 4, 10, 3e-3


def job_of(folder, **settings):
    return finetune_job(folder, steps=TOTAL, checkpoint_steps=2, evaluations=2, **settings)


@pytest.fixture
def family(tmp_path):
    """A donor's state at a step, and a child's folder that had come further by itself."""
    root = Folder(tmp_path)
    donor = Attempt(job_of(root), root / "donor", stop_at=STEP)
    child = Attempt(job_of(root, seed=1), root / "child", stop_at=6)
    for attempt in (donor, child):
        with pytest.raises(Exception, match="stopped at step"):
            attempt.run()
    return root, CheckpointStore(root / "donor", 0, 1).load(STEP)


def go_on(root, snapshot, **settings):
    """Give the child the donor's state, as a trial does, and let it go on; returns its log."""
    attempt = begin_attempt(root / "child")
    store = CheckpointStore(root / "child", attempt, 2)
    store.save(snapshot, best_step=None, wait=True)
    exchange = {"step": STEP, "attempt": attempt, "weights": hash_tensors(snapshot.model)}
    job = job_of(root, seed=1, **settings)
    execute_bare(job, root / "child", on_progress=lambda record: None)
    return exchange, read_metrics(root / "child")


def proof(exchange, records, root):
    return evidence(exchange, records, job_of(root, lr=MUTATED).config)


def test_a_child_that_goes_on_from_the_donor_at_the_mutated_rate_proves_it(family):
    root, snapshot = family
    exchange, records = go_on(root, snapshot, lr=MUTATED)
    found = proof(exchange, records, root)
    assert found["weights_after"] == exchange["weights"]
    assert found["trained"]["step"] == STEP + 1
    assert found["trained"]["lr"] == found["trained"]["due"] == pytest.approx(MUTATED * 6 / 9)
    assert is_open(exchange) and not is_open({**exchange, **found})
    assert is_open({**exchange, "weights_after": found["weights_after"]})


def test_a_rate_that_was_not_taken_over_shows(family):
    root, snapshot = family
    exchange, records = go_on(root, snapshot, lr=1e-3)
    trained = proof(exchange, records, root)["trained"]
    assert trained["lr"] == pytest.approx(1e-3 * 6 / 9)
    assert trained["due"] == pytest.approx(MUTATED * 6 / 9)


def test_a_rate_that_the_optimizer_has_not_shows(family, monkeypatch):
    """What is logged is the optimizer's, whatever the schedule says."""
    root, snapshot = family
    monkeypatch.setattr("raybert.train.loop.set_lr", lambda optimizer, lr: None)
    exchange, records = go_on(root, snapshot, lr=MUTATED)
    trained = proof(exchange, records, root)["trained"]
    assert trained["lr"] != trained["due"]


def test_other_weights_than_the_donors_show(family):
    root, snapshot = family
    snapshot.model = {name: 2 * tensor for name, tensor in snapshot.model.items()}
    exchange, records = go_on(root, snapshot, lr=MUTATED)
    exchange["weights"] = "those of the donor"
    assert proof(exchange, records, root)["weights_after"] == hash_tensors(snapshot.model)


def test_a_child_that_began_anew_shows(family):
    root, _ = family
    Attempt(job_of(root, seed=1), root / "anew").run()
    found = proof({"step": 0, "attempt": 1}, read_metrics(root / "anew"), root)
    assert found["weights_after"] == FRESH


def test_the_life_before_proves_nothing(family):
    root, _ = family
    assert proof({"step": STEP, "attempt": 9}, read_metrics(root / "child"), root) == {}

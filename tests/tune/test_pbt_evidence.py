"""Evidence that a trial continued from another's weights at its own learning rate."""

import pytest
from making import Attempt, finetune_job

from raybert.storage.folder import Folder
from raybert.train.checkpoint import CheckpointStore
from raybert.train.metrics_log import read_metrics
from raybert.train.run import train_in_process
from raybert.train.run_folder import begin_attempt
from raybert.train.tensor_file import hash_tensors
from raybert.tune.schedulers.pbt import FRESH, find_verification, lacks_verification

STEP, TOTAL, MUTATED = 4, 10, 3e-3


def job_of(folder, **settings):
    return finetune_job(folder, steps=TOTAL, checkpoint_steps=2, evaluations=2, **settings)


@pytest.fixture
def family(tmp_path):
    """A donor's checkpoint, and a trial (`child`) that has trained past that step."""
    root = Folder(tmp_path)
    donor = Attempt(job_of(root), root / "donor", stop_at=STEP)
    child = Attempt(job_of(root, seed=1), root / "child", stop_at=6)
    for attempt in (donor, child):
        with pytest.raises(Exception, match="stopped at step"):
            attempt.run()
    return root, CheckpointStore(root / "donor", 0, 1).load(STEP)


def exploit_donor(root, snapshot, **settings):
    """Copy the donor's checkpoint, as a trial does, and train the child; returns its log."""
    attempt = begin_attempt(root / "child")
    store = CheckpointStore(root / "child", attempt, 2)
    store.save(snapshot, best_step=None, wait=True, replaces_later=True)
    exploit = {"step": STEP, "attempt": attempt, "weights": hash_tensors(snapshot.model)}
    job = job_of(root, seed=1, **settings)
    train_in_process(job, root / "child", on_progress=lambda record: None)
    return exploit, read_metrics(root / "child")


def evidence(exploit, records, root):
    return find_verification(exploit, records, job_of(root, lr=MUTATED).config)


def test_the_log_shows_the_donors_weights_and_the_mutated_rate(family):
    root, snapshot = family
    exploit, records = exploit_donor(root, snapshot, lr=MUTATED)
    found = evidence(exploit, records, root)
    assert found["weights_after"] == exploit["weights"]
    assert found["trained"]["step"] == STEP + 1
    assert found["trained"]["lr"] == found["trained"]["due"] == pytest.approx(MUTATED * 6 / 9)
    assert lacks_verification(exploit) and not lacks_verification({**exploit, **found})
    assert lacks_verification({**exploit, "weights_after": found["weights_after"]})


def test_a_rate_that_was_not_mutated_shows(family):
    root, snapshot = family
    exploit, records = exploit_donor(root, snapshot, lr=1e-3)
    trained = evidence(exploit, records, root)["trained"]
    assert trained["lr"] == pytest.approx(1e-3 * 6 / 9)
    assert trained["due"] == pytest.approx(MUTATED * 6 / 9)


def test_a_rate_that_the_optimizer_does_not_have_shows(family, monkeypatch):
    """The log has the optimizer's rate, not the schedule's."""
    root, snapshot = family
    monkeypatch.setattr("raybert.train.step.set_lr", lambda optimizer, lr: None)
    exploit, records = exploit_donor(root, snapshot, lr=MUTATED)
    trained = evidence(exploit, records, root)["trained"]
    assert trained["lr"] != trained["due"]


def test_weights_that_are_not_the_donors_show(family):
    root, snapshot = family
    snapshot.model = {name: 2 * tensor for name, tensor in snapshot.model.items()}
    exploit, records = exploit_donor(root, snapshot, lr=MUTATED)
    exploit["weights"] = "those of the donor"
    assert evidence(exploit, records, root)["weights_after"] == hash_tensors(snapshot.model)


def test_a_run_from_fresh_weights_shows(family):
    root, _ = family
    Attempt(job_of(root, seed=1), root / "anew").run()
    found = evidence({"step": 0, "attempt": 1}, read_metrics(root / "anew"), root)
    assert found["weights_after"] == FRESH


def test_records_before_the_exploit_are_no_evidence(family):
    root, _ = family
    assert evidence({"step": STEP, "attempt": 9}, read_metrics(root / "child"), root) == {}

"""A step makes a GPU wait for this thread, and this thread for a GPU, once at most."""

from collections import Counter

import pytest
import torch
from making import Attempt, finetune_job, make_corpus, pretrain_job, same_tensors
from torch.utils._python_dispatch import TorchDispatchMode

from raybert.storage.folder import Folder

#: What reads values of tensors, and so waits until a GPU has computed them.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "repeat_interleave")


class Reads(TorchDispatchMode):
    """Counts the operators that need the values of tensors, by step."""

    def __init__(self):
        super().__init__()
        self.by_step, self.step = Counter(), None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_", "index_put") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if self.step is not None and (by_mask or name.startswith(READS)):
            self.by_step[self.step] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch):
    mode = Reads()
    for name in ("tolist", "numpy", "cpu"):
        method = getattr(torch.Tensor, name)

        def count(tensor, *args, _method=method, **kwargs):
            if mode.step is not None:
                mode.by_step[mode.step] += 1
            return _method(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, count)
    with mode:
        yield mode


@pytest.mark.parametrize("packed", ["separate", "joined"])
def test_a_step_of_pretraining_reads_one_number_of_a_tensor(tmp_path, reads, packed):
    corpus = Folder(tmp_path) / "corpus"
    make_corpus(corpus)
    job = pretrain_job(
        corpus, micro_batch_size=2, steps=6, log_every=6, packed_documents=packed, average_decay=0.5
    )
    count_steps(job, Folder(tmp_path) / "run", reads)


def test_a_step_of_fine_tuning_reads_one_number_of_a_tensor(tmp_path, reads):
    folder = Folder(tmp_path)
    job = finetune_job(folder, micro_batch_size=2, steps=6, log_every=6)
    count_steps(job, folder / "run", reads)


def count_steps(job, run, reads):
    attempt = Attempt(job, run)
    take = attempt.loop._step.run

    def noted(batches, step, *args):
        assert len(batches) == 4
        reads.step = step
        try:
            return take(batches, step, *args)
        finally:
            reads.step = None

    attempt.loop._step.run = noted
    attempt.run()
    assert reads.by_step == {step: 1 for step in range(6)}


@pytest.mark.parametrize("bad", [(), (0,), (2, 3)])
def test_a_step_that_a_gpu_skips_by_itself_changes_nothing(tmp_path, bad):
    from making import Scripted

    corpus = Folder(tmp_path) / "corpus"
    make_corpus(corpus)
    found = {}
    for on_device in (False, True):
        attempt = Attempt(
            pretrain_job(corpus, steps=6),
            Folder(tmp_path) / f"run-{on_device}",
            change=lambda task: Scripted(
                task, factor=lambda batch: float("inf") if batch.step in bad else 1.0
            ),
        )
        attempt.loop._step._skips_on_device = on_device
        attempt.run()
        found[on_device] = attempt.task.model.state_dict()
        assert attempt.loop.progress.skipped == len(bad)
    assert same_tensors(found[False], found[True])

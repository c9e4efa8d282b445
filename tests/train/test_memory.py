"""A step that does not fit into memory ends the run at once, with what to lower."""

import errno

import pytest
import torch
from making import Scripted, make_corpus, pretrain_job

from raybert.errors import UserError
from raybert.storage.folder import Folder
from raybert.train.distributed import Group
from raybert.train.memory import advise_on_memory, is_out_of_memory
from raybert.train.run import TrainingRun
from raybert.train.run_folder import begin_attempt

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("memory")) / "corpus"
    make_corpus(folder)
    return folder


def message(config, device, error):
    with pytest.raises(UserError) as ended, advise_on_memory(config, device):
        raise error
    return str(ended.value)


@pytest.mark.parametrize(
    ("settings", "device", "words"),
    [
        ({"micro_batch_size": 4}, CPU, "lower pretrain.micro_batch_size=4 to 2, which changes"),
        ({"micro_batch_size": 3, "global_batch_size": 9}, CPU, "micro_batch_size=3 to 1"),
        ({"micro_batch_size": 1}, CPU, "micro_batch_size is 1 already: use a smaller model"),
        ({"precision": "fp32"}, GPU, "run it again: it resumes, or set pretrain.precision=bf16"),
        ({"deterministic": True}, CPU, "micro_batch_size=4 to 2 in a new run"),
        ({}, CPU, "or set pretrain.activation_checkpointing=true, which"),
        ({"workers": 2}, CPU, "twice, or set pretrain.sharding=full"),
    ],
)
def test_the_advice_is_possible(corpus, settings, device, words):
    config = pretrain_job(corpus, **settings).config
    found = message(config, device, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert found.startswith("CUDA out of memory. Tried to allocate; ")
    assert words in found
    assert "bf16" not in found or device == GPU


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:113] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB)"),
        RuntimeError("NCCL error: unhandled cuda error: Cuda failure 2 'Out of memory'"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_every_allocators_error_is_known(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), ValueError("memory")])
def test_other_shortages_are_none_of_memory(error):
    assert not is_out_of_memory(error)


def test_other_errors_stay_as_they_are(corpus):
    config = pretrain_job(corpus).config
    with pytest.raises(RuntimeError, match="shapes"), advise_on_memory(config, CPU):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_a_run_that_is_out_of_memory_ends_with_the_advice(corpus, tmp_path):
    run = Folder(tmp_path)
    training = TrainingRun(pretrain_job(corpus), run, begin_attempt(run), Group())

    def allocate(batch):
        if batch.step == 2:
            torch.empty(1 << 60)
        return 1.0

    training.loop._step._task = Scripted(training.task, factor=allocate)
    with pytest.raises(UserError, match="lower pretrain.micro_batch_size=4 to 2"):
        training.run()

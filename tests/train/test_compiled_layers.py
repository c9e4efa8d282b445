"""Compiled training: the same losses as eager, no graph break, and few compilations."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from making import Attempt, make_corpus, pretrain_job, same_tensors
from torch._dynamo.utils import counters

from raybert.model import attention_plan
from raybert.model.encoder import Encoder
from raybert.model.settings import ModelConfig
from raybert.storage.folder import Folder
from raybert.train import step
from raybert.train.compiled_layers import CompiledLayers
from raybert.train.distributed import Group
from raybert.train.task import Stopped

# Dynamo's own.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("compiled")) / "corpus"
    make_corpus(folder, documents=51)
    return folder


def losses_and_graphs(job, run, group=None, stop_at=None):
    """Train; the loss of each step, and before each step how many graphs there were."""
    graphs = {}

    def note(batch):
        graphs.setdefault(batch.step, counters["stats"]["unique_graphs"])

    torch.compiler.reset()
    counters.clear()
    attempt = Attempt(job, run, group=group, stop_at=stop_at, on_batch=note)
    try:
        attempt.run()
    except Stopped:
        pass
    graphs[max(graphs) + 1] = counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    return [r["loss"] for r in attempt.of_kind("train")], graphs, attempt


@pytest.mark.parametrize("packed", ["separate", "joined"])
@pytest.mark.parametrize("layout", ["modern", "classic"])
def test_layers_are_compiled_once_whatever_is_masked(corpus, tmp_path, monkeypatch, layout, packed):
    monkeypatch.setattr(step, "CompiledLayers", functools.partial(CompiledLayers, backend="eager"))
    settings = {"steps": 14, "packed_documents": packed, "evaluations": 2}
    model = {"layout": layout, "num_layers": 3}  # rows of 16: 14 steps are more than an epoch
    found = {}
    for compile in (False, True):
        job = pretrain_job(corpus, model, compile=compile, **settings)
        losses, graphs, attempt = losses_and_graphs(job, Folder(tmp_path) / str(compile))
        found[compile] = losses, attempt.task.model.state_dict()
        assert attempt.loop.progress.step > attempt.task.steps_per_epoch
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-4)
    assert 0 < graphs[3] == graphs[14] <= 2  # modern: the first layer has one norm less
    assert found[True][1].keys() == found[False][1].keys()


def test_outside_of_training_layers_are_as_they_were():
    encoder = Encoder(ModelConfig(hidden_size=16, num_layers=1, num_heads=2), 50)
    compiled = CompiledLayers(encoder, backend="eager")
    with pytest.raises(ZeroDivisionError), compiled.in_use():
        assert "forward" in vars(encoder.layers[0])
        raise ZeroDivisionError
    assert "forward" not in vars(encoder.layers[0])


def ranks(corpus, folder, rank, world_size):
    """100 compiled steps on this rank, stopped and resumed in between; and eager ones."""
    group = Group.current(torch.device("cpu"))
    settings = {"steps": 100, "precision": "bf16", "global_batch_size": 16, "micro_batch_size": 4}
    found = {}
    for compile in (False, True):
        job = pretrain_job(corpus, {"num_layers": 2}, compile=compile, **settings)
        run = Folder(folder) / f"run-{compile}"
        losses, graphs, attempt = losses_and_graphs(job, run, group, 50 if compile else None)
        if compile:
            more, again, attempt = losses_and_graphs(job, run, group)
            losses += more
            found["graphs"] = graphs[3], graphs[50], again[53], again[100]
        found[compile] = losses
        found[f"weights {compile}"] = attempt.task.model.state_dict()
    torch.save(found, folder / f"found-{rank}.pt")


@pytest.mark.slow
def test_two_ranks_compile_nothing_after_their_first_steps(corpus, tmp_path):
    code = (
        "import sys, warnings, torch, torch.distributed as dist; from pathlib import Path;"
        "warnings.simplefilter('ignore'); from raybert.storage.folder import Folder;"
        "import test_compiled_layers as test; torch.set_num_threads(1); rank = int(sys.argv[1]);"
        "dist.init_process_group('gloo', init_method='file://' + sys.argv[2] + '/meet', rank=rank,"
        "world_size=2); test.ranks(Folder(sys.argv[3]), Path(sys.argv[2]), rank, 2);"
        "dist.destroy_process_group()"
    )
    paths = f"{HERE}:{HERE.parent}:{HERE.parents[1]}"
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    workers = [
        subprocess.Popen([*command, str(rank), tmp_path, corpus.path], env=env) for rank in range(2)
    ]
    assert [worker.wait(timeout=600) for worker in workers] == [0, 0]
    one, two = (torch.load(tmp_path / f"found-{rank}.pt", weights_only=False) for rank in range(2))
    for found in (one, two):
        first, last, first_again, last_again = found["graphs"]
        assert 0 < first == last and 0 < first_again == last_again
    assert same_tensors(one["weights True"], two["weights True"])
    assert one[True] == pytest.approx(one[False], rel=0.02)


def test_compiled_windows_have_the_gradients_of_eager_ones(monkeypatch):
    monkeypatch.setattr(attention_plan, "WINDOW_QUERIES", 4)
    torch.compiler.reset()
    config = ModelConfig(
        hidden_size=16, num_layers=3, num_heads=2, global_attention_every=2, local_attention=4
    )
    encoder, ids = Encoder(config, 50), torch.randint(1, 50, (2, 19))
    plain = [encoder(ids), *torch.autograd.grad(encoder(ids).sum(), encoder.layers.parameters())]
    with CompiledLayers(encoder, backend="aot_eager").in_use():
        x = encoder(ids)
        ours = [x, *torch.autograd.grad(x.sum(), encoder.layers.parameters())]
    for one, two in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)

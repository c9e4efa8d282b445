"""LoRA: adapters that learn in place of an encoder."""

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import Attempt, finetune_job, same_tensors

from raybert.model import huggingface
from raybert.model.encoder import Encoder
from raybert.model.heads import Classifier
from raybert.model.lora import add_lora, merged
from raybert.model.settings import ModelConfig
from raybert.storage.folder import Folder
from raybert.train.run import train_in_process

IDS = torch.tensor([[5, 9, 3, 7]])


@settings(max_examples=20)
@given(
    rank=st.integers(1, 9),
    alpha=st.floats(0.5, 64),
    layout=st.sampled_from(["modern", "classic"]),
    seed=st.integers(0, 99),
)
def test_a_merged_model_computes_what_the_adapted_one_does(rank, alpha, layout, seed):
    torch.manual_seed(seed)
    shape = ModelConfig(layout=layout, hidden_size=8, num_layers=2, num_heads=2, max_seq_len=16)
    model = Classifier(Encoder(shape, 12), 3).eval()
    names = set(model.state_dict())
    with torch.no_grad():
        before = model(IDS)
        add_lora(model, rank, alpha)
        assert torch.equal(model(IDS), before)
        learns = {name for name, p in model.named_parameters() if p.requires_grad}
        adapters = {name for name in learns if name.endswith((".up", ".down"))}
        assert len(adapters) == 2 * 2 * 4  # two matrices for each of four, in two layers
        assert all(name.startswith(("transform.", "classifier.")) for name in learns - adapters)
        for name in adapters:
            model.get_parameter(name).normal_(std=0.1)
        plain = merged(model)
        assert set(plain.state_dict()) == names
        torch.testing.assert_close(plain(IDS), model(IDS), rtol=1e-4, atol=1e-5)
        assert not torch.equal(plain(IDS), before)


def job_of(folder, **settings):
    return finetune_job(folder, lora={"rank": 3}, evaluations=2, **settings)


def test_a_run_learns_and_stores_adapters_and_saves_a_plain_model(tmp_path):
    job = job_of(Folder(tmp_path))
    attempt = Attempt(job, Folder(tmp_path / "run"))
    start = {k: v.clone() for k, v in attempt.task.model.state_dict().items()}
    attempt.run()
    held = {name.rpartition("|")[0] for name in attempt.store.load(4).optimizer}
    learned = {name for name, p in attempt.task.model.named_parameters() if p.requires_grad}
    assert held == learned
    for name, value in attempt.task.model.state_dict().items():
        assert torch.equal(value, start[name]) == (name not in learned), name

    result = job.finish(attempt.task, Folder(tmp_path / "run"), {})
    loaded, _ = huggingface.load_classifier(Folder(result["model"]))
    adapted = attempt.task.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(IDS), adapted(IDS), rtol=1e-4, atol=1e-5)
    names = safetensors.torch.load_file(f"{result['model']}/model.safetensors")
    assert not any(name.endswith((".up", ".down")) for name in names)


@pytest.mark.parametrize("frozen_epochs", [0, 0.3])
def test_a_stopped_run_resumes_bit_for_bit(frozen_epochs, tmp_path):
    job = job_of(Folder(tmp_path), steps=6, frozen_epochs=frozen_epochs, checkpoint_steps=1)
    whole, parts = Folder(tmp_path / "whole"), Folder(tmp_path / "parts")
    uninterrupted = Attempt(job, whole)
    uninterrupted.run()
    with pytest.raises(Exception, match="stopped at step 3"):
        Attempt(job, parts, stop_at=3).run()
    resumed = Attempt(job, parts)
    resumed.run()
    states = [each.task.model.state_dict() for each in (uninterrupted, resumed)]
    assert same_tensors(*states)
    moments = [each.store.load(6).optimizer for each in (uninterrupted, resumed)]
    assert moments[0] and same_tensors(*moments)


def test_muon_takes_adapters(tmp_path):
    job = job_of(Folder(tmp_path), optimizer="muon")
    train_in_process(job, Folder(tmp_path / "run"), on_progress=lambda record: None)
    assert Folder(tmp_path / "run").exists("model/config.json")

"""Precisions: the error of each, and that all replicas select the same one."""

import functools
import itertools
import json
import logging
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from making import reviews

from raybert.errors import UserError
from raybert.inference import compiled, onednn, precision, precision_choice
from raybert.inference.classifier import TextClassifier
from raybert.inference.precision import (
    PRECISIONS,
    available_precisions,
    build_model,
    read_choice,
    store_choice,
)
from raybert.model.encoder import Encoder
from raybert.model.heads import Classifier
from raybert.model.layers import Embeddings
from raybert.model.settings import ModelConfig
from raybert.serve.runtime.batching import ModelThreads
from raybert.serve.settings import ServeConfig
from raybert.storage import exclusive
from raybert.storage.folder import Folder

CPU = torch.device("cpu")
TEXTS = [text for text, _ in reviews(30, seed=5)]
compiler = pytest.mark.skipif(
    "compiled" not in available_precisions(CPU), reason="there is no C++ compiler here"
)
torch_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
UNCOMPILED = [name for name in available_precisions(CPU) if name != "compiled"]


@pytest.fixture(autouse=True)
def no_compiler(request, monkeypatch):
    """Compile in slow tests only; int8 works uncompiled as well."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(precision, "can_compile", lambda: False)


@pytest.fixture
def own(model, tmp_path):
    """A writable copy of the model."""
    shutil.copytree(model.path, tmp_path / "model")
    return Folder(tmp_path / "model")


def test_the_setting_accepts_the_registrys_precisions():
    names = get_args(ServeConfig.model_fields["precision"].annotation)
    assert names == ("auto", *PRECISIONS)


def choices(folder):
    return [name for name in folder.names() if name.startswith("serving-")]


@pytest.mark.parametrize("name", UNCOMPILED)
def test_each_precision_is_close_to_fp32(model, name):
    exact = TextClassifier(model, precision="fp32").probabilities(TEXTS)
    found = TextClassifier(model, precision=name).probabilities(TEXTS)
    assert np.abs(found - exact).max() < (1e-5 if name == "fp32" else 0.05)


@pytest.mark.parametrize("name", UNCOMPILED)
def test_the_other_texts_of_a_batch_do_not_change_a_score(model, name):
    classifier = TextClassifier(model, precision=name)
    together = classifier.logits(TEXTS)
    alone = np.concatenate([classifier.logits([text]) for text in TEXTS])
    # Products are rounded differently; int8 activations are scaled token by token.
    tolerance = {"fp32": 1e-5, "bf16": 2e-2, "int8": 1e-3}[name]
    np.testing.assert_allclose(together, alone, rtol=0, atol=tolerance)


def test_rotary_angles_and_head_stay_fp32_in_bf16(model):
    served = build_model(TextClassifier(model, precision="fp32").model, "bf16")
    dtypes = {name: tensor.dtype for name, tensor in served.named_buffers()}
    assert {dtype for name, dtype in dtypes.items() if "angles" in name} == {torch.float32}
    weights = {name: p.dtype for name, p in served.named_parameters()}
    assert {d for n, d in weights.items() if n.startswith("encoder.")} == {torch.bfloat16}
    assert {d for n, d in weights.items() if not n.startswith("encoder.")} == {torch.float32}


@pytest.mark.slow
@torch_warnings
@compiler
@pytest.mark.parametrize("name", ["compiled", "int8"])
def test_a_compiled_model_is_close_to_fp32_and_compiled_once(model, name, caplog):
    if name not in available_precisions(CPU):
        pytest.skip(f"there is no {name} here")
    exact = TextClassifier(model, precision="fp32").probabilities(TEXTS)
    classifier = TextClassifier(model, precision=name)
    classifier.warm()
    with torch.compiler.set_stance("fail_on_recompile"):
        found = classifier.probabilities(TEXTS)
        alone = np.concatenate([classifier.probabilities([text]) for text in TEXTS])
        classifier.probabilities([""])
    assert not warned(caplog)  # of a failure, after which it would run uncompiled
    assert np.abs(found - exact).max() < 0.05
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-3)


@pytest.mark.slow
@torch_warnings
@compiler
@pytest.mark.parametrize("local", [1, 2])
def test_more_layers_take_no_more_compiled_functions(local):
    """One for each kind of layer: local or global attention, with or without the first norm."""
    graphs, new = torch._dynamo.utils.counters["stats"], []
    for depth in (4, 9):
        config = ModelConfig(
            hidden_size=24 * local,
            num_layers=depth,
            num_heads=2,
            max_seq_len=40,
            global_attention_every=local,
            local_attention=8,
        )
        exact = Classifier(Encoder(config, 50), 2).eval().requires_grad_(False)
        before = graphs["unique_graphs"]
        served = build_model(exact, "compiled")
        served(torch.ones(1, 40, dtype=torch.int64), lengths=[20, 20])
        new.append(graphs["unique_graphs"] - before)
    assert new[0] <= 2 * local and new[1] == 0


@pytest.mark.slow
@torch_warnings
@compiler
def test_more_architectures_than_pytorchs_recompile_limit_are_compiled(caplog):
    """Its limit is 8; five architectures with two numbers of threads are 10."""
    workers, graphs = ModelThreads(2), torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for width in (32, 64, 96, 128, 160):
        config = ModelConfig(hidden_size=width, num_layers=1, num_heads=2, max_seq_len=40)
        exact = Classifier(Encoder(config, 50), 2).eval().requires_grad_(False)
        served, ids = build_model(exact, "compiled"), torch.ones(1, 40, dtype=torch.int64)
        workers.warm_up(functools.partial(served, ids, lengths=[20, 20]))
    assert graphs["unique_graphs"] - before == 10
    assert not warned(caplog)


@torch_warnings
@compiler
@pytest.mark.parametrize("broken", ["compiler", "cache"])
def test_after_a_compile_error_modules_run_uncompiled(monkeypatch, caplog, tmp_path, broken):
    """With a compiler that fails, or a cache folder that can't be made."""
    tmp_path.joinpath("file").touch()
    cache = tmp_path / ("cache" if broken == "compiler" else "file/cache")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    parts, x = [torch.nn.SiLU(), torch.nn.Tanh()], torch.arange(9.0)
    expected = [part(x) for part in parts]
    compiled.compile_modules(parts)
    with torch._inductor.config.patch({"cpp.cxx": (None, "false")}):
        for part, y in zip(2 * parts, 2 * expected, strict=True):
            assert torch.equal(part(x), y)
    [warning] = warned(caplog)
    assert warning.startswith("torch.compile failed; the model runs uncompiled, slower: ")


def warned(caplog):
    """The warnings of a log."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("layout", ["modern", "classic"])
@pytest.mark.parametrize(("name", "tolerance"), [("fp32", 1e-5), ("int8", 0.05)])
def test_both_layouts_are_close_to_the_exact_model(layout, name, tolerance):
    """Biases, learned positions and local layers included."""
    torch.manual_seed(0)
    config = ModelConfig(
        layout=layout,
        hidden_size=32,
        num_layers=3,
        num_heads=2,
        max_seq_len=40,
        global_attention_every=2 if layout == "modern" else 1,
        local_attention=8,
        initializer_range=0.1,
    )
    exact = Classifier(Encoder(config, 50), 2).eval().requires_grad_(False)
    lengths = [3, 3, 17, 40]
    ids = torch.randint(1, 50, (1, sum(lengths)))
    served = build_model(exact, name)
    logits = served(ids, lengths=lengths)
    torch.testing.assert_close(logits, exact(ids, lengths=lengths), rtol=0, atol=tolerance)
    ids, mask = ids[:, :20].expand(2, 20), torch.arange(20) < torch.tensor([[20], [11]])
    torch.testing.assert_close(served(ids, mask), exact(ids, mask), rtol=0, atol=tolerance)


@pytest.mark.skipif(not onednn.has_onednn(), reason="this PyTorch has no oneDNN")
def test_the_first_layer_uses_a_token_table_unless_it_is_too_large(model, monkeypatch):
    monkeypatch.setattr(onednn, "_TABLE_CHUNK", 100)
    with_table = TextClassifier(model, precision="fp32")
    table = with_table._compute.encoder.embeddings
    assert isinstance(table, onednn.TokenTable)
    monkeypatch.setattr(onednn, "_MAX_TABLE_BYTES", table._rows.nbytes - 1)
    computed = TextClassifier(model, precision="fp32")
    assert isinstance(computed._compute.encoder.embeddings, Embeddings)
    np.testing.assert_allclose(with_table.logits(TEXTS), computed.logits(TEXTS), rtol=0, atol=1e-5)
    monkeypatch.setattr(onednn, "_MAX_TABLE_BYTES", table._rows.nbytes)
    again = TextClassifier(model, precision="fp32")
    assert isinstance(again._compute.encoder.embeddings, onednn.TokenTable)


def test_an_unknown_precision_is_an_error(model):
    with pytest.raises(UserError, match="serve.precision=fp8: use auto, fp32, bf16"):
        TextClassifier(model, precision="fp8")


def test_a_stored_choice_is_used(own):
    default = precision.default_precision(CPU)
    other = "fp32" if default == "bf16" else "bf16"
    assert TextClassifier(own).precision == default
    assert store_choice(own, CPU, {"precision": other})["precision"] == other
    assert TextClassifier(own).precision == other
    assert precision_choice.select_precision(own, "cpu") == other  # without a benchmark
    assert precision_choice.select_precision(own, "cpu", "fp32") == other
    assert len(choices(own)) == 1


def test_replicas_that_store_at_once_all_use_one_choice(own):
    names = ["fp32", "bf16"] * 8
    with ThreadPoolExecutor(16) as threads:
        found = list(
            threads.map(lambda name: precision_choice.select_precision(own, "cpu", name), names)
        )
    assert len(set(found)) == 1
    assert len(choices(own)) == 1
    assert own.names(hidden=True) == own.names()


def test_on_an_object_store_too_all_replicas_use_one_choice(model, bucket, monkeypatch):
    """It has no locks: a replica that writes later must not overwrite what others use."""
    monkeypatch.setattr(exclusive, "_PROPOSAL_WAIT_SECONDS", 1.0)
    for name in model.names():
        if model.size(name) is not None:
            bucket.write_bytes(name, model.read_bytes(name))
    write, turn = Folder.write_json, iter(range(100))

    def write_later(folder, name, value):
        time.sleep(0.1 * next(turn))  # each after all have looked for a choice
        write(folder, name, value)

    monkeypatch.setattr(Folder, "write_json", write_later)
    names = ["fp32", "bf16"] * 2
    with ThreadPoolExecutor(4) as threads:
        found = list(
            threads.map(lambda name: precision_choice.select_precision(bucket, "cpu", name), names)
        )
    assert len(set(found)) == 1
    assert precision_choice.select_precision(bucket, "cpu") == found[0]
    assert [name for name in bucket.names(hidden=True) if "serving-" in name] == choices(bucket)
    assert len(choices(bucket)) == 1


def test_of_replicas_that_start_at_once_one_measures(own, monkeypatch, tmp_path):
    monkeypatch.setattr(precision_choice.tempfile, "tempdir", str(tmp_path))
    measured = []

    def benchmark(folder, device):
        measured.append(device)
        time.sleep(0.3)
        return {"precision": "fp32"}

    monkeypatch.setattr(precision_choice, "benchmark", benchmark)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: precision_choice.select_precision(own, "cpu"), range(4)))
    assert found == ["fp32"] * 4 and len(measured) == 1


class Thrashing:
    """A clock, and a classifier whose passes take these seconds by it, again and again."""

    def __init__(self, *seconds):
        self.now, self._seconds, self.passes = 0.0, itertools.cycle(seconds), 0

    def perf_counter(self):
        return self.now

    def score(self, rows):
        self.passes += 1
        self.now += next(self._seconds)


@pytest.mark.parametrize(
    ("seconds", "spread", "windows"),
    [([0.1], 0, 1), ([0.1, 0.12], 0.1, 1), ([0.1, 0.5, 0.5], 0.8, 3), ([3.0], 0, 1)],
)
def test_a_speed_has_a_spread_and_is_measured_longer_where_it_is_large(
    monkeypatch, seconds, spread, windows
):
    model = Thrashing(*seconds)
    monkeypatch.setattr(precision_choice, "time", model)
    speed = precision_choice._tokens_per_second(model, [np.zeros(50), np.zeros(50)])
    assert speed.best == pytest.approx(100 / min(seconds), abs=0.1)
    assert speed.spread == pytest.approx(spread, abs=0.1)
    assert model.passes >= 2 * windows
    assert model.now <= windows * max(1.6, 2 * max(seconds))
    assert (speed.spread <= precision_choice.MAX_SPREAD) == (windows == 1)


def test_an_unstable_choice_is_measured_again_a_few_times(own, monkeypatch):
    measured = []

    def benchmark(folder, device):
        measured.append(device)
        return {"precision": "bf16" if len(measured) % 2 else "fp32", "stable": False}

    monkeypatch.setattr(precision_choice, "benchmark", benchmark)
    found = [precision_choice.select_precision(own, "cpu") for _ in range(6)]
    assert found == ["bf16", "fp32", "bf16", "bf16", "bf16", "bf16"]
    assert len(measured) == 3 and read_choice(own, CPU)["tries"] == 3


def test_a_stable_choice_is_kept_and_so_is_one_by_accuracy(own, monkeypatch):
    answers = [{"precision": "bf16", "stable": False}, {"precision": "fp32", "stable": True}]
    monkeypatch.setattr(precision_choice, "benchmark", lambda folder, device: answers.pop(0))
    assert precision_choice.select_precision(own, "cpu") == "bf16"
    assert precision_choice.select_precision(own, "cpu", "bf16") == "bf16"  # of a running server
    assert len(answers) == 1
    assert [precision_choice.select_precision(own, "cpu") for _ in range(3)] == ["fp32"] * 3
    by_accuracy = {"precision": "bf16", "stable": False, "texts": 900}
    store_choice(own, CPU, by_accuracy, replace=True)
    assert precision_choice.select_precision(own, "cpu") == "bf16"


@pytest.mark.parametrize("content", ["[]", "{", '{"precision": ["bf16"]}', '{"precision": 1}', ""])
def test_a_damaged_choice_is_made_again(own, content, monkeypatch):
    store_choice(own, CPU, {"precision": "fp32"})
    Path(own.join(choices(own)[0])).write_text(content)
    assert read_choice(own, CPU) is None
    monkeypatch.setattr(precision_choice, "benchmark", lambda folder, device: {"precision": "bf16"})
    assert precision_choice.select_precision(own, "cpu") == "bf16"
    assert read_choice(own, CPU)["precision"] == "bf16"


def test_without_a_lock_file_the_choice_is_made_all_the_same(own, monkeypatch, tmp_path):
    monkeypatch.setattr(precision_choice.tempfile, "tempdir", str(tmp_path / "nowhere"))
    monkeypatch.setattr(precision_choice, "benchmark", lambda folder, device: {"precision": "fp32"})
    assert precision_choice.select_precision(own, "cpu") == "fp32"


def test_a_choice_applies_to_its_weights_and_machine_type_only(own, monkeypatch):
    store_choice(own, CPU, {"precision": "fp32"})
    assert read_choice(own, CPU)["machine"] == precision.machine_type(CPU)
    monkeypatch.setattr(precision, "machine_type", lambda device: "another one")
    assert read_choice(own, CPU) is None
    monkeypatch.undo()
    own.write_bytes("model.safetensors", own.read_bytes("model.safetensors") + b" ")
    assert read_choice(own, CPU) is None


def test_only_replace_overwrites_a_choice(own):
    store_choice(own, CPU, {"precision": "fp32"})
    store_choice(own, CPU, {"precision": "bf16"})
    assert read_choice(own, CPU)["precision"] == "fp32"
    store_choice(own, CPU, {"precision": "bf16"}, replace=True)
    assert read_choice(own, CPU)["precision"] == "bf16"


def test_a_choice_of_an_unknown_precision_is_ignored(own):
    store_choice(own, CPU, {"precision": "fp32"})
    Path(own.join(choices(own)[0])).write_text(json.dumps({"precision": "fp8"}))
    assert read_choice(own, CPU) is None


def test_the_benchmark_selects_among_precisions_close_to_fp32(own, monkeypatch):
    monkeypatch.setattr(precision_choice, "_SECONDS", 0.02)
    monkeypatch.setattr(precision_choice, "available_precisions", lambda device: tuple(UNCOMPILED))
    found = precision_choice.benchmark(own, "cpu")
    assert set(found["measured"]) == set(UNCOMPILED)
    assert found["measured"]["fp32"]["max_difference"] == 0
    assert found["measured"]["fp32"]["batch_difference"] < 1e-5
    assert all(one["tokens_per_second"] > 0 for one in found["measured"].values())
    assert all(0 <= one["spread"] < 1 for one in found["measured"].values())
    spreads = [one["spread"] for one in found["measured"].values()]
    assert found["stable"] == (max(spreads) <= precision_choice.MAX_SPREAD)
    assert found["precision"] in UNCOMPILED
    monkeypatch.setattr(precision_choice, "MAX_DIFFERENCE", 0.0)
    assert precision_choice.benchmark(own, "cpu")["precision"] == "fp32"
    assert precision_choice.select_precision(own, "cpu") == read_choice(own, CPU)["precision"]


def test_a_less_exact_precision_must_be_faster_by_a_margin():
    assert precision_choice.fastest({"fp32": 100, "bf16": 104, "int8": 90}) == "fp32"
    assert precision_choice.fastest({"fp32": 100, "bf16": 150, "int8": 151}) == "bf16"
    assert precision_choice.fastest({"fp32": 100, "bf16": 150, "int8": 200}) == "int8"


def test_comparing_on_labelled_texts_measures_the_accuracy_lost(own, monkeypatch):
    monkeypatch.setattr(precision_choice, "available_precisions", lambda device: tuple(UNCOMPILED))
    rows = reviews(40, seed=11)
    labels = np.array([("neg", "pos").index(label) for _, label in rows])
    lines = []
    found = precision_choice.compare(
        own, [text for text, _ in rows], labels, on_progress=lines.append
    )
    assert found["measured"]["fp32"]["points_lost"] == 0
    assert found["measured"]["fp32"]["accuracy"] > 0.9
    assert len(lines) == len(UNCOMPILED)
    assert all(0 <= one["spread"] < 1 for one in found["measured"].values())
    assert found["stored"] and found["stable"] in (True, False)
    assert read_choice(own, CPU)["precision"] == found["precision"]
    assert TextClassifier(own).precision == found["precision"]

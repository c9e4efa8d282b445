"""Precisions: how far each moves a score, and that replicas take the same one."""

import functools
import json
import logging
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from making import reviews

from raybert.errors import UserError
from raybert.inference import engines, packed, precision_choice
from raybert.inference import precision as precisions
from raybert.inference.classifier import TextClassifier
from raybert.model.encoder import Encoder
from raybert.model.heads import Classifier
from raybert.model.layers import Embeddings
from raybert.model.settings import ModelConfig
from raybert.serve.runtime.threads import ModelThreads
from raybert.storage.folder import Folder

CPU = torch.device("cpu")
TEXTS = [text for text, _ in reviews(30, seed=5)]
compiler = pytest.mark.skipif(
    "compiled" not in precisions.available(CPU), reason="there is no C++ compiler here"
)
torchs_own = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of its own parts
QUICK = [name for name in precisions.available(CPU) if name != "compiled"]


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Nothing is compiled but in tests that are slow for it: int8 is served either way."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(engines, "can_compile", lambda: False)


@pytest.fixture
def own(model, tmp_path):
    """A copy of the model, to write to."""
    shutil.copytree(model.path, tmp_path / "model")
    return Folder(tmp_path / "model")


def choices(folder):
    return [name for name in folder.names() if name.startswith("serving-")]


@pytest.mark.parametrize("name", QUICK)
def test_a_precision_moves_scores_little(model, name):
    exact = TextClassifier(model, precision="fp32").probabilities(TEXTS)
    found = TextClassifier(model, precision=name).probabilities(TEXTS)
    assert np.abs(found - exact).max() < (1e-5 if name == "fp32" else 0.05)


@pytest.mark.parametrize("name", QUICK)
def test_a_neighbour_does_not_change_a_score(model, name):
    classifier = TextClassifier(model, precision=name)
    together = classifier.logits(TEXTS)
    alone = np.concatenate([classifier.logits([text]) for text in TEXTS])
    # They differ by the rounding of products at most: int8 scales each token by itself.
    tolerance = {"fp32": 1e-5, "bf16": 2e-2, "int8": 1e-3}[name]
    np.testing.assert_allclose(together, alone, rtol=0, atol=tolerance)


def test_positions_are_exact_in_bf16(model):
    served = engines.engine(TextClassifier(model, precision="fp32").model, "bf16")
    dtypes = {name: tensor.dtype for name, tensor in served.named_buffers()}
    assert {dtype for name, dtype in dtypes.items() if "angles" in name} == {torch.float32}
    weights = {name: p.dtype for name, p in served.named_parameters()}
    assert {d for n, d in weights.items() if n.startswith("encoder.")} == {torch.bfloat16}
    assert {d for n, d in weights.items() if not n.startswith("encoder.")} == {torch.float32}


@pytest.mark.slow
@torchs_own
@compiler
@pytest.mark.parametrize("name", ["compiled", "int8"])
def test_a_compiled_model_scores_alike_and_is_compiled_once(model, name, caplog):
    if name not in precisions.available(CPU):
        pytest.skip(f"there is no {name} here")
    exact = TextClassifier(model, precision="fp32").probabilities(TEXTS)
    classifier = TextClassifier(model, precision=name)
    classifier.warm()
    with torch.compiler.set_stance("fail_on_recompile"):  # whatever comes then
        found = classifier.probabilities(TEXTS)
        alone = np.concatenate([classifier.probabilities([text]) for text in TEXTS])
        classifier.probabilities([""])
    assert not warned(caplog)  # of a failure, after which it would run as it is
    assert np.abs(found - exact).max() < 0.05
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-3)


@pytest.mark.slow
@torchs_own
@compiler
@pytest.mark.parametrize("local", [1, 2])
def test_a_deep_model_takes_no_longer_to_compile(local):
    """Layers share their code; local ones and global ones differ, and where the first norm is."""
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
        served = engines.engine(exact, "compiled")
        served(torch.ones(1, 40, dtype=torch.int64), lengths=[20, 20])
        new.append(graphs["unique_graphs"] - before)
    assert new[0] <= 2 * local and new[1] == 0


@pytest.mark.slow
@torchs_own
@compiler
def test_versions_of_many_shapes_are_compiled_one_after_the_other(caplog):
    """PyTorch's limit is eight: four architectures, each with two numbers of threads."""
    workers, graphs = ModelThreads(2), torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for width in (32, 64, 96, 128, 160):
        config = ModelConfig(hidden_size=width, num_layers=1, num_heads=2, max_seq_len=40)
        exact = Classifier(Encoder(config, 50), 2).eval().requires_grad_(False)
        served, ids = engines.engine(exact, "compiled"), torch.ones(1, 40, dtype=torch.int64)
        workers.warm(functools.partial(served, ids, lengths=[20, 20]))
    assert graphs["unique_graphs"] - before == 10
    assert not warned(caplog)


@torchs_own
@compiler
@pytest.mark.parametrize("broken", ["compiler", "cache"])
def test_what_can_not_be_compiled_runs_as_it_is(monkeypatch, caplog, tmp_path, broken):
    """With a compiler that fails, or no folder to keep its files in."""
    tmp_path.joinpath("file").touch()
    cache = tmp_path / ("cache" if broken == "compiler" else "file/cache")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    parts, x = [torch.nn.SiLU(), torch.nn.Tanh()], torch.arange(9.0)
    expected = [part(x) for part in parts]
    engines._compile(parts)
    with torch._inductor.config.patch({"cpp.cxx": (None, "false")}):
        for part, y in zip(2 * parts, 2 * expected, strict=True):
            assert torch.equal(part(x), y)
    [told] = warned(caplog)
    assert told.startswith("compiling fails, so the model runs as it is, slower: ")


def warned(caplog):
    """The warnings of a log."""
    return [told.getMessage() for told in caplog.records if told.levelno >= logging.WARNING]


@pytest.mark.parametrize("layout", ["modern", "classic"])
@pytest.mark.parametrize(("name", "tolerance"), [("fp32", 1e-5), ("int8", 0.05)])
def test_every_layout_is_served(layout, name, tolerance):
    """With biases, learned positions and local layers, too."""
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
    served = engines.engine(exact, name)
    logits = served(ids, lengths=lengths)
    torch.testing.assert_close(logits, exact(ids, lengths=lengths), rtol=0, atol=tolerance)
    ids, mask = ids[:, :20].expand(2, 20), torch.arange(20) < torch.tensor([[20], [11]])
    torch.testing.assert_close(served(ids, mask), exact(ids, mask), rtol=0, atol=tolerance)


@pytest.mark.skipif(not packed.can_pack(), reason="this PyTorch has no oneDNN")
def test_the_first_product_is_looked_up_unless_its_table_is_too_large(model, monkeypatch):
    monkeypatch.setattr(packed, "_TABLE_ROWS", 100)
    looked_up = TextClassifier(model, precision="fp32")
    table = looked_up._engine.encoder.embeddings
    assert isinstance(table, packed.TokenTable)
    monkeypatch.setattr(packed, "_LARGEST_TABLE", table._rows.nbytes - 1)
    computed = TextClassifier(model, precision="fp32")
    assert isinstance(computed._engine.encoder.embeddings, Embeddings)
    np.testing.assert_allclose(looked_up.logits(TEXTS), computed.logits(TEXTS), rtol=0, atol=1e-5)
    monkeypatch.setattr(packed, "_LARGEST_TABLE", table._rows.nbytes)
    again = TextClassifier(model, precision="fp32")
    assert isinstance(again._engine.encoder.embeddings, packed.TokenTable)


def test_an_unknown_precision_is_refused(model):
    with pytest.raises(UserError, match="serve.precision=fp8: use auto, fp32, bf16"):
        TextClassifier(model, precision="fp8")


def test_the_choice_is_stored_and_everybody_takes_it(own):
    rule = precisions.fallback(CPU)
    other = "fp32" if rule == "bf16" else "bf16"
    assert TextClassifier(own).precision == rule
    assert precisions.store(own, CPU, {"precision": other})["precision"] == other
    assert TextClassifier(own).precision == other
    assert precision_choice.select_precision(own, "cpu") == other  # without measuring
    assert precision_choice.select_precision(own, "cpu", "fp32") == other
    assert len(choices(own)) == 1


def test_of_replicas_that_choose_at_once_the_first_decides(own):
    names = ["fp32", "bf16"] * 8
    with ThreadPoolExecutor(16) as threads:
        found = list(
            threads.map(lambda name: precision_choice.select_precision(own, "cpu", name), names)
        )
    assert len(set(found)) == 1
    assert len(choices(own)) == 1
    assert own.names(hidden=True) == own.names()


def test_on_an_object_store_all_replicas_take_one_choice_too(model, bucket, monkeypatch):
    """It has no locks: who writes later than another one must not take its own choice for all."""
    monkeypatch.setattr(precisions, "_AGREE_SECONDS", 1.0)
    for name in model.names():
        if model.size(name) is not None:
            bucket.write_bytes(name, model.read_bytes(name))
    write, turn = Folder.write_json, iter(range(100))

    def write_later(folder, name, value):
        time.sleep(0.1 * next(turn))  # each after the others have looked, and found nothing
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


def test_replicas_that_start_at_once_measure_one_after_the_other(own, monkeypatch, tmp_path):
    """And those after the first one find its choice, and don't measure at all."""
    monkeypatch.setattr(precision_choice.tempfile, "tempdir", str(tmp_path))
    measured = []

    def measure(folder, device):
        measured.append(device)
        time.sleep(0.3)
        return {"precision": "fp32"}

    monkeypatch.setattr(precision_choice, "benchmark", measure)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: precision_choice.select_precision(own, "cpu"), range(4)))
    assert found == ["fp32"] * 4 and len(measured) == 1


def test_where_no_lock_can_be_had_the_choice_is_made_all_the_same(own, monkeypatch, tmp_path):
    monkeypatch.setattr(precision_choice.tempfile, "tempdir", str(tmp_path / "nowhere"))
    monkeypatch.setattr(precision_choice, "benchmark", lambda folder, device: {"precision": "fp32"})
    assert precision_choice.select_precision(own, "cpu") == "fp32"


def test_a_choice_holds_for_its_weights_and_machine_only(own, monkeypatch):
    precisions.store(own, CPU, {"precision": "fp32"})
    assert precisions.stored(own, CPU)["machine"] == precisions.machine(CPU)
    monkeypatch.setattr(precisions, "machine", lambda device: "another one")
    assert precisions.stored(own, CPU) is None
    monkeypatch.undo()
    own.write_bytes("model.safetensors", own.read_bytes("model.safetensors") + b" ")
    assert precisions.stored(own, CPU) is None


def test_a_choice_can_be_replaced_by_a_better_one(own):
    precisions.store(own, CPU, {"precision": "fp32"})
    precisions.store(own, CPU, {"precision": "bf16"})
    assert precisions.stored(own, CPU)["precision"] == "fp32"
    precisions.store(own, CPU, {"precision": "bf16"}, replace=True)
    assert precisions.stored(own, CPU)["precision"] == "bf16"


def test_a_choice_that_is_damaged_counts_for_none(own):
    precisions.store(own, CPU, {"precision": "fp32"})
    Path(own.join(choices(own)[0])).write_text(json.dumps({"precision": "fp8"}))
    assert precisions.stored(own, CPU) is None


def test_measuring_chooses_among_what_scores_alike(own, monkeypatch):
    monkeypatch.setattr(precision_choice, "_SECONDS", 0.02)
    monkeypatch.setattr(precisions, "available", lambda device: tuple(QUICK))
    found = precision_choice.benchmark(own, "cpu")
    assert set(found["measured"]) == set(QUICK)
    assert found["measured"]["fp32"]["max_difference"] == 0
    assert found["measured"]["fp32"]["company"] < 1e-5
    assert all(one["tokens_per_second"] > 0 for one in found["measured"].values())
    assert found["precision"] in QUICK
    monkeypatch.setattr(precision_choice, "MOST_DIFFERENCE", 0.0)
    assert precision_choice.benchmark(own, "cpu")["precision"] == "fp32"
    assert precision_choice.select_precision(own, "cpu") == precisions.stored(own, CPU)["precision"]


def test_a_faster_precision_must_be_worth_it():
    assert precision_choice.fastest({"fp32": 100, "bf16": 104, "int8": 90}) == "fp32"
    assert precision_choice.fastest({"fp32": 100, "bf16": 150, "int8": 151}) == "bf16"
    assert precision_choice.fastest({"fp32": 100, "bf16": 150, "int8": 200}) == "int8"


def test_comparing_on_labelled_texts_states_what_each_costs(own, monkeypatch):
    monkeypatch.setattr(precisions, "available", lambda device: tuple(QUICK))
    rows = reviews(40, seed=11)
    labels = np.array([("neg", "pos").index(label) for _, label in rows])
    told = []
    found = precision_choice.compare(
        own, [text for text, _ in rows], labels, on_progress=told.append
    )
    assert found["measured"]["fp32"]["points_lost"] == 0
    assert found["measured"]["fp32"]["accuracy"] > 0.9
    assert len(told) == len(QUICK)
    assert found["stored"]
    assert precisions.stored(own, CPU)["precision"] == found["precision"]
    assert TextClassifier(own).precision == found["precision"]

"""The registry: versions, the pointer to the current one, rollbacks."""

import json

import pytest

from raybert.errors import DamagedError, UserError
from raybert.storage.folder import Folder
from raybert.storage.registry import Registry, resolve_model


@pytest.fixture
def registry(anywhere):
    return Registry(anywhere.uri)


def model(tmp_path, weights):
    folder = Folder(tmp_path / f"model-{weights}")
    folder.write_json("config.json", {"model_type": "bert"})
    folder.write_text("model.safetensors", weights)
    folder.write_text("tokenizer.json", "{}")
    folder.write_text("README.md", "card")
    return folder


def test_a_promoted_model_is_the_current_one(registry, tmp_path):
    source = model(tmp_path, "one")
    assert registry.promote("reviews", source) == 1
    current = registry.current("reviews")
    assert current.read_text("model.safetensors") == "one"
    assert current.names() == [*source.names(), "version.json"]
    assert registry.versions("reviews") == [1]
    assert registry.names() == ["reviews"]
    assert registry.describe("reviews", 1)["from"] == source.uri


def test_rollbacks_return_through_the_history(registry, tmp_path):
    for number, weights in enumerate(("one", "two", "three"), 1):
        assert registry.promote("reviews", model(tmp_path, weights)) == number
    assert registry.versions("reviews") == [1, 2, 3]
    assert registry.rollback("reviews") == 2
    assert registry.current("reviews").read_text("model.safetensors") == "two"
    assert registry.promote("reviews", model(tmp_path, "four")) == 4
    assert [registry.rollback("reviews") for _ in range(2)] == [2, 1]
    with pytest.raises(UserError, match="version 1 is the first one; there is nothing to go back"):
        registry.rollback("reviews")
    assert registry.versions("reviews") == [1, 2, 3, 4]


def test_a_rollback_can_name_a_version(registry, tmp_path):
    for weights in ("one", "two", "three"):
        registry.promote("reviews", model(tmp_path, weights))
    assert registry.rollback("reviews", 1) == 1
    assert registry.rollback("reviews") == 3  # the one that was current before
    with pytest.raises(UserError, match="has no version 9; it has 1, 2, 3"):
        registry.rollback("reviews", 9)
    assert registry.current("reviews").uri == registry.folder("reviews", 3).uri


def test_a_registered_model_is_not_copied_again(registry, tmp_path):
    registry.promote("reviews", model(tmp_path, "one"))
    registry.promote("reviews", model(tmp_path, "two"))
    assert registry.promote("reviews", model(tmp_path, "one")) == 1
    assert registry.versions("reviews") == [1, 2]
    assert registry.rollback("reviews") == 2


def test_a_chosen_precision_is_copied_to_a_registered_version(registry, tmp_path):
    """`bench serve` chooses by accuracy, after serving has chosen by speed."""
    source = model(tmp_path, "one")
    registry.promote("reviews", source)
    version = registry.current("reviews")
    version.write_json("serving-a-b.json", {"precision": "int8"})
    source.write_json("serving-a-b.json", {"precision": "bf16", "texts": 900})
    source.write_json("serving-a-c.json", {"precision": "fp32"})
    assert registry.promote("reviews", source) == 1
    assert version.read_json("serving-a-b.json")["precision"] == "bf16"
    assert version.read_json("serving-a-c.json")["precision"] == "fp32"
    source.write_json("serving-a-b.json", {"precision": "compiled"})  # by speed
    registry.promote("reviews", source)
    assert version.read_json("serving-a-b.json")["precision"] == "bf16"


def test_models_of_different_names_are_separate(registry, tmp_path):
    registry.promote("a", model(tmp_path, "one"))
    registry.promote("b", model(tmp_path, "two"))
    assert (registry.versions("a"), registry.versions("b")) == ([1], [1])
    assert registry.current("b").read_text("model.safetensors") == "two"


@pytest.mark.parametrize(
    "content",
    ["[]", "{", "null", '{"version": 1}', "[" * 9000]
    + [
        json.dumps({"format_version": 1, "version": 1, "history": []} | changed)
        for changed in (
            {"version": "1"},
            {"version": 0},
            {"version": None},
            {"version": 1.5},
            {"history": [None]},
            {"history": 0},
            {"format_version": None},
        )
    ],
)
def test_a_damaged_pointer_is_named_and_mended_by_promoting(tmp_path, content):
    registry, source = Registry(str(tmp_path)), model(tmp_path, "one")
    registry.promote("reviews", source)
    (tmp_path / "registry/reviews/current.json").write_text(content)
    for ask in (registry.current, registry.rollback):
        with pytest.raises(DamagedError, match="reviews/current.json is damaged") as caught:
            ask("reviews")
        assert str(caught.value).isprintable()
    assert registry.promote("reviews", source) == 1
    assert registry.current("reviews").read_text("model.safetensors") == "one"


def test_damaged_records_of_versions_and_precisions_are_passed_over(tmp_path):
    registry, source = Registry(str(tmp_path)), model(tmp_path, "one")
    registry.promote("reviews", source)
    (tmp_path / "registry/reviews/v1/version.json").write_text('{"version": 1}')
    source.write_text("serving-a-b.json", "[1")
    assert registry.promote("reviews", source) == 2
    source.write_json("serving-a-b.json", {"precision": "bf16"})
    (tmp_path / "registry/reviews/v2/serving-a-b.json").write_text("[]")
    assert registry.promote("reviews", source) == 2
    assert registry.current("reviews").read_json("serving-a-b.json") == {"precision": "bf16"}


def test_an_incomplete_version_does_not_count(registry, tmp_path, monkeypatch):
    registry.promote("reviews", model(tmp_path, "one"))
    write = Folder.write_json

    def fail(folder, name, value):
        if name == "version.json":
            raise KeyboardInterrupt
        write(folder, name, value)

    monkeypatch.setattr(Folder, "write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        registry.promote("reviews", model(tmp_path, "two"))
    monkeypatch.undo()
    assert registry.versions("reviews") == [1]
    assert registry.current("reviews").uri == registry.folder("reviews", 1).uri
    assert registry.promote("reviews", model(tmp_path, "two")) == 3  # 2 stays taken


def test_a_missing_model_is_an_error_that_lists_the_known_ones(registry, tmp_path):
    with pytest.raises(UserError, match="has no model 'reviews'; it has none as yet; make one"):
        registry.current("reviews")
    registry.promote("films", model(tmp_path, "one"))
    with pytest.raises(UserError, match="has no model 'reviews'; it has films"):
        registry.rollback("reviews")
    with pytest.raises(UserError, match="no model here"):
        registry.promote("reviews", Folder(tmp_path / "nothing"))
    for name in ("../reviews", "a/b", ""):
        with pytest.raises(UserError, match="is no name for a model"):
            registry.promote(name, model(tmp_path, "one"))
        with pytest.raises(UserError, match="is no name for a model"):
            registry.current(name)
    assert registry.versions("reviews") == []


def test_weights_in_several_files_are_told_apart(tmp_path):
    registry, source = Registry(str(tmp_path)), model(tmp_path, "one")
    source.write_text("model-1-of-2.safetensors", "same")
    source.write_text("model-2-of-2.safetensors", "one")
    assert registry.promote("reviews", source) == 1
    source.write_text("model-2-of-2.safetensors", "two")
    assert registry.promote("reviews", source) == 1  # model.safetensors is what is read
    source.delete("model.safetensors")
    assert registry.promote("reviews", source) == 2
    source.write_text("model-2-of-2.safetensors", "one")
    assert registry.promote("reviews", source) == 3
    assert registry.promote("reviews", source) == 3


@pytest.mark.parametrize("name", ["bert-base-uncased", "answerdotai/ModernBERT-base"])
def test_a_name_on_a_hub_is_to_be_downloaded_first(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    local = name.split("/")[-1]
    with pytest.raises(
        UserError, match=f"no model here.* `hf download {name} --local-dir {local}`"
    ):
        resolve_model(name)
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match="no model here") as caught:
        resolve_model(name)
    assert "download" not in str(caught.value)


def test_a_registry_of_a_newer_format_is_refused(registry, anywhere, tmp_path):
    registry.promote("reviews", model(tmp_path, "one"))
    folder = anywhere / "registry" / "reviews"
    folder.write_json("current.json", {"format_version": 2, "version": 1, "history": []})
    with pytest.raises(UserError, match="has format 2, this raybert reads up to 1; upgrade"):
        registry.current("reviews")

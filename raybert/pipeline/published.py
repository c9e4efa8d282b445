"""`--from`: an experiment that starts from a published encoder, or another one of raybert's.

The encoder's directory decides architecture and tokenizer. Pretraining continues its masked
language modelling on the user's text; fine-tuning alone starts from it directly. What the
configuration leaves out is filled in with values that suit a pretrained encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raybert.errors import UserError, one_line
from raybert.storage.folder import Folder
from raybert.storage.registry import find_model, is_hub_name, resolve_model

if TYPE_CHECKING:
    from raybert.model.settings import ModelConfig

#: The files of a model on a hub that are read.
_FILES = [
    *("config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt"),
]
_MOST_SHOWN = 3  # ignored settings in a line
#: Sequences in a step, and in one forward pass, of continued pretraining. A user's text is little
#: beside what the encoder has read: small batches make more steps of it.
_BATCH, _MICRO_BATCH = 64, 16


def find_encoder(given: str) -> Folder:
    """The model directory of a path, a run, or a name on a hub, which is downloaded.

    Raises:
        UserError: there is none.
    """
    folder = Folder(given)
    found = find_model(folder, "pretrain")
    if found is not None:
        return found
    if folder.exists() or not is_hub_name(given):
        return resolve_model(given, "pretrain", key="--from")
    return resolve_model(_download(given), "pretrain", key="--from")


def _download(name: str) -> str:
    """The folder of a model of huggingface.co, in the cache that all its clients share."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"--from {name}: no such folder; for a model of huggingface.co, `pip install "
            "raybert[hub]`"
        ) from None
    try:
        return str(snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # of HTTP, of the network, of the hub's answer, of the cache
        raise UserError(
            f"--from {name}: no such folder, and no such model was read from huggingface.co "
            f"({one_line(error)}); check the name and the network, or name a folder"
        ) from None


def with_encoder(
    values: Mapping[str, Any], folder: Folder, command: str
) -> tuple[dict[str, Any], list[str]]:
    """The values of a configuration that starts from an encoder, and settings that it overrules.

    `command` is `finetune` or `tune` where an encoder that was not pretrained further is fine-tuned
    itself, as are those that transformers computes. Others than these and `config` pretrain.

    Raises:
        UserError: the folder holds no model that raybert reads, or no tokenizer.
    """
    from raybert.data.tokenizer import Tokenizer
    from raybert.model import huggingface
    from raybert.model.settings import ModelConfig

    is_own = huggingface.is_own(huggingface.read_config_json(folder))
    begins = command in ("finetune", "tune")
    pretrains = not begins and command != "config"
    read = huggingface.read_own_config if pretrains else huggingface.read_model_config
    model, _ = read(folder)
    huggingface.weight_files(folder)
    if not Tokenizer.exists(folder):
        raise UserError(
            f"--from {folder}: no tokenizer here (tokenizer.json, or BERT's vocab.txt); copy the "
            "model's there"
        )
    given, usual = _section(values, "model"), ModelConfig()
    shape = model.model_dump(mode="json", exclude={"dropout", "size"})
    overruled = [
        f"model.{key}={value}"
        for key, value in given.items()
        if key == "size" or (key in shape and value not in (shape[key], getattr(usual, key)))
        if value is not None
    ]
    kind = _section(_section(values, "corpus"), "tokenizer").get("kind", "auto")
    if kind not in ("auto", "file"):
        overruled.append(f"corpus.tokenizer.kind={kind}")
    started = _updated(values, "model", {**shape, "size": None})
    tokenizer = {
        **_section(_section(values, "corpus"), "tokenizer"),
        "kind": "file",
        "path": folder.uri,
    }
    started = _updated(started, "corpus", {"tokenizer": tokenizer})
    started = _updated(started, "pretrain", {"initialize_from": folder.uri})
    start = _section(values, "finetune").get("initialize_from", "pretrain")
    if start == "pretrain" and (not is_own or (begins and not _is_pretrained(values))):
        started = _updated(started, "finetune", {"initialize_from": folder.uri})
    return _filled(started, model), overruled


def format_overruled(overruled: list[str], folder: Folder) -> str:
    """A line about settings that an encoder's directory overrules."""
    shown = ", ".join(overruled[:_MOST_SHOWN])
    more = f" and {len(overruled) - _MOST_SHOWN} more" if len(overruled) > _MOST_SHOWN else ""
    return f"model     {folder} decides its shape and tokenizer: {shown}{more} ignored"


def _filled(values: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """The values with what suits a pretrained encoder, where they have none."""
    from raybert.data.corpus.settings import CorpusConfig
    from raybert.model.sizes import continued_lr, fill, published_lr
    from raybert.train.settings import LIMITS

    width, batch, micro = model.hidden_size, _BATCH, _MICRO_BATCH
    own = _section(values, "pretrain")
    pretrain: dict[str, Any] = {"lr": continued_lr(width)}
    if own.get("global_batch_size") is None and own.get("micro_batch_size") is None:
        pretrain |= {"global_batch_size": batch, "micro_batch_size": micro}
    if all(own.get(limit) is None for limit in LIMITS):
        pretrain["epochs"] = 1
    adapts = _section(_section(values, "finetune"), "lora").get("rank")
    decided = {
        "corpus": {"seq_len": min(CorpusConfig().seq_len, model.max_seq_len)},
        "pretrain": pretrain,
        # Adapters begin at zero, and what the encoder knows stays.
        "finetune": {"lr": published_lr(width) * (10 if adapts else 1)},
    }
    return fill(values, decided)


def _is_pretrained(values: Mapping[str, Any]) -> bool:
    """Whether this experiment's own pretraining has begun."""
    from raybert.experiment import RunConfig

    run = {**RunConfig().model_dump(), **_section(values, "run")}
    folder = Folder(str(run["storage"])) / str(run["name"])
    return folder.exists("pretrain/config.yaml")


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return dict(found) if isinstance(found, Mapping) else {}


def _updated(
    values: Mapping[str, Any], section: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    return {**values, section: {**_section(values, section), **settings}}

"""The model card of a fine-tuned model, once its n-gram part and its test scores are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from raybert.errors import DamagedError, StorageError
from raybert.experiment import Experiment
from raybert.model import huggingface
from raybert.storage.folder import Folder
from raybert.tasks.model_cards import ClassifierCard, public_name
from raybert.tasks.prepared_texts import read_prepared_texts
from raybert.terminal.display import Display
from raybert.train.run_folder import RESULT

CARD = "README.md"


def complete_card(
    experiment: Experiment, run: Folder, display: Display, test: Mapping[str, Any] | None = None
) -> None:
    """Write the card of a finished run's model again; a storage that refuses costs a line."""
    try:
        card = _card(experiment, run)
        if card is None:
            return
        if test is not None:
            card = card.with_test(test, experiment.evaluate.source.paths)
        note = huggingface.read_config_json(run / "model").get("raybert", {}).get("only_raybert")
        text = card.render() + (f"\n**Note:** {note}.\n" if note else "")
        (run / "model").write_text(CARD, text)
    except (StorageError, DamagedError) as error:
        display.print(f"card      the model card is not complete: {error}")


def _card(experiment: Experiment, run: Folder) -> ClassifierCard | None:
    prepared = read_prepared_texts(run / "data")
    if prepared is None or not run.exists(RESULT):
        return None
    result, task = run.read_json(RESULT), prepared.make_task()
    config = experiment.finetune
    start, base = config.initialize_from, config.initialize_from
    named = public_name(start)
    if start == "pretrain":
        base = experiment.pretrain.initialize_from or ""
        named = f"{experiment.run.name}, pretrained"
        named += f" from {public_name(base)}" if base else ""
    card = ClassifierCard(
        prepared,
        task,
        config.source.paths,
        None if start == "scratch" else named,
        public_name(base),
        result,
        config.metric or task.default_metric,
        result.get("temperature"),
        license=experiment.run.license,
        language=experiment.run.language,
    )
    return replace(card, has_ngrams=(run / "model").exists("ngrams.json"))

"""Labels and texts that look wrong, told before training: what it is, and what to set.

Nothing here is an error: each may be what the user wants.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from raybert.data.sources.settings import SourceConfig

_MANY = 20  # labels; a classifier has more of them seldom
_TEXTS_PER_LABEL = 5  # with fewer on average, labels are ids, numbers or texts
_DOMINANT = 0.95  # share of the texts with one label
_SHARED = 0.01  # share of the validation texts that are trained on, too
_SHOWN = 5
_MISSING = {"nan", "null", "none", "na", "n/a", "<na>", "#n/a", "nil", "-"}


def list_names(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    found = list(names)
    more = f" and {len(found) - _SHOWN:,} more" if len(found) > _SHOWN else ""
    return ", ".join(repr(name) for name in found[:_SHOWN]) + more


def label_suspicions(
    labels: Sequence[str],
    train: Counter[str],
    validation: Counter[str],
    texts: int,
    source: SourceConfig,
) -> list[str]:
    """What looks wrong with the labels of texts; the counters have how many texts each is of."""
    column = source.label_column
    found = []
    if len(labels) > _MANY and len(labels) * _TEXTS_PER_LABEL > texts:
        found.append(
            f"label_column={column} has {len(labels):,} different labels in {texts:,} texts, as an "
            "id, a number or a text has: set finetune.source.label_column to a column of classes"
            + (", or finetune.task=regression" if _are_numbers(labels) else "")
        )
    elif len(labels) > _MANY and _are_numbers(labels):
        found.append(
            f"the {len(labels):,} labels are numbers from {min(labels, key=float)} to "
            f"{max(labels, key=float)}: if they are quantities, set finetune.task=regression"
        )
    if untrained := [name for name in labels if not train[name]]:
        found.append(
            f"no text to train on has the label {list_names(untrained)}: it can't be learned; add "
            "texts, or leave it out of labels"
        )
    if unseen := [n for n in labels if train[n] > 1 and not validation[n]]:
        found.append(
            f"no text to validate on has the label {list_names(unseen)}: its scores can't be "
            "measured; set finetune.validation_split=stratified, or add texts"
        )
    name, count = max(train.items(), key=lambda item: item[1], default=("", 0))
    if len(labels) > 1 and texts > _MANY and count > _DOMINANT * train.total():
        found.append(
            f"{count / train.total():.1%} of the texts to train on have the label {name!r}, and "
            "always answering it would be as accurate: set finetune.class_weights=balanced and "
            "finetune.metric=f1_macro"
        )
    if missing := [name for name in labels if name.casefold() in _MISSING]:
        found.append(
            f"the label {list_names(missing)} is how programs write a missing value: leave such "
            "rows empty, and set on_bad_row: skip, if it is none"
        )
    spellings = Counter(" ".join(label.split()).casefold() for label in labels)
    if doubled := [n for n in labels if spellings[" ".join(n.split()).casefold()] > 1]:
        found.append(
            f"the labels {list_names(doubled)} differ only in case or spaces: spell them alike if "
            "they are one"
        )
    return found


def shared_texts(train: Sequence[str], validation: Sequence[str]) -> list[str]:
    """A line if texts are both trained and validated on; pairs of texts are one each."""
    known = set(train)
    shared = sum(text in known for text in validation)
    if shared <= _SHARED * len(validation):
        return []
    return [
        f"{shared:,} of {len(validation):,} validation texts are also trained on: their scores say "
        "little about new texts; set finetune.validation.path to others, or leave it out"
    ]


def _are_numbers(labels: Sequence[str]) -> bool:
    try:
        return all(math.isfinite(float(label)) for label in labels)
    except ValueError:
        return False

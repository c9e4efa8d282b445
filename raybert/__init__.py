"""raybert: from raw text to a BERT of your own, a tuned classifier and an HTTP endpoint, on Ray.

`raybert.pretrain`, `finetune`, `tune` and `Classifier` are in `raybert.api`, which is imported when
one of them is used first: it imports PyTorch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["Classifier", "Run", "__version__", "finetune", "pretrain", "tune"]


def __getattr__(name: str) -> Any:
    if name == "tune":  # the package of the search, which can be called
        return importlib.import_module("raybert.tune")
    if name in __all__:
        return getattr(importlib.import_module("raybert.api"), name)
    raise AttributeError(f"module 'raybert' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Search: Ray Tune over the fine-tuning task.

The package can be called: `raybert.tune(...)` is `raybert.api.tune`, which has the same name.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return importlib.import_module("raybert.api").tune(*args, **options)


sys.modules[__name__].__class__ = _CallablePackage

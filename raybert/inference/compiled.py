"""Compile an encoder's modules with torch.compile, for any number of texts of any lengths.

Between two matrix products of a small encoder, eager mode reads and writes each element several
times; compiled, the operations between two products become one loop.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: Compiled versions of one function in a process: one for each architecture and each number of
#: threads. PyTorch's limit is 8, beyond which it runs the function uncompiled.
_MAX_COMPILED_VERSIONS = 128
#: How PyTorch 2.13 calls a compiled loop from Python, and the same call with the GIL released.
_CALL_WITH_GIL = "kernel({}); Py_RETURN_NONE;"
_CALL_WITHOUT_GIL = (
    "[](auto... given) {{ Py_BEGIN_ALLOW_THREADS kernel(given...); Py_END_ALLOW_THREADS }}({}); "
    "Py_RETURN_NONE;"
)
_LOG = logging.getLogger("ray.serve")  # a replica's log; elsewhere, warnings go to standard error


def can_compile() -> bool:
    """Whether there is a C++ compiler."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def compile_modules(modules: Sequence[nn.Module]) -> None:
    """Compile modules at their first call; if that fails, all of them run uncompiled."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # otherwise it keeps processes
    _release_gil_in_compiled_loops()
    # One function for any number of threads: another number takes a new trace only, 2.8 s instead
    # of 10 (int8, 4 layers of 128). On one core it is as fast, within 0.3%.
    options: dict[str, Any] = {"cpp.dynamic_threads": True}
    has_failed = False

    def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        from torch._dynamo import config
        from torch._dynamo.exc import TorchDynamoException

        fast: Callable[..., Tensor] | None = None

        def run(*args: Any) -> Tensor:
            nonlocal fast, has_failed
            if has_failed:
                return function(*args)
            config.recompile_limit = _MAX_COMPILED_VERSIONS  # a setting of the calling thread
            try:
                if fast is None:
                    fast = torch.compile(function, dynamic=True, options=options)
                return fast(*args)
            except (TorchDynamoException, OSError) as error:  # OSError: the compiler's cache folder
                has_failed = True
                cause = " ".join(str(error).split("\n")[:2]).strip()
                _LOG.warning("torch.compile failed; the model runs uncompiled, slower: %s", cause)
                return function(*args)

        return run

    for module in modules:
        module.forward = compiled(module.forward)


def _release_gil_in_compiled_loops() -> None:
    """Let compiled loops run without the GIL, as PyTorch's own operators do.

    Otherwise two computing threads, and the one that reads requests, wait for each other's loops:
    1.5 of two cores were busy. PyTorch has no setting; another way of calling is left unchanged.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache as Bindings

    if Bindings.call_entry_function == _CALL_WITH_GIL:
        Bindings.call_entry_function = _CALL_WITHOUT_GIL

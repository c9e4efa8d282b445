"""PyTorch's process group over the network interface by which Ray knows a node.

Gloo takes the interface of the host's name, which many systems map to the loopback.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.train.torch import TorchConfig

from raybert.train.distributed import use_interface_of

_TorchBackend: Any = TorchConfig().backend_cls


class NodeInterfaceConfig(TorchConfig):  # type: ignore[misc]  # of an untyped package
    """TorchConfig that selects each node's interface before the process group is set up."""

    @property
    def backend_cls(self) -> Any:
        """The backend that sets up the process group."""
        return _NodeInterfaceBackend


class _NodeInterfaceBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_select_interface)
        super().on_start(worker_group, backend_config)


def _select_interface() -> None:
    use_interface_of(ray.util.get_node_ip_address())

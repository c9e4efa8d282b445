"""Private parts of Ray Serve: its variables, its HAProxy template, the address it listens on.

Serve reads the variables when it is imported, in every process: they are set before Ray starts.
`RAY_SERVE_ENABLE_HA_PROXY` and `RAY_SERVE_THROUGHPUT_OPTIMIZED` are documented; the others are not.
"""

from __future__ import annotations

from typing import Any

from raybert.cluster.internals.private_names import has_private_api

THROUGHPUT_OPTIMIZED = "RAY_SERVE_THROUGHPUT_OPTIMIZED"
HTTP_MIDDLEWARE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"  # module:function
ENABLE_DIRECT_INGRESS = "RAY_SERVE_ENABLE_DIRECT_INGRESS"
ENABLE_HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
MIN_DRAINING_S = "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"
FALLBACK_PROXY_PORT = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"
HAPROXY = "RAY_SERVE_HAPROXY_"  # how the names of HAProxy's own variables begin


def http_options(*, must_run: bool = True) -> Any:
    """The HTTPOptions of Serve; if none runs, RayServeException, or None without `must_run`."""
    has_private_api("serve")
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=must_run)
    return None if client is None else client.http_config


def haproxy_template() -> str:
    """The template of HAProxy's configuration, which Ray renders."""
    has_private_api("haproxy")
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    return str(HAPROXY_CONFIG_TEMPLATE)

"""The proxies' middleware at its former address; use `raybert.serve.http.load_shedding`.

Manifests of earlier releases name it in RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH; it goes in 0.3.
"""

from raybert.serve.http.load_shedding import middlewares

__all__ = ["middlewares"]

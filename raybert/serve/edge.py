"""The former address of the proxies' middleware; use `raybert.serve.http.middleware:middlewares`.

Manifests of earlier releases name it in RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH. Removed in 0.3.
"""

from raybert.serve.http.middleware import middlewares

__all__ = ["middlewares"]

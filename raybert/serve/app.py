"""The former address of the Serve application; use `raybert.serve.deploy.deployment:build`.

Serve configurations and RayService manifests of earlier releases import it. Removed in 0.3.
"""

from raybert.serve.deploy.deployment import build

__all__ = ["build"]

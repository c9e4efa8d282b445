"""Deploying on Ray Serve: the deployment, HAProxy, launch and status."""

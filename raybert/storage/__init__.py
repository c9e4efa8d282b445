"""Folders on disks and object stores, and the model registry in them."""

"""The training loop, and the Ray Train worker around it."""

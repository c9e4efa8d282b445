"""The one training loop, its tasks, and the Ray Train worker around it."""

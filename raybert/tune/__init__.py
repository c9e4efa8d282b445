"""Search: Ray Tune over the fine-tuning task."""

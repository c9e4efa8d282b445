"""What a replica does with a request: batching, threads, loaded models, metrics."""

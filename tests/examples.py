"""How many examples a costly property test tries: few in `make test`, more in `make test-slow`."""

import os


def examples(few):
    """The number for `max_examples`."""
    return 20 * few if os.environ.get("RAYBERT_MANY_EXAMPLES") else few

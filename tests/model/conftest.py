import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Run on one thread: a second one does not speed up small tensors and slows a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

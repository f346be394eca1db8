import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """More threads only cost time on tensors as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

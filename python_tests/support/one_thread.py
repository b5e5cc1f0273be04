"""A fixture for modules whose models are too small to share out among threads."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are too small to share out, and other tests may keep the other cores busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

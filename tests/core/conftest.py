import pytest
import torch
from hypothesis import settings

# The same examples in every run; no deadline, since a busy machine or a first import is no fault of the code.
settings.register_profile("core", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("core")


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """States of a few numbers: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

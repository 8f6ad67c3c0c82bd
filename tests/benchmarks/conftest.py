import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny cases take milliseconds each where threads wait for one another on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

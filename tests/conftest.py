"""What every test runs under: one thread, so that a shared machine stays usable and sums keep their order."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)

"""What every test starts from: empty parameter store, fixed seed, float32."""

from collections.abc import Iterator

import pyro
import pytest
import torch

torch.set_num_threads(1)  # the tensors of the tests are small: threads would only wait for each other


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Keep tests independent of each other."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def float64() -> None:
    """Use double precision throughout a test."""
    torch.set_default_dtype(torch.float64)

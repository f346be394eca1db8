"""What the tests of decode_step's CUDA sources share: those compiled for the host, once."""

import pytest
from helpers.decode_simulation import library_in


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return library_in(tmp_path_factory.mktemp("simulation"))

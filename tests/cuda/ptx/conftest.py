"""What the tests of nvcc's PTX share: the sources, compiled once."""

import ctypes

import pytest
from helpers.nvcc.sources import Compiled, compile_in


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    library, ptx = compile_in(tmp_path_factory.mktemp("recorded"))
    return Compiled(ctypes.CDLL(str(library)), ptx)

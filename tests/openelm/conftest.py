import pytest
from golden import TINY, Golden, load_hf_tiny, load_tiny


@pytest.fixture(params=TINY)
def tiny(request: pytest.FixtureRequest) -> Golden:
    """Each tiny golden model in turn: layer-wise scaled and tied, then plain and untied."""
    return load_tiny(request.param)


@pytest.fixture
def hf_tiny() -> Golden:
    return load_hf_tiny()

"""Pytest's setup: tests marked slow run only when `-m` asks for them; the golden models."""

from pathlib import Path

import pytest
from helpers.checkpoints import CONFIG
from helpers.golden import TINY, Golden, load_hf_tiny, load_tiny

from elmkernels.openelm import OpenELM


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="slow; run with -m slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=TINY)
def tiny(request: pytest.FixtureRequest) -> Golden:
    """Each tiny golden model in turn: layer-wise scaled and tied, then plain and untied."""
    return load_tiny(request.param)


@pytest.fixture
def hf_tiny() -> Golden:
    return load_hf_tiny()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved checkpoint of CONFIG with the weights of seed 1."""
    OpenELM(CONFIG, seed=1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"

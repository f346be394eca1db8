"""Pytest's setup: a whole run takes every core; tests marked slow, ecosystem or vllm run only when
`-m` asks for them; the golden models.
"""

import os
from pathlib import Path

import pytest
from helpers.checkpoints import CONFIG
from helpers.golden import TINY, Golden, load_hf_tiny, load_tiny

from elmkernels.openelm import OpenELM

TESTS = Path(__file__).parent
# Without -m; the rest takes gigabytes, of which one process at a time has enough.
FAST = ("", "not slow")
MOST_WORKERS = 8
# What a worker's torch and the processes that tests start get, if the environment says nothing
# else. Two threads, on however many cores, so that kernels split their work; and threads that
# sleep while they wait, since the workers together have more of them than there are cores.
THREADS = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads what it is to do
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Give a whole run one worker a core, if pytest-xdist is there and -n says nothing else. A run
    of chosen files stays in this process, which is there sooner than workers are.
    """
    option = config.option
    if not hasattr(option, "numprocesses") or hasattr(config, "workerinput"):
        return  # without pytest-xdist, or in a worker, which must not start workers of its own
    whole = str(TESTS) in map(os.path.abspath, config.args) and option.markexpr in FAST
    if whole and option.numprocesses is None and option.dist == "no":
        option.numprocesses, option.maxprocesses = "auto", MOST_WORKERS
    if option.numprocesses:
        option.dist = "worksteal" if option.dist == "no" else option.dist
        for name, value in THREADS.items():
            os.environ.setdefault(name, value)


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        from helpers.interpreter import hasten

        hasten()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr:
        return
    for item in items:
        for mark in ("slow", "ecosystem", "vllm"):
            if mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"{mark}; run with -m {mark}"))


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

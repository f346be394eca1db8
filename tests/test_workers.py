"""How a run of the tests is divided among workers: conftest's part of it."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

TESTS = str(Path(__file__).parent)


@pytest.fixture
def divided(request, monkeypatch):
    """What conftest makes of a run: options -> (number of workers, how tests go to them)."""
    conftest = request.config.pluginmanager.get_plugin(os.path.join(TESTS, "conftest.py"))
    for name in conftest.THREADS:
        monkeypatch.delenv(name, raising=False)

    def run(*args: str, in_worker: bool = False, **options):
        found = {"numprocesses": None, "maxprocesses": None, "dist": "no", "markexpr": ""}
        config = SimpleNamespace(args=list(args or [TESTS]), option=SimpleNamespace(**found))
        vars(config.option).update(options)
        if in_worker:
            config.workerinput = {}
        conftest.pytest_cmdline_main(config)
        return config.option.numprocesses, config.option.dist

    return run


@pytest.mark.parametrize("markexpr", ["", "not slow"])
def test_a_whole_run_takes_every_core_with_two_threads_that_sleep(divided, markexpr):
    assert divided(markexpr=markexpr) == ("auto", "worksteal")
    assert os.environ["OMP_NUM_THREADS"] == "2" and os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_what_was_said_stays(divided, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert divided(numprocesses=4, dist="loadfile") == (4, "loadfile")
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert divided(numprocesses=0) == (0, "no")


def test_chosen_files_slow_tests_and_a_workers_share_are_not_divided(divided):
    assert divided(os.path.join(TESTS, "ops")) == (None, "no")
    assert divided(markexpr="slow") == (None, "no")
    assert divided(in_worker=True) == (None, "no")
    assert "OMP_NUM_THREADS" not in os.environ


def test_without_pytest_xdist_nothing_is_divided(request):
    conftest = request.config.pluginmanager.get_plugin(os.path.join(TESTS, "conftest.py"))
    conftest.pytest_cmdline_main(SimpleNamespace(args=[TESTS], option=SimpleNamespace()))

"""Thousands of damaged files: each is a model, a run, or an error of one line; never anything else.

A case is made from its kind and number alone. To see one again, from the repository's root:

    PYTHONPATH=.:tests python -m helpers.fuzzing.worker /tmp/fuzz KIND NUMBER 1
"""

import os
import re

import pytest
from helpers.fuzzing import fuzz
from helpers.fuzzing.planted import NAMES

pytestmark = pytest.mark.skipif(os.name != "posix", reason="limits and pipes as POSIX has them")

# How many cases every run of the tests sees, and of each kind how many the slow ones.
QUICK = 600
COUNTS = {
    "folder": 3000,
    "journal": 1500,
    "packed": 3000,
    "checkpoint": 2500,
    "recipe": 1500,
    "tokens": 1000,
}
SEEN = {
    "write": "outside: .*canary",
    "remove": "outside: .*canary",
    "rename": "outside: .*canary",
    "follow": "outside: .*canary",
    "unpickle": "ran pickle.find_class",
    "spawn": "ran subprocess.Popen",
    "memory": "took .* MiB more",
    "key": "unclean KeyError: .*planted.py",
    "recursion": "unclean RecursionError",
    "crash": "exit -6",
    "hang": "hung for more than 3 s",
    "type": "unclean TypeError",
}


def test_damaged_files(tmp_path):
    """Of all kinds."""
    found = fuzz(tmp_path, "mixed", 0, QUICK)
    assert found.faults == [] and found.cases == QUICK
    for outcome in ("loaded", "ValueError", "resumed", "state loaded", "read"):
        assert found.outcomes[f"mixed: {outcome}"], found.outcomes


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_many_damaged_files(tmp_path, kind):
    count = COUNTS[kind]
    found = fuzz(tmp_path, kind, 1000, count)
    print(f"{found.cases} cases: {dict(found.outcomes)}")
    assert found.faults == [] and found.cases == count


def test_planted_faults_are_seen(tmp_path):
    """Each of them, and a worker that died is followed by another."""
    found = fuzz(tmp_path, "planted", 0, len(NAMES), seconds=3.0)
    assert found.cases == len(NAMES) == len(SEEN)
    for number, name in enumerate(NAMES):
        said = " ".join(what for _, seed, what in found.faults if seed == number)
        assert re.search(SEEN[name], said), (name, said)

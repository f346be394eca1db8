"""The process that reads damaged files: worker.py FOLDER KIND FIRST COUNT.

It says a line of JSON when it is ready, and one for every case. To see a case again, run it alone.
"""

import json
import os
import random
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

sys.dont_write_bytecode = True  # what is imported late writes no files

import torch  # noqa: E402

from .cases import Folder, Kind, Packed, SaveJournal  # noqa: E402
from .guard import Guard  # noqa: E402
from .planted import Planted  # noqa: E402
from .training_cases import Checkpoint, RecipeText, TokenFile  # noqa: E402

KINDS = {
    "folder": Folder,
    "journal": SaveJournal,
    "packed": Packed,
    "checkpoint": Checkpoint,
    "recipe": RecipeText,
    "tokens": TokenFile,
    "planted": Planted,
}


class Mixed(Kind):
    """All kinds in one process, by chance."""

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self.kinds = {name: kind(scratch) for name, kind in KINDS.items() if name != "planted"}

    def make(self, rng: random.Random) -> Callable[[], str]:
        self.name = rng.choice([*self.kinds])
        return self.kinds[self.name].make(rng)


ADDRESSES = 12 << 30


class Chance(random.Random):
    """A case's own chance, which its name decides."""

    def __init__(self, seed_text: str) -> None:
        self.seed_text = seed_text
        super().__init__(seed_text)


def is_documented(kind: Kind, error: Exception) -> bool:
    """Whether it is an error that the package says it raises, for what a user can put right."""
    if isinstance(error, TypeError):
        return kind.name == "recipe" and " must " in str(error)
    return isinstance(error, ValueError | OSError) and bool(str(error))


def run(kind: str, made: Kind, seed: int, guard: Guard) -> dict:
    """One case: {outcome, faults}."""
    faults = []
    made.clean()
    read = made.make(Chance(f"{kind}-{seed}"))
    guard.begin()
    try:
        outcome = read()
    except Exception as error:
        outcome = type(error).__name__
        if not is_documented(made, error):
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{where.filename}:{where.lineno}"
            faults.append(f"unclean {outcome}: {str(error)[:200]!r} at {place}")
    faults += guard.end()
    if not made.canary.exists() or made.canary.read_text() != "precious":
        faults.append("the canary was touched")
        made.canary.unlink(missing_ok=True)
        made.canary.write_text("precious")
    return {"outcome": outcome, "faults": faults}


def main(folder: str, kind: str, first: str, count: str) -> None:
    torch.set_num_threads(1)
    scratch = Path(folder) / f"worker-{os.getpid()}"
    scratch.mkdir(parents=True)
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    made = (KINDS | {"mixed": Mixed})[kind](scratch)
    temporary = scratch / "temporary"
    temporary.mkdir()
    tempfile.tempdir = str(temporary)
    guard = Guard(made.case, temporary)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(json.dumps({"ready": True}), file=out)
    for seed in range(int(first), int(first) + int(count)):
        print(json.dumps(run(kind, made, seed, guard)), file=out)
    made.clean()


if __name__ == "__main__":
    main(*sys.argv[1:])

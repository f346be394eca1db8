"""The command with one process that is killed in the middle, once: dies.py MARKER ARGUMENTS...

The second process kills itself before its sixth step, unless the file MARKER is there.
"""

import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from elmkernels.cli.main import main
from elmkernels.training.loop import Trainer


def install(marker: Path) -> None:
    step = Trainer.step

    def dying(self: Trainer):
        if self.done == 5 and dist.get_rank() == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    Trainer.step = dying


if __name__ == "__main__":
    install(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))

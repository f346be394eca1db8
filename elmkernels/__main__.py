"""`python -m elmkernels`: the command line, see `elmkernels.cli`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())

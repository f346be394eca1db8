"""What tests share. `ROOT` is the checkout, `GOLDEN` the tensors that Apple's own code printed."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"


def load_setup() -> ModuleType:
    """setup.py as a module: nothing is set up by importing it."""
    spec = importlib.util.spec_from_file_location("elmkernels_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module

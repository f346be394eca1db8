"""What tests share. `ROOT` is the checkout, `GOLDEN` the tensors that Apple's own code printed."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"

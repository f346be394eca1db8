"""`python -m docs.generate`: write what the documents repeat of code and of result files.

With --check nothing is written: stale pages are named, and the exit code is 1. A page is generated
as a whole (PAGES), or in blocks (BLOCKS) between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from . import api, decoding, figures, kernels, margins, serving, support, traffic

ROOT = Path(__file__).resolve().parents[2]
PAGES: dict[str, Callable[[], str]] = {"docs/api.md": api.page, "docs/support.md": support.page}
BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "results": figures.six_results,
        "paper": lambda: figures.paper_in_short(figures.PAPER[0]),
    },
    "docs/benchmarks.md": figures.TABLES | decoding.TABLES,
    "docs/gpu.md": {
        "executed": kernels.executed,
        "least": traffic.least,
        "traffic": traffic.traffic,
    },
    "docs/huggingface.md": {"transformers": lambda: figures.transformers("transformers-270m-cpu")},
    "docs/serving.md": {"throughput": lambda: serving.throughput("vllm-270m-cpu")},
    "docs/parity.md": {"margins": margins.margins, "processors": margins.processors},
}
_BLOCK = re.compile(r"<!-- generated: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def filled(text: str, blocks: dict[str, Callable[[], str]], page: str) -> str:
    """A page with its blocks made anew. Raises ValueError if page and program name other blocks."""
    found = [match[1] for match in _BLOCK.finditer(text)]
    if sorted(found) != sorted(blocks):
        raise ValueError(f"{page} must have the blocks {sorted(blocks)}, got {sorted(found)}")

    def block(match: re.Match) -> str:
        return f"<!-- generated: {match[1]} -->\n{blocks[match[1]]()}\n<!-- end -->"

    return _BLOCK.sub(block, text)


def generated() -> dict[str, str]:
    """{path from the root: what the page must say}."""
    made = {name: page() for name, page in PAGES.items()}
    for name, blocks in BLOCKS.items():
        made[name] = filled((ROOT / name).read_text(), blocks, name)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, name what is stale")
    check = parser.parse_args().check
    stale = []
    for name, text in generated().items():
        path = ROOT / name
        if path.is_file() and path.read_text() == text:
            continue
        stale.append(name)
        if not check:
            path.write_text(text)
    for name in stale:
        print(f"{name} {'is stale: python -m docs.generate' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

"""The compiled libraries: what they were built from, and why one can't be loaded.

setup.py runs this file by its path, before there is a package or a torch: torch is imported late.
"""

import ctypes
import hashlib
import json
import re
import shlex
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).parent
SOURCES = PACKAGE.parent / "csrc"  # beside the package in a clone only
REPORT = PACKAGE / "build_report.json"
BUILT = "built"
LEAST_TORCH = (2, 10)  # the stable ABI that the libraries are compiled for
FOLDERS = ("cpu", "cuda")
SUFFIXES = (".h", ".cpp", ".cuh", ".cu")
# What a reason says, see `_mended`; setup.py's reasons keep to it.
NOT_HERE, FIRST = ", this is ", ("install", "set")
_MARK = b"elmkernels built from "  # in every library, before the digest of its sources


def build_report() -> dict[str, str]:
    """What the installation built: {library: "built" or the reason why not}, and with what."""
    if not REPORT.is_file():
        return {}
    try:
        found = json.loads(REPORT.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        return {REPORT.name: _mended("damaged: what was built isn't known")}
    return found


@cache
def digest(sources: Path, folder: str) -> str:
    """What a library is compiled from: its folder of csrc and those that all libraries share.

    Comments and spaces don't count, so that a sentence made clearer asks for no new build.
    """
    found = hashlib.sha256()
    others = [sources / other for other in FOLDERS if other != folder]
    for path in sorted(p for p in sources.rglob("*") if p.suffix in SUFFIXES):
        if not any(other in path.parents for other in others):
            code = re.sub(rb"//[^\n]*|\s+", b"", path.read_bytes())
            found.update(b"%s %d " % (path.relative_to(sources).as_posix().encode(), len(code)))
            found.update(code)
    return found.hexdigest()[:32]


def stamp(sources: Path, name: str) -> str:
    """C++ that leaves the digest in the library of one backend; compiled into each."""
    text = (_MARK + digest(sources, _folder(name)).encode()).decode()
    return f'extern "C" __attribute__((used)) const char elmkernels_built_from[] = "{text}";\n'


def reinstall() -> str:
    """The command that builds the libraries again."""
    if (SOURCES.parent / "setup.py").is_file():
        return f"pip install --no-deps -e {shlex.quote(str(SOURCES.parent))}"
    source = "elmkernels"
    try:
        # Where pip took it from: a folder, an sdist, a repository.
        found = json.loads(metadata.distribution(source).read_text("direct_url.json") or "{}")
        source = found.get("url", source)
        if "vcs_info" in found:
            source = f"{found['vcs_info']['vcs']}+{source}@{found['vcs_info']['commit_id']}"
    except (metadata.PackageNotFoundError, ValueError):
        pass
    return f"pip install --force-reinstall --no-deps --no-cache-dir {shlex.quote(source)}"


def load(name: str) -> str | None:
    """Load the library of one backend into torch; returns why it is missing, or None."""
    import torch

    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < LEAST_TORCH:
        return f"needs torch >= {'.'.join(map(str, LEAST_TORCH))}, this is {torch.__version__}"
    path = _library(name)
    if not path.is_file():
        found = build_report().get(name, "not built when elmkernels was installed")
        return _mended(f"{path.name} is gone" if found == BUILT else found)
    if why := out_of_date(name):
        return _mended(why)
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return _mended(f"{path.name} can't be loaded: {error}")
    return _own_reason(path)


def _own_reason(path: Path) -> str | None:
    """Why a library that is loaded can't run here, if it has a say: whether a processor has tiles
    is more than its flags tell.
    """
    ask = getattr(ctypes.CDLL(str(path)), "elmkernels_missing", None)
    if ask is None:
        return None
    ask.restype = ctypes.c_char_p
    found = ask()
    return None if found is None else found.decode(errors="replace")


def out_of_date(name: str) -> str | None:
    """Why a library isn't that of the sources beside the package, in a clone; None if it is."""
    path = _library(name)
    if not SOURCES.is_dir():
        return None
    found = _built_from(path)
    if not found:
        return f"{path.name} is damaged: it doesn't say what it was built from"
    if found == digest(SOURCES, _folder(name)):
        return None
    return f"{path.name} is out of date: {SOURCES} has changed since it was built"


def lacks(name: str, kernel: str, device: str) -> str | None:
    """Why a loaded library is missing all the same: it has put no such kernel into torch."""
    import torch

    qualified = f"elmkernels_{name}::{kernel}"
    if torch._C._dispatch_has_kernel_for_dispatch_key(qualified, device.upper()):
        return None
    return _mended(f"{_library(name).name} has no kernel {kernel}")


def _mended(reason: str) -> str:
    """A reason with what mends it, if a new build can: it ends in what this machine is if not, and
    in what must be there before if that alone would fail again.
    """
    if NOT_HERE in reason:
        return reason
    first = any(f"; {verb} " in reason for verb in FIRST)
    return f"{reason}{', then' if first else '; reinstall with'}: {reinstall()}"


def _library(name: str) -> Path:
    return PACKAGE / f"_{name}.so"


def _folder(name: str) -> str:
    return name if name in FOLDERS else "cpu"


def _built_from(library: Path) -> str:
    """The digest in a library, empty if it has none."""
    found = re.search(_MARK + rb"([0-9a-f]{32})\0", library.read_bytes())
    return found[1].decode() if found else ""

"""Apple's own model code for transformers, as the Hub's local cache has it.

It is neither part of this package nor fetched: whoever loaded one of Apple's models with
trust_remote_code has it. It runs with transformers 4.40 to 4.53, which are imported late.
"""

import json
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ...backends import Reason
from ...openelm import OpenELM

LEAST, MOST = (4, 40), (4, 53)
FILES = ("configuration_openelm.py", "modeling_openelm.py")
CLASSES = {
    "AutoConfig": "configuration_openelm.OpenELMConfig",
    "AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM",
}


def found() -> Path | None:
    """The folder of Apple's code in the Hub's local cache, None if there is none."""
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshots = sorted(Path(HF_HUB_CACHE).glob("models--apple--OpenELM*/snapshots/*"))
    folders = [f for f in snapshots if all((f / name).is_file() for name in FILES)]
    return folders[-1] if folders else None


def missing() -> Reason | None:
    """Why Apple's code can't run here, or None."""
    try:
        here = version("transformers")
    except PackageNotFoundError:
        return "transformers is not installed (pip install 'transformers>=4.40,<4.54')"
    if not LEAST <= tuple(map(int, here.split(".")[:2])) <= MOST:
        return f"Apple's code needs transformers 4.40 to 4.53, got {here}"
    if found() is None:
        return "the Hub's local cache has no modeling_openelm.py of an apple/OpenELM model"
    return None


def build(model: OpenELM, folder: Path, dtype: torch.dtype) -> Any:
    """Apple's model with the weights of one of ours. folder: an empty one, for its checkpoint.

    Raises ImportError, with the reason, if the code can't run here.
    """
    code = found() if missing() is None else None
    if code is None:
        raise ImportError(missing())
    model.save_pretrained(folder)
    return load(folder, code, dtype)


def load(folder: Path, code: Path, dtype: torch.dtype) -> Any:
    """The checkpoint in a folder, by the code in another, which is copied into it."""
    from transformers import AutoModelForCausalLM

    for name in FILES:
        shutil.copyfile(code / name, folder / name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": CLASSES}))
    kind: Any = AutoModelForCausalLM
    return kind.from_pretrained(folder, trust_remote_code=True, torch_dtype=dtype).eval()

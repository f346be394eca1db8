"""The tensors of a training checkpoint: part-00000.safetensors, part-00001.safetensors, ...

Every tensor of model and optimizer lies there by name: `model.NAME`, `optimizer.NAME.exp_avg`. A
part is what one process wrote. With FSDP each has its own rows of every tensor, in the processes'
order; else the first has all. So a tensor is the rows of all parts that have it, one after another,
and any number of processes reads what any other wrote, each the rows that it holds.

Nothing of it is code, or becomes code: names, shapes and numbers.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checks import fail
from ..weights.storage import Stored, read_safetensors, write_safetensors

NAME = re.compile(r"part-[0-9]{5}\.safetensors")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP = "step"  # how many updates a parameter has had: AdamW's, float32 []
_AT_ONCE = 1 << 24  # bytes


def digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with file.open("rb") as data:
        while block := data.read(_AT_ONCE):
            found.update(block)
    return found.hexdigest()


@torch.no_grad()
def local(x: Tensor) -> Tensor:
    """What this process has of a tensor that may be spread over several; the same memory."""
    return x.to_local() if _is_spread(x) else x


def _is_spread(x: Tensor) -> bool:
    return hasattr(x, "placements")


def _rows(x: Tensor) -> tuple[int, int]:
    """Which rows of the whole tensor this process has; (0, 1) of one without rows."""
    if not x.dim():
        return 0, 1
    if not _is_spread(x):
        return 0, x.shape[0]
    from torch.distributed.tensor import Shard

    if x.device_mesh.ndim != 1 or tuple(x.placements) != (Shard(0),):
        fail("a parameter", "spread by rows over one row of processes", x.placements)
    # As torch.chunk deals rows out: the last processes may have fewer, or none.
    share = -(-x.shape[0] // x.device_mesh.size())
    first = min(x.device_mesh.get_local_rank() * share, x.shape[0])
    return first, first + local(x).shape[0]


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name; those that FSDP had gathered are given back to their processes first."""
    model.state_dict()
    return dict(model.named_parameters())


def tensors_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Everything that is saved, by its name in the parts. A parameter that no update has touched
    has no moments.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in _named(model).items():
        found[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
    return found


def write(folder: Path, tensors: Mapping[str, Tensor], rank: int) -> None:
    """This process's part; no file if it has nothing to write."""
    own = {
        name: local(x)
        for name, x in tensors.items()
        if (_is_spread(x) or rank == 0) and local(x).numel()
    }
    if own:
        write_safetensors(folder / f"part-{rank:05d}.safetensors", own)


class Parts:
    """The tensors of a checkpoint's parts, mapped from their files.

    Raises ValueError for a file that isn't safetensors, or rows that don't belong together.
    """

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self._stored: dict[str, list[Stored]] = {}
        for name in sorted(names):
            for stored in read_safetensors(folder / name):
                self._stored.setdefault(stored.key, []).append(stored)

    def names(self) -> set[str]:
        return set(self._stored)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless the parts have the whole tensor, float32 of this shape."""
        parts = self._stored.get(name, [])
        for part in parts:
            if part.dtype != "F32":
                fail(f"{self.folder}: {name}", "F32", part.dtype)
        shapes = [part.shape for part in parts]
        inner = all(len(s) == len(shape) and s[1:] == shape[1:] for s in shapes)
        rows = sum(s[0] for s in shapes) if shape and inner else len(shapes)
        if not inner or rows != (shape[0] if shape else 1):
            fail(f"{self.folder}: {name}", list(shape), shapes[0] if len(shapes) == 1 else shapes)

    def read(self, name: str, begin: int, end: int) -> Tensor:
        """Rows [begin, end) of a tensor that `check` has passed; of one without rows, itself."""
        found, first = [], 0
        for part in self._stored[name]:
            if not part.shape:
                return part.read()
            last = first + part.shape[0]
            if first < end and begin < last:
                found.append(part.read()[max(begin - first, 0) : min(end, last) - first])
            first = last
        if not found:
            return torch.empty(0, *self._stored[name][0].shape[1:])
        return found[0] if len(found) == 1 else torch.cat(found)

    def whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """All of a tensor. Raises as `check`."""
        self.check(name, shape)
        return self.read(name, 0, shape[0] if shape else 1)


def load(parts: Parts, model: nn.Module, optimizer: Optimizer) -> None:
    """Put the tensors into model and optimizer, whose settings stay. All are checked before any is
    put in. Raises ValueError.
    """
    parameters = _named(model)
    states, expected = {}, set()
    for name, parameter in parameters.items():
        shapes: dict[str, Any] = {f"model.{name}": tuple(parameter.shape)}
        keys = {k: f"optimizer.{name}.{k}" for k in (*_MOMENTS, _STEP)}
        if parts.names() & set(keys.values()):
            shapes |= {keys[k]: tuple(parameter.shape) for k in _MOMENTS}
            shapes[keys[_STEP]] = ()
            states[name] = keys
        for key, shape in shapes.items():
            parts.check(key, shape)
        expected |= set(shapes)
    if unknown := sorted(parts.names() - expected):
        fail(f"{parts.folder}: its tensors", "those of the model", f"{unknown[0]} too")
    with torch.no_grad():
        for name, parameter in parameters.items():
            local(parameter).copy_(parts.read(f"model.{name}", *_rows(parameter)))
    values = optimizer.state_dict()
    order = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = {id(p): number for number, p in enumerate(order)}
    values["state"] = {
        numbers[id(parameters[name])]: {
            key: _like(parameters[name], key, parts, stored) for key, stored in keys.items()
        }
        for name, keys in states.items()
    }
    optimizer.load_state_dict(values)


def _like(parameter: Tensor, key: str, parts: Parts, stored: str) -> Tensor:
    """A tensor of the optimizer's state, spread as its parameter is; in memory of its own."""
    if key == _STEP:
        return parts.read(stored, 0, 1).clone()
    rows = parts.read(stored, *_rows(parameter)).to(parameter.device, copy=True)
    if not _is_spread(parameter):
        return rows
    from torch.distributed.tensor import DTensor

    whole: dict[str, Any] = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(
        rows, parameter.device_mesh, parameter.placements, run_check=False, **whole
    )


def mean(folders: list[Parts], name: str, shape: tuple[int, ...]) -> Tensor:
    """The mean of one parameter in several checkpoints, added up in float64."""
    total = torch.zeros(shape, dtype=torch.float64)
    for parts in folders:
        total += parts.whole(f"model.{name}", shape)
    return (total / len(folders)).float()

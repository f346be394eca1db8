"""Processes: who they are and what they share, by torch's own means.

`torchrun` starts them and torch.distributed reads what it says. A model is wrapped in DDP (every
process has all of it) or FSDP2 (each has a slice of every parameter, and gathers a layer's where
that layer works). Messages about the run itself go through gloo, whatever the device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import checks

T = TypeVar("T")


class Reported(Exception):
    """An error of the first process, which tells of it: the others only end."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them."""

    device: torch.device
    rank: int = 0
    size: int = 1
    group: Any = None  # for messages: gloo's, and patient

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The values of all processes, added up in float64."""
        if self.size == 1:
            return [float(v) for v in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives to the first process, which alone does it, for all of them. Its error
        ends all: as itself in the first, as `Reported` in the others.
        """
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        error = None
        if self.first:
            try:
                outcome[0] = work()
            except Exception as caught:
                error, outcome[1] = caught, str(caught)
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise Reported(outcome[1])
        return outcome[0]

    def each(self, work: Callable[[], None]) -> None:
        """Have every process do its own work. The first error of any ends all: as itself in the
        first process, or as an OSError with its text, and as `Reported` in the others.
        """
        if self.size == 1:
            return work()
        error, texts = None, [None] * self.size
        try:
            work()
        except Exception as caught:
            error = caught
        dist.all_gather_object(texts, None if error is None else str(error), group=self.group)
        text = next((text for text in texts if text is not None), None)
        if text is None:
            return
        if not self.first:
            raise Reported(text)
        raise OSError(text) if error is None else error


@contextmanager
def world(device: torch.device) -> Iterator[World]:
    """The processes that torchrun has started; without it, this one alone.

    device: of all of them; "cuda" means another GPU for each of a node's processes.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield World(device)
        return
    from torch.distributed.elastic.utils import get_env_variable_or_raise

    if device.type == "cuda":
        local = dist.get_node_local_rank()
        if device.index is not None or local >= torch.cuda.device_count():
            expected = f"cuda, with a GPU for each process ({torch.cuda.device_count()} are here)"
            checks.fail("device", expected, f"{device} for process {local} of this node")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # Processes that torchrun starts again meet in the same store, where the addresses of those
    # that died still stand.
    attempt = get_env_variable_or_raise("TORCHELASTIC_RESTART_COUNT")
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        store=dist.PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=size,
    )
    # The others wait as long as the first takes to tokenize a corpus.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    yield World(device, rank, size, group)
    # Not after an error: the others may be waiting in a collective that will never end.
    dist.destroy_process_group()


class LossOf(nn.Module):
    """The model's loss as a forward pass, which is what DDP and FSDP wrap."""

    def __init__(self, model: nn.Module, z_loss: float, label_smoothing: float) -> None:
        super().__init__()
        self.model, self.z_loss, self.label_smoothing = model, z_loss, label_smoothing

    def forward(
        self, input_ids: Tensor, targets: Tensor, cu_seqlens: Tensor | None, plain: bool
    ) -> Tensor:
        """The sum over all targets; plain: the cross-entropy alone, as evaluations report it."""
        return self.model.loss(
            input_ids,
            targets,
            cu_seqlens=cu_seqlens,
            z_loss=0.0 if plain else self.z_loss,
            label_smoothing=0.0 if plain else self.label_smoothing,
            reduction="sum",
        )


def wrap(module: LossOf, how: str, bf16: bool, world: World) -> nn.Module:
    """The module made ready for several processes; itself where there is one. how: ddp or fsdp.

    FSDP in bf16 gathers parameters in bfloat16 and reduces gradients in float32. So its norms'
    weights and its residual stream are bfloat16, which DDP under autocast keeps in float32.
    """
    if world.size == 1:
        return module
    if how == "ddp":
        ids = [world.device] if world.device.type == "cuda" else None
        # Without buffers there is nothing to broadcast, and gradients needn't be held twice.
        return DistributedDataParallel(
            module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    # Inputs stay as they are: what a layer gets is in its parameters' dtype already.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for layer in module.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(module, mesh=mesh, mp_policy=policy)


@contextmanager
def accumulation(module: nn.Module, last: bool) -> Iterator[None]:
    """Around one micro batch: gradients are exchanged with those of the last."""
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(last)
    held = isinstance(module, DistributedDataParallel) and not last
    with module.no_sync() if held else nullcontext():
        yield


def whole(x: Tensor) -> float:
    """The number that a tensor holds, also where it is spread over the processes."""
    return float(x.full_tensor() if hasattr(x, "full_tensor") else x)

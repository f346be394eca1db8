"""FSDP2 and DDP round a model, before and after `accelerate`, in one process on gloo."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from helpers.checkpoints import CONFIG
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from elmkernels import OpenELM, accelerate, restore
from elmkernels.acceleration.classes import Fused
from elmkernels.openelm.layers import Context, DecoderLayer, Rotation

IDS = torch.arange(2 * 9).view(2, 9) * 7 % CONFIG.vocab_size


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model: nn.Module, **policy) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    options = {"mp_policy": MixedPrecisionPolicy(**policy)} if policy else {}
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def results(model: nn.Module, by_loss: bool) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model.loss(IDS, IDS) if by_loss else model(IDS)
    out.float().square().mean().backward()
    found = {n: whole(p.grad).clone() for n, p in model.named_parameters()}
    return found | {"out": out.detach()}


def assert_same(got: dict, expected: dict, allowed: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = (got[name].float() - value.float()).norm() / value.float().norm()
        assert error < allowed, f"{name}: {error}"


POLICIES = {
    "float32": ({}, 2e-5),
    "bfloat16": ({"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}, 0.05),
}


@pytest.mark.parametrize("when", ["never", "before", "after"])
@pytest.mark.parametrize("by_loss", [False, True], ids=["forward", "loss"])
@pytest.mark.parametrize("policy", POLICIES)
def test_fsdp2(policy, by_loss, when):
    """The measure is the eager model without FSDP2, in bfloat16 for its default mixed precision."""
    options, allowed = POLICIES[policy]
    eager = OpenELM(CONFIG, seed=1)
    expected = results(eager, by_loss)
    model = OpenELM(CONFIG, seed=1)
    if when == "before":
        accelerate(model)
    shard(model, **options)
    if when == "after":
        report = accelerate(model)
        reasons = dict(report.left)
        assert "DTensor" in reasons["layers.0.attn.qkv_proj"]
        assert "DTensor" in reasons["layers.0.attn_norm"]
        assert report.accelerated["layers"] == len(model.layers)
    for _ in range(2):
        assert_same(results(model, by_loss), expected, allowed)
    assert all(isinstance(layer, DecoderLayer | FSDPModule) for layer in model.layers)
    if when == "never":
        return
    assert all(isinstance(layer, Fused) for layer in model.layers)
    restore(model)
    assert not any(isinstance(m, Fused) for m in model.modules())
    assert all(type(layer).__mro__[2] is DecoderLayer for layer in model.layers)
    assert_same(results(model, by_loss), expected, allowed)


def test_other_methods_that_use_weights_work_sharded():
    expected = OpenELM(CONFIG, seed=1).hidden_states(IDS)
    model = shard(OpenELM(CONFIG, seed=1))
    accelerate(model)
    torch.testing.assert_close(model.hidden_states(IDS), expected)


def test_the_rotary_table_is_nobodys_input():
    """What casts the tensors among arguments, however deep, must not find it."""
    from torch.distributed.utils import _apply_to_tensors

    table = torch.zeros(4, 8)
    context = Context(torch.zeros(1, 2), Rotation(table), None, None, None)
    cast = _apply_to_tensors(lambda t: t.bfloat16(), context)
    assert cast.positions.dtype == torch.bfloat16 and cast.rope_table is table
    leaves = torch.utils._pytree.tree_leaves(context)
    assert not any(leaf is table for leaf in leaves)


@pytest.mark.parametrize("when", ["before", "after"])
def test_ddp(when):
    eager, model = OpenELM(CONFIG, seed=1), OpenELM(CONFIG, seed=1)
    if when == "before":
        accelerate(model)
    wrapped = DistributedDataParallel(model)
    if when == "after":
        report = accelerate(wrapped)
        assert report.accelerated["layers"] == len(model.layers)
    for module in (eager, wrapped):
        module(IDS).square().mean().backward()
    for (name, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=name)
    keys = list(wrapped.state_dict())
    restore(wrapped)
    assert list(wrapped.state_dict()) == keys
    assert not any(isinstance(m, Fused) for m in model.modules())


def test_a_model_can_be_copied_before_it_is_sharded():
    model = OpenELM(CONFIG, seed=1)
    accelerate(model)
    other = shard(copy.deepcopy(model))
    torch.testing.assert_close(other(IDS), model(IDS))

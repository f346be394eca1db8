"""A packed batch gives what its documents give one by one: logits, gradients, positions, errors."""

import copy
import re

import pytest
import torch
from helpers.golden import load_tiny

from elmkernels import OpenELM, accelerate
from elmkernels.openelm import KVCache
from elmkernels.reference.common import document_of, positions_of
from elmkernels.testing import runnable
from elmkernels.testing.rule import ATTENTION_SLACK, compare

BATCH, LENGTH = 2, 40
CU_SEQLENS = torch.tensor([0, 7, 8, 8, 30, 40, 40, 79, 80])


def small(dtype=torch.float32) -> tuple[OpenELM, torch.Tensor]:
    case = load_tiny("tiny_layerwise")
    model = case.model(dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, case.config.vocab_size, (BATCH, LENGTH), generator=generator)
    return model, ids


def one_by_one(model, ids, **options):
    ends = CU_SEQLENS.tolist()
    parts = [ids.flatten()[None, a:b] for a, b in zip(ends, ends[1:], strict=False) if a < b]
    return torch.cat([model(part, **options) for part in parts], dim=1).view(BATCH, LENGTH, -1)


def packed(model, ids, **options):
    return model(ids, cu_seqlens=CU_SEQLENS, **options)


def logits_and_gradients(forward, model, ids, autocast=False):
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = forward(model, ids)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(logits.shape, generator=generator).to(logits.dtype)
    logits.backward(cotangent)
    return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters()}


SWAPS = [None, *runnable("rms_norm"), "reference"]
SWAPS = [name for name in SWAPS if name != "triton"]  # interpreted, it would take minutes


@pytest.mark.parametrize("how", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("backend", [*SWAPS, "eager"])
def test_logits_and_every_gradient(backend, how):
    model, ids = small(torch.bfloat16 if how == "bfloat16" else torch.float32)
    exact = copy.deepcopy(model).double()
    truth = logits_and_gradients(one_by_one, exact, ids)
    yardstick = logits_and_gradients(one_by_one, model, ids, how == "autocast")
    if backend != "eager":
        accelerate(model, backend=backend)
    assert_all(logits_and_gradients(packed, model, ids, how == "autocast"), yardstick, truth)


def assert_all(got, yardstick, truth):
    """Each tensor by the rule of parity, the documents one by one in float64 being the truth."""
    assert got.keys() == truth.keys()
    for name, tensor in got.items():
        compared = compare(truth[name], yardstick[name], tensor, name, ATTENTION_SLACK)
        assert compared.ok, f"{name}: {compared.reason}"


@pytest.mark.parametrize("backend", SWAPS)
def test_a_document_does_not_see_its_neighbours(backend):
    """Bitwise: other documents, other tokens in them, and the logits of this one stay."""
    model, ids = small()
    accelerate(model, backend=backend)
    with torch.inference_mode():
        before = packed(model, ids)
        ids[0, 8:30] = ids[0, 8:30].flip(0)
        after = packed(model, ids)
    assert torch.equal(after[0, :8], before[0, :8])
    assert torch.equal(after[0, 30:], before[0, 30:])
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0, 8:30], before[0, 8:30])


def test_one_document_a_row_is_the_plain_batch():
    model, ids = small()
    cu_seqlens = torch.tensor([0, LENGTH, 2 * LENGTH])
    with torch.inference_mode():
        torch.testing.assert_close(model(ids, cu_seqlens=cu_seqlens), model(ids))
        accelerate(model)
        got, expected = model(ids, cu_seqlens=cu_seqlens, logits_to_keep=3), model(ids)[:, -3:]
    torch.testing.assert_close(got, expected)


def test_positions_and_documents_of_tokens():
    cu_seqlens = torch.tensor([0, 0, 3, 3, 4, 6])
    assert positions_of(cu_seqlens, 6).tolist() == [0, 1, 2, 0, 0, 1]
    assert document_of(cu_seqlens, 6).tolist() == [1, 1, 1, 3, 4, 4]
    assert positions_of(torch.tensor([0]), 0).tolist() == []


@pytest.mark.parametrize("accelerated", [False, True])
def test_compiled_and_checkpointed_it_is_the_same(accelerated):
    model, ids = small()
    truth = logits_and_gradients(one_by_one, copy.deepcopy(model).double(), ids)
    yardstick = logits_and_gradients(one_by_one, model, ids)
    if accelerated:
        accelerate(model)
    plain = logits_and_gradients(packed, model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    traced = logits_and_gradients(lambda _, ids: packed(compiled, ids), model, ids)
    model.gradient_checkpointing = True
    again = logits_and_gradients(packed, model, ids)
    assert_all(traced, yardstick, truth)
    assert all(torch.equal(again[name], expected) for name, expected in plain.items())


MASK = torch.ones(BATCH, LENGTH)
WRONG = {
    "a mask": ({"attention_mask": MASK}, CU_SEQLENS, "given without cache and attention_mask"),
    "counts": ({"counts": [1, 2]}, CU_SEQLENS, "counts must be given with a cache"),
    "int32": ({}, CU_SEQLENS.int(), "cu_seqlens must be torch.int64, got torch.int32"),
    "a matrix": ({}, CU_SEQLENS[None], "cu_seqlens must be [documents + 1], got [1, 9]"),
    "the end": ({}, CU_SEQLENS[:-1], "cu_seqlens must be rising from 0 to 80, got 0 to 79"),
    "falling": (
        {}, torch.tensor([0, 40, 30, 80]), "cu_seqlens must be rising from 0 to 80, got 40 before"),
    "over two rows": (
        {}, torch.tensor([0, 41, 80]),
        "cu_seqlens must be a boundary at every row's start (each 40), got none at 40"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_message(what):
    model, ids = small()
    options, cu_seqlens, message = WRONG[what]
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        model(ids, cu_seqlens=cu_seqlens, **options)


def test_a_cache_is_refused():
    model, ids = small()
    cache = KVCache(model.config, BATCH, LENGTH)
    with pytest.raises(ValueError, match="cu_seqlens must be given without cache"):
        model(ids, cache=cache, cu_seqlens=CU_SEQLENS)
    assert cache.length == 0

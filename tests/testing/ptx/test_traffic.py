"""What is counted of an execution: sectors, bytes, conflicts of banks, instructions."""

import os

import numpy as np
import pytest
import torch
from helpers.ptx import launch

from elmkernels.testing.ptx import Device, Settings, Traffic, executed

COUNT = Settings(traffic=True)
X = np.arange(1024, dtype=np.uint32)


def counted(body: str, *inputs: np.ndarray, **options) -> Traffic:
    traffic = launch(body, *inputs, settings=COUNT, **options)[1]
    assert traffic is not None
    return traffic


def test_neighbours_share_sectors():
    t = counted("add.u32 %r10, %r0, 1;", X[:32])
    assert (t.asked["load"], t.sectors["load"]) == (128, 4)
    assert (t.asked["store"], t.sectors["store"]) == (128, 4)


STRIDE = """
 setp.lt.u32 %p1, %r63, 32;
 ld.param.u64 %at9, [q0];
 mad.wide.u32 %at9, %r63, 32, %at9;
 mov.u32 %r10, 0;
 @%p1 ld.global.u32 %r10, [%at9];
 @%p1 ld.global.u32 %r11, [%at9+4];
"""


def test_a_stride_takes_a_sector_a_thread_and_touches_each_once():
    t = counted(STRIDE, X[:256], threads=256)
    assert t.asked["load"] == 4 * 256 + 2 * 4 * 32
    assert t.sectors["load"] == 32 + 2 * 32  # the neighbours of the prologue, then the strides
    assert len(t.touched["load"]) == 32


def test_instructions_are_those_of_warps():
    t = counted("add.u32 %r10, %r0, 1;", X[:256], threads=256)
    assert t.issued["store"] == 8


@pytest.mark.parametrize(
    ("words", "cycles"), [(1, 1), (2, 2), (3, 1), (8, 8), (32, 32), (33, 1), (0, 1)]
)
def test_conflicts_of_banks(words, cycles):
    """Threads `words` words apart; all at one word are served at once."""
    body = f"""
 mov.u32 %r2, dynamic;
 mad.lo.u32 %r1, %r63, {4 * words}, %r2;
 st.shared.u32 [%r1], 1;
 mov.u32 %r10, 0;
"""
    t = counted(body, shared=4 * 33 * 32)
    assert (t.shared["store accesses"], t.shared["store cycles"]) == (1, cycles)


def test_wide_accesses_take_a_warp_in_quarters():
    body = """
 mov.u32 %r2, dynamic;
 mad.lo.u32 %r1, %r63, 16, %r2;
 st.shared.v4.u32 [%r1], {%r63, %r63, %r63, %r63};
 mov.u32 %r10, 0;
"""
    t = counted(body, shared=512)
    assert (t.shared["store accesses"], t.shared["store cycles"]) == (4, 4)


pytest.importorskip("triton")

WIDTHS = (1280, 1536, 2048, 3072)


def least(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() // 32 for t in tensors)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_touches_what_it_must_and_each_access_is_whole_sectors(n, dtype):
    import elmkernels

    x, residual, weight = torch.randn(17, n), torch.randn(17, n), torch.rand(n)
    x, residual, weight = (t.to(dtype) for t in (x, residual, weight))
    with executed(Device(COUNT)) as device:
        y = elmkernels.rms_norm(x, weight, backend="triton")
        both = elmkernels.add_rms_norm(x, residual, weight, backend="triton")
        gated = elmkernels.swiglu(x, backend="triton")
    bounds = (
        ((x, weight), (y,)), ((x, residual, weight), both), ((x,), (gated,)),
    )  # fmt: skip
    for launched, (read, written) in zip(device.launches, bounds, strict=True):
        t = launched.traffic
        assert t is not None
        assert len(t.touched["load"]) == least(*read), launched.kernel
        assert len(t.touched["store"]) == least(*written), launched.kernel
        # Rows are asked for once, the weight again for each row.
        again = 16 * least(weight) if len(read) > 1 else 0
        assert t.sectors["load"] <= 1.05 * (least(*read) + again), launched.kernel
        assert t.sectors["store"] <= 1.05 * least(*written), launched.kernel

"""What the launchers decide, on tensors without data: rows, units, blocks."""

import pytest
import torch

pytest.importorskip("triton")

from elmkernels.openelm.config import VARIANTS, OpenELMConfig  # noqa: E402
from elmkernels.triton.common import collapse, rows_of  # noqa: E402
from elmkernels.triton.rms_norm import blocks  # noqa: E402


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("sizes", "strides", "expected"),
    [
        ((2, 3, 4), [(12, 4, 1)], ([24], [[1]])),
        ((2, 3, 4), [(24, 4, 1)], ([2, 12], [[24, 1]])),
        ((2, 3, 4), [(12, 4, 1), (1, 2, 6)], ([2, 3, 4], [[12, 4, 1], [1, 2, 6]])),
        ((2, 1, 4), [(4, 99, 1)], ([8], [[1]])),
        ((5, 4), [(0, 0)], ([20], [[0]])),
        ((1, 1), [(7, 7)], ([1], [[0]])),
        ((), [()], ([1], [[0]])),
    ],
)
def test_neighbouring_dimensions_merge_where_every_tensor_allows(sizes, strides, expected):
    assert collapse(sizes, *strides) == expected


def test_contiguous_rows_are_one_list():
    r = rows_of(meta(2, 3, 1280), meta(2, 3, 1280), multiple=1280)
    assert (r.count, r.rank, r.vec) == (6, 1, 8)
    assert r.strides == [(160, 0, 0), (160, 0, 0)]


def test_heads_of_a_projection_are_rows_without_a_copy():
    heads = meta(2, 7, 18, 64)[:, :, 12:15]
    r = rows_of(heads, multiple=64)
    assert r.tensors[0] is heads
    assert (r.count, r.rank, r.sizes) == (42, 2, (3, 1))
    assert r.strides == [(18 * 64 // 8, 64 // 8, 0)]


@pytest.mark.parametrize(
    ("x", "multiple", "vec"),
    [
        (meta(3, 64), 64, 8),
        (meta(3, 64, dtype=torch.float32), 64, 4),
        (meta(3, 12), 12, 1),
        (meta(3, 12, dtype=torch.float32), 12, 4),
        (meta(3, 65)[:, :64], 64, 1),
        (meta(3, 128), 60, 1),
    ],
)
def test_units_are_16_bytes_where_every_size_and_stride_divides(x, multiple, vec):
    assert rows_of(x, multiple=multiple).vec == vec


def test_a_fourth_dimension_costs_a_copy():
    r = rows_of(meta(2, 3, 4, 5, 8).permute(3, 2, 1, 0, 4), multiple=8)
    assert r.rank == 1
    assert r.tensors[0].is_contiguous()


@pytest.mark.parametrize("name", VARIANTS)
def test_no_lane_idles_in_a_hidden_row(name):
    n = OpenELMConfig.from_name(name).model_dim
    assert blocks(n)["HEAD"] + blocks(n)["TAIL"] == n


@pytest.mark.parametrize("n", [1, 2, 3, 7, 33, 1000, 4095, 4096, 4097, 12289])
def test_blocks_hold_the_row_or_say_that_they_don_t(n):
    found = blocks(n)
    held = found["HEAD"] + found["TAIL"]
    assert found["HEAD"] <= n
    assert found["TAIL"] <= found["HEAD"]
    assert found["WIDE"] == (held < n)
    assert found["EXACT"] == (held <= n)

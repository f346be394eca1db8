"""What the launchers decide, on tensors without data: rows, units, blocks."""

import pytest
import torch

pytest.importorskip("triton")

from elmkernels.openelm.config import VARIANTS, OpenELMConfig  # noqa: E402
from elmkernels.triton._attention_tiles import plan, tiles_of  # noqa: E402
from elmkernels.triton.attention import FORWARD, LEAST_KEYS, splits_of  # noqa: E402
from elmkernels.triton.common import collapse, rows_of, units, vec_of  # noqa: E402
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


def test_heads_are_in_units_of_16_bytes_where_head_dim_and_every_stride_divide():
    heads = meta(2, 7, 18, 64)[:, :, 12:15]
    assert vec_of(64, heads, meta(2, 7, 3, 64)) == 8
    assert units(heads, 8) == (7 * 18 * 8, 18 * 8, 8)
    assert vec_of(64, meta(2, 7, 3, 64, dtype=torch.float32)) == 4
    assert vec_of(64, heads, meta(2, 7, 3, 65)[..., :64]) == 1
    assert vec_of(20, meta(2, 7, 3, 20)) == 1


@pytest.mark.parametrize("head_dim", [1, 20, 64, 80, 128, 256])
def test_a_tile_of_attention_is_as_wide_as_its_heads(head_dim):
    sizes, block = plan(FORWARD[2], head_dim, 4096, "sm_90")
    assert sizes["HEAD_DIM"] == head_dim <= sizes["BLOCK_D"] < max(17, 2 * head_dim)
    assert sizes["BLOCK_M"] == block.tile >= 64
    assert plan(FORWARD[2], head_dim, 4, "sm_90")[0]["BLOCK_M"] == 16


@pytest.mark.parametrize("lengths", [[7], [0, 0], [1] * 9, [63, 65, 0, 128, 1], [0, 300, 0]])
@pytest.mark.parametrize(("each", "block"), [(1, 16), (3, 16), (4, 128), (70, 16)])
def test_every_document_has_tiles_enough_and_no_tile_is_shared(lengths, each, block):
    """The arithmetic of `place`: document d has the tiles from cu_seqlens[d] // block + d on."""
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    begins = [end * each // block + d for d, end in enumerate(ends)]
    for length, begin, end in zip(lengths, begins, begins[1:], strict=False):
        assert (end - begin) * block >= length * each
    assert begins[-1] == tiles_of(ends[-1] * each, block, len(lengths))
    assert tiles_of(ends[-1] * each, block, None) == -(-ends[-1] * each // block)


def test_keys_are_split_where_programs_are_few_and_keys_many():
    assert splits_of(5, 4, 4096, 132) == 4096 // LEAST_KEYS  # one token after a long context
    assert splits_of(5, 4, 1 << 20, 132) == 2 * 132 // 5
    assert splits_of(5, 4, LEAST_KEYS, 132) == 1
    assert splits_of(400, 4, 1 << 20, 132) == 1  # a large batch fills the GPU by itself
    assert splits_of(80, 2048, 2048, 132) == 1  # and a prompt


def test_the_number_of_splits_has_no_cliffs():
    """One key, program or row more never changes it by more than a step, but where each program
    is a large share of all: then it stays as near to two programs a multiprocessor."""
    for keys in range(1, 20000):
        assert 0 <= splits_of(3, 4, keys + 1, 132) - splits_of(3, 4, keys, 132) <= 1
    for rows in range(1, 2000):
        fewer, more = splits_of(3, rows, 9000, 132), splits_of(3, rows + 1, 9000, 132)
        assert 0 <= fewer - more <= 1 + fewer // max(32, rows)
    for programs in range(1, 600):
        splits = splits_of(programs, 4, 1 << 20, 132)
        assert programs * splits <= max(264, programs) < programs * (splits + 1)

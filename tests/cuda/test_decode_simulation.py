"""decode_step's CUDA sources, compiled for the host and held to the reference: no GPU needed.

The phases, the schedule and the arithmetic are the very functions of the kernel. Blocks run one
after the other in any order, scratch and shared memory begin as NaN, and a barrier that is taken
away must show.
"""

import pytest
import torch
from helpers.decode_simulation import (
    ORDERS,
    POSITIONS,
    assert_parity,
    comparisons,
    decoding,
    draw,
    simulated,
)
from torch import Tensor

from elmkernels.testing import CASES
from elmkernels.testing.cases.decode_step import arena
from elmkernels.testing.cases.draw import make, models
from elmkernels.testing.cases.weights import FORMS, dtypes_of
from elmkernels.weights.affine import quantize_weight
from elmkernels.weights.formats import Affine, DecoderWeights

# The op answers a batch of none by itself, and gives rounded activations to no GPU.
SOME = [c for c in CASES["decode_step"] if c.name != "no_batch" and "_int8" not in c.name]
PARITY_CASES = [(case, dtype) for case in SOME for dtype in case.dtypes]


@pytest.mark.parametrize(
    ("case", "dtype"), PARITY_CASES, ids=lambda x: str(x).removeprefix("torch.")
)
def test_every_case_has_parity(library, case, dtype):
    """Those of the CPU kernels; the number of blocks is none that divides anything."""
    args, kwargs = make(case, dtype, "cpu", 0)
    assert_parity(simulated(library, 13, order="shuffled"), *args, **kwargs)


every_form = pytest.mark.parametrize(
    ("form", "dtype"),
    [(form, dtype) for form in FORMS for dtype in dtypes_of(form)],
    ids=lambda x: str(x).removeprefix("torch."),
)


@every_form
def test_the_order_of_blocks_and_the_batch_change_no_bit(library, form, dtype):
    weights, tokens, positions, cache = decoding(form, dtype)
    kept = cache._replace(data=cache.data.clone())
    expected = simulated(library)(weights, tokens, positions, kept)
    for batch, order in ((1, "shuffled"), (2, "reversed"), (3, "forward"), (4, "shuffled")):
        rows = slice(4 - batch, 4)
        own = arena(draw(dtype), weights, batch, cache.max_length)
        for i, layer in enumerate(weights.layers):
            views = (c.views(i, layer.kv_heads) for c in (own, cache))
            for mine, all_rows in zip(*views, strict=True):
                mine.copy_(all_rows[rows])
        for passes in (1, 4):
            again = own._replace(data=own.data.clone())
            step = simulated(library, rows=passes, order=order, seed=batch)
            assert torch.equal(step(weights, tokens[rows], positions[rows], again), expected[rows])
            for i, layer in enumerate(weights.layers):
                views = (c.views(i, layer.kv_heads) for c in (again, kept))
                for mine, theirs in zip(*views, strict=True):
                    at = torch.arange(batch), positions[rows]
                    assert torch.equal(mine[at], theirs[rows][at])


@pytest.mark.parametrize("grid", [1, 2, 7, 132, 300])
@pytest.mark.parametrize("form", FORMS)
def test_any_number_of_blocks_has_parity(library, form, grid):
    """Also more of them than a weight has rows."""
    assert_parity(simulated(library, grid), *decoding(form, torch.bfloat16))


@pytest.mark.parametrize("form", ["plain", "affine4_64", "packed12"])
def test_a_layer_of_270m_has_parity(library, form):
    config = models()["270M"]
    layer = config.num_transformer_layers // 2
    sizes = {
        "model_dim": config.model_dim,
        "head_dim": config.head_dim,
        "heads": ((config.num_query_heads[layer], config.num_kv_heads[layer]),),
        "ffn_dims": (config.ffn_dims[layer],),
    }
    assert_parity(simulated(library, 132), *decoding(form, torch.bfloat16, (130, 9), **sizes))


@pytest.mark.parametrize("scales", [torch.float32, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_of_another_dtype_have_parity(library, bits, scales):
    weights, *rest = decoding("plain", torch.bfloat16)

    def other(w):
        return quantize_weight(w.to(scales), bits) if w is not None and w.dim() == 2 else w

    layers = tuple(
        layer._replace(**{n: other(getattr(layer, n)) for n in ("qkv_proj", "proj_1", "proj_2")})
        for layer in weights.layers
    )
    weights = DecoderWeights(**{**vars(weights), "layers": layers, "head": other(weights.head)})
    assert isinstance(weights.head, Affine)
    assert_parity(simulated(library), weights, *rest)


@pytest.mark.parametrize("what", ["token", "position"])
@pytest.mark.parametrize("bad", [-1, 210, 2**40])
def test_an_index_outside_gives_nan_for_its_row_alone(library, what, bad):
    weights, tokens, positions, cache = decoding("plain", torch.bfloat16)
    kept = cache._replace(data=cache.data.clone())
    expected = simulated(library)(weights, tokens, positions, kept)
    wrong = {"token": tokens.clone(), "position": positions.clone()}
    wrong[what][1] = bad
    before = cache.data.clone()
    got = simulated(library)(weights, *wrong.values(), cache)
    assert got[1].isnan().all()
    others = [0, 2, 3]
    assert torch.equal(got[others], expected[others])
    for i, layer in enumerate(weights.layers):
        old = cache._replace(data=before).views(i, layer.kv_heads)
        for after, start in zip(cache.views(i, layer.kv_heads), old, strict=True):
            assert torch.equal(after[1], start[1])


def test_what_lies_beyond_the_positions_is_neither_read_nor_written(library):
    weights, tokens, positions, cache = decoding("plain", torch.bfloat16)
    poisoned = cache._replace(data=torch.full_like(cache.data, torch.nan))
    for i, layer in enumerate(weights.layers):
        pairs = zip(poisoned.views(i, layer.kv_heads), cache.views(i, layer.kv_heads), strict=True)
        for bad, good in pairs:
            for b, p in enumerate(positions.tolist()):
                bad[b, :p] = good[b, :p]
    unwritten = poisoned.data.isnan().sum()
    expected = simulated(library)(weights, tokens, positions, cache)
    assert torch.equal(simulated(library)(weights, tokens, positions, poisoned), expected)
    written = sum(2 * layer.kv_heads for layer in weights.layers) * weights.head_dim * len(tokens)
    assert unwritten - poisoned.data.isnan().sum() == written


@every_form
@pytest.mark.parametrize(
    ("grid", "order"), [(1, "forward"), (7, "shuffled"), (41, "reversed"), (300, "shuffled")]
)
def test_the_likeliest_tokens_are_chosen_in_place_of_the_last_ones(
    library, grid, order, form, dtype
):
    weights, tokens, *rest = decoding(form, dtype, (*POSITIONS, 7, 64, 9, 1))
    chosen = torch.full_like(tokens, -1)
    step = simulated(library, grid, order=order)
    logits = step(weights, tokens, *rest, chosen)
    assert torch.equal(chosen, logits.argmax(-1))
    again = step(weights, tokens, *rest, tokens)
    assert torch.equal(again, logits)
    assert torch.equal(tokens, chosen)


def with_head(weights, change):
    head = draw(weights.norm.dtype, 5).normal(203, weights.model_dim)
    change(head)
    return DecoderWeights(**{**vars(weights), "head": head})


def all_alike(head):
    head[:] = head[0]


def alike_by_sevens(head):
    head[:] = head[:7].repeat(29, 1)


def not_numbers(head):
    head[[150, 77, 190]] = torch.nan


@pytest.mark.parametrize("change", [all_alike, alike_by_sevens, not_numbers, Tensor.zero_])
@pytest.mark.parametrize("grid", [1, 5, 203, 300])
def test_of_equal_logits_and_of_nan_the_first_is_chosen(library, grid, change):
    """The equal ones lie in different blocks; a row that isn't in the vocabulary is all NaN."""
    weights, tokens, *rest = decoding("plain", torch.bfloat16)
    weights = with_head(weights, change)
    tokens[2] = -1
    for order in ORDERS:
        chosen = torch.full_like(tokens, -1)
        logits = simulated(library, grid, order=order)(weights, tokens, *rest, chosen)
        assert torch.equal(chosen, logits.argmax(-1))
        assert chosen[2] == 0


def test_ranks_are_ordered_as_argmax_orders_logits(library):
    """All pairs of numbers that could go wrong, in both orders."""
    inf, tiny = float("inf"), 1e-45
    numbers = (-inf, -3.0, -tiny, -0.0, 0.0, tiny, 3e38, inf, float("nan"), -float("nan"))
    for a in numbers:
        for b in numbers:
            ranks = [library.rank(x, i) for i, x in enumerate((a, b))]
            assert ranks.index(max(ranks)) == torch.tensor([a, b]).argmax(), (a, b)
            assert min(ranks) > 0


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_shows(library, order):
    call = decoding("plain", torch.float32)
    barriers = library.count_barriers(len(call[0].layers))
    assert barriers == 5 * len(call[0].layers) + 1
    for barrier in range(barriers):
        step = simulated(library, 5, order=order, missing=barrier)
        found = comparisons(step, *call)
        assert not all(c.ok for c in found), f"nothing shows without barrier {barrier}"


@pytest.mark.parametrize("shift", [1, -64])
def test_a_shifted_offset_shows(library, shift):
    found = comparisons(simulated(library, shift=shift), *decoding("plain", torch.float32))
    assert not all(c.ok for c in found)


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize(("rows", "size"), [(4, 2), (1, 4)])
def test_every_model_fits_the_shared_memory_of_an_a100(library, name, rows, size):
    config = models()[name]
    heads = max(
        q + 2 * kv for q, kv in zip(config.num_query_heads, config.num_kv_heads, strict=True)
    )
    width = heads * config.head_dim
    widest = max(config.model_dim, width, *config.ffn_dims)
    assert (
        library.count_shared_bytes(rows, widest, width, config.head_dim, size) <= 163 * 1024 - 128
    )

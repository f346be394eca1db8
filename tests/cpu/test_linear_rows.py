"""linear's kernel past the 8 rows that `ops.linear` gives it: a server's batches have more. Tiles
of 6 rows of a bfloat16 weight by 4 of up to 64 activations, and what is left of each.
"""

import pytest
import torch
from torch.nn import functional as F

from elmkernels.backends import BACKENDS, CPU, kernel
from elmkernels.testing.rule import compare
from elmkernels.weights import pack_weight
from elmkernels.weights.formats import form_of

HERE = [name for name in CPU if BACKENDS[name].missing is None]
ROWS = (9, 11, 12, 16, 33, 63, 64, 65, 73, 130)


def draw(rows: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * n + k + rows)
    return tuple(torch.randn(size, k, generator=generator).to(dtype) for size in (rows, n))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("n, k", [(1, 1), (5, 31), (6, 64), (97, 129), (200, 320)])
def test_any_number_of_rows(backend, dtype, n, k):
    for rows in ROWS:
        x, weight = draw(rows, n, k, dtype)
        got = kernel("linear_fwd", backend)(x, *form_of(weight).parts())
        truth = x.double() @ weight.double().t()
        found = compare(truth, F.linear(x, weight), got, f"{rows} rows")
        assert found.ok, found.reason


@pytest.mark.parametrize("backend", HERE)
def test_rows_that_lie_apart_and_none_that_meet(backend):
    """Strided activations; a row that is not finite makes its own row NaN, no other."""
    x, weight = draw(40, 50, 96, torch.bfloat16)
    product, parts = kernel("linear_fwd", backend), form_of(weight).parts()
    whole = product(x, *parts)
    wide = torch.cat((x, x), 1)[:, :96]
    assert torch.equal(product(wide, *parts), whole)
    x[17, 3] = float("nan")
    spoiled = product(x, *parts)
    assert spoiled[17].isnan().all()
    spoiled[17] = whole[17]
    assert torch.equal(spoiled, whole)


@pytest.mark.parametrize("backend", HERE)
def test_any_number_of_threads_gives_the_same_bits(backend):
    x, weight = draw(16, 1000, 320, torch.bfloat16)
    product, parts, held = kernel("linear_fwd", backend), form_of(weight).parts(), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            held.append(product(x, *parts))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(held[0], other) for other in held[1:])


@pytest.mark.parametrize("backend", HERE)
def test_packed12_has_the_bits_of_its_groups(backend):
    """It is read once for each 8 rows."""
    x, weight = draw(20, 64, 256, torch.bfloat16)
    product, parts = kernel("linear_fwd", backend), form_of(pack_weight(weight)).parts()
    apart = torch.cat([product(part, *parts) for part in x.split(8)])
    assert torch.equal(product(x, *parts), apart)

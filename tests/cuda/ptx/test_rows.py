"""The kernels of rows as nvcc compiles them for sm_80, launched by their own host code, executed:
parity by the usual rule, forward and backward, with every checker on.
"""

import pytest
import torch
from helpers.nvcc.gpu import Gpu, executed

import elmkernels
from elmkernels.testing import CASES
from elmkernels.testing.cases.draw import Case, Draw, grad
from elmkernels.testing.cases.qk_norm_rope import heads_case
from elmkernels.testing.parity import DTYPES, Expected, assert_parity
from elmkernels.testing.ptx import Settings

OPS = ("rms_norm", "add_rms_norm", "qk_norm_rope")
WIDTHS, ROWS = (1280, 1536, 2048, 3072), (1, 3, 17)
# Of the ops' own cases these; the slow test has the others.
QUICK = {
    "rms_norm": ("width_33", "row_slices", "no_rows"),
    "add_rms_norm": ("row_slices", "mixed_layouts"),
    "qk_norm_rope": ("head_dim_6", "left_padded", "ragged", "cached_prompt", "cached_token"),
}  # fmt: skip
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def rows_case(op: str, rows: int, n: int, strided: bool = False) -> Case:
    """Rows of a norm; strided: every second row of a wider tensor's left part."""

    def build(d: Draw):
        def drawn():
            whole = d.normal(2 * rows, n + 64) if strided else d.normal(rows, n)
            return grad(whole[::2, :n] if strided else whole)

        given = (drawn(),) if op == "rms_norm" else (drawn(), drawn())
        return (*given, d.weight(n)), {}

    return Case(op, f"{n}_rows_{rows}{'_strided' * strided}", build)


def drawn_cases() -> list[Case]:
    found = [
        rows_case(op, rows, n, strided=rows == 3) for op in OPS[:2] for n in WIDTHS for rows in ROWS
    ]
    for head_dim in (64, 128):
        for rows in ROWS:
            name = f"head_dim_{head_dim}_rows_{rows}"
            found.append(heads_case(name, 6, 2, head_dim, batch=1, length=rows))
    return found


def drawn(quick: bool) -> list:
    """Of each three numbers of rows every dtype has another one; the slow test has the others."""
    found = []
    for i, case in enumerate(drawn_cases()):
        for j, (name, dtype) in enumerate(DTYPES.items()):
            if ((i + i // 3) % 3 == j) == quick:
                found.append(pytest.param(case, dtype, id=f"{case.op}-{case.name}-{name}"))
    return found


def chosen(quick: bool) -> list:
    return [
        pytest.param(op, case, id=f"{op}-{case.name}")
        for op in OPS
        for case in CASES[op]
        if any(case.name.startswith(n) for n in QUICK[op]) == quick
    ]


def hold(
    compiled, op: str, case: Case, dtype: torch.dtype, settings: Settings | None = None
) -> Gpu:
    if dtype not in case.dtypes:
        pytest.skip(f"{case.name} isn't drawn in {dtype}")
    with executed(Gpu(compiled, settings or Settings())) as gpu:
        assert_parity(op, case, dtype, "cuda")
    return gpu


@pytest.mark.parametrize(("case", "dtype"), drawn(True))
def test_parity(compiled, case, dtype):
    gpu = hold(compiled, case.op, case, dtype)
    assert len(gpu.launches) >= 3


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), drawn(False))
def test_parity_of_other_rows(compiled, case, dtype):
    hold(compiled, case.op, case, dtype)


@EVERY_DTYPE
@pytest.mark.parametrize(("op", "case"), chosen(True))
def test_parity_of_layouts(compiled, op, case, dtype):
    hold(compiled, op, case, dtype)


@pytest.mark.slow
@EVERY_DTYPE
@pytest.mark.parametrize(("op", "case"), chosen(False))
def test_parity_of_every_case(compiled, op, case, dtype):
    hold(compiled, op, case, dtype)


@pytest.mark.parametrize("op", OPS)
def test_parity_with_approximations_as_far_off_as_is_stated(compiled, op):
    case = next(c for c in drawn_cases() if c.op == op)
    hold(compiled, op, case, torch.bfloat16, Settings(share=1.0))


@pytest.mark.parametrize("order", ["backward", "shuffled"])
@pytest.mark.parametrize("op", OPS)
def test_blocks_in_any_order_and_company_give_the_same_bits(compiled, op, order):
    case = next(c for c in drawn_cases() if c.op == op and c.name.endswith("17"))
    expected = Expected(op, case, torch.bfloat16)

    def gradients(settings: Settings) -> list[torch.Tensor]:
        fn = getattr(elmkernels, op)
        with executed(Gpu(compiled, settings)):
            return [*expected.run(lambda *a, **k: fn(*a, **k, backend="cuda")).values()]

    first, second = gradients(Settings()), gradients(Settings(order=order, lanes=256))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_launches_are_the_host_codes(compiled):
    """A block a row; backward, parts of two blocks a multiprocessor and their sum."""
    gpu = hold(compiled, "rms_norm", rows_case("rms_norm", 17, 1280), torch.bfloat16)
    assert [(ran.kernel, ran.grid, ran.block) for ran in gpu.launches] == [
        ("norm_fwd", (17, 1, 1), (160, 1, 1)),
        ("norm_bwd", (8, 1, 1), (160, 1, 1)),
        ("sum_partials", (40, 1, 1), (32, 32, 1)),
    ]


@pytest.mark.parametrize("n", WIDTHS)
def test_forward_touches_what_it_must_and_each_access_is_whole_sectors(compiled, n):
    x, weight = torch.randn(17, n).bfloat16(), torch.rand(n).bfloat16()
    with executed(Gpu(compiled, Settings(traffic=True))) as gpu:
        y = elmkernels.rms_norm(x, weight, backend="cuda")
        normed, total = elmkernels.add_rms_norm(x, x + 1, weight, backend="cuda")
    least = [t.nbytes // 32 for t in (x, weight, y)]
    read = ((least[0], 1), (2 * least[0], 2))
    for ran, (rows, written) in zip(gpu.launches, read, strict=True):
        traffic = ran.traffic
        assert traffic is not None
        assert len(traffic.touched["load"]) == rows + least[1], ran.kernel
        assert len(traffic.touched["store"]) == written * least[2], ran.kernel
        # Rows are asked for once, the weight again for each row.
        assert traffic.sectors["load"] == rows + 17 * least[1], ran.kernel
        assert traffic.sectors["store"] == written * least[2], ran.kernel
        assert traffic.shared["load cycles"] == traffic.shared["load accesses"], ran.kernel
    assert normed.shape == total.shape

"""Triton's kernels as compiled for sm_80, launched by their launchers and executed: parity by the
usual rule, with every checker on.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing while it interprets", allow_module_level=True)

from elmkernels.testing import CASES  # noqa: E402
from elmkernels.testing.cases.draw import Case  # noqa: E402
from elmkernels.testing.parity import DTYPES, assert_parity  # noqa: E402
from elmkernels.testing.ptx import Device, Settings, executed  # noqa: E402

# The widths of the models, then layouts and edges; the slow test has them all.
QUICK = {
    "rms_norm": (
        "270M_hidden", "450M_hidden", "1_1B_hidden", "3B_hidden", "width_33", "row_slices",
    ),
    "add_rms_norm": ("270M_hidden", "3B_hidden", "row_slices", "mixed_layouts"),
    "swiglu": ("270M", "row_slices", "width_1"),
    "qk_norm_rope": (
        "270M_12_3_heads", "3B_12_3_heads", "head_dim_6", "left_padded", "ragged", "cached_prompt",
        "cached_token",
    ),
}  # fmt: skip

# Ops with products: a case of each kind of kernel, in one dtype or two.
PRODUCTS = {
    "linear": (
        ("plain_rows_3", "bfloat16"), ("affine8_64_rows_2", "bfloat16"),
        ("affine4_32_rows_5", "float16"), ("packed12_rows_3", "bfloat16"),
        ("affine4_64_gradient_rows_17", "float32"),
    ),
    "linear_cross_entropy": (
        ("270M_hidden", "bfloat16"), ("mean_every_option", "float32"), ("vocabulary_17", "float16"),
    ),
    "attention": (
        ("chunk", "bfloat16"), ("ragged_tokens", "float16"), ("head_dim_20", "float32"),
        ("left_padded_chunk", "bfloat16"), ("varlen_strided", "bfloat16"),
    ),
}  # fmt: skip


def products() -> list:
    found = []
    for op, pairs in PRODUCTS.items():
        for name, dtype in pairs:
            case = next(c for c in CASES[op] if c.name.startswith(name))
            found.append(pytest.param(op, case, DTYPES[dtype], id=f"{op}-{case.name}-{dtype}"))
    return found


def chosen(quick: bool) -> list:
    found = []
    for op, names in QUICK.items():
        for case in CASES[op]:
            if any(case.name.startswith(n) for n in names) == quick:
                found.append(pytest.param(op, case, id=f"{op}-{case.name}"))
    return found


def hold(op: str, case: Case, dtype: torch.dtype, settings: Settings | None = None) -> Device:
    with executed(Device(settings or Settings())) as device:
        assert_parity(op, case, dtype, "triton")
    return device


def test_every_name_of_the_quick_cases_is_there():
    for op, names in QUICK.items():
        for name in names:
            assert any(case.name.startswith(name) for case in CASES[op]), f"{op} {name}"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize(("op", "case"), chosen(True))
def test_parity(op, case, dtype):
    if dtype not in case.dtypes:
        pytest.skip(f"{case.name} isn't drawn in {dtype}")
    hold(op, case, dtype)


@pytest.mark.parametrize(("op", "case", "dtype"), products())
def test_parity_of_products(op, case, dtype):
    assert hold(op, case, dtype).launches


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize(("op", "case"), chosen(False))
def test_parity_of_every_case(op, case, dtype):
    if dtype not in case.dtypes:
        pytest.skip(f"{case.name} isn't drawn in {dtype}")
    hold(op, case, dtype)


@pytest.mark.parametrize("op", QUICK)
def test_parity_with_approximations_as_far_off_as_is_stated(op):
    case = next(c for c in CASES[op] if c.name.startswith(QUICK[op][0]))
    hold(op, case, torch.bfloat16, Settings(share=1.0))


@pytest.mark.parametrize("order", ["backward", "shuffled"])
@pytest.mark.parametrize("op", QUICK)
def test_blocks_in_any_order_and_company_give_the_same_bits(op, order):
    case = next(c for c in CASES[op] if c.name.startswith(QUICK[op][0]))

    def gradients(settings: Settings) -> list[torch.Tensor]:
        from elmkernels.testing.parity import Expected

        expected = Expected(op, case, torch.bfloat16)
        with executed(Device(settings)):
            import elmkernels

            fn = getattr(elmkernels, op)
            found = expected.run(lambda *a, **k: fn(*a, **k, backend="triton"))
        return [*found.values()]

    first = gradients(Settings())
    second = gradients(Settings(order=order, lanes=256))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_launches_are_those_of_the_launchers():
    device = hold("rms_norm", CASES["rms_norm"][0], torch.bfloat16)
    assert [e.kernel for e in device.launches] == [
        "rms_norm._fwd", "rms_norm._bwd", "common._sum_partials",
    ]  # fmt: skip


def test_everything_is_as_it_was_afterwards():
    from triton.runtime import driver

    from elmkernels import backends, ops
    from elmkernels.triton import common

    before = driver._active, dict(backends._KERNELS), dict(backends._CHOICE), common.arch
    with executed():
        assert common.arch is not before[3]
    assert (driver._active, backends._KERNELS, backends._CHOICE, common.arch) == before
    if backends.BACKENDS["triton"].missing is not None:
        with pytest.raises(RuntimeError, match="can't run here"):
            ops.rms_norm(torch.ones(2, 8), torch.ones(8), backend="triton")

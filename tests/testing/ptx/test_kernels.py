"""Triton's kernels as compiled for sm_80, launched by their launchers and executed: parity by the
usual rule, with every checker on.
"""

import os
from functools import partial

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing while it interprets", allow_module_level=True)

import elmkernels  # noqa: E402
from docs.generate import kernels  # noqa: E402
from elmkernels.testing import CASES  # noqa: E402
from elmkernels.testing.cases.draw import Case  # noqa: E402
from elmkernels.testing.cases.weights import FORMS  # noqa: E402
from elmkernels.testing.parity import Expected, assert_parity  # noqa: E402
from elmkernels.testing.ptx import Device, Settings, executed  # noqa: E402

# The widths of the models, then layouts and edges, of ops with products each kind of kernel; the
# slow test has all the others: `python -m pytest -m slow tests/testing/ptx`.
QUICK = {
    "rms_norm": (
        "270M_hidden", "450M_hidden", "1_1B_hidden", "3B_hidden", "width_33", "row_slices",
        "parts_of_1280", "parts_of_3072",
    ),
    "add_rms_norm": ("270M_hidden", "3B_hidden", "row_slices", "mixed_layouts", "parts_of_1280"),
    "swiglu": ("270M", "row_slices", "width_1"),
    "qk_norm_rope": (
        "270M_12_3_heads", "3B_12_3_heads", "head_dim_6", "left_padded", "ragged", "cached_prompt",
        "cached_token",
    ),
    "attention": (
        "chunk", "head_dim_20", "head_dim_128", "left_padded_chunk", "long_token", "ragged_tokens",
        "strided_prompt", "varlen_strided_dy", "varlen_head_dim_128",
    ),
    "linear": (
        *(
            f"{form}_{kind}"
            for form in FORMS
            for kind in (
                "rows_1", "norm_swiglu_rows_3", "residual_rows_2", "norm_residual_gradient",
                "many_outputs",
            )
        ),
        "plain_norm_swiglu_rows_5", "affine4_64_norm_swiglu_rows_8", "packed12_norm_rows_5",
        "affine8_64_rows_9_blocks", "affine4_32_gradient_rows_17", "packed12_gradient_rows_17",
        "packed12_many_escapes", "plain_strided_rows", "plain_k_33", "norm_wide_swiglu",
        "affine4_64_int8_rows_3", "affine8_64_scales_float16_rows_3", "fused_transposed",
        "270M_plain_proj_1", "450M_affine4_32_qkv", "1_1B_packed12_out", "3B_affine8_64_proj_2",
    ),
    "linear_cross_entropy": (
        "270M_hidden", "450M_hidden", "1_1B_hidden", "3B_hidden", "none_every_option",
        "mean_ignored", "vocabulary_17", "vocabulary_4099", "ignore_index_0", "wide_weight",
        "row_slices", "huge_offset", "strided_dy",
    ),
}  # fmt: skip


# In float32 these are slow too.
LONG = ("head_dim_128", "long_token", "varlen_head_dim_128")


def is_quick(op: str, case: Case, dtype: torch.dtype) -> bool:
    if dtype == torch.float32 and case.name in LONG:
        return False
    return any(case.name == n or case.name.startswith(f"{n}_") for n in QUICK[op])


def chosen(quick: bool) -> list:
    return [
        pytest.param(*one, id=f"{one[0]}-{one[1].name}-{str(one[2]).removeprefix('torch.')}")
        for one in kernels.calls()
        if is_quick(*one) == quick
    ]


def hold(op: str, case: Case, dtype: torch.dtype, settings: Settings | None = None) -> Device:
    with executed(Device(settings or Settings())) as device:
        assert_parity(op, case, dtype, "triton")
    return device


def test_every_name_of_the_quick_cases_is_there():
    for op, names in QUICK.items():
        for name in names:
            cases = [c for c in CASES[op] if c.name == name or c.name.startswith(f"{name}_")]
            assert cases, f"{op} {name}"


@pytest.mark.parametrize(("op", "case", "dtype"), chosen(True))
def test_parity(op, case, dtype):
    hold(op, case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "case", "dtype"), chosen(False))
def test_parity_of_every_case(op, case, dtype):
    hold(op, case, dtype)


# Cases by which each kernel of an op is launched.
WHOLE = {
    "rms_norm": ("many_short_rows",), "add_rms_norm": ("width_7",), "swiglu": ("width_1",),
    "qk_norm_rope": ("many_tokens",), "attention": ("long_token",),
    "linear": ("packed12_rows_2", "packed12_gradient_rows_17"),
    "linear_cross_entropy": ("vocabulary_17",),
}  # fmt: skip


def test_every_kernel_there_is_is_launched():
    with executed(Device(Settings(races=False))) as device:
        for op, names in WHOLE.items():
            for case in (c for c in CASES[op] if c.name in names):
                expected = Expected(op, case, torch.bfloat16)
                expected.run(partial(getattr(elmkernels, op), backend="triton"))
        launched = {tuple(done.kernel.split(".")) for done in device.launches}
    assert launched == kernels.launched()
    assert set(WHOLE) == set(QUICK) == set(kernels.ops())
    for op, names in kernels.LEFT.items():
        assert set(names) <= {c.name for c in CASES[op]}, "left out, but no case"


@pytest.mark.parametrize("op", QUICK)
def test_parity_with_approximations_as_far_off_as_is_stated(op):
    case = next(c for c in CASES[op] if c.name.startswith(QUICK[op][0]))
    hold(op, case, torch.bfloat16, Settings(share=1.0))


# Cases of several programs, of ops that sum over them or split their work in another way.
SHARED = {
    "rms_norm": "parts_of_1280", "add_rms_norm": "many_rows", "qk_norm_rope": "270M_12_3_heads",
    "swiglu": "270M", "attention": "long_token", "linear": "packed12_residual_rows_2",
    "linear_cross_entropy": "vocabulary_17",
}  # fmt: skip


@pytest.mark.parametrize("order", ["backward", "shuffled"])
@pytest.mark.parametrize("op", SHARED)
def test_blocks_in_any_order_and_company_give_the_same_bits(op, order):
    case = next(c for c in CASES[op] if c.name.startswith(SHARED[op]))

    def gradients(settings: Settings) -> list[torch.Tensor]:
        expected = Expected(op, case, torch.bfloat16)
        with executed(Device(settings)):
            return [*expected.run(partial(getattr(elmkernels, op), backend="triton")).values()]

    first = gradients(Settings())
    second = gradients(Settings(order=order, lanes=256))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_launches_are_those_of_the_launchers():
    """Of few rows a single program stores the weight's gradient; of more each leaves a part."""
    for name, more in (("270M_hidden", []), ("parts_of_1280", ["common._sum_partials"])):
        case = next(c for c in CASES["rms_norm"] if c.name == name)
        device = hold("rms_norm", case, torch.bfloat16)
        assert [e.kernel for e in device.launches] == ["rms_norm._fwd", "rms_norm._bwd", *more]


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

"""Compiled kernels with one thing changed, each of which a checker or parity must find."""

import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing while it interprets", allow_module_level=True)

from elmkernels.testing import CASES  # noqa: E402
from elmkernels.testing.parity import ParityError, assert_parity  # noqa: E402
from elmkernels.testing.ptx import Device, Fault, executed  # noqa: E402

BF16, FP32 = torch.bfloat16, torch.float32
# name: (op, the beginning of a case's name, dtype, what is changed, into what, which of its
# occurrences, what is found).
MUTATIONS = {
    "dropped barrier": ("rms_norm", "270M_hidden", BF16, r"bar\.sync\s+0;", "", 0, "race"),
    "dropped barrier of the second sum": (
        "rms_norm", "270M_hidden", BF16, r"bar\.sync\s+0;", "", 1, "race",
    ),
    "dropped barrier of the heads": ("add_rms_norm", "3B", FP32, r"bar\.sync\s+0;", "", 0, "race"),
    "truncated rounding": (
        "rms_norm", "1_1B", BF16, r"cvt\.rn\.bf16\.f32", "cvt.rz.bf16.f32", None, "parity",
    ),
    "truncated pairs": (
        "swiglu", "270M", BF16, r"cvt\.rn\.bf16", "cvt.rz.bf16", None, "parity",
    ),
    "off by one in a mask of rows": (
        "rms_norm", "width_33", BF16, r"setp\.lt\.s64", "setp.le.s64", None, "bounds",
    ),
    "off by one in a mask of columns": (
        "swiglu", "width_1", FP32, r"setp\.lt\.s32", "setp.le.s32", None, "bounds",
    ),
    "a store without its mask": (
        "swiglu", "width_1", FP32, r"@%p\d+ (st\.global)", r"\1", 0, "bounds",
    ),
    "a load without its mask": (
        "swiglu", "width_1", FP32, r"@%p\d+ (ld\.global)", r"\1", 0, "bounds",
    ),
    "a wrong stride of x": ("rms_norm", "270M_hidden", BF16, r"mul\.lo\.s64", "add.s64", 0, None),
    "another lane": ("rms_norm", "270M_hidden", BF16, r", 16, 31, -1", ", 8, 31, -1", 0, None),
    "a sum of half a warp": (
        "add_rms_norm", "270M_hidden", FP32, r", 16, 31, -1", ", 0, 31, -1", 0, None,
    ),
    "rows nearer together": (
        "rms_norm", "1_1B", FP32, r"shl\.b64 (.*), 4;", r"shl.b64 \1, 3;", 0, None,
    ),
    "a load one vector further": (
        "rms_norm", "270M_hidden", BF16, r"(ld\.global\.v4.*\[ %rd\d+ )\+ 0", r"\1+ 16", 0, None,
    ),
    "a load that is not aligned": (
        "rms_norm", "270M_hidden", BF16, r"(ld\.global\.v4.*\[ %rd\d+ )\+ 0", r"\1+ 8", 0,
        "alignment",
    ),
    "a store one vector further": (
        "rms_norm", "270M_hidden", BF16, r"(st\.global\.v4.*\[ %rd\d+ )\+ 0", r"\1+ 16", 0, None,
    ),
    "the root of the reciprocal": (
        "rms_norm", "270M_hidden", FP32, r"rsqrt\.approx", "sqrt.approx", None, "parity",
    ),
    "a sum that becomes a difference": (
        "add_rms_norm", "270M_hidden", FP32, r"add\.rn\.f32", "sub.rn.f32", 0, "parity",
    ),
    "an exponential of the other sign": (
        "swiglu", "270M", FP32, r"ex2\.approx(\S*) *\t*(%r\d+), (%r\d+);",
        r"neg.f32 \3, \3; ex2.approx\1 \2, \3;", 0, "parity",
    ),
    "an angle of the other sign": (
        "qk_norm_rope", "270M_12_3", FP32, r"neg\.f32", "abs.f32", None, "parity",
    ),
    "a store that is left out": (
        "qk_norm_rope", "270M_12_3", BF16, r"@%p\d+ st\.global[^;]*;", "", 0, "parity",
    ),
    "a partial sum of another warp": (
        "rms_norm", "270M_hidden", FP32, r"(ld\.shared\.b32\s+%r\d+, \[%r\d+)\]", r"\1+4]", 0, None,
    ),
    "what isn't loaded isn't zero": (
        "rms_norm", "width_33", FP32, r"mov\.b32 \t*(%r\d+), 0;", r"mov.b32 \1, 0f3F800000;", 0,
        "parity",
    ),
    "shared memory past its end": (
        "rms_norm", "270M_hidden", BF16, r"st\.shared\.b32 (\t*)\[(%r\d+)\]",
        r"st.shared.b32 \1[\2+65536]", 0, "bounds",
    ),
    "shared memory that nobody wrote": (
        "rms_norm", "270M_hidden", BF16, r"(@%p\d+ )?st\.shared[^;]*;", "", 0, "uninitialized",
    ),
    "a copy that nothing waits for": (
        "attention", "chunk", BF16, r"cp\.async\.wait_group[^;]*;", "", 0, "uninitialized",
    ),
    "a dropped barrier of tiles": ("attention", "chunk", BF16, r"bar\.sync\s+0;", "", 3, "race"),
    "a matrix that isn't transposed": (
        "attention", "chunk", BF16, r"\.trans\.shared", ".shared", 0, "parity",
    ),
    "a weight of the other sign": (
        "attention", "chunk", BF16, r"ex2\.approx\.ftz\.f32 *\t*(%r\d+), (%r\d+);",
        r"neg.f32 \2, \2; ex2.approx.ftz.f32 \1, \2;", 0, "parity",
    ),
    "an edge of keys one further": (
        "attention", "chunk", BF16, r"setp\.lt\.s32", "setp.le.s32", None, None,
    ),
    "a row of a weight too many": (
        "linear", "affine4_32_rows_5", BF16, r"setp\.lt\.s32", "setp.le.s32", 0, "bounds",
    ),
    "lanes of a sum that disagree": (
        "linear", "plain_rows_3", BF16, r", 16, 31, -1", ", 8, 31, -1", 0, "race",
    ),
    "escapes that don't wait": (
        "linear", "packed12_many_escapes_rows_12", BF16, r"bar\.sync\s+0;", "", None, "race",
    ),
    "a loss of one column more": (
        "linear_cross_entropy", "vocabulary_17", FP32, r"setp\.lt\.s32", "setp.le.s32", None, None,
    ),
    "a dropped barrier of a loss": (
        "linear_cross_entropy", "vocabulary_17", FP32, r"bar\.sync\s+0;", "", 0, "race",
    ),
    "parts of a gradient that lie elsewhere": (
        "rms_norm", "parts_of_1280", FP32, r"mul\.lo\.s64", "add.s64", None, "alignment",
    ),
}  # fmt: skip


def change(text: str, old: str, new: str, which: int | None) -> str:
    """A PTX text with the occurrences of a pattern, or one of them, replaced."""
    found = list(re.finditer(old, text))
    if which is None:
        return re.sub(old, new, text)
    if which >= len(found):
        return text
    match = found[which]
    return text[: match.start()] + match.expand(new) + text[match.end() :]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_found(name):
    op, case, dtype, old, new, which, kind = MUTATIONS[name]
    case = next(c for c in CASES[op] if c.name.startswith(case))
    changed = []

    def rewrite(text: str) -> str:
        again = change(text, old, new, which)
        changed.append(again != text)
        return again

    with executed(Device(rewrite=rewrite)), pytest.raises((Fault, ParityError)) as found:
        assert_parity(op, case, dtype, "triton")
    assert any(changed), "nothing was changed"
    if kind is not None:
        assert getattr(found.value, "kind", "parity") == kind, found.value

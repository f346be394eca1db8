"""nvcc's kernels with one thing changed, and their launches, each of which a checker or parity must
find.
"""

import re

import pytest
import torch
from helpers.decode_simulation import assert_parity as assert_step
from helpers.decode_simulation import decoding
from helpers.nvcc.gpu import Gpu, executed, parts_of

import elmkernels
from elmkernels.testing import CASES
from elmkernels.testing.parity import ParityError, assert_parity
from elmkernels.testing.ptx import Fault, Settings

BF16, FP32 = torch.bfloat16, torch.float32
SMALL = {
    "model_dim": 64, "head_dim": 32, "heads": ((2, 1),), "ffn_dims": (64,), "vocab_size": 37,
}  # fmt: skip
RELEASE, ACQUIRE = r"red\.release\.gpu\.global", r"ld\.acquire\.gpu\.global\.u32"
# name: (what is changed in decode_step, into what, which of its occurrences, what is found).
STEPS = {
    "a barrier that nobody waits at": (
        ACQUIRE + r" (%r\d+), \[%rd\d+\]", r"mov.u32 \1, -1", None, "race or uninitialized",
    ),
    "a barrier without an acquire or a fence": (
        ACQUIRE + r"|membar\.gl;",
        lambda m: "" if m[0] == "membar.gl;" else "ld.relaxed.gpu.global.u32", None, "race",
    ),
    "an arrival without a release or a fence": (
        RELEASE + r"|membar\.gl;",
        lambda m: "" if m[0] == "membar.gl;" else "red.relaxed.gpu.global", None, "race",
    ),
    "an arrival that counts for a block alone": (RELEASE, "red.release.cta.global", None, "race"),
    "an arrival that is left out": (RELEASE + r"[^;]*;", "", None, "barrier"),
    "a dropped barrier of a block": (r"bar\.sync\s+0;", "", 2, None),
    "the last barrier of a block dropped": (r"bar\.sync\s+0;", "", -1, None),
    "another block's results by the way for constants": (
        r"ld\.global\.cg\.", "ld.global.nc.", None, "race",
    ),
    "the last item of a head without fences": (r"membar\.gl;", "", None, "race"),
    "a row of weights further": (
        r"(ld\.global\.nc\.L1::no_allocate\.L2::128B\.v4\.u32 \{[^}]*\}, \[%rd\d+)\]", r"\1+128]",
        None, None,
    ),
    "truncated rounding": (r"cvt\.rn\.bf16\.f32", "cvt.rz.bf16.f32", None, "parity"),
}  # fmt: skip
# name: (op, the beginning of a case's name, dtype, ...).
ROWS = {
    "a dropped barrier of the rows": (
        "rms_norm", "270M_hidden", BF16, r"bar\.sync\s+0;", "", 0, "race",
    ),
    "a stride that is added": (
        "rms_norm", "row_slices", BF16, r"mul\.lo\.s64", "add.s64", None, None,
    ),
    "columns one too many": (
        "rms_norm", "width_33", FP32, r"setp\.lt\.s64", "setp.le.s64", None, None,
    ),
    "sums of a warp that stay apart": (
        "add_rms_norm", "270M_hidden", FP32,
        r"shfl\.sync\.bfly\.b32\s+(%r\d+)\|%p\d+, (%r\d+),[^;]*;", r"mov.b32 \1, \2;", None, None,
    ),
    "truncated rows": (
        "add_rms_norm", "450M_hidden", BF16, r"cvt\.rn\.bf16\.f32", "cvt.rz.bf16.f32", None,
        "parity",
    ),
    "an angle of the other sign": (
        "qk_norm_rope", "270M_12_3", FP32, r"sub\.f32", "add.f32", None, "parity",
    ),
    "a head that is not stored": (
        "qk_norm_rope", "270M_12_3", BF16, r"st\.global[^;]*;", "", 0, None,
    ),
}  # fmt: skip


def change(text: str, old: str, new, which: int | None) -> str:
    found = list(re.finditer(old, text))
    if which is None:
        return re.sub(old, new, text)
    match = found[which]
    return text[: match.start()] + match.expand(new) + text[match.end() :]


def changing(old: str, new, which: int | None):
    changed = []

    def rewrite(text: str) -> str:
        again = change(text, old, new, which) if re.search(old, text) else text
        changed.append(again != text)
        return again

    return rewrite, changed


def caught(found, kind: str | None) -> None:
    if kind is not None:
        assert getattr(found.value, "kind", "parity") in kind.split(" or "), found.value


@pytest.mark.parametrize("name", ROWS)
def test_a_mutation_of_a_row_kernel_is_found(compiled, name):
    op, case, dtype, old, new, which, kind = ROWS[name]
    case = next(c for c in CASES[op] if c.name.startswith(case))
    rewrite, changed = changing(old, new, which)
    with (
        executed(Gpu(compiled, rewrite=rewrite)),
        pytest.raises((Fault, ParityError)) as found,
    ):
        assert_parity(op, case, dtype, "cuda")
    assert any(changed), "nothing was changed"
    caught(found, kind)


def steps() -> list:
    """Two of them, the slow test has the others."""
    quick = ("a barrier without an acquire or a fence", "an arrival that is left out")
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in STEPS]


@pytest.mark.parametrize("name", steps())
def test_a_mutation_of_decode_step_is_found(compiled, name):
    old, new, which, kind = STEPS[name]
    rewrite, changed = changing(old, new, which)
    weights, *call = decoding("plain", BF16, (70, 3), **SMALL)
    gpu = Gpu(compiled, Settings(), rewrite=rewrite, known=parts_of(weights))

    def step(*args, **kwargs):
        with executed(gpu), torch.no_grad():
            return elmkernels.decode_step(*args, **kwargs, backend="cuda")

    with pytest.raises((Fault, AssertionError)) as found:
        assert_step(step, weights, *call)
    assert any(changed), "nothing was changed"
    caught(found, kind)


def test_a_block_fewer_is_found(compiled):
    case = next(c for c in CASES["rms_norm"] if c.name == "270M_hidden")
    with (
        executed(Gpu(compiled, fewer=(1, 0, 0))),
        pytest.raises(Fault, match="uninitialized: .* nothing has written"),
    ):
        assert_parity("rms_norm", case, BF16, "cuda")


def test_less_shared_memory_is_found(compiled):
    weights, *call = decoding("plain", BF16, (70, 3), **SMALL)
    gpu = Gpu(compiled, fewer=(0, 0, 4096), known=parts_of(weights))
    with executed(gpu), torch.no_grad(), pytest.raises(Fault, match="bounds: .* shared memory"):
        step = elmkernels.decode_step
        step(weights, call[0], call[1], call[2], backend="cuda")

"""Attention's Triton kernels, compiled ahead of time for four GPUs, which needs none of them.

Each as its launcher compiles it for OpenELM's heads, held to what can be seen without running it:
no register spills, shared memory that the architecture has, 16-byte loads, and nothing compiled
again for another length or stride.
"""

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing while it interprets", allow_module_level=True)

from helpers.compiling import TARGETS, compile_for, in_lanes, need_cuobjdump, spills  # noqa: E402

from elmkernels.openelm.config import VARIANTS, OpenELMConfig  # noqa: E402
from elmkernels.triton import _attention_bwd as bwd  # noqa: E402
from elmkernels.triton import attention as fwd  # noqa: E402
from elmkernels.triton._attention_tiles import plan  # noqa: E402

KERNELS = (fwd._fwd, fwd._combine, bwd._bwd_q, bwd._bwd_k)
TABLES = (fwd.FORWARD, bwd.BACKWARD_Q, bwd.BACKWARD_K)
TOKEN, FEW, MANY = 4, 64, 1 << 14
GROUP = 4
# Of what a program may have; sm_100 has more, but its rows serve consumer cards too, which have 99.
SHARED_KB = {"sm_80": 99, "sm_90": 227, "sm_100": 99, "gfx942": 64}
TENSORS = {
    "*i64": {"offsets", "cu_seqlens"},
    "*u8": {"key_mask"},
    "*fp32": {"lse", "delta", "partial", "levels"},
    None: {"q", "k", "v", "out", "dout", "dq", "dk", "dv"},  # the inputs' own dtype
}
PLAIN = {"key_mask": None, "offsets": None, "cu_seqlens": None}
PADDED = {"cu_seqlens": None}
DOCUMENTS = {"key_mask": None, "offsets": None}


class Build(NamedTuple):
    """One compilation of a kernel for tensors of one dtype."""

    kernel: object
    dtype: str
    constants: dict
    options: dict

    def compile(self, arch: str):
        signature = {}
        for name in self.kernel.arg_names:
            kind = next((t for t, names in TENSORS.items() if name in names), "i32")
            if name in self.constants:
                kind = "constexpr"
            elif name in ("c", "scale"):
                kind = "fp32"
            elif kind is None or name == "partial":
                split = self.constants.get("SPLIT") and name == "out"
                kind = "*fp32" if split or name == "partial" else f"*{self.dtype}"
            signature[name] = kind
        return compile_for(arch, self.kernel, signature, self.constants, **self.options)


def build(kernel, tables, arch, dtype, head_dim, rows, sight=PLAIN, **extra) -> Build:
    size = 4 if dtype == "fp32" else 2
    sizes, block = plan(tables[size], head_dim, rows, arch)
    constants = {**sizes, **sight, **extra, "GROUP": GROUP, "VEC": 16 // size}
    return Build(kernel, dtype, constants, {"num_warps": block.warps, "num_stages": block.stages})


def builds(arch: str, dtype: str, head_dim: int) -> Iterator[Build]:
    """What the launchers compile for OpenELM, in training and in generation."""

    def forward(rows, sight=PLAIN, split=False):
        return build(fwd._fwd, fwd.FORWARD, arch, dtype, head_dim, rows, sight, SPLIT=split)

    def backward(sight):
        for kernel, tables in ((bwd._bwd_q, bwd.BACKWARD_Q), (bwd._bwd_k, bwd.BACKWARD_K)):
            yield build(kernel, tables, arch, dtype, head_dim, MANY, sight)

    yield forward(MANY)
    yield from backward(PLAIN)
    if dtype == "fp32":
        return
    yield forward(TOKEN, split=True)
    if head_dim != 64:
        return
    yield forward(FEW)
    yield forward(MANY, PADDED)
    yield forward(MANY, DOCUMENTS)
    yield from backward(PADDED)
    yield from backward(DOCUMENTS)
    combine = {"HEAD_DIM": head_dim, "BLOCK_D": head_dim, "ROWS": fwd.COMBINED_ROWS}
    yield Build(fwd._combine, dtype, combine, {"num_warps": 4})


# float16 takes the same path as bfloat16; one target shows that it compiles.
RUNS = [
    (arch, dtype, head_dim)
    for arch in TARGETS
    for head_dim in (64, 128)
    for dtype in ("bf16", "fp32", *(["fp16"] if (arch, head_dim) == ("sm_90", 128) else []))
]


def test_the_heads_of_openelm_are_those_compiled_here():
    models = [OpenELMConfig.from_name(name) for name in VARIANTS]
    assert {c.head_dim for c in models} <= {64, 128}
    pairs = ((c.num_query_heads, c.num_kv_heads) for c in models)
    assert {q // kv for qs, kvs in pairs for q, kv in zip(qs, kvs, strict=True)} == {GROUP}


@pytest.mark.parametrize(("arch", "dtype", "head_dim"), RUNS)
def test_compiles_without_spills(arch, dtype, head_dim, tmp_path):
    need_cuobjdump(arch)
    failures = []
    for each in builds(arch, dtype, head_dim):
        compiled = each.compile(arch)
        found = spills(compiled, arch, tmp_path)
        if arch == "gfx942" and "key_mask" not in each.constants and in_lanes(compiled):
            found = None  # the many predicates of padding
        if found is None and compiled.metadata.shared > SHARED_KB[arch] * 1024:
            found = f"{compiled.metadata.shared} bytes of shared memory"
        if found is not None:
            failures.append(f"{each}: {found}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("head_dim", [1, 20, 80, 256])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_other_head_dims_compile(dtype, head_dim):
    vec = 1 if head_dim == 1 else 4
    for kernel, tables in zip((fwd._fwd, bwd._bwd_q, bwd._bwd_k), TABLES, strict=True):
        extra = {"SPLIT": False} if kernel is fwd._fwd else {}
        each = build(kernel, tables, "sm_80", dtype, head_dim, MANY, **extra)
        each.constants.update(VEC=vec, GROUP=3)
        assert each.compile("sm_80").metadata.shared <= 99 * 1024


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.__name__)
def test_nothing_is_compiled_again_for_another_length_or_stride(kernel):
    tensors = set().union(*TENSORS.values())
    constants = {"SPLIT", "GROUP", "VEC", "HEAD_DIM", "BLOCK_D", "BLOCK_M", "BLOCK_N", "ROWS"}
    for parameter in kernel.params:
        if parameter.is_constexpr:
            assert parameter.name in constants
        elif parameter.name not in tensors:
            assert parameter.do_not_specialize, parameter.name


def test_rows_are_loaded_in_16_bytes():
    """Though the compiler knows no stride: they come in units of 16 bytes."""
    for each in builds("sm_90", "bf16", 64):
        ptx = each.compile("sm_90").asm["ptx"]
        copied = set(re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x\w+|\d+)[,;]", ptx))
        if each.kernel in (fwd._fwd, bwd._bwd_q):  # keys and values, in flight over the loop
            assert "0x10" in copied, each
        if each.kernel is not fwd._combine:
            assert re.search(r"ld\.global\S*\.v4\.b32", ptx), each
        assert not re.search(r"ld\.global\S*\.b16", ptx), f"two bytes at a time: {each}"


def test_every_architecture_has_a_configuration_for_every_size():
    for tables in TABLES:
        for size, table in tables.items():
            for arch in TARGETS:
                for head_dim in (1, 16, 17, 64, 128, 256):
                    for rows in (1, 16, 17, 64, 65, 1 << 31):
                        sizes, block = plan(table, head_dim, rows, arch)
                        assert sizes["BLOCK_D"] >= head_dim
                        assert block.measured.startswith(("reasoned: ", "compiled: "))
                        for each in (sizes["BLOCK_D"], block.tile, block.keys):
                            assert each >= 16 and each & (each - 1) == 0
            assert all(b in {16, 32, 64, 128} for b in (r.tile for r in table)), size

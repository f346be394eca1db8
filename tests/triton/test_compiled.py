"""Every Triton kernel, compiled ahead of time for four GPUs, which needs none of them.

Each is compiled as its launcher would for OpenELM's layers, and held to what can be seen without
running it: no register spills, little shared memory, 16-byte loads, and nothing compiled again
for another layer's width.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing while it interprets", allow_module_level=True)

from helpers.compiling import TARGETS, compile_for, need_cuobjdump, spills  # noqa: E402

from elmkernels.openelm.config import VARIANTS, OpenELMConfig  # noqa: E402
from elmkernels.triton import (  # noqa: E402
    add_rms_norm,
    common,
    linear_cross_entropy,
    qk_norm_rope,
    rms_norm,
    swiglu,
)

MODELS = [OpenELMConfig.from_name(name) for name in VARIANTS]
FEW, MANY = 8, 1 << 16
SHARED_LIMIT = 32 * 1024

PARTIAL = ("partial", "dq_partial", "dk_partial")
FP32 = (*PARTIAL, "table", "dloss", "losses")
INT64 = ("positions", "slots", "targets")
FLOATS = ("eps", "z_loss", "smoothing")
KERNELS = {
    "rms_norm": (rms_norm._fwd, rms_norm._bwd, common._sum_partials),
    "add_rms_norm": (add_rms_norm._fwd,),
    "swiglu": (swiglu._fwd, swiglu._bwd),
    "qk_norm_rope": (qk_norm_rope._fwd, qk_norm_rope._bwd),
    "linear_cross_entropy": (linear_cross_entropy._rows,),
}
UNFUSED = (rms_norm._fwd, rms_norm._bwd, add_rms_norm._fwd)
INTEGERS = re.compile(
    r"rows|n|d[12]|[abcpsx][012]|k[012]|v[012]|heads|length|[qk]v?_heads|table_length|max_length"
    r"|programs|ignore_index"
)


@dataclass(frozen=True)
class Build:
    """One compilation: a kernel, its constants, and the types of its tensors. `alone`: as a single
    program, which stores the weight's gradient where several would leave parts of it."""

    kernel: object
    constants: tuple[tuple[str, object], ...]
    warps: int
    dtype: str
    weight: str
    alone: bool = False

    def signature(self) -> dict[str, str]:
        constants, found = dict(self.constants), {}
        for name in self.kernel.arg_names:
            if name in constants:
                found[name] = "constexpr"
            elif INTEGERS.fullmatch(name) and name not in ("k", "v"):
                found[name] = "i32"
            elif name in FLOATS:
                found[name] = "fp32"
            elif name in FP32 and not (self.alone and name in PARTIAL):
                found[name] = "*fp32"
            elif name in INT64:
                found[name] = "*i64"
            else:
                of_weight = "weight" in name or name in PARTIAL
                found[name] = "*" + (self.weight if of_weight else self.dtype)
        return found

    def compile(self, arch: str):
        options = {"num_warps": self.warps}
        if self.kernel in UNFUSED:
            options["enable_fp_fusion"] = False
        constants = dict(self.constants)
        return compile_for(arch, self.kernel, self.signature(), constants, **options)


def _norms(op: str, arch: str, vec: int) -> Iterator[tuple]:
    widths = sorted({c.model_dim for c in MODELS} | {c.head_dim for c in MODELS})
    for n in widths:
        for rows in (FEW, MANY):
            table = rms_norm.FORWARD if op == "rms_norm" else add_rms_norm.FORWARD
            constants, tile = rms_norm.plan(table, n, rows, arch)
            kernel = rms_norm._fwd if op == "rms_norm" else add_rms_norm._fwd
            yield kernel, {**constants, "VEC": vec, "RANK": 1}, tile.warps
            if op == "rms_norm":
                constants, tile = rms_norm.plan(rms_norm.BACKWARD, n, rows, arch)
                for extra in (False, True):
                    all_constants = {**constants, "VEC": vec, "RANK": 1, "EXTRA": extra}
                    yield rms_norm._bwd, all_constants, tile.warps
    # The awkward ones: a loop over a very wide row, a ragged tail, a slice of the fused projection.
    if op == "rms_norm":
        for n, size, rank in ((12289, 1, 1), (1000, vec, 1), (64, vec, 3)):
            constants, tile = rms_norm.plan(rms_norm.FORWARD, n, MANY, arch)
            yield rms_norm._fwd, {**constants, "VEC": size, "RANK": rank}, tile.warps
        constants, tile = rms_norm.plan(rms_norm.BACKWARD, 12289, MANY, arch)
        yield rms_norm._bwd, {**constants, "VEC": 1, "RANK": 1, "EXTRA": True}, tile.warps
        yield common._sum_partials, common.SUM_BLOCKS, 4


def _swiglu(arch: str, vec: int) -> Iterator[tuple]:
    for n in sorted({n for c in MODELS for n in c.ffn_dims}):
        for rows in (FEW, MANY):
            for kernel, table in ((swiglu._fwd, swiglu.FORWARD), (swiglu._bwd, swiglu.BACKWARD)):
                constants, tile = swiglu.plan(table, n, rows, arch)
                yield kernel, {**constants, "VEC": vec, "RANK": 1}, tile.warps


def _qk_norm_rope(arch: str, vec: int) -> Iterator[tuple]:
    module = qk_norm_rope
    without = {"q_weight": None, "k_weight": None, "NORM": False}
    layers = {(c.head_dim, q) for c in MODELS for q in c.num_query_heads}
    for head_dim, q_heads in sorted(layers):
        for tokens in (1, MANY):
            rows = tokens * q_heads * 5 // 4
            constants, tile = module.plan(module.FORWARD, head_dim, rows, arch)
            plain = {**constants, "slots": None, "v": None, "CACHE": False, "VEC": vec}
            yield module._fwd, {**plain, "NORM": True}, tile.warps
            cached = {**constants, "CACHE": True, "VEC": vec, "NORM": True}
            yield module._fwd, cached, tile.warps
            if tokens > 1:
                yield module._fwd, {**plain, **without}, tile.warps
            constants, tile = module.plan(module.BACKWARD, head_dim, rows, arch)
            yield module._bwd, {**constants, "VEC": vec, "NORM": True}, tile.warps
            no_sums = {"dq_partial": None, "dk_partial": None}
            bare = {**constants, **without, **no_sums, "VEC": vec}
            yield module._bwd, bare, tile.warps


def _linear_cross_entropy(arch: str, vec: int) -> Iterator[tuple]:
    for n, size in ((32000, vec), (32128, vec), (257, 1)):
        constants, tile = linear_cross_entropy.plan(n, MANY, arch)
        for grad, given in ((False, False), (True, False), (True, True)):
            for smooth in (False, True):
                found = {**constants, "VEC": size, "GRAD": grad, "GIVEN": given, "SMOOTH": smooth}
                found |= {} if given else {"dloss": None}
                yield linear_cross_entropy._rows, found, tile.warps


def builds(op: str, arch: str) -> list[Build]:
    """What the launchers of an op compile for all layers of all the models, each once."""
    # float16 takes the same path as bfloat16; one target shows that it compiles.
    types = [("bf16", "bf16"), ("fp32", "fp32"), *([("fp16", "fp16")] if arch == "sm_90" else [])]
    if op not in ("swiglu", "linear_cross_entropy") and arch == "sm_90":
        types.append(("bf16", "fp32"))
    found = {}
    for dtype, weight in types:
        vec = 4 if dtype == "fp32" else 8
        rows = {
            "swiglu": lambda v: _swiglu(arch, v),
            "qk_norm_rope": lambda v: _qk_norm_rope(arch, v),
            "linear_cross_entropy": lambda v: _linear_cross_entropy(arch, v),
        }.get(op, lambda v: _norms(op, arch, v))(vec)
        for kernel, constants, warps in rows:
            key = tuple(sorted(constants.items()))
            found[Build(kernel, key, warps, dtype, weight)] = None
            adds = set(kernel.arg_names) & set(PARTIAL) and kernel is not common._sum_partials
            if adds and arch == "sm_80":
                found[Build(kernel, key, warps, dtype, weight, alone=weight != "fp32")] = None
    return list(found)


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("op", KERNELS)
def test_compiles_without_spills(op, arch, tmp_path):
    need_cuobjdump(arch)
    failures = []
    kernels = set()
    for build in builds(op, arch):
        compiled = build.compile(arch)
        kernels.add(build.kernel)
        found = spills(compiled, arch, tmp_path)
        if found is None and compiled.metadata.shared > SHARED_LIMIT:
            found = f"{compiled.metadata.shared} bytes of shared memory"
        if found is not None:
            failures.append(f"{build}: {found}")
    assert kernels == set(KERNELS[op])
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("op", KERNELS)
def test_nothing_is_compiled_again_for_another_width(op):
    """No size or stride is specialized on, and layers share their constants."""
    for kernel in KERNELS[op]:
        for parameter in kernel.params:
            if not parameter.is_constexpr and INTEGERS.fullmatch(parameter.name):
                if parameter.name not in ("k", "v"):
                    assert parameter.do_not_specialize, f"{kernel.__name__} {parameter.name}"


def test_swiglu_compiles_twice_for_all_the_models():
    for kernel in KERNELS["swiglu"]:
        ours = [b for b in builds("swiglu", "sm_90") if b.kernel is kernel and b.dtype == "bf16"]
        assert len(ours) == 2, "one for few rows, one for many"


@pytest.mark.parametrize("op", KERNELS)
def test_hidden_rows_are_loaded_in_16_bytes(op):
    """Though the compiler knows no stride: they come in units of 16 bytes."""
    for build in builds(op, "sm_90"):
        constants = dict(build.constants)
        if build.kernel is common._sum_partials or constants["VEC"] == 1:
            continue
        if "HEAD" in constants and constants["HEAD"] // (32 * build.warps) < constants["VEC"]:
            continue  # fewer columns than threads can take 16 bytes of
        ptx = build.compile("sm_90").asm["ptx"]
        assert re.search(r"ld\.global\S*\.v4\.b32", ptx), build


def test_every_architecture_has_a_configuration_for_every_size():
    tables = (
        rms_norm.FORWARD, rms_norm.BACKWARD, add_rms_norm.FORWARD,
        swiglu.FORWARD, swiglu.BACKWARD, qk_norm_rope.FORWARD, qk_norm_rope.BACKWARD,
        linear_cross_entropy.ROWS,
    )  # fmt: skip
    for table in tables:
        for arch in TARGETS:
            for width in (1, 64, 65, 1280, 3072, 5000, 1 << 20):
                for rows in (1, 513, 1 << 33):
                    tile = common.pick(table, arch, width, rows)
                    assert tile.measured and tile.tile & (tile.tile - 1) == 0


def test_without_a_row_there_is_an_error():
    with pytest.raises(ValueError, match="no configuration for sm_70"):
        common.pick(rms_norm.FORWARD, "sm_70", 1280, 1)


def test_importing_the_package_imports_no_triton():
    code = "import elmkernels, sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

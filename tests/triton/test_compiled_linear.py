"""linear's Triton kernels, compiled ahead of time for four GPUs, which needs none of them.

Each as its launcher compiles it for OpenELM's projections, held to what can be seen without running
it: no register spills, next to no shared memory, 16-byte loads of a plain weight, and nothing
compiled again for another width, stride or layer.
"""

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing while it interprets", allow_module_level=True)

from helpers.compiling import TARGETS, compile_for, in_lanes, need_cuobjdump, spills  # noqa: E402

from elmkernels.openelm.config import VARIANTS, OpenELMConfig  # noqa: E402
from elmkernels.triton import linear  # noqa: E402
from elmkernels.triton._linear_weights import PACKED, stored  # noqa: E402

MODELS = [OpenELMConfig.from_name(name) for name in VARIANTS]
FORMS = {"plain": 0, "affine8": 8, "affine4": 4, "packed12": PACKED.value}
WORDS = {"affine8": "i64", "affine4": "i32", "packed12": "i64"}
SIZES = {"rows", "n", "k", "x0", "w0", "r0", "begin"}
ESCAPES = {"exponents": "*u8", "starts": "*i32", "columns": "*i32", "values": "*bf16"}
AROUND = {"norm": None, "residual": None, "SWIGLU": False}
# What a layer calls it with: before qkv_proj, out_proj and proj_2, proj_1; and alone.
CALLS = {
    "qkv": {"norm": True},
    "out": {"residual": True},
    "proj_1": {"norm": True, "SWIGLU": True},
    "alone": {},
}
SHARED_LIMIT = 8 * 1024


class Build(NamedTuple):
    """One compilation of a kernel for activations of one dtype."""

    kernel: object
    dtype: str
    form: str
    constants: dict
    warps: int

    def compile(self, arch: str):
        signature = {}
        for name in self.kernel.arg_names:
            if name in self.constants:
                kind = "constexpr"
            elif name in SIZES:
                kind = "i32"
            elif name == "eps":
                kind = "fp32"
            elif name == "data" and self.form != "plain":
                kind = "*" + WORDS[self.form]
            else:
                kind = ESCAPES.get(name, "*" + self.dtype)
            signature[name] = kind
        options = {"num_warps": self.warps}
        if self.kernel is linear._dense:
            options["enable_fp_fusion"] = False
        return compile_for(arch, self.kernel, signature, self.constants, **options)


def build(kernel, table, arch, dtype, form, n, rows, vec=None, **extra) -> Build:
    size = 4 if dtype == "fp32" else 2
    constants, block = linear.plan(table, FORMS[form], size, n, rows, arch)
    affine = form.startswith("affine")
    constants = {**constants, "VEC": vec or 16 // size, "GROUP": 64 if affine else 0, **extra}
    if not affine:
        constants |= {"scales": None, "biases": None}
    if form != "packed12":
        constants |= dict.fromkeys(ESCAPES)
    return Build(kernel, dtype, form, constants, block.warps)


def product(arch, dtype, form, n, rows, call, vec=None) -> Build:
    extra = {**AROUND, "ROWS": rows}
    extra |= {"SWIGLU": True} if "SWIGLU" in CALLS[call] else {}
    for name in ("norm", "residual"):
        if name in CALLS[call]:
            del extra[name]
    return build(linear._product, linear.PRODUCT, arch, dtype, form, n, rows, vec, **extra)


def builds(arch: str, form: str) -> Iterator[Build]:
    """What decoding compiles: narrow and wide layers and the head, one row and eight."""
    for n, rows in ((2048, 1), (7168, 1), (32000, 1), (2048, 8)):
        yield product(arch, "bf16", form, n, rows, "qkv")
    for n, rows in ((3072, 1), (3072, 2), (3072, 4), (7168, 4), (3072, 8)):
        yield product(arch, "bf16", form, n, rows, "proj_1")
    yield product(arch, "bf16", form, 2048, 1, "out")
    yield product(arch, "bf16", form, 2048, 8, "out")
    if form != "packed12":
        yield product(arch, "fp32", form, 2048, 8, "qkv")
        yield build(linear._dense, linear.DENSE, arch, "fp32", form, 4096, 1)
    yield product(arch, "bf16", form, 1001, 8, "proj_1", vec=1)
    if form != "plain":
        yield build(linear._dense, linear.DENSE, arch, "bf16", form, 4096, 1)
    if arch == "sm_90" and form != "packed12":  # float16 takes the same path as bfloat16
        yield product(arch, "fp16", form, 3072, 4, "proj_1")


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_compiles_without_spills(form, arch, tmp_path):
    need_cuobjdump(arch)
    failures = []
    for each in builds(arch, form):
        compiled = each.compile(arch)
        found = spills(compiled, arch, tmp_path)
        if found is not None and arch == "gfx942" and form == "packed12" and in_lanes(compiled):
            found = None  # the many predicates of what is looked up and what has escaped
        if found is None and compiled.metadata.shared > SHARED_LIMIT:
            found = f"{compiled.metadata.shared} bytes of shared memory"
        if found is not None:
            failures.append(f"{each}: {found}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("kernel", [linear._product, linear._dense], ids=lambda k: k.__name__)
def test_nothing_is_compiled_again_for_another_width_or_stride(kernel):
    found = {p.name for p in kernel.params if p.do_not_specialize}
    assert found == {p.name for p in kernel.params if not p.is_constexpr} & SIZES


def constants_of(rows: int, size: int = 2) -> dict[str, set]:
    """Of each call, the constants that the layers of all the models are compiled for."""
    found: dict[str, set] = {}
    for config in MODELS:
        dim = config.model_dim
        for q, kv, ffn in zip(
            config.num_query_heads, config.num_kv_heads, config.ffn_dims, strict=True
        ):
            sizes = {"qkv": (q + 2 * kv) * config.head_dim, "out": dim, "proj_1": 2 * ffn,
                     "proj_2": dim}  # fmt: skip
            for call, n in sizes.items():
                plan, block = linear.plan(linear.PRODUCT, 0, size, n, rows, "sm_90")
                found.setdefault(call, set()).add((*plan.values(), block.warps))
    return found


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_the_layers_share_few_compilations(rows):
    """One for narrow weights and, where that makes a difference, one for wide ones."""
    found = constants_of(rows)
    assert all(len(each) <= 3 for each in found.values())
    assert sum(map(len, found.values())) <= 7


def test_sums_have_one_order_for_any_number_of_rows():
    for form, size in ((0, 2), (0, 4), (4, 2), (8, 2), (12, 2)):
        for arch in TARGETS:
            for n in (64, 2048, 4097, 32000):
                orders = set()
                for rows in range(1, 9):
                    plan, block = linear.plan(linear.PRODUCT, form, size, n, rows, arch)
                    orders.add((plan["UNITS"], plan["COLS"], block.warps))
                assert len(orders) == 1


def test_a_plain_weight_is_loaded_in_16_bytes_and_nothing_in_two():
    for rows in (1, 8):
        for call in CALLS:
            each = product("sm_90", "bf16", "plain", 2048, rows, call)
            ptx = each.compile("sm_90").asm["ptx"]
            # Each row of x and the weight's tile, this turn's and the next one's, at the least.
            least = rows + 2 * each.constants["BLOCK_N"]
            assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= least, each
            shorter = re.findall(r"ld\.global\S*\.b(?:16|32|64) ", ptx.replace(".v4.b32", ""))
            assert len(shorter) <= (call == "out"), f"the residual alone: {each}"


@pytest.mark.parametrize("form", ["affine8", "affine4", "packed12"])
def test_lanes_side_by_side_load_words_side_by_side_of_compressed_weights(form):
    """And none is exchanged for another lane's: shared memory holds the last sums alone."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("earlier versions pass the words through shared memory")
    each = product("sm_90", "bf16", form, 2048, 1, "alone")
    compiled = each.compile("sm_90")
    assert compiled.metadata.shared <= 4 * each.warps * each.constants["BLOCK_N"]
    lanes = r"blocked<{sizePerThread = \[1, 1\], threadsPerWarp = \[1, 32\], warpsPerCTA = \[1, 4\]"
    assert re.search(lanes, compiled.asm["ttgir"])


def test_every_architecture_has_a_configuration_for_every_size():
    for table in (linear.PRODUCT, linear.DENSE):
        for arch in TARGETS:
            for n in (1, 4096, 4097, 1 << 20):
                for rows in range(1, 9):
                    constants, block = linear.plan(table, 0, 2, n, rows, arch)
                    assert block.measured.startswith(("reasoned: ", "compiled: "))
                    assert constants["BLOCK_N"] & (constants["BLOCK_N"] - 1) == 0


@pytest.mark.parametrize("bits", [8, 4])
def test_words_that_are_not_aligned_are_copied(bits):
    memory = torch.arange(65, dtype=torch.int32).view(torch.uint32)
    q = memory[1:].view(4, 16)
    one = torch.ones(4, 1)
    found = stored((q, one, one, None, None, None, None, bits), 64, 1)
    assert found.tensors[0].data_ptr() % 8 == 0
    assert torch.equal(found.tensors[0].flatten().view(torch.int32), torch.arange(1, 65).int())

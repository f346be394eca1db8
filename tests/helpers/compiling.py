"""Compiling Triton kernels ahead of time for four GPUs, which needs none of them."""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_for(
    arch: str, kernel, signature: Mapping[str, str], constants: Mapping[str, object], **options
):
    """A kernel as its launcher compiles it, for tensors that begin at multiples of 16 bytes."""
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(kernel, dict(signature), dict(constants), aligned)
    return triton.compile(source, target=TARGETS[arch], options=options)


def spills(compiled, arch: str, folder: Path) -> str | None:
    """What a compiled kernel keeps in local memory for want of registers, or None."""
    if arch == "gfx942":
        counts = re.findall(r"\.[vs]gpr_spill_count: *(\d+)", compiled.asm["amdgcn"])
        assert counts, "the assembly states no spill counts"
        return None if set(counts) == {"0"} else f"spills {counts}"
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    shown = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    used = re.search(r"REG:\d+ STACK:(\d+).* LOCAL:(\d+)", shown)
    assert used, shown
    return None if used.groups() == ("0", "0") else used.group(0)


def in_lanes(compiled) -> bool:
    """Whether all that gfx942 spills are scalars, into lanes of vector registers: not to memory."""
    asm = compiled.asm["amdgcn"]
    return set(re.findall(r"(?:\.vgpr_spill_count|private_segment_fixed_size): *(\d+)", asm)) == {
        "0"
    }


def need_cuobjdump(arch: str) -> None:
    if arch != "gfx942" and not CUOBJDUMP.is_file():
        pytest.skip("this Triton comes without cuobjdump")

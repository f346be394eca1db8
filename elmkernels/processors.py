"""What the kind of processor decides, as tables: every row says what it was measured on.

A kind is what changes which routine is fast: tile instructions, bfloat16 products, wide vectors. It
is found once, at import, as dispatch only reads. A kind without a row of its own takes that of
KIND_MEASURED_MOST. `elmkernels info --tune` measures a machine against these rows, and says which
hold and which to add.

Not here: the matrix products' routines, which every process measures for itself
(`acceleration.routines`), and distances of prefetch, which are constants of each instruction set
(csrc/cpu).
"""

import platform
from typing import Any, NamedTuple

import torch

TILES, BF16, AVX512, AVX2, OTHER = "tiles", "avx512_bf16", "avx512", "avx2", "other"
# {kind: torch.cpu's function that knows}, the first that says so.
_PROBES = {
    TILES: "_is_amx_tile_supported",
    BF16: "_is_avx512_bf16_supported",
    AVX512: "_is_avx512_supported",
    AVX2: "_is_avx2_supported",
}
KIND_MEASURED_MOST = BF16


def _kind() -> str:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return OTHER
    return next((k for k, n in _PROBES.items() if getattr(torch.cpu, n, lambda: False)()), OTHER)


KIND = _kind()


class Row(NamedTuple):
    """choice: what is taken; where: what it was measured on, and what that gave."""

    choice: Any
    where: str


_ZEN4 = "AMD EPYC (Zen 4), 2 cores"
_XEON = "Intel Xeon with tiles (Emerald Rapids), 2 cores; figures not kept: run info --tune"
_FILE = " (benchmarks/results/attention-cpu)"

# The backend of attention over a prompt without masks, if none is named: OWN for the first of
# backends.PREFERENCE, or a name that goes before it.
OWN = "own kernels"
ATTENTION: dict[tuple[str, torch.dtype], Row] = {
    (TILES, torch.bfloat16): Row("sdpa", f"{_XEON}: torch's takes tiles, ours by default doesn't"),
    (TILES, torch.float32): Row(OWN, _XEON),
    (BF16, torch.bfloat16): Row(OWN, f"{_ZEN4}: 4.1 times as fast as torch's at 512 tokens{_FILE}"),
    (BF16, torch.float32): Row(OWN, f"{_ZEN4}: 2.3 times as fast as torch's at 512 tokens{_FILE}"),
}  # fmt: skip

# The most rows of a batch that are decoded in groups of those that `ops.decode_step` takes, if its
# projections have no prepacked copies: {kind, bits of the weights (0: plain), activations' dtype}.
# Two runs on a busy machine, whose figures were not kept.
_DECODED = f"{_ZEN4}, busy: OpenELM-270M, 16 to 64 rows after 128 tokens; run info --tune"
GROUPED: dict[tuple[str, int, torch.dtype], Row] = {
    (BF16, 0, torch.bfloat16): Row(16, _DECODED),
    (BF16, 12, torch.bfloat16): Row(24, _DECODED),
    (BF16, 8, torch.bfloat16): Row(24, _DECODED),
    (BF16, 4, torch.bfloat16): Row(48, _DECODED),
    (BF16, 0, torch.float32): Row(8, _DECODED),
}

# The most rows of a product with a plain weight that `linear`'s kernel multiplies inside vLLM; what
# has more rows is vLLM's own, prepacked: {kind, dtype}. No row: all is vLLM's. Four runs on a busy
# machine, whose figures were not kept; what the engine gains: benchmarks/results/vllm-270m-cpu.
SERVED: dict[tuple[str, torch.dtype], Row] = {
    (BF16, torch.bfloat16): Row(64, f"{_ZEN4}, busy: OpenELM-270M, 1 to 64 rows, against oneDNN's"),
}


def row(table: dict[Any, Row], *key: Any) -> Row | None:
    """The row of this kind of processor, or of the one that was measured most; None if neither has
    one.
    """
    return table.get((KIND, *key), table.get((KIND_MEASURED_MOST, *key)))

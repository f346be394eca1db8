"""ldmatrix and mma.sync: fragments as PTX lays them out, products as numpy makes them."""

import numpy as np
import pytest
import torch
from helpers.ptx import run

RNG = np.random.default_rng(1)
GROUP, WITHIN = np.arange(32) // 4, np.arange(32) % 4
HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}


def raw16(x: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Bits of 16, and the numbers they stand for."""
    t = torch.from_numpy(x).to(HALVES[kind])
    return t.view(torch.int16).numpy().view(np.uint16), t.double().numpy()


def packed(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


def c_fragments(c: np.ndarray) -> list[np.ndarray]:
    """c0 and c1 are of row group, c2 and c3 of row group + 8."""
    return [
        c[GROUP + 8 * (i // 2), 2 * WITHIN + i % 2].astype(np.float32).view(np.uint32)
        for i in range(4)
    ]


def product(kind: str, a: list, b: list, c: np.ndarray, k: int) -> np.ndarray:
    """What mma gives, put together from the fragments of the lanes."""
    count = len(a) + len(b)
    names = [f"%r{i}" for i in range(count + 4)]
    parts = [", ".join(names[i:j]) for i, j in ((0, len(a)), (len(a), count), (count, count + 4))]
    body = (
        f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 "
        f"{{%r20, %r21, %r22, %r23}}, {{{parts[0]}}}, {{{parts[1]}}}, {{{parts[2]}}};"
    )
    gives = ["%r20", "%r21", "%r22", "%r23"]
    got = run(body, *a, *b, *c_fragments(c), gives=gives).view(np.float32)
    found = np.full((16, 8), np.nan, np.float32)
    for i in range(4):
        found[GROUP + 8 * (i // 2), 2 * WITHIN + i % 2] = got[:, i]
    return found


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("k", [8, 16])
def test_mma_of_halves(kind, k):
    a, wide_a = raw16(RNG.standard_normal((16, k)), kind)
    b, wide_b = raw16(RNG.standard_normal((k, 8)), kind)
    c = RNG.standard_normal((16, 8)).astype(np.float32)
    row = [GROUP, GROUP + 8] * 2
    column = [2 * WITHIN] * 2 + [2 * WITHIN + 8] * 2
    fa = [packed(a[row[i], column[i]], a[row[i], column[i] + 1]) for i in range(k // 4)]
    fb = [
        packed(b[2 * WITHIN + 8 * i, GROUP], b[2 * WITHIN + 8 * i + 1, GROUP])
        for i in range(k // 8)
    ]
    want = (wide_a @ wide_b + c).astype(np.float32)
    assert np.array_equal(product(kind, fa, fb, c, k), want)


def test_mma_of_tf32_reads_10_bits_of_mantissa():
    a, b = (RNG.standard_normal(s).astype(np.float32) for s in ((16, 8), (8, 8)))
    c = RNG.standard_normal((16, 8)).astype(np.float32)
    cut = [
        (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(float) for x in (a, b)
    ]
    fa = [a[GROUP + 8 * (i % 2), WITHIN + 4 * (i // 2)].view(np.uint32) for i in range(4)]
    fb = [b[WITHIN + 4 * i, GROUP].view(np.uint32) for i in range(2)]
    want = (cut[0] @ cut[1] + c).astype(np.float32)
    assert np.array_equal(product("tf32", fa, fb, c, 8), want)


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, trans):
    """Lane i stores row i of 8 halves, i // 8 is the matrix; each lane gets two neighbours."""
    halves = RNG.integers(0, 65536, (32, 8), dtype=np.uint16)
    words = halves.view(np.uint32)
    targets = [f"%r{20 + i}" for i in range(count)]
    body = f"""
 mov.u32 %r10, dynamic;
 mad.lo.u32 %r10, %r63, 16, %r10;
 st.shared.v4.u32 [%r10], {{%r0, %r1, %r2, %r3}};
 bar.warp.sync -1;
 ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{", ".join(targets)}}}, [%r10];
"""
    got = run(body, *words.T, gives=targets, shared=512)
    for i in range(count):
        m = halves[8 * i : 8 * i + 8]
        m = m.T if trans else m
        assert np.array_equal(got[:, i], packed(m[GROUP, 2 * WITHIN], m[GROUP, 2 * WITHIN + 1]))

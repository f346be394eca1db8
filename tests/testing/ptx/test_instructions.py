"""Instructions of the executor of PTX against exact values, computed by other means."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers.ptx import run

from elmkernels.testing.ptx import PtxError, Settings
from elmkernels.testing.ptx.floats import EXACT, STATED

RNG = np.random.default_rng(0)
MODES = ("rn", "rz", "rm", "rp")


def bits(values: object) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32).view(np.uint32)


def samples(count: int = 512, spread: float = 30.0) -> np.ndarray:
    """float32 of many magnitudes and both signs."""
    x = RNG.standard_normal(count) * np.exp2(RNG.uniform(-spread, spread, count))
    return x.astype(np.float32)


def rounded(exact: Fraction, mode: str) -> float:
    """The float32 that a fraction rounds to, found among the neighbours of a guess."""
    near = np.float32(float(exact))
    inf = np.float32(np.inf)
    around = [np.nextafter(near, -inf), near, np.nextafter(near, inf)]
    below = max(c for c in around if Fraction(float(c)) <= exact)
    above = min(c for c in around if Fraction(float(c)) >= exact)
    if mode == "rm" or (mode == "rz" and exact >= 0):
        return float(below)
    if mode in ("rp", "rz"):
        return float(above)
    down, up = exact - Fraction(float(below)), Fraction(float(above)) - exact
    if down == up:
        return float(below if int(below.view(np.uint32)) % 2 == 0 else above)
    return float(below if down < up else above)


@pytest.mark.parametrize("mode", MODES)
def test_fma_rounds_once(mode):
    a, b = samples(512, 8), samples(512, 8)
    factor = RNG.choice([1, 1 + 2.0**-22, 0.5, 2.0**-30, 1e4], 512)
    c = (-(a.astype(np.float64) * b) * factor).astype(np.float32)
    got = run(f"fma.{mode}.f32 %r10, %r0, %r1, %r2;", bits(a), bits(b), bits(c), threads=512)
    for x, y, z, found in zip(a, b, c, got.view(np.float32), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert float(found) == rounded(exact, mode)


def test_fma_of_middles_and_of_numbers_below_the_normal_ones():
    one, step = 1 + 2.0**-23, 2.0**-23
    a = np.float32([one, one, one, 2.0**-75, 2.0**-100])
    b = np.float32([1, 1, 1, 2.0**-75, 2.0**-49])
    c = np.float32([step / 2, step / 2 + 2.0**-40, -(2.0**-70), 2.0**-149, 2.0**-149])
    got = run("fma.rn.f32 %r10, %r0, %r1, %r2;", *(bits(np.resize(x, 32)) for x in (a, b, c)))
    for x, y, z, found in zip(a, b, c, got.view(np.float32), strict=False):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert float(found) == rounded(exact, "rn")


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
@pytest.mark.parametrize("mode", MODES)
def test_arithmetic_in_every_rounding(name, mode):
    a, b = samples(256, 4), samples(256, 4)
    got = run(f"{name}.{mode}.f32 %r10, %r0, %r1;", bits(a), bits(b), threads=256)
    for x, y, found in zip(a, b, got.view(np.float32), strict=True):
        p, q = Fraction(float(x)), Fraction(float(y))
        exact = {"add": p + q, "sub": p - q, "mul": p * q}[name]
        assert float(found) == rounded(exact, mode)


HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}


@pytest.mark.parametrize("kind", HALVES)
def test_every_half_widens_to_what_torch_reads(kind):
    every = np.arange(65536, dtype=np.uint16)
    want = torch.from_numpy(every.view(np.int16)).view(HALVES[kind]).float().numpy()
    for part in np.split(every, 64):
        got = run(f"cvt.f32.{kind} %r10, %h0;", part, threads=1024).view(np.float32)
        assert np.array_equal(got, want[part], equal_nan=True)


@pytest.mark.parametrize("kind", HALVES)
def test_conversion_to_halves_rounds_to_nearest_as_torch_does(kind):
    x = np.concatenate([samples(900, 20), samples(100, 120)])
    tiny = {"bf16": 2.0**-133, "f16": 2.0**-24}[kind]
    middles = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 65519.9, 65520, 3.4e38, 0, -0.0]
    middles += [tiny / 2, tiny * 1.5, tiny * 0.51, -tiny, np.inf, -np.inf]
    x = np.resize(np.concatenate([np.float32(middles), x]), 1024)
    want = torch.from_numpy(x).to(HALVES[kind]).view(torch.int16).numpy().view(np.uint16)
    got = run(f"cvt.rn.{kind}.f32 %h10, %r0;", bits(x), gives="%h10", dtype=np.uint16, threads=1024)
    assert np.array_equal(got, want)
    packed = run(f"cvt.rn.{kind}x2.f32 %r10, %r0, %r1;", bits(x), bits(x[::-1]), threads=1024)
    assert np.array_equal(packed >> 16, want)
    assert np.array_equal(packed & 0xFFFF, want[::-1])


@pytest.mark.parametrize("kind", HALVES)
def test_conversion_to_halves_towards_zero_is_the_largest_below(kind):
    x = samples(1024, 12)
    raw = run(f"cvt.rz.{kind}.f32 %h10, %r0;", bits(x), gives="%h10", dtype=np.uint16, threads=1024)
    got = torch.from_numpy(raw.view(np.int16)).view(HALVES[kind]).float().numpy()
    after = torch.from_numpy((raw + 1).view(np.int16)).view(HALVES[kind]).float().numpy()
    assert (np.abs(got) <= np.abs(x)).all()
    assert (np.abs(after) > np.abs(x)).all()


def test_nan_becomes_the_canonical_one():
    for kind in HALVES:
        got = run(f"cvt.rn.{kind}.f32 %h10, %r0;", bits(np.nan), gives="%h10", dtype=np.uint16)
        assert (got == 0x7FFF).all()


def test_tf32_rounds_half_away():
    x = np.uint32([0x3F800FFF, 0x3F801000, 0x3F801001, 0x3F803000, 0xBF801000])
    got = run("cvt.rna.tf32.f32 %r10, %r0;", np.resize(x, 32))
    want = np.uint32([0x3F800000, 0x3F802000, 0x3F802000, 0x3F804000, 0xBF802000])
    assert np.array_equal(got[:5], want)


@pytest.mark.parametrize("kind", HALVES)
def test_arithmetic_of_halves_rounds_once(kind):
    dtype = HALVES[kind]
    a, b, c = (torch.from_numpy(samples(1024, 5)).to(dtype) for _ in "abc")
    raw = [t.view(torch.int16).numpy().view(np.uint16) for t in (a, b, c)]
    # In float64 product and sum are exact enough that one rounding remains, but where the sum has
    # more than 53 bits: magnitudes here are within 2^30.
    want = {
        "fma.rn": a.double() * b.double() + c.double(),
        "add": a.double() + b.double(),
        "mul": a.double() * b.double(),
    }
    for name, exact in want.items():
        operands = "%h0, %h1, %h2" if name == "fma.rn" else "%h0, %h1"
        got = run(
            f"{name}.{kind} %h10, {operands};", *raw, gives="%h10", dtype=np.uint16, threads=1024
        )
        narrow = torch.from_numpy(got.view(np.int16)).view(dtype).double()
        near = torch.from_numpy((got ^ 1).view(np.int16)).view(dtype).double()
        assert ((narrow - exact).abs() <= (near - exact).abs()).all()


def test_conversion_to_integers_saturates():
    x = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 3e9, -3e9, np.nan, 7.999])
    for mode, want in {
        "rni": [0, 2, 2, 0, -2, 2**31 - 1, -(2**31), 0, 8],
        "rzi": [0, 1, 2, 0, -1, 2**31 - 1, -(2**31), 0, 7],
        "rmi": [0, 1, 2, -1, -2, 2**31 - 1, -(2**31), 0, 7],
        "rpi": [1, 2, 3, 0, -1, 2**31 - 1, -(2**31), 0, 8],
    }.items():
        got = run(f"cvt.{mode}.s32.f32 %r10, %r0;", bits(np.resize(x, 32)))
        assert np.array_equal(got[:9].view(np.int32), want)


@pytest.mark.parametrize(("kind", "size"), [("u32", 4), ("s32", 4), ("u64", 8), ("s64", 8)])
def test_integers_convert_to_the_nearest_float(kind, size):
    letter = "r" if size == 4 else "d"
    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{size}")
    x = RNG.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, 256, dtype)
    got = run(f"cvt.rn.f32.{kind} %r10, %{letter}0;", x.view(f"u{size}"), threads=256)
    for value, found in zip(x, got.view(np.float32), strict=True):
        assert float(found) == rounded(Fraction(int(value)), "rn")


@pytest.mark.parametrize("name", sorted(EXACT))
def test_approximations_are_exact_or_within_what_is_stated(name):
    x = np.abs(samples(1024, 6)) if name not in ("ex2", "tanh") else samples(1024, 3)
    x = np.clip(x, -3, 3) if name in ("sin", "cos") else x
    exact = EXACT[name](x.astype(np.float64))
    suffix = "approx.f32"
    plain = run(f"{name}.{suffix} %r10, %r0;", bits(x), threads=1024).view(np.float32)
    assert np.array_equal(plain, exact.astype(np.float32))
    moved = run(
        f"{name}.{suffix} %r10, %r0;", bits(x), threads=1024, settings=Settings(share=1.0)
    ).view(np.float32)
    scale = np.maximum(np.abs(exact), 1.0) if name in ("lg2", "sin", "cos") else np.abs(exact)
    error = np.abs(moved - exact) / scale
    assert (error <= STATED[name] + 2.0**-24).all()
    assert error.max() > STATED[name] / 2  # it is moved


def test_ftz_flushes_what_comes_and_what_goes():
    tiny = np.float32([2.0**-127, -(2.0**-127), 2.0**-126, 1])
    got = run("mul.ftz.f32 %r10, %r0, %r1;", bits(np.resize(tiny, 32)), bits(0.5))
    assert np.array_equal(got[:4], bits([0.0, -0.0, 0.0, 0.5]))
    kept = run("mul.f32 %r10, %r0, %r1;", bits(np.resize(tiny, 32)), bits(0.5))
    assert kept[0] == bits(2.0**-128)


def test_minimum_and_maximum_drop_nan_and_know_the_signs_of_zeros():
    a, b = np.float32([np.nan, 1, 0.0, -0.0]), np.float32([2, np.nan, -0.0, 0.0])
    low = run("min.f32 %r10, %r0, %r1;", *(bits(np.resize(x, 32)) for x in (a, b)))[:4]
    high = run("max.f32 %r10, %r0, %r1;", *(bits(np.resize(x, 32)) for x in (a, b)))[:4]
    assert np.array_equal(low, bits([2, 1, -0.0, -0.0]))
    assert np.array_equal(high, bits([2, 1, 0.0, 0.0]))


def test_comparisons_with_nan():
    a, b = bits(np.resize(np.float32([1, np.nan]), 32)), bits(1.0)
    for name, want in {"eq": (1, 0), "ne": (0, 0), "neu": (0, 1), "ltu": (0, 1), "num": (1, 0),
                       "nan": (0, 1)}.items():  # fmt: skip
        body = f"setp.{name}.f32 %p1, %r0, %r1;\nselp.b32 %r10, 1, 0, %p1;"
        assert tuple(run(body, a, b)[:2]) == want


def integers(dtype: object, count: int = 256) -> np.ndarray:
    info = np.iinfo(dtype)
    x = RNG.integers(info.min, info.max, count, dtype, endpoint=True)
    x[:4] = [0, 1, info.max, info.min]
    return x


def wrap(value: int, bits_: int, signed: bool) -> int:
    value &= (1 << bits_) - 1
    return value - (1 << bits_) if signed and value >> (bits_ - 1) else value


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_integer_arithmetic_wraps(kind):
    size, signed = int(kind[1:]), kind[0] == "s"
    letter = "r" if size == 32 else "d"
    dtype = np.dtype(f"{'i' if signed else 'u'}{size // 8}")
    a, b = integers(dtype), RNG.permutation(integers(dtype))
    b[b == 0] = 3

    def quotient(x: int, y: int) -> int:
        return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)

    for name, exact in {
        "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul.lo": lambda x, y: x * y,
        "div": quotient, "rem": lambda x, y: x - y * quotient(x, y), "min": min, "max": max,
    }.items():  # fmt: skip
        got = run(
            f"{name}.{kind} %{letter}10, %{letter}0, %{letter}1;", a.view(f"u{size // 8}"),
            b.view(f"u{size // 8}"), gives=f"%{letter}10", dtype=dtype, threads=256,
        )  # fmt: skip
        want = [wrap(exact(int(x), int(y)), size, signed) for x, y in zip(a, b, strict=True)]
        assert got.tolist() == want, name


def test_wide_and_high_products():
    a, b = integers(np.int32), RNG.permutation(integers(np.int32))
    raw = a.view(np.uint32), b.view(np.uint32)
    wide = run("mul.wide.s32 %d10, %r0, %r1;", *raw, gives="%d10", dtype=np.int64, threads=256)
    assert wide.tolist() == [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    high = run("mul.hi.u32 %r10, %r0, %r1;", *raw, threads=256)
    assert high.tolist() == [int(x) * int(y) >> 32 for x, y in zip(*raw, strict=True)]


def test_shifts_past_the_width():
    x, by = np.uint32(0x80000001), np.resize(np.uint32([0, 1, 31, 32, 200]), 32)
    assert run("shl.b32 %r10, %r0, %r1;", x, by)[:5].tolist() == [0x80000001, 2, 1 << 31, 0, 0]
    assert run("shr.u32 %r10, %r0, %r1;", x, by)[:5].tolist() == [0x80000001, 1 << 30, 1, 0, 0]
    minus = 0xFFFFFFFF
    signed = run("shr.s32 %r10, %r0, %r1;", x, by)[:5].tolist()
    assert signed == [0x80000001, 0xC0000000, minus, minus, minus]


def test_bit_fields():
    x = integers(np.uint32)
    for at, length in ((0, 8), (3, 4), (28, 8), (0, 32), (5, 0), (32, 4)):
        body = f"bfe.u32 %r10, %r0, {at}, {length};"
        want = [(int(v) >> at) & ((1 << length) - 1) for v in x]
        assert run(body, x, threads=256).tolist() == want
    signed = run("bfe.s32 %r10, %r0, 4, 4;", x, threads=256).view(np.int32)
    assert signed.tolist() == [wrap(int(v) >> 4, 4, True) for v in x]
    got = run("bfi.b32 %r10, %r0, %r1, 8, 12;", x, x[::-1], threads=256)
    assert got.tolist() == [
        (int(b) & ~0xFFF00) | (int(a) & 0xFFF) << 8 for a, b in zip(x, x[::-1], strict=True)
    ]


def test_lop3_is_its_table():
    a, b, c = (integers(np.uint32, 32) for _ in "abc")
    for table, want in {
        0x96: a ^ b ^ c,
        0xE8: (a & b) | (a & c) | (b & c),
        0x2A: ~(a & b) & c,
    }.items():
        assert np.array_equal(run(f"lop3.b32 %r10, %r0, %r1, %r2, {table};", a, b, c), want)


def test_prmt_picks_bytes_and_signs():
    a, b = np.uint32(0x44332291), np.uint32(0x88776655)
    for selector, want in {0x7654: 0x88776655, 0x0123: 0x91223344, 0x8888: 0xFFFFFFFF,
                           0x5140: 0x66225591, 0x9F10: 0x00FF2291}.items():  # fmt: skip
        assert run(f"prmt.b32 %r10, %r0, %r1, {selector};", a, b)[0] == want


def test_shfl_in_every_mode():
    lane = np.arange(32)
    x = (lane * 10).astype(np.uint32)
    down, up = np.where(lane < 29, lane + 3, lane), np.where(lane >= 3, lane - 3, lane)
    for body, want in {
        "bfly.b32 %r10, %r0, 5, 31, -1": lane ^ 5, "idx.b32 %r10, %r0, 7, 31, -1": 0 * lane + 7,
        "down.b32 %r10, %r0, 3, 31, -1": down, "up.b32 %r10, %r0, 3, 0, -1": up,
        "idx.b32 %r10, %r0, 1, 6175, -1": lane // 8 * 8 + 1,  # segments of 8 lanes
    }.items():  # fmt: skip
        assert np.array_equal(run(f"shfl.sync.{body};", x), want * 10), body


def test_votes_and_redux():
    x = np.arange(32, dtype=np.uint32)
    body = "setp.lt.u32 %p1, %r0, 5;\nvote.sync.ballot.b32 %r10, %p1, -1;"
    assert (run(body, x) == 31).all()
    assert (run("redux.sync.max.s32 %r10, %r0, -1;", x) == 31).all()
    assert (run("redux.sync.add.u32 %r10, %r0, -1;", x) == 496).all()


def test_packs_and_halves_of_registers():
    x = np.arange(32, dtype=np.uint32) * 0x01010101
    body = "mov.b32 {%h10, %h11}, %r0;\nmov.b32 %r10, {%h11, %h10};"
    assert np.array_equal(run(body, x), x >> 16 | x << 16)


def test_an_unknown_instruction_is_named():
    with pytest.raises(PtxError, match="wgmma"):
        run("wgmma.fence.sync.aligned;")
    with pytest.raises(PtxError, match=r"cvt\.rn\.satfinite\.e4m3x2\.f32"):
        run("cvt.rn.satfinite.e4m3x2.f32 %h10, %r0, %r1;")

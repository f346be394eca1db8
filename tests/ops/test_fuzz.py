"""Random calls of every op against float64, by the rule of parity: shapes, strides, dtypes, values
and options that no case has. Hostile values stay where the reference has them.

A call that kills the process is named by its test, which pytest's fault handler prints.
"""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.calls import as_tuple
from helpers.mutations import MUTATIONS

from elmkernels import ops
from elmkernels.testing import CASES, OPS, runnable
from elmkernels.testing.cases import (
    _linear_fused,
    attention,
    decode_step,
    linear,
    linear_cross_entropy,
)
from elmkernels.testing.cases.draw import ALL, LAYOUTS, Case, Draw, grad
from elmkernels.testing.cases.qk_norm_rope import heads_case
from elmkernels.testing.cases.weights import FORMS, many_escapes
from elmkernels.testing.parity import EVALUATIONS, Expected, poisoned, specification
from elmkernels.testing.rule import compare
from elmkernels.weights.packed12 import pack_weight

QUICK, MANY = 25, 450  # seeds of each op; each is a call of every backend
WIDTHS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 100, 127, 128, 130, 255, 300, 513)
# torch's own kernel, on documents of two and three tokens with heads of one number: 1.2 times what
# the rule allows of one gradient's rms error.
TORCH_S_OWN = {("attention", 307, "sdpa")}
COTANGENTS = ("contiguous", "broadcast", "strided")


def values(r):
    """How the numbers of an input are drawn."""
    draw = r.choice([Draw.normal, Draw.normal, Draw.outliers, small, Draw.huge])
    layout = r.choice([None, *LAYOUTS.values()])
    return draw, layout


def small(d, *shape):
    return d.normal(*shape, scale=1e-3)


def rows_of(r, d, draw, layout, n):
    """[a, b, n] or with fewer dimensions, in some layout, as a leaf."""
    a, b = r.choice([(1, 1), (1, 5), (3, 2), (2, 9), (4, 33)])
    if layout is not None:
        return grad(layout(d, a, b, n))
    shape = r.choice([(n,), (a * b, n), (a, b, n), (1, a, b, n)])
    return grad(draw(d, *shape))


def norm_case(r, op):
    n, (draw, layout), inputs = r.choice(WIDTHS), values(r), 2 if op == "add_rms_norm" else 1
    seed, wide, eps = r.random(), r.random() < 0.3, r.choice([1e-6, 1e-5, 1e-3])

    def build(d):
        made = [rows_of(random.Random(seed), d, draw, layout, n) for _ in range(inputs)]
        return (*made, d.weight(n, wide), eps), {}

    return Case(op, "fuzz", build, cotangent=r.choice(COTANGENTS))


def swiglu_case(r, op):
    n, (draw, layout), seed = 2 * r.choice(WIDTHS), values(r), r.random()
    draw = Draw.normal if draw is Draw.huge else draw
    return Case(
        op, "fuzz", lambda d: ((rows_of(random.Random(seed), d, draw, layout, n),), {}),
        cotangent=r.choice(COTANGENTS),
    )  # fmt: skip


def rope_case(r, op):
    kv, group, length = r.choice([1, 2, 3]), r.choice([1, 2, 5]), r.choice([1, 2, 7, 20])
    batch = r.choice([None, 1, 3])
    starts = (
        None if batch is None or r.random() < 0.5 else [r.randint(-3, 90) for _ in "abc"[:batch]]
    )
    return heads_case(
        "fuzz", kv * group, kv, r.choice([2, 4, 6, 16, 20, 32, 62, 64, 128]), batch, length,
        norm=r.random() < 0.8, wide=r.random() < 0.2, starts=starts, table_length=128,
        cache=0 if batch is None else r.choice([0, 0, length, length + 3]),
        cotangent=r.choice(COTANGENTS),
    )  # fmt: skip


def attention_case(r, op):
    kv, group, head_dim = r.choice([1, 2, 3]), r.choice([1, 2, 5]), r.choice([1, 2, 8, 20, 64, 80])
    common = {"cotangent": r.choice(COTANGENTS), "strided": r.random() < 0.4}
    if r.random() < 0.3:
        lengths = [r.choice([0, 1, 2, 9, 40, 65]) for _ in range(r.randint(1, 6))] + [3]
        return attention.varlen_case("fuzz", kv * group, kv, head_dim, lengths, **common)
    lq = r.choice([1, 2, 9, 40, 65])
    # One key has no choice: its scores' gradient is 0, to which no error compares.
    lk, batch = max(2, lq + r.choice([0, 0, 1, 30, 90])), r.choice([1, 2, 3])
    if r.random() < 0.4:
        common["offsets"] = [r.randint(min(1, lk - lq), lk - lq) for _ in range(batch)]
    elif r.random() < 0.3:
        common["padding"] = [r.randint(0, max(0, lk - lq - 1)) for _ in range(batch)]
    return attention.attention_case("fuzz", kv * group, kv, head_dim, lq, lk, batch, **common)


def linear_case(r, op):
    form, rows = r.choice(list(FORMS)), r.choice([1, 2, 3, 5, 8, 9, 12, 40])
    k = r.choice([64, 128, 192, 320]) if form.startswith("affine") else r.choice(WIDTHS)
    n, escapes = r.choice([1, 2, 5, 70, 130]), form == "packed12" and r.random() < 0.5
    if r.random() < 0.5:
        around = r.choice([{"norm": True}, {"norm": True, "wide": True}, {}])
        after = r.choice([{"swiglu": True}, {"residual": True}, {}])
        return _linear_fused._case(
            "fuzz", form, r.choice([(rows, k), (1, rows, k)]), 2 * n, **around, **after,
            eps=r.choice([None, 1e-3]) if around else None, train=r.random() < 0.4,
            draw=r.choice([Draw.normal, Draw.outliers, small]),
        )  # fmt: skip
    return linear._linear_case(
        "fuzz", form, r.choice([(rows, k), (1, rows, k)]), n, train=r.random() < 0.4,
        draw=r.choice([Draw.normal, Draw.outliers, small]),
        draw_weight=(lambda d: pack_weight(many_escapes(d, n, k))) if escapes else None,
    )  # fmt: skip


def loss_case(r, op):
    shape = r.choice([(1,), (7,), (3, 5), (40,), (2, 1, 9)])
    return linear_cross_entropy._case(
        "fuzz", (*shape, r.choice([1, 8, 33, 64, 100])), r.choice([2, 3, 17, 131, 515]),
        scale=r.choice([0.5, 2.0, 10.0]), wide=r.random() < 0.3,
        ignored=r.choice([0.0, 0.3]), reduction=r.choice(["none", "sum", "mean"]),
        z_loss=r.choice([0.0, 1e-3]), label_smoothing=r.choice([0.0, 0.1]),
    )  # fmt: skip


def step_case(r, op):
    kv_heads = [r.choice([1, 2, 3]) for _ in range(r.choice([1, 2]))]
    heads = tuple((kv * r.choice([1, 2, 4]), kv) for kv in kv_heads)
    positions = tuple(r.randint(0, 90) for _ in range(r.randint(1, 8)))
    options = dict(
        form=r.choice(list(FORMS)), positions=positions,
        max_length=r.choice([0, 100]), model_dim=r.choice([128, 256]), head_dim=64,
        heads=heads, ffn_dims=tuple(r.choice([64, 192]) for _ in heads), norm=r.random() < 0.8,
        gated=r.random() < 0.8, tied=r.random() < 0.5, vocab_size=r.choice([65, 203]),
        table_length=128,
    )  # fmt: skip
    if r.random() < 0.5:
        options |= several_tokens(r)
    return decode_step._decode_case("fuzz", **options)


def several_tokens(r):
    """Of one to four sequences of five, in any order."""
    positions, sequences, room = [], [], 8
    for row in r.sample(range(5), r.randint(1, 4)):
        count, first = r.randint(1, max(1, room - 3)), r.randint(0, 90)
        positions += range(first, first + count)
        sequences += [row] * count
        room -= count
    return {"positions": tuple(positions[:8]), "sequences": tuple(sequences[:8]), "batch": 5}


MAKE = {
    "rms_norm": norm_case,
    "add_rms_norm": norm_case,
    "qk_norm_rope": rope_case,
    "swiglu": swiglu_case,
    "attention": attention_case,
    "linear": linear_case,
    "decode_step": step_case,
    "linear_cross_entropy": loss_case,
}
assert set(MAKE) == set(CASES)


def drawn(op, seed):
    """What a random call must give."""
    r = random.Random(f"{op} {seed}")
    case = replace(MAKE[op](r, op), name=f"fuzz {seed}")
    return Expected(op, case, r.choice([t for t in ALL if t in case.dtypes]), seed=seed)


def finite(expected):
    """Whether a half type holds what the reference gives: of outliers, gated, it may not."""
    return all(bool(t.isfinite().all()) for t in expected.evaluation(0).values())


def check(op, seed):
    """One random call by each backend; returns how many there were."""
    expected = drawn(op, seed)
    if not finite(expected):
        return 0
    backends = [b for b in runnable(op) if b != "triton" and (op, seed, b) not in TORCH_S_OWN]
    for backend in backends:
        fn = partial(OPS[op].observe(getattr(ops, op)), backend=backend)
        with poisoned():
            got = expected.run(fn)
        for found in expected.judge(got):
            what = f"{op} by {backend}, fuzz {seed} in {expected.dtype}: {found.what}"
            assert found.ok, f"{what}: {found.reason}"
    return len(backends)


@pytest.mark.parametrize("op", MAKE)
@pytest.mark.parametrize("seed", range(QUICK))
def test_a_random_call_is_the_reference(op, seed):
    check(op, seed)


@pytest.mark.parametrize("op", MAKE)
def test_random_calls_find_wrong_kernels(op):
    """Most of those that are wrong in one thing (`helpers.mutations`), by the quick calls alone."""
    missed = dict(MUTATIONS[op])
    for seed in range(QUICK):
        expected = drawn(op, seed)
        for name, wrong in list(missed.items()):
            try:
                found = expected.judge(expected.results(wrong))
            except (NotImplementedError, RuntimeError, TypeError):  # not of such a call
                continue
            if not all(c.ok for c in found):
                del missed[name]
    print(f"{op}: {len(missed)} of {len(MUTATIONS[op])} missed: {', '.join(missed)}")
    assert len(missed) <= len(MUTATIONS[op]) // 2, missed


@pytest.mark.slow
@pytest.mark.parametrize("op", MAKE)
@pytest.mark.parametrize("start", range(QUICK, QUICK + MANY, 50))
def test_many_random_calls_are_the_reference(op, start):
    for seed in range(start, start + 50):
        check(op, seed)


HOSTILE = (torch.nan, torch.inf, -torch.inf, 1e20, -1e20, 3e38, -3e38, 1e-40, -1e-45, 0.0, -0.0)


def hostile(r, op):
    """Rows of which some hold hostile numbers."""
    n, seed = r.choice(WIDTHS), r.randrange(2**31)

    def build(d):
        width = 2 * n if op == "swiglu" else n
        x = d.normal(9, width)
        picks = random.Random(seed)
        for row in (1, 4, 8):
            for _ in range(picks.randint(1, 4)):
                x[row, picks.randrange(width)] = picks.choice(HOSTILE)
        if op == "swiglu":
            return (grad(x),), {}
        if op == "linear":
            return (grad(x), d.normal(5, n)), {}
        rest = (d.normal(9, n),) if op == "add_rms_norm" else ()
        return (grad(x), *rest, d.weight(n)), {}

    return Case(op, "hostile", build)


def run(fn, args):
    """Outputs and the first input's gradient."""
    args = [a.detach().requires_grad_(a.requires_grad) for a in args]
    outputs = as_tuple(fn(*args))
    (dx,) = torch.autograd.grad(outputs, args[:1], [torch.ones_like(y) for y in outputs])
    return [y.detach() for y in (*outputs, dx)]


def check_hostile(op, seed):
    r = random.Random(f"hostile {op} {seed}")
    case, dtype = hostile(r, op), r.choice(ALL)
    args, _ = case.build(Draw(dtype, torch.device("cpu"), torch.Generator().manual_seed(seed)))
    plain, *others = (run(specification(op, i), args) for i in range(EVALUATIONS))
    truth = run(specification(op), [a.double() for a in args])
    for backend in (b for b in runnable(op) if b != "triton"):
        got = run(lambda *a, b=backend: getattr(ops, op)(*a, backend=b), args)
        for i, (g, p, t) in enumerate(zip(got, plain, truth, strict=True)):
            right = p, *(o[i] for o in others)
            what = f"{op} by {backend} on hostile {seed}, output {i}"
            nan = p.isnan() & t.isnan()
            assert bool(g[nan].isnan().all()), f"{what}: a number, where there is none"
            known = p.isfinite() & t.isfinite() & (t.abs() <= torch.finfo(dtype).max)
            assert bool(g[known].isfinite().all()), f"{what}: no number, where there is one"
            for row in range(len(g)):
                k = known[row]
                if bool(k.any()):
                    rows = [r[row][k] for r in right if bool(r[row][k].isfinite().all())]
                    found = compare(t[row][k], rows, g[row][k], what)
                    assert found.ok, f"{what}, row {row}: {found.reason}"


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "swiglu", "linear"])
@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(s, marks=pytest.mark.slow)
                                               for s in range(20, 220))])  # fmt: skip
def test_hostile_numbers_stay_where_the_reference_has_them(op, seed):
    check_hostile(op, seed)

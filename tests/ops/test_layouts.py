"""What the ops promise of their inputs: read where they lie, each row for itself, however far."""

import pytest
import torch
from helpers.calls import (
    BACKENDS,
    COMPILED,
    as_tuple,
    assert_same,
    every_backend,
    every_op,
    inputs,
    run,
)

from elmkernels import add_rms_norm, ops, qk_norm_rope, rms_norm, rope_table, swiglu


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_does_not_depend_on_the_others(backend, dtype):
    for op, name in (
        ("rms_norm", "width_33"),
        ("add_rms_norm", "width_33"),
        ("swiglu", "width_33"),
    ):
        args, _ = inputs(op, name, dtype)
        rows = sum(a.dim() > 1 for a in args)
        full = run(getattr(ops, op), args, backend)[0]
        for i in (0, 7, 32):
            alone = (*(a[i : i + 1].detach() for a in args[:rows]), *args[rows:])
            with torch.no_grad():
                got = as_tuple(getattr(ops, op)(*alone, backend=backend))
            assert all(torch.equal(g[0], f[i]) for g, f in zip(got, full, strict=True))
    (qkv, qw, kw, positions, *rest), _ = inputs("qk_norm_rope", "ragged", dtype)
    with torch.no_grad():
        full = qk_norm_rope(qkv, qw, kw, positions, *rest, backend=backend)
        one = qk_norm_rope(qkv[1:2, 3:4], qw, kw, positions[1:2, 3:4], *rest, backend=backend)
    assert all(torch.equal(o[0, 0], f[1, 3]) for o, f in zip(one, full, strict=True))


@every_op
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("layout", ["row_slices", "transposed", "every_other_row"])
def test_strided_inputs_are_not_copied(op, backend, layout):
    args, _ = inputs(op, layout)
    rows = [a for a in args if isinstance(a, torch.Tensor) and a.dim() == 3]
    assert not any(a.is_contiguous() for a in rows)
    args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    fn = getattr(ops, op)
    fn(*args, backend=backend)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fn(*args, backend=backend)
    seen = {event.key for event in profile.key_averages()}
    assert "aten::new_empty" in seen or "aten::empty" in seen  # the profiler sees into kernels
    assert not seen & {"aten::copy_", "aten::clone", "aten::contiguous", "aten::to"}


@every_backend
def test_rows_beyond_two_to_the_31_elements_are_read(backend):
    """A view whose last row starts past int32; memory that is never touched costs nothing."""
    stride = 2**30 + 64
    storage = torch.empty(2 * stride + 256, dtype=torch.bfloat16)
    storage = storage if backend != "triton" else storage.view(torch.float16)

    def far(width):
        return storage.as_strided((3, width), (stride, 1))

    torch.manual_seed(0)
    near = torch.randn(3, 256).to(storage.dtype)
    far(256).copy_(near)
    weight = torch.rand(64).to(storage.dtype)
    x, close = far(64), near[:, :64]
    assert torch.equal(
        rms_norm(x, weight, backend=backend), rms_norm(close, weight, backend=backend)
    )
    got = add_rms_norm(x, x, weight, backend=backend)
    assert_same([got], [add_rms_norm(close, close, weight, backend=backend)])
    assert torch.equal(swiglu(far(256), backend=backend), swiglu(near, backend=backend))
    rest = (weight, weight, torch.tensor([[0], [5], [9]]), 2, 1, rope_table(16, 64))
    got = qk_norm_rope(far(256)[:, None], *rest, backend=backend)
    assert_same([got], [qk_norm_rope(near[:, None], *rest, backend=backend)])


@pytest.mark.slow
@pytest.mark.parametrize("backend", COMPILED)
def test_outputs_beyond_two_to_the_31_elements_are_written(backend):
    """One row, repeated without memory, to outputs of 4.3 GB each."""
    rows = 2**31 // 64 + 8
    torch.manual_seed(0)
    weight = torch.rand(64).bfloat16()
    row = torch.randn(1, 256).bfloat16()
    calls = (
        lambda n: rms_norm(row[:, :64].expand(n, 64), weight, backend=backend),
        lambda n: swiglu(row[:, :128].expand(n, 128), backend=backend),
        lambda n: qk_norm_rope(
            row[:, :192].expand(n, 192), weight, weight, torch.tensor(3), 1, 1, rope_table(9, 64),
            backend=backend,
        )[0].squeeze(1),
    )  # fmt: skip
    for call in calls:
        expected, got = call(1)[0], call(rows)
        for i in (0, rows // 2, rows - 9, rows - 8, rows - 1):
            assert torch.equal(got[i], expected)
        del got


@every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_and_stays_in_its_row(backend, bad):
    for op, name in (
        ("rms_norm", "width_33"),
        ("add_rms_norm", "width_33"),
        ("swiglu", "width_33"),
    ):
        args, _ = inputs(op, name)
        args = tuple(a.detach().clone() for a in args)
        fn = getattr(ops, op)
        clean = as_tuple(fn(*args, backend=backend))
        args[0][5, 3] = bad
        got = as_tuple(fn(*args, backend=backend))
        truth = as_tuple(fn(*args, backend="reference"))
        for g, t, c in zip(got, truth, clean, strict=True):
            assert torch.equal(g.isfinite(), t.isfinite())
            others = torch.arange(len(c)) != 5
            assert torch.equal(g[others], c[others])
    args, _ = inputs("qk_norm_rope")
    qkv = args[0].detach().clone()
    qkv[1, 2, 70] = bad  # the second query head of one token
    q, k, _ = qk_norm_rope(qkv, *args[1:], backend=backend)
    truth = qk_norm_rope(qkv, *args[1:], backend="reference")
    assert torch.equal(q.isfinite(), truth[0].isfinite())
    assert not q[1, 2, 1].isfinite().all()
    assert k.isfinite().all()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_values_are_a_view_and_caches_are_written_in_place(backend):
    args, kwargs = inputs("qk_norm_rope", "cached_strided")
    qkv = args[0]
    _, _, v = qk_norm_rope(*args, backend=backend)
    assert v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    before = [kwargs[name].clone() for name in ("k_cache", "v_cache")]
    _, k_cache, v_cache = qk_norm_rope(*args, **kwargs, backend=backend)
    assert k_cache is kwargs["k_cache"]
    assert v_cache is kwargs["v_cache"]
    assert not torch.equal(k_cache, before[0])
    rows = torch.arange(len(qkv))[:, None]
    assert torch.equal(v_cache[rows, kwargs["slots"]], v)

"""What the ops promise beyond numbers: tracing, autocast, determinism, no copies, any layout."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from elmkernels import add_rms_norm, attention, ops, qk_norm_rope, rms_norm, rope_table, swiglu
from elmkernels.backends import kernel
from elmkernels.testing import CASES, make, runnable

KERNEL_OPS = ("rms_norm", "add_rms_norm", "qk_norm_rope", "swiglu")
BACKENDS = runnable("rms_norm")
COMPILED = [name for name in BACKENDS if name != "triton"]  # the interpreter isn't for tracing
CASE = {op: {case.name: case for case in cases} for op, cases in CASES.items()}
PLAIN = {
    "rms_norm": "270M_hidden",
    "add_rms_norm": "270M_hidden",
    "qk_norm_rope": "ragged",
    "swiglu": "270M_ffn_768",
}

every_op = pytest.mark.parametrize("op", KERNEL_OPS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def inputs(op, name=None, dtype=torch.float32):
    return make(CASE[op][name or PLAIN[op]], dtype)


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def run(fn, args, backend, **kwargs):
    """Outputs and gradients of one call, the gradients from cotangents that are always the same."""
    args = tuple(leaf(a) for a in args)
    outputs = as_tuple(fn(*args, backend=backend, **kwargs))
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    cotangents = [
        torch.randn(o.shape, generator=torch.Generator().manual_seed(i)).to(o.dtype)
        for i, o in enumerate(outputs)
    ]
    return [o.detach() for o in outputs], list(torch.autograd.grad(outputs, leaves, cotangents))


def leaf(x):
    if isinstance(x, torch.Tensor) and x.requires_grad:
        return x.detach().requires_grad_()
    return x


def assert_same(left, right):
    for a, b in zip(itertools.chain(*left), itertools.chain(*right), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def raw_calls(op, dtype):
    """{kernel name: arguments}, none of which requires a gradient."""
    args = tuple(
        a.detach() if isinstance(a, torch.Tensor) else a for a in inputs(op, None, dtype)[0]
    )
    if op == "rms_norm":
        x, weight = args
        yield "rms_norm_fwd", (x, weight, 1e-6)
        yield "rms_norm_bwd", (torch.randn_like(x), x, weight, 1e-6)
    elif op == "add_rms_norm":
        x, residual, weight = args
        yield "add_rms_norm_fwd", (x, residual, weight, 1e-6)
        for dsum in (None, torch.randn_like(x)):
            yield "add_rms_norm_bwd", (torch.randn_like(x), dsum, x, weight, 1e-6)
    elif op == "swiglu":
        yield "swiglu_fwd", args
        yield "swiglu_bwd", (args[0][..., : args[0].shape[-1] // 2].clone(), *args)
    else:
        qkv, q_weight, k_weight, positions, q_heads, kv_heads, table = args
        batch, length, _ = qkv.shape
        q, kv = (
            torch.randn(batch, length, heads, table.shape[1]).to(dtype)
            for heads in (q_heads, kv_heads)
        )
        for weights in ((q_weight, k_weight), (None, None)):
            common = (qkv, *weights, positions, table)
            yield "qk_norm_rope_fwd", (*common, q_heads, kv_heads, 1e-6)
            caches = (torch.randn(batch, 9, kv_heads, table.shape[1]).to(dtype) for _ in "kv")
            slots = torch.arange(length).expand(batch, length)
            yield "qk_norm_rope_cache", (*common, q_heads, kv_heads, 1e-6, *caches, slots)
            yield "qk_norm_rope_bwd", (q, kv, kv.clone(), *common, 1e-6)


@every_op
@pytest.mark.parametrize("backend", COMPILED)
def test_raw_kernels_pass_opcheck(op, backend):
    for name, args in raw_calls(op, torch.float32):
        torch.library.opcheck(kernel(name, backend), args)


@every_op
@pytest.mark.parametrize("backend", COMPILED)
def test_traced_forward_and_backward_equal_eager(op, backend):
    args, kwargs = inputs(op, None, torch.bfloat16)
    torch.compiler.reset()
    traced = torch.compile(getattr(ops, op), backend="aot_eager", fullgraph=True)
    assert_same(run(traced, args, backend), run(getattr(ops, op), args, backend))


@pytest.mark.parametrize("backend", COMPILED[:1] or ["reference"])
def test_inductor_equals_eager(backend):
    """All four ops in one graph, with nothing between them that a compiler may round otherwise."""

    def block(x, residual, weight, q_weight, k_weight, table, positions, *, backend):
        normed, total = add_rms_norm(x, residual, weight, backend=backend)
        q, k, v = qk_norm_rope(
            rms_norm(normed, weight, backend=backend),
            q_weight, k_weight, positions, 4, 1, table, backend=backend,
        )  # fmt: skip
        return swiglu(total, backend=backend), q, k, v

    torch.manual_seed(0)
    width = 6 * 32
    leaves = [torch.randn(2, 5, width), torch.randn(2, 5, width), torch.rand(width) + 0.5]
    leaves += [torch.rand(32) + 0.5, torch.rand(32) + 0.5]
    args = (*(t.requires_grad_() for t in leaves), rope_table(16, 32), torch.arange(5))
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True)
    if backend == "reference":
        pytest.skip("no kernels can run here: the reference compiled rounds otherwise")
    assert_same(run(compiled, args, backend), run(block, args, backend))


@pytest.mark.parametrize("backend", COMPILED)
def test_one_graph_serves_every_width_and_row_count(backend):
    """Layer-wise scaling gives every layer its own widths: they must not recompile."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    fn = torch.compile(
        lambda x, w: swiglu(rms_norm(x, w, backend=backend), backend=backend),
        backend=counter, fullgraph=True, dynamic=True,
    )  # fmt: skip
    counts = []
    for rows, width in ((3, 64), (7, 96), (16, 1280), (5, 2560)):
        x, w = torch.randn(rows, width), torch.rand(width)
        assert torch.equal(fn(x, w), swiglu(rms_norm(x, w, backend=backend), backend=backend))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


@every_backend
def test_autocast_keeps_float32_weights_and_half_activations(backend):
    linear = torch.nn.Linear(64, 64, bias=False)
    weight = torch.rand(64, requires_grad=True)
    x = torch.randn(6, 64)
    dtype = torch.float16 if backend == "triton" else torch.bfloat16
    with torch.autocast("cpu", dtype=dtype):
        hidden = linear(x)
        y = rms_norm(hidden, weight, backend=backend)
    assert hidden.dtype == y.dtype == dtype
    assert torch.equal(y, rms_norm(hidden, weight, backend=backend))
    y.float().square().sum().backward()
    assert weight.grad.dtype == linear.weight.grad.dtype == torch.float32


@every_op
@every_backend
def test_checkpointing_gives_the_same_gradients(op, backend):
    args, _ = inputs(op)

    def checkpointed(*args, backend):
        return checkpoint(
            lambda *a: getattr(ops, op)(*a, backend=backend), *args, use_reentrant=False
        )

    assert_same(run(checkpointed, args, backend), run(getattr(ops, op), args, backend))


@every_op
@pytest.mark.parametrize("backend", COMPILED)
def test_repeated_runs_are_bitwise_equal(op, backend):
    """With any number of threads: a weight's gradient is summed in an order of its own."""
    args, _ = inputs(op, "many_tokens" if op == "qk_norm_rope" else "many_rows", torch.float32)
    threads = torch.get_num_threads()
    try:
        first = run(getattr(ops, op), args, backend)
        for count in (1, 2, 3, threads):
            torch.set_num_threads(count)
            assert_same(run(getattr(ops, op), args, backend), first)
    finally:
        torch.set_num_threads(threads)


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


@every_op
@every_backend
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_results_are_the_same(op, backend, mode):
    args, _ = inputs(op)
    expected, _ = run(getattr(ops, op), args, backend)
    with mode():
        got = as_tuple(getattr(ops, op)(*args, backend=backend))
    # qk_norm_rope's values are a view of a leaf, which torch says requires a gradient as it does.
    assert not any(g.requires_grad for g in got[:2])
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@every_op
@every_backend
def test_one_leaf_alone_gets_the_same_gradient(op, backend):
    args, _ = inputs(op)
    leaves = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.requires_grad]
    _, together = run(getattr(ops, op), args, backend)
    for place, expected in zip(leaves, together, strict=True):
        alone = tuple(a.detach() if i in leaves and i != place else a for i, a in enumerate(args))
        if op == "qk_norm_rope" and place != 0:
            continue  # v, a view of qkv, then carries no gradient
        _, (got,) = run(getattr(ops, op), alone, backend)
        assert torch.equal(got, expected)


@every_op
@every_backend
def test_a_second_derivative_is_refused(op, backend):
    args, _ = inputs(op)
    args = tuple(leaf(a) for a in args)
    out = as_tuple(getattr(ops, op)(*args, backend=backend))[0]
    (first,) = torch.autograd.grad(out.square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@every_backend
def test_changing_a_saved_input_is_noticed(backend):
    x = torch.randn(4, 64, requires_grad=True)
    hidden = x * 1
    y = rms_norm(hidden, torch.rand(64), backend=backend)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


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


def test_attention_never_repeats_keys_and_matches_a_cache_of_any_length():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 9, 8, 32), torch.randn(2, 9, 2, 32), torch.randn(2, 9, 2, 32)
    whole = attention(q, k, v)
    for lq in (1, 4):
        torch.testing.assert_close(attention(q[:, -lq:], k, v), whole[:, -lq:])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(q[:, -1:], k, v)
    seen = {event.key for event in profile.key_averages()}
    assert "aten::repeat_interleave" not in seen
    assert "aten::clone" not in seen


ATTENTION = [name for name in runnable("attention") if name not in ("sdpa", "triton")]


@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize("name", ["chunk", "ragged_and_padded", "packed_off_every_block"])
def test_attention_traces_and_passes_opcheck(backend, name):
    args, kwargs = inputs("attention", name, torch.float32)
    q, k, v = (a.detach().nan_to_num() for a in args)
    sight = (*(kwargs.get(name) for name in ("key_mask", "offsets", "cu_seqlens")), 0.125)
    out, lse = kernel("attention_fwd", backend)(q, k, v, *sight)
    torch.library.opcheck(kernel("attention_fwd", backend), (q, k, v, *sight))
    backward = (torch.randn_like(out), q, k, v, out, lse, *sight)
    torch.library.opcheck(kernel("attention_bwd", backend), backward)
    torch.compiler.reset()
    traced = torch.compile(attention, backend="aot_eager", fullgraph=True)
    assert_same(run(traced, args, backend, **kwargs), run(attention, args, backend, **kwargs))


@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize("name", ["long", "ragged_long", "packed_long_among_short"])
def test_attention_is_bitwise_equal_with_any_number_of_threads(backend, name):
    args, kwargs = inputs("attention", name, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        first = run(attention, args, backend, **kwargs)
        for count in (1, 2, 3, threads):
            torch.set_num_threads(count)
            assert_same(run(attention, args, backend, **kwargs), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_row_does_not_depend_on_its_batch(backend, dtype):
    """Nor, beyond one tile, on where the tiles of queries begin."""
    args, kwargs = inputs("attention", "ragged_chunks", dtype)
    q, k, v = (a.detach() for a in args)
    offsets = kwargs["offsets"]
    whole = attention(q, k, v, offsets=offsets, backend=backend)
    assert whole.isfinite().all()
    for b, first in enumerate(offsets.tolist()):
        end = first + q.shape[1]
        alone = attention(q[b : b + 1], k[b : b + 1, :end], v[b : b + 1, :end], backend=backend)
        assert torch.equal(alone[0], whole[b])
        rest = attention(q[b : b + 1, -4:], k[b : b + 1, :end], v[b : b + 1, :end],
                         backend=backend)  # fmt: skip
        assert torch.equal(rest[0], whole[b, -4:])


@pytest.mark.parametrize("backend", ATTENTION)
def test_attention_reads_strided_inputs_where_they_lie(backend):
    args, _ = inputs("attention", "strided_prompt")
    q, k, v = (a.detach() for a in args)
    assert not any(t.is_contiguous() for t in (q, k, v))
    assert torch.equal(
        attention(q, k, v, backend=backend),
        attention(q.contiguous(), k.contiguous(), v.contiguous(), backend=backend),
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(q, k, v, backend=backend)
    seen = {event.key for event in profile.key_averages()}
    assert not seen & {"aten::copy_", "aten::clone", "aten::contiguous", "aten::to"}


@pytest.mark.parametrize("backend", ATTENTION)
def test_attention_with_an_odd_last_stride_is_right(backend):
    args, _ = inputs("attention", "chunk")
    expected = run(attention, args, backend)
    spread = [torch.stack((a.detach(), a.detach()), dim=-1).flatten(-2) for a in args]
    got = run(attention, [s[..., ::2].requires_grad_() for s in spread], backend)
    assert_same(got, expected)


@pytest.mark.parametrize("backend", [*runnable("attention"), "reference"])
def test_a_query_that_sees_no_key_gives_zeros(backend):
    q, k, v = torch.randn(2, 5, 4, 32), torch.randn(2, 9, 2, 32), torch.randn(2, 9, 2, 32)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1] = False
    out = attention(q, k, v, key_mask=mask, backend=backend)
    assert out[0].all()
    assert not out[1].any()


@pytest.mark.parametrize("backend", ATTENTION)
def test_a_query_that_sees_no_key_gives_no_gradient(backend):
    q, k, v = torch.randn(2, 5, 4, 32), torch.randn(2, 9, 2, 32), torch.randn(2, 9, 2, 32)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1] = False
    leaves = [t.requires_grad_() for t in (q, k, v)]
    attention(*leaves, key_mask=mask, backend=backend).sum().backward()
    assert all(t.grad[0].any() and t.grad.isfinite().all() for t in leaves)
    assert not any(t.grad[1].any() for t in leaves)

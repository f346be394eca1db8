"""What the ops promise beyond numbers: tracing, autocast, determinism, gradients."""

import pytest
import torch
from helpers.calls import (
    COMPILED,
    as_tuple,
    assert_same,
    every_backend,
    every_op,
    inputs,
    leaf,
    run,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from elmkernels import add_rms_norm, ops, qk_norm_rope, rms_norm, rope_table, swiglu
from elmkernels.backends import kernel


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
    with pytest.raises(
        RuntimeError, match=rf"{op} has no second derivative: .*backend=.reference."
    ):
        first.sum().backward()


@every_backend
def test_changing_a_saved_input_is_noticed(backend):
    x = torch.randn(4, 64, requires_grad=True)
    hidden = x * 1
    y = rms_norm(hidden, torch.rand(64), backend=backend)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()

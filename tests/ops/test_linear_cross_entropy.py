"""What linear_cross_entropy promises beyond its parity cases: chunks, gradients given away once and
made again, ignored tokens, targets out of range, autocast, tracing, memory.
"""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from elmkernels import linear_cross_entropy
from elmkernels.backends import kernel, optional_kernel
from elmkernels.ops import _chunked_loss, _linear_cross_entropy
from elmkernels.testing import CASES, assert_parity, compare, runnable

BACKENDS = runnable("linear_cross_entropy")
COMPILED = [name for name in BACKENDS if name != "triton"]  # the interpreter isn't for tracing
CASE = {case.name: case for case in CASES["linear_cross_entropy"]}

ADDING = [name for name in BACKENDS if optional_kernel("linear_cross_entropy_add", name)]

every_backend = pytest.mark.parametrize("backend", BACKENDS)
with_reference = pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
reductions = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])


def half(backend):
    return torch.float16 if backend == "triton" else torch.bfloat16


def inputs(rows=37, v=131, d=24, dtype=torch.float32, seed=0, ignored=0.2):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, d, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=g) * 0.3).to(dtype).requires_grad_()
    targets = torch.randint(v, (rows,), generator=g)
    targets[torch.rand(rows, generator=g) < ignored] = -100
    return hidden, weight, targets


def run(hidden, weight, targets, **options):
    """The loss and both gradients, of a cotangent that is always the same."""
    loss = linear_cross_entropy(hidden, weight, targets, **options)
    dloss = torch.linspace(0.5, 2.0, max(1, loss.numel()))[: loss.numel()].view(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight), dloss)


def small_chunks(monkeypatch, rows, v, itemsize, part_rows=None, d=24):
    monkeypatch.setitem(_chunked_loss.CHUNK_BYTES, "cpu", rows * v * itemsize)
    monkeypatch.setitem(_chunked_loss.BLOCK_BYTES, "cpu", 50 * d * itemsize)
    if part_rows:
        monkeypatch.setattr(_linear_cross_entropy, "PART_BYTES", part_rows * d * 4)


@every_backend
@pytest.mark.parametrize("name", ["mean_every_option", "none_every_option", "sum_ignored"])
@pytest.mark.parametrize("rows", [1, 5, 7])
def test_chunks_are_parity_too(backend, name, rows, monkeypatch):
    """With blocks and parts of weight whose ends meet those of nothing else."""
    for dtype in (torch.float32, half(backend)):
        v = 1003 if "every" in name else 131
        monkeypatch.setattr(_linear_cross_entropy, "PART_BYTES", 90 * 96 * 4)
        monkeypatch.setitem(_chunked_loss.BLOCK_BYTES, "cpu", 64 * 96 * dtype.itemsize)
        monkeypatch.setitem(_chunked_loss.CHUNK_BYTES, "cpu", rows * v * dtype.itemsize)
        assert_parity("linear_cross_entropy", CASE[name], dtype, backend)


@every_backend
@reductions
def test_losses_do_not_depend_on_the_chunks(backend, reduction, monkeypatch):
    """But for the order in which dweight is added."""
    args = inputs()
    loss, dhidden, _ = run(*args, reduction=reduction, backend=backend)
    for rows in (1, 4, 36, 37, 38):
        small_chunks(monkeypatch, rows, 131, 4)
        got, again, _ = run(*args, reduction=reduction, backend=backend)
        truth = loss.double()
        assert compare(truth, loss, got, "loss").ok
        assert compare(dhidden.double(), dhidden, again, "dhidden").ok


@every_backend
@reductions
@pytest.mark.parametrize("dtype", ["float32", "half"])
def test_a_retained_graph_gives_the_same_again(backend, reduction, dtype, monkeypatch):
    """The first backward gives its buffers away, and what they became may be changed."""
    dtype = torch.float32 if dtype == "float32" else half(backend)
    small_chunks(monkeypatch, 5, 131, dtype.itemsize, part_rows=40)
    hidden, weight, targets = inputs(dtype=dtype)
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction, backend=backend)
    dloss = torch.rand(loss.shape) + 0.5
    first = torch.autograd.grad(loss, (hidden, weight), dloss, retain_graph=True)
    expected = [g.clone() for g in first]
    for g in first:
        g.fill_(math.nan)
    for scale in (1.0, 0.25, 1.0):
        again = torch.autograd.grad(loss, (hidden, weight), scale * dloss, retain_graph=True)
        for what, e, g in zip(("dhidden", "dweight"), expected, again, strict=True):
            # One more rounding, where the first scaled a rounded gradient.
            bound = 16 * torch.finfo(dtype).eps * e.abs().max()
            assert ((g / scale - e).abs().max() <= bound).item(), what


@every_backend
@reductions
def test_gradients_accumulate(backend, reduction):
    hidden, weight, targets = inputs()
    expected = run(hidden, weight, targets, reduction=reduction, backend=backend)[1:]
    for _ in range(2):
        loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction, backend=backend)
        loss.backward(torch.linspace(0.5, 2.0, loss.numel()).view(loss.shape))
    assert torch.equal(hidden.grad, 2 * expected[0])
    assert torch.equal(weight.grad, 2 * expected[1])


@every_backend
@reductions
def test_one_leaf_alone_gets_the_same_gradient(backend, reduction):
    hidden, weight, targets = inputs()
    options = {"reduction": reduction, "backend": backend}
    _, *both = run(hidden, weight, targets, **options)
    for leaf, expected in zip((hidden, weight), both, strict=True):
        args = (x if x is leaf else x.detach() for x in (hidden, weight))
        loss = linear_cross_entropy(*args, targets, **options)
        dloss = torch.linspace(0.5, 2.0, max(1, loss.numel()))[: loss.numel()].view(loss.shape)
        (got,) = torch.autograd.grad(loss, leaf, dloss)
        assert torch.equal(got, expected)


@every_backend
@reductions
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_losses_are_the_same(backend, reduction, mode):
    args = inputs()
    expected = run(*args, reduction=reduction, backend=backend)[0]
    with mode():
        got = linear_cross_entropy(*args, reduction=reduction, backend=backend)
    assert not got.requires_grad
    assert torch.equal(got, expected)


@every_backend
def test_a_weight_that_is_also_the_embedding(backend):
    """Its gradient is the sum of both uses."""
    _, weight, _ = inputs()
    ids, targets = torch.tensor([[1, 2, 130], [5, 5, 0]]), torch.tensor([[2, 130, 7], [5, 0, -100]])
    table = weight.detach().double().requires_grad_()
    for t in (weight, table):
        hidden = F.embedding(ids, t).tanh()
        if t is weight:
            loss = linear_cross_entropy(hidden, t, targets, backend=backend)
        else:
            loss = F.cross_entropy((hidden @ t.T).flatten(0, 1), targets.flatten())
        loss.backward()
    hidden = F.embedding(ids, weight).tanh()
    yardstick = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten())
    (reference,) = torch.autograd.grad(yardstick, weight)
    found = compare(table.grad, reference, weight.grad, "grad weight")
    assert found.ok, found.reason


@with_reference
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_nothing_but_ignored_tokens(backend, smoothing):
    hidden, weight, targets = inputs(ignored=1.1)
    options = {"z_loss": 0.1, "label_smoothing": smoothing, "backend": backend}
    for reduction in ("none", "sum", "mean"):
        loss, *grads = run(hidden, weight, targets, reduction=reduction, **options)
        assert not loss.any()
        assert not any(g.any() for g in grads)


@with_reference
def test_ignored_tokens_leave_no_trace(backend):
    hidden, weight, targets = inputs(ignored=0.4)
    real = targets != -100
    kept = hidden.detach()[real].requires_grad_()
    options = {"z_loss": 0.1, "label_smoothing": 0.1, "backend": backend}
    loss, dhidden, dweight = run(hidden, weight, targets, **options)
    expected, dkept, dweight_2 = run(kept, weight, targets[real], **options)
    assert not dhidden[~real].any()
    pairs = {"loss": (expected, loss), "dhidden": (dkept, dhidden[real])}
    for what, (e, g) in (pairs | {"dweight": (dweight_2, dweight)}).items():
        assert compare(e.double(), e, g, what).ok, what


@every_backend
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_ignored_tokens_may_hold_anything(backend, share):
    """Where enough of them are left out, as here, or are multiplied by zeros but finite."""
    hidden, weight, targets = inputs(rows=100, ignored=share)
    with torch.no_grad():
        hidden[targets == -100] = 1e30 if share < 0.1 else math.nan
    loss, dhidden, dweight = run(hidden, weight, targets, backend=backend)
    assert loss.isfinite()
    assert dhidden.isfinite().all()
    assert dweight.isfinite().all()


@every_backend
@pytest.mark.parametrize("offset", [-3e4, 1e4, 3e4])
def test_an_offset_of_all_logits_changes_nothing(backend, offset):
    """Powers of two as weights keep every logit exact."""
    hidden, _, targets = inputs(d=8)
    hidden = (hidden.detach() * 4).round().requires_grad_()
    weight = torch.zeros(131, 8)
    weight[torch.arange(131), torch.arange(131) % 7] = 0.25
    args = (weight.requires_grad_(), targets)
    with torch.no_grad():
        hidden[:, 7] = 1.0
    plain = run(hidden, *args, reduction="none", backend=backend)
    with torch.no_grad():
        weight[:, 7] = offset
    moved = run(hidden, *args, reduction="none", backend=backend)
    assert torch.equal(plain[0], moved[0])
    assert torch.equal(plain[1][:, :7], moved[1][:, :7])
    assert torch.equal(plain[2], moved[2])


@every_backend
def test_masked_logits_and_whole_blocks_of_them(backend):
    """-inf is a logit too: 5000 of them before the first that isn't."""
    x = torch.full((2, 5100), -math.inf)
    x[:, 5000:] = torch.randn(2, 100)
    targets = torch.tensor([5000, 5099])
    expected = F.cross_entropy(x.double(), targets, reduction="none")
    dx = (x.double().softmax(-1) - F.one_hot(targets, 5100)).float()
    row = kernel("linear_cross_entropy_rows", backend)
    losses = row(x, targets, None, -100, 0.0, 0.0, True)
    assert compare(expected, expected.float(), losses, "losses").ok
    assert compare(dx.double(), dx, x, "dx").ok


@every_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(backend, bad):
    x, targets = torch.randn(3, 70), torch.tensor([1, 2, 3])
    x[1, 5] = bad
    clean = x.clone()
    clean[1, 5] = 0.0
    row = kernel("linear_cross_entropy_rows", backend)
    losses = row(x, targets, None, -100, 0.0, 0.0, True)
    expected = row(clean, targets, None, -100, 0.0, 0.0, True)
    assert losses[1].isnan()
    assert x[1].isnan().all()
    assert torch.equal(losses[::2], expected[::2])
    assert torch.equal(x[::2], clean[::2])


@every_backend
def test_the_kernel_marks_a_target_out_of_range(backend):
    """As on a GPU, whose targets nobody looks at: NaN, in that row alone."""
    x = torch.randn(4, 70)
    targets = torch.tensor([70, -1, 69, -100])
    row = kernel("linear_cross_entropy_rows", backend)
    losses = row(x, targets, None, -100, 0.0, 0.0, True)
    assert losses.isnan().tolist() == [True, True, False, False]
    assert x.isnan().all(-1).tolist() == [True, True, False, False]
    assert x[2].isfinite().all()
    assert not x[3].any()


@pytest.mark.parametrize("backend", ADDING)
def test_shares_are_not_copied_on_their_way(backend, monkeypatch):
    """torch's own sum of two dtypes would write each share anew, in float32."""
    small_chunks(monkeypatch, 5, 131, 2)
    args = inputs(dtype=torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(*args, backend=backend)
    seen = {event.key for event in profile.key_averages()}
    assert f"elmkernels_{backend}::linear_cross_entropy_add" in seen
    assert "aten::add_" not in seen


@with_reference
@pytest.mark.parametrize("bad", [131, 2**40, -1, -101])
@reductions
def test_a_target_out_of_range_is_named(backend, bad, reduction):
    hidden, weight, targets = inputs()
    targets[3] = bad
    message = rf"targets must be in \[0, 131\) \(weight's rows; -100 is ignored\), got {bad}"
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, targets, reduction=reduction, backend=backend)


H, W, T = inputs(rows=6)
WRONG = {
    "hidden is float64": ((H.double(), W, T), {}, TypeError, "hidden must be float32"),
    "hidden is a scalar": ((H[0, 0], W, T), {}, ValueError, r"hidden must be \[..., d\], got a"),
    "weight has another width": (
        (H, W[:, :5], T), {}, ValueError, r"weight must be \[v, 24\] with v > 0, got \[131, 5\]"),
    "weight has no rows": (
        (H, W[:0], T), {}, ValueError, r"weight must be \[v, 24\] with v > 0, got \[0, 24\]"),
    "weight is narrower": (
        (H, W.half(), T), {}, TypeError, "weight must be torch.float32 like hidden"),
    "weight is elsewhere": ((H, W.to("meta"), T), {}, ValueError, "weight must be on cpu"),
    "targets are int32": ((H, W, T.int()), {}, TypeError, "targets must be torch.int64"),
    "targets have another shape": (
        (H, W, T[:5]), {}, ValueError, r"targets must be \[6\] like hidden's rows, got \[5\]"),
    "targets are a list": ((H, W, [1] * 6), {}, TypeError, "targets must be a tensor, got list"),
    "ignore_index is None": (
        (H, W, T), {"ignore_index": None}, TypeError, "ignore_index must be an integer, got None"),
    "z_loss is negative": (
        (H, W, T), {"z_loss": -1e-4}, ValueError, "z_loss must be at least 0, got -0.0001"),
    "label_smoothing is above 1": (
        (H, W, T), {"label_smoothing": 1.5}, ValueError, r"must be in \[0, 1\], got 1.5"),
    "reduction is unknown": (
        (H, W, T), {"reduction": "max"}, ValueError, "reduction must be .*, got 'max'"),
    "backend has no such op": (
        (H, W, T), {"backend": "sdpa"}, RuntimeError, "has no kernels for linear_cross_entropy"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(name):
    args, options, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        linear_cross_entropy(*args, **options)


@every_backend
def test_autocast_keeps_float32_masters(backend):
    """Products in autocast's dtype, the weight's gradient float32 and never rounded to it."""
    hidden, weight, targets = inputs()
    dtype = half(backend)
    with torch.autocast("cpu", dtype=dtype):
        loss = linear_cross_entropy(hidden, weight, targets, backend=backend)
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == dhidden.dtype == dweight.dtype == torch.float32
    assert not torch.equal(dweight, dweight.to(dtype).float())
    narrow = hidden.detach().to(dtype).requires_grad_()
    expected = linear_cross_entropy(narrow, weight, targets, backend=backend)
    assert torch.equal(loss, expected)
    assert torch.equal(dweight, torch.autograd.grad(expected, weight)[0])


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_raw_kernel_and_chunks_pass_opcheck(backend, dtype):
    hidden, weight, targets = (x.detach() for x in inputs(dtype=dtype))
    dloss = torch.rand(len(targets))
    rows = kernel("linear_cross_entropy_rows", backend)
    for grad, given in itertools.product((False, True), (None, dloss)):
        logits = torch.randn(len(targets), 131).to(dtype)
        torch.library.opcheck(rows, (logits, targets, given, -100, 0.1, 0.1, grad))
        args = (hidden, weight, targets, given, -100, 0.1, 0.1, grad, grad)
        for narrow in (False, True):
            torch.library.opcheck(_chunked_loss.op, (*args, narrow, backend))
    add = kernel("linear_cross_entropy_add", backend)
    for scale, fresh in itertools.product((None, torch.tensor(0.5)), (False, True)):
        torch.library.opcheck(add, (torch.randn(3, 24), weight[:3], scale, fresh))


@pytest.mark.parametrize("backend", COMPILED)
@reductions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traced_forward_and_backward_equal_eager(backend, reduction, dtype, monkeypatch):
    small_chunks(monkeypatch, 5, 131, dtype.itemsize, part_rows=40)
    torch.compiler.reset()
    traced = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    args, options = inputs(dtype=dtype), {"reduction": reduction, "backend": backend}
    eager = run(*args, **options)
    loss = traced(*args, **options)
    dloss = torch.linspace(0.5, 2.0, max(1, loss.numel()))[: loss.numel()].view(loss.shape)
    got = (loss.detach(), *torch.autograd.grad(loss, args[:2], dloss))
    assert all(torch.equal(a, b) for a, b in zip(eager, got, strict=True))


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_runs_are_bitwise_equal(backend, dtype, monkeypatch):
    small_chunks(monkeypatch, 64, 1003, dtype.itemsize)
    args = inputs(rows=300, v=1003, dtype=dtype)
    first = run(*args, reduction="none", backend=backend)
    again = run(*args, reduction="none", backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@every_backend
def test_a_second_derivative_is_refused(backend):
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden, weight, targets, backend=backend)
    (first,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_cross_entropy has no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_never_lie_in_memory(backend, reduction):
    """No allocation of the profile is larger than a chunk or dweight."""
    hidden, weight, targets = inputs(rows=2048, v=20000, d=16)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run(hidden, weight, targets, reduction=reduction, backend=backend)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= _chunked_loss.CHUNK_BYTES["cpu"] + (1 << 20)

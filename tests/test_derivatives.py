"""Derivatives of every op: the first is the reference's, through autograd and torch.func, with vmap
around it; forward mode and a second derivative name the op and the way out. None is 0 instead.
"""

import contextlib
import inspect
import warnings

import pytest
import torch
from helpers.calls import as_tuple, every_backend
from helpers.checkpoints import SMALL as CONFIG
from torch.autograd import forward_ad
from torch.autograd.functional import hvp
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from elmkernels import OpenELM, accelerate, ops, rope_table
from elmkernels.testing import runnable
from elmkernels.testing.cases.decode_step import arena, decoder
from elmkernels.testing.cases.draw import Draw
from elmkernels.weights.affine import quantize_weight
from elmkernels.weights.packed12 import pack_weight

TABLE = rope_table(16, 8)
COMPRESSED = {
    "affine": quantize_weight(torch.randn(12, 64), 4, 32),
    "packed12": pack_weight(torch.randn(12, 64).bfloat16()),
}
TARGETS = torch.tensor([3, 0, -100, 10])


def frozen(form):
    dtype = torch.bfloat16 if form == "packed12" else torch.float32
    return (
        lambda x, **k: ops.linear(x, COMPRESSED[form], **k),
        lambda: [torch.randn(3, 64).to(dtype)],
    )


# {name: (function of float tensors, what draws them)}: each argument is differentiated.
CALLS = {
    "rms_norm": (ops.rms_norm, lambda: [torch.randn(3, 16), torch.rand(16) + 0.5]),
    "add_rms_norm": (
        ops.add_rms_norm,
        lambda: [torch.randn(3, 16), torch.randn(3, 16), torch.rand(16) + 0.5]),
    "add_rms_norm, the norm alone": (
        lambda *a, **k: ops.add_rms_norm(*a, **k)[0],
        lambda: [torch.randn(3, 16), torch.randn(3, 16), torch.rand(16) + 0.5]),
    "swiglu": (ops.swiglu, lambda: [torch.randn(3, 16)]),
    "qk_norm_rope": (
        lambda qkv, q, k, **o: ops.qk_norm_rope(qkv, q, k, torch.arange(5), 2, 1, TABLE, **o),
        lambda: [torch.randn(1, 5, 32), torch.rand(8) + 0.5, torch.rand(8) + 0.5]),
    "qk_norm_rope without norms": (
        lambda qkv, **o: ops.qk_norm_rope(qkv, None, None, torch.arange(5), 2, 1, TABLE, **o),
        lambda: [torch.randn(5, 32)]),
    "attention": (
        ops.attention,
        lambda: [torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)]),
    "attention with offsets": (
        lambda q, k, v, **o: ops.attention(q, k, v, offsets=torch.tensor([1]), **o),
        lambda: [torch.randn(1, 3, 4, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)]),
    "linear": (ops.linear, lambda: [torch.randn(3, 16), torch.randn(8, 16)]),
    "linear around": (
        lambda x, w, norm, **k: ops.linear(x, w, norm=norm, swiglu=True, **k),
        lambda: [torch.randn(3, 16), torch.randn(8, 16), torch.rand(16) + 0.5]),
    "linear, affine": frozen("affine"),
    "linear, packed12": frozen("packed12"),
    "linear_cross_entropy": (
        lambda h, w, **k: ops.linear_cross_entropy(h, w, TARGETS, **k),
        lambda: [torch.randn(4, 16), torch.randn(11, 16)]),
    "linear_cross_entropy of each": (
        lambda *a, **k: ops.linear_cross_entropy(*a, TARGETS, reduction="none", z_loss=0.1, **k),
        lambda: [torch.randn(4, 16), torch.randn(11, 16)]),
}  # fmt: skip
# What torch's own products have: a derivative of any kind.
RIGHT = {"linear"}
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def op_of(name):
    return name.partition(",")[0].partition(" ")[0]


def backends():
    for name in CALLS:
        for backend in [*runnable(op_of(name)), None]:
            if backend != "triton":
                yield name, backend


every_call = pytest.mark.parametrize(("name", "backend"), list(backends()))


def drawn(name, backend):
    """(the op, the reference, arguments), each a function of the arguments alone."""
    torch.manual_seed(0)
    fn, draw = CALLS[name]
    return (
        lambda *a: fn(*a, backend=backend),
        lambda *a: fn(*a, backend="reference"),
        draw(),
    )


def total(fn, power=3):
    """A number whose second derivative is not 0, and that depends on every output."""
    return lambda *a: sum(y.float().pow(power).sum() for y in as_tuple(fn(*a)))


def close(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-6)
        assert error <= ALLOWED[b.dtype]


@contextlib.contextmanager
def plain_reference():
    """torch's fast attention has neither forward mode nor a second derivative."""
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@every_call
def test_torch_func_gives_the_first_derivative(name, backend):
    fn, reference, args = drawn(name, backend)
    places = tuple(range(len(args)))
    got, expected = (grad(total(f), places)(*args) for f in (fn, reference))
    close(got, expected)
    y, pull = vjp(fn, *args)
    close(as_tuple(y), as_tuple(fn(*args)))
    close(pull(y), vjp(reference, *args)[1](y))


@every_call
def test_vmap_is_a_call_for_each_example(name, backend):
    fn, _, args = drawn(name, backend)
    batch = [torch.stack([a, a.flip(0) * 1.5, a * 0.5], dim=-1) for a in args]
    got = vmap(fn, in_dims=-1, out_dims=0)(*batch)
    for i in range(3):
        alone = as_tuple(fn(*(b[..., i] for b in batch)))
        close([y[i] for y in as_tuple(got)], alone)
    one = vmap(fn, in_dims=(-1, *(None for _ in args[1:])))(batch[0], *args[1:])
    close([y[0] for y in as_tuple(one)], as_tuple(fn(*args)))


@every_call
def test_gradients_of_each_sample(name, backend):
    fn, _, args = drawn(name, backend)
    samples = torch.stack([args[0], args[0].flip(0), args[0] * 0.5])
    in_dims, places = (0, *(None for _ in args[1:])), tuple(range(len(args)))
    got = vmap(grad(total(fn), places), in_dims=in_dims)(samples, *args[1:])
    for i in range(3):
        close([g[i] for g in got], grad(total(fn), places)(samples[i], *args[1:]))


def test_the_jacobian_is_the_references():
    fn, reference, (x, w) = drawn("rms_norm", None)
    close([jacrev(fn)(x, w)], [jacrev(reference)(x, w)])


FORWARD = {
    "func.jvp": lambda fn, args: jvp(fn, tuple(args), tuple(args))[1],
    "dual numbers": lambda fn, args: dual(fn, args),
    "dual numbers, a gradient wanted": lambda fn, args: dual(
        fn, [a.clone().requires_grad_() for a in args]
    ),
    "dual numbers without gradients": lambda fn, args: no_grad(dual, fn, args),
    "functional.jvp": lambda fn, args: torch.autograd.functional.jvp(
        total(fn), tuple(args), tuple(args)
    )[1],
    "jacfwd": lambda fn, args: torch.func.jacfwd(total(fn))(*args),
    "hessian": lambda fn, args: torch.func.hessian(total(fn))(*args),
    "jvp of vmap": lambda fn, args: jvp(
        lambda x: vmap(lambda x: as_tuple(fn(x, *args[1:]))[0])(x), (args[0][None],),
        (args[0][None],),
    )[1],
}  # fmt: skip
SECOND = {
    "functional.hvp": lambda fn, args: hvp(total(fn), tuple(args), tuple(args))[1],
    "hvp of a sum": lambda fn, args: hvp(total(fn, 1), tuple(args), tuple(args))[1],
    "create_graph": lambda fn, args: twice(total(fn), args),
    "create_graph of a sum": lambda fn, args: twice(total(fn, 1), args),
    "grad of grad": lambda fn, args: grad(
        lambda x: grad(total(fn))(x, *args[1:]).float().sum()
    )(args[0]),
    "jvp of grad": lambda fn, args: jvp(
        lambda x: grad(total(fn))(x, *args[1:]), (args[0],), (args[0],)
    )[1],
    "per sample": lambda fn, args: grad(
        lambda x: vmap(grad(lambda x: total(fn)(x, *args[1:])))(x).float().sum()
    )(args[0][None]),
}  # fmt: skip


BY_BACKWARD = {*SECOND, "hessian", "functional.jvp"}


def no_grad(call, *args):
    with torch.no_grad():
        return call(*args)


def dual(fn, args):
    with forward_ad.dual_level():
        found = fn(*(forward_ad.make_dual(a, torch.ones_like(a)) for a in args))
        return [forward_ad.unpack_dual(y).tangent for y in as_tuple(found)]


def twice(fn, args):
    leaves = [a.clone().requires_grad_() for a in args]
    first = torch.autograd.grad(fn(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.float().sum() for g in first), leaves)


@every_call
@pytest.mark.parametrize("how", FORWARD | SECOND)
def test_other_derivatives_are_refused_by_name_or_right(name, backend, how):
    fn, reference, args = drawn(name, backend)
    derivative = (FORWARD | SECOND)[how]
    if name in RIGHT:
        got, expected = derivative(fn, args), derivative(reference, args)
        close(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected))
        return
    allowed = f"({op_of(name)}|rms_norm|swiglu)" if name == "linear around" else op_of(name)
    kind, message = NotImplementedError, rf'^{allowed} has no .*backend="reference"'
    if backend == "sdpa" and how in BY_BACKWARD:  # torch's own message, of its own operation
        kind, message = RuntimeError, "scaled_dot_product"
    with pytest.raises(kind, match=message):
        derivative(fn, args)


@every_call
def test_the_way_out_works(name, backend):
    fn, reference, args = drawn(name, "reference")
    if backend is not None:
        pytest.skip("once for each op")
    with plain_reference():
        for how, derivative in (FORWARD | SECOND).items():
            if name == "qk_norm_rope without norms" and "sum" in how:
                continue  # it is linear: there is no second derivative to ask for
            found = torch.utils._pytree.tree_leaves(derivative(fn, args))
            assert all(x.isfinite().all() for x in found), how
            assert name.startswith("linear") or any(x.float().norm() > 0 for x in found), how


def test_every_op_is_among_the_calls():
    assert {op_of(name) for name in CALLS} == set(ops.__all__) - {"decode_step"}
    for name, (fn, draw) in CALLS.items():
        if inspect.signature(fn).parameters.keys() <= {"args", "kwargs"}:
            continue
        assert all(a.is_floating_point() for a in draw()), name


def step(dtype=torch.float32):
    d = Draw(dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    weights = decoder(d, model_dim=64, vocab_size=9)
    return weights, torch.tensor([1, 2]), torch.tensor([0, 3]), arena(d, weights, 2, 6)


@pytest.mark.parametrize("backend", [*runnable("decode_step"), None])
def test_decode_step_has_no_derivative_and_says_so(backend):
    weights, *rest, cache = step()

    def run(data):
        return ops.decode_step(weights, *rest, cache._replace(data=data), backend=backend)

    refused = pytest.raises(NotImplementedError, match=r'decode_step has no .*backend="reference"')
    with refused:
        jvp(run, (cache.data,), (cache.data,))
    with refused:
        dual(run, [cache.data])
    with refused:
        no_grad(dual, run, [cache.data])
    with refused:
        grad(lambda data: run(data).sum())(cache.data)
    with refused:
        vmap(run)(torch.stack([cache.data, cache.data]))
    weights.layers[1].ffn_norm.requires_grad_()
    with refused:
        run(cache.data)
    with torch.no_grad():
        assert run(cache.data).isfinite().all()


@every_backend
def test_a_cache_is_not_written_in_a_transform(backend):
    if backend == "triton":
        pytest.skip("the same check")
    cache = torch.zeros(1, 6, 1, 8)
    slots = torch.arange(5)
    with pytest.raises(NotImplementedError, match="qk_norm_rope has no .* if a cache is written"):
        vmap(lambda x: ops.qk_norm_rope(
            x, None, None, slots, 2, 1, TABLE, k_cache=cache, v_cache=cache.clone(), slots=slots,
            backend=backend)[0])(torch.randn(2, 1, 5, 32))  # fmt: skip


def models():
    plain = OpenELM.from_config(CONFIG, seed=1)
    fast = OpenELM.from_config(CONFIG, seed=1)
    accelerate(fast)
    return plain, fast


IDS = torch.randint(0, 60, (3, 9), generator=torch.Generator().manual_seed(0))


def loss_of(model):
    def loss(weights, ids):
        logits = functional_call(model, weights, (ids[None, :-1],))
        return torch.nn.functional.cross_entropy(logits[0], ids[1:])

    return loss


def test_gradients_of_each_sample_of_a_model():
    found = []
    for model in models():
        weights = {k: v.detach() for k, v in model.named_parameters()}
        found.append(vmap(grad(loss_of(model)), in_dims=(None, 0))(weights, IDS))
    plain, fast = found
    assert plain.keys() == fast.keys()
    close(fast.values(), plain.values())
    weights = {k: v.detach() for k, v in model.named_parameters()}
    alone = grad(loss_of(model))(weights, IDS[1])
    close([g[1] for g in fast.values()], alone.values())


@pytest.mark.parametrize("tokens", [2, 9])
def test_a_model_in_forward_mode_is_refused(tokens):
    model = models()[1]
    weights = {k: v.detach() for k, v in model.named_parameters()}
    run = lambda w: functional_call(model, w, (IDS[:, :tokens],))  # noqa: E731
    with torch.no_grad(), pytest.raises(NotImplementedError, match='has no .*backend="reference"'):
        jvp(run, (weights,), (weights,))
    with pytest.raises(NotImplementedError, match='has no .*backend="reference"'):
        hvp(lambda w: functional_call(model, {"norm.weight": w}, (IDS,)).pow(2).mean(),
            weights["norm.weight"], weights["norm.weight"])  # fmt: skip
    with pytest.raises(NotImplementedError, match='has no .*backend="reference"'):
        w = model.layers[0].attn.qkv_proj.weight
        (first,) = torch.autograd.grad(model.loss(IDS[:, :-1], IDS[:, 1:]), w, create_graph=True)
        first.sum().backward()

"""What the contract tests share: inputs, and calls with their gradients."""

import itertools

import pytest
import torch

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

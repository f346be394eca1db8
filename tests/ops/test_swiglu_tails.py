"""SwiGLU far from 0, where kernels clamp an exponential: exact limits, infinities and NaN as the
reference has them, forward and backward, alone, in `linear` and in a decoding step."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import silu

from elmkernels import decode_step, linear, reference, swiglu
from elmkernels.testing import runnable
from elmkernels.testing.cases.decode_step import arena, decoder
from elmkernels.testing.cases.draw import Draw
from elmkernels.testing.parity import compare

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = [b for b in runnable("swiglu") if b != "triton"]
FINITE = [60.0, 79.0, 80.0, 80.5, 81.0, 87.0, 87.5, 88.5, 89.0, 100.0, 103.0, 104.5, 126.0, 159.0,
          160.0, 161.0, 1e3, 6e4, 1e5, 1e10, 1e20, 1e30, 1e36, 3e38]  # fmt: skip

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def gates(dtype):
    """Both signs of each number that the dtype holds."""
    x = torch.tensor([*FINITE, *(-g for g in FINITE), 0.0, 1.0, -1.0]).to(dtype)
    return x[x.isfinite()]


def run(fn, gate_up, dy):
    gate_up = gate_up.detach().requires_grad_()
    y = fn(gate_up)
    (grad,) = torch.autograd.grad(y, gate_up, dy)
    return y.detach(), *grad.chunk(2, dim=-1)


@every_backend
@every_dtype
@pytest.mark.parametrize("up", [1.0, -3.0, 1e4, 0.0])
def test_limits_are_exact(backend, dtype, up):
    """0 times up of a gate far below, the gate itself far above, each element held on its own."""
    gate = gates(dtype)
    x = torch.cat((gate, torch.full_like(gate, up)))
    dy = torch.ones_like(gate)
    got = run(lambda x: swiglu(x, backend=backend), x, dy)
    plain = run(reference.swiglu, x, dy)
    truth = run(reference.swiglu, x.double(), dy.double())
    for name, g, p, t in zip(("y", "dgate", "dup"), got, plain, truth, strict=True):
        for i in range(len(gate)):
            held = t[i].isfinite() & p[i].isfinite() & (t[i].abs() <= torch.finfo(dtype).max)
            if bool(held):
                found = compare(t[i : i + 1], p[i : i + 1], g[i : i + 1], name)
                assert found.ok, f"{name} of gate {float(gate[i])}: {found.reason}"
            below = gate[i] < -200
            assert not below or float(g[i]) == 0.0, f"{name} of gate {float(gate[i])}: {g[i]}"


def kind(x):
    """0 of a number, 1 and 2 of infinities, 3 of NaN."""
    return x.isposinf().int() + 2 * x.isneginf().int() + 3 * x.isnan().int()


@every_backend
@every_dtype
def test_no_number_is_none_as_in_the_reference(backend, dtype):
    """Infinities and NaN, of the gate, of what it gates and of the gradient that arrives."""
    odd = [float("nan"), float("inf"), -float("inf"), 0.0, 2.0, -2.0, -1e4, 1e4]
    gate, up, dy = (x.flatten().to(dtype) for x in torch.meshgrid(*[torch.tensor(odd)] * 3,
                                                                  indexing="ij"))  # fmt: skip
    x = torch.cat((gate, up))
    got = run(lambda x: swiglu(x, backend=backend), x, dy)
    expected = run(reference.swiglu, x, dy)
    truth = run(reference.swiglu, x.double(), dy.double())
    for name, g, e, t in zip(("y", "dgate", "dup"), got, expected, truth, strict=True):
        # Not where the dtype alone is left in between, as in dy up of two large numbers.
        same = (kind(g) == kind(e)) | (kind(e) != kind(t))
        wrong = [(float(gate[i]), float(up[i]), float(dy[i]), float(g[i]), float(e[i]))
                 for i in (~same).nonzero()[:, 0].tolist()]  # fmt: skip
        assert not wrong, f"{name} of (gate, up, dy) is, must be: {wrong[:5]}"


@every_backend
@every_dtype
def test_a_vector_with_one_gate_in_the_tail_keeps_its_other_bits(backend, dtype):
    x = torch.randn(4, 2 * 67, generator=torch.Generator().manual_seed(0)).to(dtype)
    tail = x.clone()
    tail[:, 5] = -1e4
    a, b = (swiglu(t, backend=backend) for t in (x, tail))
    others = [i for i in range(67) if i != 5]
    assert torch.equal(a[:, others], b[:, others])
    assert bool((b[:, 5] == 0).all())


@pytest.mark.parametrize("backend", [b for b in runnable("linear") if b != "triton"])
@every_dtype
@pytest.mark.parametrize("rows", [1, 12])
def test_in_a_product(backend, dtype, rows):
    x = torch.ones(rows, 1, dtype=dtype)
    gate = gates(dtype)
    up = torch.full_like(gate, 7.0)
    y = linear(x, torch.cat((gate, up))[:, None], swiglu=True, backend=backend)
    far = gate < -200
    assert bool((y[:, far] == 0).all())
    assert torch.equal(y[:, gate > 0].isinf(), (silu(gate) * up)[gate > 0].isinf().expand(rows, -1))


@pytest.mark.parametrize("backend", runnable("decode_step"))
@pytest.mark.parametrize("gated", [False, True])
@every_dtype
def test_in_a_decoding_step(backend, gated, dtype):
    """Feed-forward networks whose gates are all far below give nothing: as if they weren't."""
    d = Draw(dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    weights = decoder(d, model_dim=64, vocab_size=9, gated=gated)
    layers = []
    for layer in weights.layers:
        norm = torch.zeros_like(layer.ffn_norm)
        norm[0] = 1.0
        proj_1 = layer.proj_1.clone()
        ffn = layer.proj_2.shape[1]
        proj_1[:ffn] = 0.0
        proj_1[:ffn, 0] = -6e3
        layers.append(layer._replace(ffn_norm=norm, proj_1=proj_1))
    embedding = weights.embedding.clone()
    embedding[:, 0] = 8.0
    quiet = tuple(x._replace(proj_2=torch.zeros_like(x.proj_2)) for x in layers)
    tokens, positions = torch.tensor([1, 2]), torch.tensor([0, 3])
    found = []
    for each in (tuple(layers), quiet):
        for layer in each:  # attention gives nothing: the gates stay where they are
            layer.out_proj.zero_()
        d = Draw(dtype, torch.device("cpu"), torch.Generator().manual_seed(1))
        changed = replace(weights, layers=each, embedding=embedding, head=embedding)
        cache = arena(d, changed, 2, 6)
        found.append(decode_step(changed, tokens, positions, cache, backend=backend))
    assert torch.equal(*found)

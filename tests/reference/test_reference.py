"""The references themselves: gradients in float64, rounding points, what no kernel can prove."""

import math

import pytest
import torch

from elmkernels import reference
from elmkernels.reference import rope_table

TORCH = torch.float64


def normal(*shape, seed=0, dtype=TORCH):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=TORCH).to(dtype)


TARGETS = torch.tensor([[0, 6, -100], [3, 3, -100]])


def leaf(*shape, seed=0):
    return normal(*shape, seed=seed).requires_grad_()


def qk_inputs(make, head_dim=6, q_heads=4, kv_heads=2):
    qkv = make(2, 3, (q_heads + 2 * kv_heads) * head_dim)
    positions = torch.tensor([[0, 1, 2], [7, 0, 3]])
    table = rope_table(9, head_dim).double()
    return qkv, make(head_dim, seed=1), make(head_dim, seed=2), positions, q_heads, kv_heads, table


CALLS = {
    "rms_norm": (reference.rms_norm, lambda: (leaf(3, 7), leaf(7, seed=1), 1e-3)),
    "add_rms_norm": (
        reference.add_rms_norm,
        lambda: (leaf(3, 7), leaf(3, 7, seed=1), leaf(7, seed=2)),
    ),
    "swiglu": (reference.swiglu, lambda: (leaf(3, 10),)),
    "qk_norm_rope": (reference.qk_norm_rope, lambda: qk_inputs(leaf)),
    "attention prompt": (
        reference.attention,
        lambda: (leaf(2, 4, 4, 6), leaf(2, 4, 2, 6, seed=1), leaf(2, 4, 2, 6, seed=2)),
    ),
    "attention ragged": (
        lambda q, k, v: reference.attention(q, k, v, offsets=torch.tensor([2, 0])),
        lambda: (leaf(2, 2, 4, 6), leaf(2, 5, 2, 6, seed=1), leaf(2, 5, 2, 6, seed=2)),
    ),
    "attention packed": (
        lambda q, k, v: reference.attention(q, k, v, cu_seqlens=torch.tensor([0, 3, 3, 5])),
        lambda: (leaf(1, 5, 4, 6), leaf(1, 5, 2, 6, seed=1), leaf(1, 5, 2, 6, seed=2)),
    ),
    "linear_cross_entropy": (
        lambda h, w: reference.linear_cross_entropy(
            h, w, TARGETS, z_loss=0.1, label_smoothing=0.2, reduction="none"
        ),
        lambda: (leaf(2, 3, 5), leaf(7, 5, seed=1)),
    ),
    "linear_cross_entropy mean": (
        lambda h, w: reference.linear_cross_entropy(h, w, TARGETS, z_loss=0.1),
        lambda: (leaf(2, 3, 5), leaf(7, 5, seed=1)),
    ),
    "attention chunk": (
        reference.attention,
        lambda: (leaf(1, 2, 4, 6), leaf(1, 5, 2, 6, seed=1), leaf(1, 5, 2, 6, seed=2)),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name):
    fn, inputs = CALLS[name]
    assert torch.autograd.gradcheck(fn, inputs())


def test_rms_norm_is_its_formula():
    x, w = normal(3, 7), normal(7, seed=1)
    rows = [[v / math.sqrt(sum(u * u for u in row) / 7 + 1e-6) for v in row] for row in x.tolist()]
    expected = torch.tensor(rows, dtype=TORCH) * w
    torch.testing.assert_close(reference.rms_norm(x, w), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_rounds_before_the_weight(dtype):
    x, w = normal(50, 64, dtype=dtype), (1 + normal(64, seed=1) / 3).to(dtype)
    wide = x.float()
    z = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    got = reference.rms_norm(x, w)
    assert got.dtype == dtype
    assert torch.equal(got, z.to(dtype) * w)
    assert not torch.equal(got, (z * w.float()).to(dtype))  # the two do differ on these inputs


def test_a_float32_weight_meets_the_rounded_row_and_is_rounded_once():
    x, w = normal(50, 64, dtype=torch.bfloat16), (1 + normal(64, seed=1) / 3).float()
    wide = x.float()
    z = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert torch.equal(reference.rms_norm(x, w), (z.float() * w).bfloat16())


def test_add_rms_norm_normalises_the_rounded_sum():
    x, r, w = (normal(20, 64, seed=i, dtype=torch.bfloat16) for i in range(3))
    normed, total = reference.add_rms_norm(x, r, w)
    assert torch.equal(total, x + r)
    assert torch.equal(normed, reference.rms_norm(total, w))


def test_swiglu_rounds_between_silu_and_the_product():
    gate_up = normal(50, 64, dtype=torch.bfloat16)
    gate, up = gate_up[:, :32], gate_up[:, 32:]
    silu = gate.float() * torch.sigmoid(gate.float())
    got = reference.swiglu(gate_up)
    assert torch.equal(got, silu.bfloat16() * up)
    assert not torch.equal(got, (silu * up.float()).bfloat16())


def test_rope_table_holds_cosines_then_sines():
    table = rope_table(50, 8, base=100.0)
    assert table.dtype == torch.float32
    assert table.shape == (50, 8)
    for position in (0, 1, 7, 49):
        for i in range(4):
            angle = position * 100.0 ** (-2 * i / 8)
            assert table[position, i] == pytest.approx(math.cos(angle), abs=4e-6)
            assert table[position, 4 + i] == pytest.approx(math.sin(angle), abs=4e-6)


def test_rope_is_a_rotation_that_depends_on_distance_alone():
    """Lengths stay, and a query and a key of equal distance have equal products."""
    table = rope_table(30, 6).double()
    qkv = normal(1, 1, 3 * 6)
    products = []
    for at, distance in ((0, 5), (11, 5), (24, 5)):
        q = reference.qk_norm_rope(qkv, None, None, torch.tensor([[at + distance]]), 1, 1, table)[0]
        k = reference.qk_norm_rope(qkv, None, None, torch.tensor([[at]]), 1, 1, table)[1]
        assert q.norm() == pytest.approx(qkv[..., :6].norm().item())
        products.append((q * k).sum().item())
    assert products == pytest.approx([products[0]] * 3, rel=1e-5)


def test_qk_norm_rope_splits_by_heads_and_leaves_the_values():
    qkv, q_weight, k_weight, positions, q_heads, kv_heads, table = qk_inputs(normal)
    q, k, v = reference.qk_norm_rope(qkv, q_weight, k_weight, positions, q_heads, kv_heads, table)
    heads = qkv.view(2, 3, 8, 6)
    assert torch.equal(v, heads[:, :, 6:])
    cos, sin = table[positions].unsqueeze(2).chunk(2, dim=-1)
    for got, part, weight in ((q, heads[:, :, :4], q_weight), (k, heads[:, :, 4:6], k_weight)):
        a, b = reference.rms_norm(part, weight).chunk(2, dim=-1)
        assert torch.equal(got, torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1))


def by_loops(q, k, v, key_mask=None, scale=None, offsets=None):
    """Attention, one query of one head at a time."""
    out = torch.zeros_like(q)
    batch, lq, q_heads, head_dim = q.shape
    lk, group = k.shape[1], q_heads // k.shape[2]
    for b in range(batch):
        for i in range(lq):
            first = lk - lq if offsets is None else int(offsets[b])
            seen = [j for j in range(first + i + 1) if key_mask is None or key_mask[b, j]]
            for h in range(q_heads if seen else 0):
                keys, values = k[b, seen, h // group], v[b, seen, h // group]
                scores = keys @ q[b, i, h] * (scale or head_dim**-0.5)
                out[b, i, h] = scores.softmax(0) @ values
    return out


@pytest.mark.parametrize(("lq", "lk"), [(5, 5), (1, 5), (3, 5)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_attention_is_its_loops(lq, lk, masked, scale):
    q, k, v = normal(2, lq, 4, 6), normal(2, lk, 2, 6, seed=1), normal(2, lk, 2, 6, seed=2)
    key_mask = torch.arange(lk) >= torch.tensor([[0], [3]]) if masked else None
    got = reference.attention(q, k, v, key_mask, scale)
    torch.testing.assert_close(got, by_loops(q, k, v, key_mask, scale))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_rows_that_end_at_places_of_their_own(masked):
    q, k, v = normal(3, 2, 4, 6), normal(3, 9, 2, 6, seed=1), normal(3, 9, 2, 6, seed=2)
    offsets = torch.tensor([0, 7, 3])
    key_mask = torch.arange(9) >= torch.tensor([[0], [3], [4]]) if masked else None
    expected = by_loops(q, k, v, key_mask, offsets=offsets)
    for row, end in enumerate(offsets + 2):
        k[row, end:] = v[row, end:] = math.nan
    got = reference.attention(q, k, v, key_mask, offsets=offsets)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("scale", [None, 0.2])
def test_attention_of_packed_documents(scale):
    lengths = [4, 0, 1, 6]
    q, k, v = normal(1, 11, 4, 6), normal(1, 11, 2, 6, seed=1), normal(1, 11, 2, 6, seed=2)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    got = reference.attention(q, k, v, scale=scale, cu_seqlens=cu_seqlens)
    parts = zip(*(t.split(lengths, dim=1) for t in (q, k, v)), strict=True)
    expected = [by_loops(*part, scale=scale) for part in parts]
    torch.testing.assert_close(got, torch.cat(expected, dim=1))


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_linear_cross_entropy_is_its_formula(smoothing):
    """A token at a time: CoreNet's z-loss, and the label smoothing of F.cross_entropy."""
    hidden, weight, z = normal(6, 5), normal(7, 5, seed=1), 0.01
    losses = []
    for h, target in zip(hidden, TARGETS.flatten().tolist(), strict=True):
        logits = (weight @ h).tolist()
        lse = math.log(sum(math.exp(x) for x in logits))
        wanted = (1 - smoothing) * (logits[target] if target >= 0 else 0.0)
        wanted += smoothing * sum(logits) / 7
        losses.append(lse - wanted + z * lse**2 if target >= 0 else 0.0)
    options = {"z_loss": z, "label_smoothing": smoothing}
    flat = TARGETS.flatten()
    for reduction, expected in (("none", losses), ("sum", sum(losses)), ("mean", sum(losses) / 4)):
        got = reference.linear_cross_entropy(hidden, weight, flat, reduction=reduction, **options)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=TORCH))
    plain = reference.linear_cross_entropy(hidden, weight, flat, label_smoothing=smoothing)
    torch.testing.assert_close(
        plain, torch.nn.functional.cross_entropy(hidden @ weight.T, flat, label_smoothing=smoothing)
    )


def test_the_mean_of_no_targets_is_0():
    hidden, weight = leaf(2, 5), leaf(7, 5, seed=1)
    loss = reference.linear_cross_entropy(hidden, weight, torch.tensor([-100, -100]), z_loss=0.1)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0
    assert not any(g.any() for g in grads)

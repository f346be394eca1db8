"""The reference's equally right evaluations: exact in exact arithmetic, repeatable, made only when
they are needed, and enough for a kernel that is right beside a reference that is so by luck.
"""

from functools import partial

import pytest
import torch
from helpers.mutations import MUTATIONS

from elmkernels import ops, reference
from elmkernels.reference import swiglu
from elmkernels.reference.attention import visible_keys, without_unseen
from elmkernels.testing import CASES, OPS, make
from elmkernels.testing.cases import attention
from elmkernels.testing.equivalent import Orders, put_back, take
from elmkernels.testing.parity import EVALUATIONS, Expected, runnable, specification
from elmkernels.testing.rule import compare, relative_errors

CASE = {op: {case.name: case for case in cases} for op, cases in CASES.items()}
# Every shape of an op's sums, options and layouts; none is large.
EXACT = {
    "rms_norm": ["width_33", "transposed", "no_columns", "no_rows", "one_dimension", "eps_0.01"],
    "add_rms_norm": ["mixed_layouts", "sum_unused", "normed_unused"],
    "qk_norm_rope": [
        "ragged", "no_batch_dimension", "no_norm", "no_norm_cached", "cached_strided", "head_dim_2",
        "left_padded", "values_unused", "no_batch", "transposed",
    ],
    "swiglu": ["width_7", "transposed", "no_rows"],
    "attention": [
        "one_key_outweighs", "varlen_one_key_outweighs", "group_of_3", "two_keys", "chunk",
        "ragged_chunks", "ragged_and_padded", "left_padded_chunk", "varlen_strided", "scale",
        "varlen_empty_among_ones", "no_batch", "no_queries", "varlen_nothing",
    ],
    "linear": [
        "plain_gradient_rows_17", "affine4_64_three_dimensions", "packed12_k_200",
        "plain_no_outputs", "plain_norm_residual_gradient", "affine8_32_norm_swiglu_gradient",
        "plain_one_dimension", "plain_norm_no_rows", "packed12_many_escapes",
        "affine8_64_scales_float16_rows_3",
    ],
    "decode_step": [
        "no_batch", "no_layers", "no_norm", "no_gate", "group_8", "odd_widths_packed12", "width_1",
        "affine4_64_untied", "first_token", "plain_ragged_tokens",
    ],
    "linear_cross_entropy": [
        "none_every_option", "mean_ignored", "sum_no_rows", "one_dimension", "ignore_index_0",
        "vocabulary_2", "huge_offset", "transposed",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in EXACT for name in EXACT[op]])
def test_another_order_changes_nothing_but_rounding(op, name):
    expected = Expected(op, CASE[op][name], CASE[op][name].dtypes[0])
    got = expected.run(specification(op, 5), torch.float64)
    assert got.keys() == expected.truth.keys()
    for what, truth in expected.truth.items():
        assert got[what].shape == truth.shape, what
        if truth.numel():
            # Of the 53 bits the offset that all logits share takes 13, their sums the rest.
            size = max(1.0, float(truth.abs().max()))
            assert float((got[what] - truth).abs().max()) <= 2**-32 * size, what


def rounded_elsewhere(case):
    """An attention case in float64 by what half types are evaluated in besides, and plainly."""
    (q, k, v), given = make(case, torch.float32)
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    group, offsets = q.shape[2] // k.shape[2], given.get("offsets")
    keys, values = (k, v) if offsets is None else without_unseen(k, v, q.shape[1], offsets)
    visible = visible_keys(
        q.shape[1], k.shape[1], given.get("key_mask"), offsets, torch.device("cpu")
    )
    heads = (x.repeat_interleave(group, dim=2).transpose(1, 2) for x in (keys, values))
    real = visible.any(-1, keepdim=True)
    out = attention.rounded_elsewhere(
        q.transpose(1, 2), *heads, visible | ~real, given.get("scale"), 1.37
    )
    out = out.masked_fill(~real, 0.0).transpose(1, 2)
    plain = reference.attention(q, k, v, **given)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).double()
    found = (torch.autograd.grad(y, (q, k, v), dout) for y in (out, plain))
    return [[y, *grads] for y, grads in zip((out, plain), found, strict=True)]


@pytest.mark.parametrize(
    "name", ["group_of_3", "two_keys", "ragged_and_padded", "left_padded_chunk", "scale"]
)
def test_other_roundings_of_attention_change_nothing_else(name):
    got, expected = rounded_elsewhere(CASE["attention"][name])
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).detach().abs().max()) <= 2**-40 * max(
            1.0, float(b.detach().abs().max())
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("op", "name"), [("attention", "two_keys"), ("linear_cross_entropy", "mean")]
)
def test_evaluations_of_half_types_round_otherwise(op, name, dtype):
    """Not all eight in the same bits, as those of orders alone may be."""
    expected = Expected(op, CASE[op][name], dtype)
    for what in expected.truth:
        if what.startswith("grad"):
            found = [expected.evaluation(i)[what] for i in range(EVALUATIONS)]
            assert any(not torch.equal(found[0], other) for other in found[1:]), what


def test_an_order_follows_from_its_seed():
    orders = [Orders(seed, torch.device("cpu")) for seed in (1, 1, 2)]
    first, second, other = (order(50) for order in orders)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(first.sort().values, torch.arange(50))
    pairs = orders[0].pairs(8)
    assert torch.equal(pairs[:4] + 4, pairs[4:])
    assert torch.equal(orders[0].heads(3, 4) // 4, torch.arange(3).repeat_interleave(4))
    x = torch.randn(4, 5, 6)
    by = orders[0](4), None, orders[0](6)
    assert torch.equal(put_back(take(x, *by), *by), x)


def test_evaluations_are_repeatable_and_differ():
    first, again = (Expected("attention", CASE["attention"]["chunk"], torch.float32) for _ in "ab")
    for i in range(3):
        for what, result in first.evaluation(i).items():
            assert torch.equal(result, again.evaluation(i)[what])
    assert not torch.equal(first.evaluation(1)["out"], first.evaluation(2)["out"])
    other = Expected("attention", CASE["attention"]["chunk"], torch.float32, seed=1)
    assert not torch.equal(first.evaluation(1)["out"], other.evaluation(1)["out"])


def test_no_more_is_evaluated_than_a_candidate_needs():
    expected = Expected("swiglu", CASE["swiglu"]["width_33"], torch.float32)
    assert all(c.ok and c.evaluations == 1 for c in expected.compare(swiglu))
    assert len(expected.evaluated) == 1
    wrong = expected.compare(lambda x: swiglu(x) * 1.001)
    assert not any(c.ok for c in wrong)
    assert {c.evaluations for c in wrong} == {len(expected.evaluated)} == {EVALUATIONS}


ILL = [
    ("attention", "one_key_outweighs"),
    ("attention", "varlen_one_key_outweighs"),
    ("attention", "scores_of_hundreds"),
    ("linear", "plain_outliers"),
    ("linear", "plain_norm_outliers"),
    ("rms_norm", "outliers"),
    ("add_rms_norm", "outliers"),
    ("qk_norm_rope", "outliers"),
    ("linear_cross_entropy", "huge_negative_offset"),
    ("linear_cross_entropy", "logits_of_ten_thousand"),
]


def right_by_luck(expected: Expected) -> Expected:
    """As where the plain reference's sums come in the best of orders: it is truth, rounded."""
    plain = expected.evaluated[0]
    rounded = {what: truth.to(plain[what].dtype) for what, truth in expected.truth.items()}
    expected.evaluated[0] = rounded
    return expected


@pytest.mark.parametrize(("op", "name"), ILL)
def test_a_right_kernel_passes_beside_a_reference_that_is_right_by_luck(op, name):
    expected = right_by_luck(Expected(op, CASE[op][name], torch.float32))
    for seed in (101, 102):
        found = expected.compare(specification(op, seed))
        assert all(c.ok for c in found), found
    fn = OPS[op].observe(getattr(ops, op))
    for backend in runnable(op):
        found = expected.compare(partial(fn, backend=backend))
        assert all(c.ok for c in found), found


def test_one_evaluation_alone_would_fail_it():
    failed = 0
    for op, name in ILL:
        expected = right_by_luck(Expected(op, CASE[op][name], torch.float32))
        got = expected.results(specification(op, 101))
        failed += any(not c.ok for c in expected.judge(got, (0,)))
    assert failed >= 4


def at_moved_inputs(expected: Expected, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Truth, had the inputs been what they may have been before they were rounded."""
    generator = torch.Generator().manual_seed(0)

    def moved(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        wide = x.detach().double()
        unit = torch.exp2(wide.abs().clamp(min=1e-30).log2().floor()) * torch.finfo(dtype).eps
        by = torch.rand(wide.shape, generator=generator, dtype=torch.float64) - 0.5
        return (wide + by * unit).requires_grad_(x.requires_grad)

    before = expected.inputs
    expected.inputs = tuple(map(moved, before[0])), {k: moved(v) for k, v in before[1].items()}
    found = expected.run(specification(expected.op), torch.float64)
    expected.inputs = before
    return found


@pytest.mark.parametrize("name", ["one_key_outweighs", "varlen_one_key_outweighs"])
def test_the_inputs_own_rounding_is_no_yardstick(name):
    """Float32 doesn't need it, and half types would let a truncating store through."""
    for dtype in (torch.float32, torch.bfloat16):
        expected = Expected("attention", CASE["attention"][name], dtype)
        moved = at_moved_inputs(expected, dtype)["out"]
        truth, plain = expected.truth["out"], expected.evaluated[0]["out"]
        errors = relative_errors(truth, plain), relative_errors(truth, moved)
        truncated = MUTATIONS["attention"]["truncated"]
        wrong = truncated(*expected.inputs[0], **expected.inputs[1])
        assert not compare(truth, plain, wrong).ok
        if dtype == torch.float32:
            assert errors[1] < errors[0]
        else:
            assert compare(truth, plain, wrong, floor=errors[1]).ok

"""linear_cross_entropy beside its baselines: three products of 2 rows v d, and memory."""

OP = "linear_cross_entropy"


def test_linear_cross_entropy(measure, case, dtype, backend, backward):
    measure(OP, case, dtype, backend, backward)

"""linear beside its baselines: few rows read the weight's bytes once, more are bound by
arithmetic.
"""

OP = "linear"


def test_linear(measure, case, dtype, backend, backward):
    measure(OP, case, dtype, backend, backward)

"""swiglu beside its baselines: memory-bound, 3 n elements a row forward and 5 n more backward."""

OP = "swiglu"


def test_swiglu(measure, case, dtype, backend, backward):
    measure(OP, case, dtype, backend, backward)

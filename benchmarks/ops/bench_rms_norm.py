"""rms_norm beside its baselines: memory-bound, 2 n elements a row forward and 3 n more backward."""

OP = "rms_norm"


def test_rms_norm(measure, case, dtype, backend, backward):
    measure(OP, case, dtype, backend, backward)

"""add_rms_norm beside its baselines: memory-bound, 4 n elements a row forward, 4 n more
backward.
"""

OP = "add_rms_norm"


def test_add_rms_norm(measure, case, dtype, backend, backward):
    measure(OP, case, dtype, backend, backward)

"""qk_norm_rope beside its baselines: memory-bound, the q and k columns in and out, once each."""

OP = "qk_norm_rope"


def test_qk_norm_rope(measure, case, dtype, backend, backward):
    measure(OP, case, dtype, backend, backward)

"""decode_step beside its baselines: it reads every weight, and the keys and values seen, once."""

OP = "decode_step"


def test_decode_step(measure, case, dtype, backend, backward):
    measure(OP, case, dtype, backend, backward)

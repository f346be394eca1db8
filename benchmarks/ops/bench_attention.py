"""attention beside its baselines: bound by arithmetic on prompts, by memory on single tokens."""

OP = "attention"


def test_attention(measure, case, dtype, backend, backward):
    measure(OP, case, dtype, backend, backward)

"""Every op beside its baselines: each of its cases by each backend, forward and with the backward.

A case that a smaller one stands for (`Case.check`) takes its parity from that.
"""


def test_op(measure, op, case, dtype, backend, backward):
    measure(op, case, dtype, backend, backward)

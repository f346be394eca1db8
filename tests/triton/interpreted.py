"""Triton's own corners, run by test_interpreted.py in an interpreted process."""

from elmkernels.backends import BACKENDS


def test_this_process_is_interpreted():
    assert BACKENDS["triton"].missing is None
    assert "cpu" in BACKENDS["triton"].devices

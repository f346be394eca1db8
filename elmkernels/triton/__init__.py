"""Triton kernels, one file per op; imported at the first launch."""

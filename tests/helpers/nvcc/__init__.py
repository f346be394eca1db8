"""csrc/cuda as nvcc compiles it, on a machine without a GPU: host code that runs, PTX that is
executed.
"""

"""Triton's interpreter without what it does again and again: it takes half the time, and computes
the same.
"""

from types import FunctionType, SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """A launch puts numpy's functions into Triton's language, and so does each call of a function
    within a kernel, though they are there already. Here they are put there once, for good.
    """
    sees_all = FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    interpreter._patch_lang(sees_all)
    left = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda function: left

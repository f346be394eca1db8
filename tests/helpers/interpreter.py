"""Triton's interpreter without what it does again and again: it takes half the time, and computes
the same.
"""

import functools
from collections.abc import Callable
from types import FunctionType, SimpleNamespace

import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter


def hasten() -> None:
    """Leave out what a kernel's numbers don't depend on, each part if this Triton has it."""
    _patch_once()
    _make_types_once()
    _skip_unread_overflow()
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)


def _patch_once() -> None:
    """A launch puts numpy's functions into Triton's language, and so does each call of a function
    within a kernel, though they are there already. Here they are put there once, for good.
    """
    sees_all = FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    interpreter._patch_lang(sees_all)
    left = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda function: left


def _make_types_once() -> None:
    """A tensor's shape is wrapped anew for each tensor, a block's type made anew for each value,
    name included. Here a block's type is one object for each element type and shape.
    """
    block = tl.core.block_type
    first, known = block.__init__, {}

    def remembered(cls: type, element_ty: tl.dtype, shape: list) -> tl.dtype:
        space = getattr(element_ty, "address_space", None)
        key = element_ty.name, space, *(getattr(s, "value", s) for s in shape)
        if key not in known:
            known[key] = object.__new__(cls)
            first(known[key], element_ty, shape)
        return known[key]

    block.__new__ = staticmethod(remembered)
    block.__init__ = lambda self, element_ty, shape: None
    wrap = tl.tensor.__init__

    def tensor(self: tl.tensor, handle: object, type: tl.dtype) -> None:
        made = type.__dict__.get("_made")
        if made is None:
            wrap(self, handle, type)
            type._made = self.shape, self.numel, self.dtype
        else:
            self.handle, self.type = handle, type
            self.shape, self.numel, self.dtype = made

    tl.tensor.__init__ = tensor


def _skip_unread_overflow() -> None:
    """Each sum and product of integers is made again in int64 and compared with their range, for an
    assertion that the interpreter then leaves out unless it debugs.
    """
    checked = semantic.TritonSemantic.binary_op_sanitize_overflow_impl

    def if_read(self: semantic.TritonSemantic, *arguments: object) -> None:
        if self.builder.options.debug:
            checked(self, *arguments)

    semantic.TritonSemantic.binary_op_sanitize_overflow_impl = if_read


def _by_name(function: Callable) -> Callable:
    """A function of one Triton type, remembered by the type's name, which says all of it."""
    known = {}

    @functools.wraps(function)
    def remembered(dtype: tl.dtype) -> object:
        if dtype.name not in known:
            known[dtype.name] = function(dtype)
        return known[dtype.name]

    return remembered

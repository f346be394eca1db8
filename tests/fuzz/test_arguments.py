"""Every argument of every op, given something else: an error that names it, or a result."""

import inspect
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from elmkernels import ops
from elmkernels.testing import CASES, make
from elmkernels.weights.formats import Affine, Arena, DecoderWeights, Packed12

THINGS = {
    "3": 3, "-1": -1, "0": 0, "2**70": 2**70, "True": True, "2.5": 2.5, "nan": float("nan"),
    "inf": float("inf"), "text": "x", "bytes": b"x", "None": None, "[]": [], "[1.0]": [1.0],
    "()": (), "{}": {}, "object": object(), "array": np.zeros(3), "dtype": torch.float32,
    "class": Tensor, "function": len, "scalar": torch.zeros(()), "nothing": torch.empty(0),
    "bytes of a tensor": torch.zeros(3, dtype=torch.int8),
}  # fmt: skip
LIKE = {
    "complex": lambda x: x.to(torch.complex64),
    "bool": lambda x: x.to(torch.bool),
    "float64": lambda x: x.to(torch.float64),
    "int32": lambda x: x.to(torch.int32),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "one more": lambda x: x.new_zeros([n + 1 for n in x.shape]),
    "a dimension more": lambda x: x[None],
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
}
# Cases that together have arguments of all kinds.
NAMES = {
    "rms_norm": ["width_33"],
    "add_rms_norm": ["width_33"],
    "qk_norm_rope": ["270M_12_3_heads", "no_norm", "no_norm_cached"],
    "swiglu": ["width_33"],
    "attention": ["270M_prompt", "ragged_tokens", "ragged_and_padded", "270M_varlen"],
    "linear": [
        "plain_rows_1", "affine8_64_rows_1", "packed12_rows_1", "plain_norm_swiglu_rows_1",
        "plain_residual_rows_1",
    ],
    "linear_cross_entropy": ["none", "mean_every_option"],
    "decode_step": ["plain_batch_1", "plain_ragged_tokens"],
}  # fmt: skip
PICKED = [(op, case) for op, names in NAMES.items() for case in CASES[op] if case.name in names]


def garbage_for(value):
    """(what it is, a value in place of another)."""
    yield from THINGS.items()
    if isinstance(value, Tensor):
        for name, change in LIKE.items():
            try:
                yield name, change(value.detach())
            except (RuntimeError, NotImplementedError):
                continue
    if is_dataclass(value):
        for field in fields(value):
            for name, thing in garbage_for(getattr(value, field.name)):
                try:
                    yield f"{field.name} = {name}", replace(value, **{field.name: thing})
                except (TypeError, ValueError):
                    continue  # refused when it was made
    elif isinstance(value, tuple) and hasattr(value, "_replace"):
        for field in value._fields:
            for name, thing in garbage_for(getattr(value, field)):
                yield f"{field} = {name}", value._replace(**{field: thing})


# torch's own words on tensors that aren't strided.
OF_TORCH = ("sparse", "nested")


def clean(op, fn, given, name, what):
    """A call gives something, or an error of the kinds that there are, which names the argument if
    it is of another type.
    """
    thing = THINGS.get(what, torch.empty(0))
    try:
        with torch.no_grad():
            fn(**given)
    except (TypeError, ValueError, NotImplementedError) as error:
        if isinstance(error, TypeError) and not isinstance(thing, Tensor):
            assert name in str(error), f"{op}({name}={what}): {error} doesn't name it"
        said = str(error)
        assert "elmkernels_" not in said or what.endswith(OF_TORCH), f"{op}({name}={what}): {said}"
    except RuntimeError as error:
        assert what.endswith(OF_TORCH) or "meta" in what, f"{op}({name}={what}): unclean {error}"


@pytest.mark.parametrize(("op", "case"), PICKED, ids=str)
def test_garbage_is_refused(op, case):
    args, kwargs = make(case, case.dtypes[0])
    fn = getattr(ops, op)
    given = dict(inspect.signature(fn).bind(*args, **kwargs).arguments)
    detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in given.items()}
    for name in inspect.signature(fn).parameters:
        for what, thing in garbage_for(detached.get(name)):
            try:
                clean(op, fn, detached | {name: thing}, name, what)
            except AssertionError:
                raise
            except BaseException as error:
                raise AssertionError(
                    f"{op}({name}: {what}): unclean {type(error).__name__}: {error}"
                ) from error


def test_every_op_and_every_kind_of_argument_is_among_them():
    assert {op for op, _ in PICKED} == set(CASES)
    assert len(PICKED) == sum(map(len, NAMES.values()))
    given = [make(case, case.dtypes[0]) for _, case in PICKED]
    found = {type(x) for args, _ in given for x in args}
    assert {Tensor, Affine, Packed12, DecoderWeights, Arena} <= found
    assert {"key_mask", "offsets", "cu_seqlens"} <= {name for _, kwargs in given for name in kwargs}

"""The layout of a prepacked weight is turned back bit by bit, and its dict of Parameters is one."""

import copy
import pickle

import pytest
import torch
from torch import nn

from elmkernels import OpenELM, Plan
from elmkernels.acceleration.classes import fuse
from elmkernels.acceleration.projections import Linear, Products
from elmkernels.acceleration.routines import alone_plan
from elmkernels.testing.cases.draw import models
from elmkernels.weights.prepacked import (
    Prepacked,
    dense_of,
    held_of,
    parameters_of,
    prepacked_copy,
)

INTS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().view(INTS[x.dtype])


class TestRoundTrip:
    """The layout is turned back bit by bit: NaNs, infinities, zeros of both signs."""

    @pytest.mark.parametrize("dtype", INTS)
    @pytest.mark.parametrize("shape", [(1, 5), (130, 1), (33, 70), (17, 2049), (3072, 1280)])
    def test_all_bits(self, dtype, shape):
        most = 1 << (8 * dtype.itemsize - 1)
        numbers = torch.randint(-most, most, shape, dtype=INTS[dtype])
        weight = nn.Parameter(numbers.clone().view(dtype), requires_grad=False)
        weight.mine = "kept"
        own = Prepacked({"weight": weight, "bias": None})
        del weight
        assert own.hold() is not None and dict.get(own, "weight") is None
        back = own["weight"]
        assert torch.equal(bits(back), numbers) and back.is_contiguous()
        assert type(back) is nn.Parameter and not back.requires_grad and back.mine == "kept"
        assert own["weight"] is back

    @pytest.mark.slow
    @pytest.mark.parametrize("name", models())
    def test_every_shape_of_the_released_models(self, name):
        model = OpenELM(models()[name], device="meta")
        for n, k in {tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)}:
            numbers = torch.randint(-(1 << 15), 1 << 15, (n, k), dtype=torch.int16)
            again = dense_of(prepacked_copy(numbers.view(torch.bfloat16)))
            assert torch.equal(again.view(torch.int16), numbers)


class TestAsADict:
    """What reads a module's Parameters as a dict finds what was there."""

    READERS = {
        "[]": lambda d: {"weight": d["weight"], "bias": d["bias"]},
        "get": lambda d: {"weight": d.get("weight"), "bias": d.get("bias")},
        "items": lambda d: dict(list(d.items())),
        "values": lambda d: dict(zip(d.keys(), d.values(), strict=True)),
        "dict": dict,
        "**": lambda d: {**d},
        "copy": lambda d: d.copy(),
        "copy.copy": copy.copy,
        "|": lambda d: d | {},
        "or": lambda d: {} | d,
        "update": lambda d: (e := {}, e.update(d))[0],
        "pop": lambda d: {"weight": d.pop("weight"), "bias": d.pop("bias")},
        "popitem": lambda d: dict([d.popitem(), d.popitem()]),
        "setdefault": lambda d: {k: d.setdefault(k) for k in ("weight", "bias")},
        "pickle": lambda d: pickle.loads(pickle.dumps(d)),
        "deepcopy": copy.deepcopy,
    }

    def make(self):
        layer = nn.Linear(48, 64, bias=False)
        expected = layer.weight.detach().clone()
        fuse(layer, Linear, Products(alone_plan(Plan()), alone=True))
        assert layer.hold() is not None
        return layer, expected

    @pytest.mark.parametrize("reader", READERS)
    def test_readers(self, reader):
        layer, expected = self.make()
        found = self.READERS[reader](parameters_of(layer))
        assert found.keys() == {"weight", "bias"} and found["bias"] is None
        assert torch.equal(found["weight"], expected)
        assert "Parameter containing" in repr(found)

    @pytest.mark.parametrize("how", ["None", "del", "clear", "pop", "update", "|="])
    def test_writers(self, how):
        layer, _ = self.make()
        own, new = parameters_of(layer), nn.Parameter(torch.ones(64, 48))
        if how == "None":
            layer.weight = None
            assert own["weight"] is None and held_of(layer) is None
        elif how == "del":
            del layer.weight
            assert not hasattr(layer, "weight")
        elif how in ("clear", "pop"):
            own.clear() if how == "clear" else own.pop("weight")
            assert "weight" not in own and held_of(layer) is None
        else:
            own.update(weight=new) if how == "update" else own.__ior__({"weight": new})
            assert own["weight"] is new and held_of(layer) is None
            with torch.no_grad():
                assert torch.equal(layer(torch.ones(1, 48)), torch.full((1, 64), 48.0))

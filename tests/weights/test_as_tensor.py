"""The weight of a compressed projection as others' code sees it: it is computed with as the dense
matrix, and what is written into it is compressed in the same form.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

from elmkernels.openelm.compressed import packed12_module, quantized_module
from elmkernels.weights.affine import quantize_weight
from elmkernels.weights.as_tensor import AsTensor
from elmkernels.weights.packed12 import pack_weight


def matrix(dtype=torch.float32, seed=0):
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)


FORMS = {
    "8 bits": lambda w: quantized_module("proj_1", quantize_weight(w, 8, 32)),
    "4 bits": lambda w: quantized_module("proj_1", quantize_weight(w, 4, 64)),
    "8 bits, bfloat16": lambda w: quantized_module("proj_1", quantize_weight(w.bfloat16(), 8, 32)),
    "packed12": lambda w: packed12_module("proj_1", pack_weight(w.bfloat16())),
}
READS = {
    "+": lambda w: w + 1,
    "@": lambda w: torch.ones(3, 24, dtype=w.dtype) @ w,
    "norm": lambda w: torch.linalg.norm(w, dim=1),
    "t": lambda w: w.t(),
    "clone": lambda w: w.clone(),
    "detach": lambda w: w.detach() * 1,
    "float": lambda w: w.to(torch.float64),
    "data": lambda w: w.data,
    "rows": lambda w: w[3:7],
    "linear": lambda w: nn.functional.linear(torch.ones(2, 64, dtype=w.dtype), w),
}


@pytest.fixture(params=FORMS)
def module(request):
    return FORMS[request.param](matrix())


@pytest.mark.parametrize("read", READS)
def test_it_is_read_as_the_dense_matrix(read, module):
    dense = module.compressed().dense(module.dtype)
    got, expected = READS[read](module.weight), READS[read](dense)
    assert type(got) is torch.Tensor and torch.equal(got, expected)


def test_what_it_says_of_itself(module):
    weight = module.weight
    assert isinstance(module, nn.Linear) and module.bias is None
    assert (weight.shape, weight.dtype) == ((24, 64), module.dtype)
    assert not weight.requires_grad and list(module.parameters()) == []
    assert list(module.state_dict()) == list(module.names)
    assert "AsTensor([24, 64]" in repr(weight)


def add_to_data(module, delta):
    module.weight.data += delta


def add_in_place(module, delta):
    module.weight.add_(delta)


def set_weight(module, delta):
    module.weight = module.weight.data + delta


def set_parameter(module, delta):
    module.weight = nn.Parameter(module.weight.data + delta)


@pytest.mark.parametrize("write", [add_to_data, add_in_place, set_weight, set_parameter])
def test_what_is_written_is_compressed_again(write, module):
    delta = 0.1 * matrix(module.dtype, seed=1)
    expected = module.encoded(module.compressed().dense(module.dtype) + delta)
    write(module, delta)
    assert list(module.state_dict()) == list(module.names)
    for a, b in zip(module.compressed().parts(), expected.parts(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    x = torch.ones(2, 64, dtype=module.dtype)
    near = (module(x) - nn.functional.linear(x, expected.dense(module.dtype))).abs().max()
    assert near < (1e-4 if module.dtype == torch.float32 else 0.2)


def test_its_own_weight_given_back_changes_no_bit(module):
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.weight = module.weight
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_weight_of_another_shape_is_refused(module):
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"weight must be \[24, 64\], got \[24, 32\]"):
        module.weight = matrix()[:, :32]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_that_no_form_holds_are_refused(bits):
    module = FORMS[f"{bits} bits"](matrix())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match="finite"):
        module.weight.data *= torch.inf
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_copies_hold_their_own(module):
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        before = module.weight.data
        other.weight.data += 1
        assert torch.equal(module.weight.data, before)
        assert not torch.equal(other.weight.data, before)
        assert isinstance(other.weight, AsTensor)

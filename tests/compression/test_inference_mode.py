"""quantize, pack and unpack inside inference mode: what they make is as it is without, and can be
written and trained outside."""

import pytest
import torch
from helpers.checkpoints import SMALL as CONFIG

from elmkernels import OpenELM, accelerate, pack, quantize, unpack
from elmkernels.weights.affine import quantize_weight
from elmkernels.weights.packed12 import pack_weight

IDS = torch.tensor([[1, 2, 3, 4]])
DEEDS = {
    "8 bits": lambda m: quantize(m, 8, 32, progress=False),
    "4 bits": lambda m: quantize(m, 4, 32, progress=False),
    "packed": lambda m: pack(m, progress=False),
    "packed and unpacked": lambda m: (pack(m, progress=False), unpack(m, progress=False)),
    "packed, then 4 bits": lambda m: (pack(m, progress=False), quantize(m, 4, 32, progress=False)),
}


def made(mode, deed, accelerated, born_there):
    with torch.inference_mode(mode and born_there):
        model = OpenELM.from_config(CONFIG, seed=1, dtype=torch.bfloat16)
    with torch.inference_mode(mode):
        if accelerated:
            accelerate(model)
        DEEDS[deed](model)
    return model


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("born_there", [False, True])
@pytest.mark.parametrize("deed", DEEDS)
def test_inside_inference_mode_it_is_the_same(deed, born_there, accelerated):
    got = made(True, deed, accelerated, born_there)
    expected = made(False, deed, accelerated, False)
    left, right = got.state_dict(), expected.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        a, b = (x.view(torch.uint8) if x.numel() else x for x in (left[name], right[name]))
        assert torch.equal(a, b), name
    for module in got.modules():
        buffers = [b for b in module._buffers.values() if b is not None]
        assert not any(b.is_inference() for b in buffers if b.dtype != torch.float32)
    with torch.inference_mode():
        assert torch.equal(got(IDS), expected(IDS))


def test_what_is_unpacked_there_can_be_trained():
    model = made(True, "packed and unpacked", False, True)
    weight = model.layers[0].ffn.proj_1.weight
    assert not weight.is_inference()
    x = torch.ones(1, weight.shape[1], dtype=weight.dtype)
    torch.nn.functional.linear(x, weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("threads", [1, 2])
def test_weights_alone(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        w = torch.randn(700, 512)
        with torch.inference_mode():
            affine, packed = quantize_weight(w, 4, 32), pack_weight(w.bfloat16())
        for got, expected in (
            (affine, quantize_weight(w, 4, 32)), (packed, pack_weight(w.bfloat16()))
        ):  # fmt: skip
            pairs = zip(got.parts()[:-1], expected.parts()[:-1], strict=True)
            for a, b in ((a, b) for a, b in pairs if a is not None):
                assert not a.is_inference()
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    finally:
        torch.set_num_threads(before)

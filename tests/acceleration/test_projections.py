"""Projections keep a prepacked copy of their weight only as long as it is that weight's."""

import pytest
import torch
from helpers.checkpoints import CONFIG
from helpers.golden import assert_as_accurate
from torch import nn

from elmkernels import OpenELM, OpenELMConfig, accelerate
from elmkernels.acceleration.classes import fuse
from elmkernels.acceleration.projections import Linear, Products
from elmkernels.acceleration.routines import PREPACKED, Plan


class TestPrepackedWeights:
    """A prepacked copy never outlives the weight it was made from."""

    plan = Plan(PREPACKED, PREPACKED, PREPACKED)

    def make(self) -> tuple[Linear, torch.Tensor]:
        layer = nn.Linear(64, 48, bias=False)
        fuse(layer, Linear, Products(self.plan))
        return layer, torch.randn(3, 64)

    def check(self, layer: Linear, x: torch.Tensor) -> None:
        with torch.no_grad():
            torch.testing.assert_close(layer(x), x @ layer.weight.T)
        assert layer.products.nbytes in (0, layer.weight.nbytes)

    def test_it_is_used(self):
        layer, x = self.make()
        self.check(layer, x)
        assert layer.products.nbytes == layer.weight.nbytes

    @pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_optimizer_steps(self, options, set_to_none):
        layer, x = self.make()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **options)
        for _ in range(3):
            self.check(layer, x)
            layer(x).square().sum().backward()
            self.check(layer, x)  # an evaluation between backward and step
            optimizer.step()
            self.check(layer, x)
            optimizer.zero_grad(set_to_none=set_to_none)
            self.check(layer, x)

    def test_loads_and_moves(self):
        layer, x = self.make()
        for change in (
            lambda: layer.load_state_dict({"weight": torch.randn(48, 64)}),
            lambda: layer.load_state_dict({"weight": torch.randn(48, 64)}, assign=True),
            lambda: nn.init.normal_(layer.weight),
            lambda: layer.weight.data.add_(torch.randn(48, 64)),  # as adapters are merged
        ):
            self.check(layer, x)
            change()
            self.check(layer, x)
        layer.bfloat16()
        with torch.no_grad():
            expected = nn.functional.linear(x.bfloat16(), layer.weight)
            assert_as_accurate(layer(x.bfloat16()), expected, (x @ layer.weight.float().T).double())

    def test_training_drops_it(self):
        layer, x = self.make()
        self.check(layer, x)
        layer.train()
        assert layer.products.nbytes == 0


IDS = torch.arange(2 * 24).view(2, 24) * 7 % CONFIG.vocab_size
OPTIMIZERS = {
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=1e-1, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("by", ["loss", "forward", "gradients that are given"])
def test_the_head_is_never_stale(by, optimizer, untied, set_to_none):
    """Its weight is also the embedding's, and is trained by the loss, which calls no projection."""
    given = CONFIG.to_hf_dict() | {"share_input_output_layers": not untied}
    config = OpenELMConfig.from_hf_dict(given)
    model = OpenELM(config, seed=1)
    accelerate(model, plan=Plan(PREPACKED, PREPACKED, PREPACKED))
    step = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(3):
        with torch.no_grad():  # an evaluation, a sample
            model(IDS)
        if by == "loss":
            model.loss(IDS, IDS).backward()
        elif by == "forward":
            model(IDS).square().mean().backward()
        else:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
        step.step()
        step.zero_grad(set_to_none=set_to_none)
        truth = OpenELM(config, seed=0)
        truth.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
        with torch.no_grad():
            torch.testing.assert_close(model(IDS), truth(IDS), rtol=1e-4, atol=1e-5)


def test_a_prepacked_copy_belongs_to_the_weight():
    """Two modules share it, and whoever trains the weight drops it for both."""
    first, second = nn.Linear(64, 48, bias=False), nn.Linear(64, 48, bias=False)
    second.weight = first.weight
    for layer in (first, second):
        fuse(layer, Linear, Products(Plan(PREPACKED, PREPACKED, PREPACKED)))
    x = torch.randn(3, 64)
    with torch.no_grad():
        first(x), second(x)
    assert first.products.nbytes == first.weight.nbytes
    second(x).sum().backward()
    assert first.products.nbytes == 0
    del first, second, layer

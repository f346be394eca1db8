"""Projections keep a prepacked copy of their weight only as long as it is that weight's."""

import pytest
import torch
from helpers.golden import assert_as_accurate
from torch import nn

from elmkernels.acceleration.projections import PREPACKED, Linear, Plan


class TestPrepackedWeights:
    """A prepacked copy never outlives the weight it was made from."""

    plan = Plan(PREPACKED, PREPACKED, PREPACKED)

    def make(self) -> tuple[Linear, torch.Tensor]:
        original = nn.Linear(64, 48, bias=False)
        return Linear(original, self.plan), torch.randn(3, 64)

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

"""The rule for one tensor: several yardsticks, other factors, a floor."""

import math

import pytest
import torch

from elmkernels.testing import model_parity
from elmkernels.testing.rule import EPS32, compare, relative_errors, ulp

TRUTH = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def off(by: float) -> torch.Tensor:
    """Truth in float32 with errors of about this size."""
    return (TRUTH + by * NOISE).float()


def yardsticks(*sizes: float):
    """Of these errors, and a list of those that were asked for."""
    taken = []

    def each():
        for size in sizes:
            taken.append(size)
            yield off(size)

    return each(), taken


def test_the_largest_error_of_several_counts_and_no_more_are_taken_than_needed():
    candidate = off(1e-3)
    assert not compare(TRUTH, off(1e-4), candidate).ok
    several, taken = yardsticks(1e-4, 2e-4, 1e-3, 1e-2)
    found = compare(TRUTH, several, candidate)
    assert found.ok
    assert taken == [1e-4, 2e-4, 1e-3]
    assert found.evaluations == 3
    assert found.yardstick_max == compare(TRUTH, off(1e-3), candidate).yardstick_max


def test_a_smaller_error_later_takes_nothing_back():
    several, taken = yardsticks(9e-4, 1e-5, 1e-6)
    found = compare(TRUTH, several, off(2e-3))
    assert not found.ok
    assert taken == [9e-4, 1e-5, 1e-6]
    assert found.max_allowed == compare(TRUTH, off(9e-4), off(2e-3)).max_allowed


def test_what_has_no_errors_is_not_evaluated_again():
    several, taken = yardsticks(1e-4, 1e-3)
    assert compare(TRUTH, several, off(1e-4)[1:]).evaluations == len(taken) == 1


def test_no_yardstick_is_refused():
    with pytest.raises(ValueError, match="y must have a yardstick, got none"):
        compare(TRUTH, [], off(0), "y")


def test_a_later_yardstick_must_be_finite_too():
    with pytest.raises(ValueError, match="y must be finite"):
        compare(TRUTH, [off(1e-4), off(math.inf)], off(1e-3), "y")


@pytest.mark.parametrize("factors", [(2.0, 1.5), (4.0, 4.0)])
@pytest.mark.parametrize("n", [4, 4000])
def test_factors_and_floor_are_the_formula(factors, n):
    truth, yardstick = TRUTH[:n], off(1e-3)[:n]
    most, rms = float(truth.abs().max()), float(truth.square().mean().sqrt())
    own = relative_errors(truth, yardstick)
    for floor in ((0.0, 0.0), (own[0] * 3, own[1] * 3)):
        found = compare(truth, yardstick, truth.float(), factors=factors, floor=floor)
        luck = 1 + 8 / n
        yardsticks = [max(luck * o, f) for o, f in zip(own, floor, strict=True)]
        constant = ulp(most, torch.float32) + 4 * EPS32 * most, 4 * EPS32 * rms
        assert found.max_allowed == pytest.approx(
            factors[0] * yardsticks[0] * most + constant[0], rel=1e-12
        )
        assert found.rms_allowed == pytest.approx(
            factors[1] * yardsticks[1] * rms + constant[1], rel=1e-12
        )
        assert found.yardstick_max == pytest.approx(max(own[0], floor[0]) * most, rel=1e-12)


def test_relative_errors_of_nothing_are_zero():
    nothing = torch.zeros(3, dtype=torch.float64)
    assert relative_errors(nothing, nothing.float()) == (0.0, 0.0)
    assert relative_errors(TRUTH[:0], off(0)[:0]) == (0.0, 0.0)


def test_the_layers_of_a_model_share_the_largest_yardstick_of_their_kind():
    truth = {"grad layers.0.norm": TRUTH, "grad layers.1.norm": 10 * TRUTH, "logits": TRUTH}
    yardstick = {"grad layers.0.norm": off(1e-5), "grad layers.1.norm": 10 * off(1e-3)}
    floors = model_parity._floors(truth, yardstick | {"logits": off(1e-6)})
    assert floors["grad norm"] == relative_errors(10 * TRUTH, 10 * off(1e-3))
    assert floors["logits"] == relative_errors(TRUTH, off(1e-6))
    wrong = off(1e-3)
    assert not compare(TRUTH, yardstick["grad layers.0.norm"], wrong).ok
    assert compare(TRUTH, yardstick["grad layers.0.norm"], wrong, floor=floors["grad norm"]).ok

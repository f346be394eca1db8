"""What an op moves, by passes, and the command that prints it."""

import os

import pytest
import torch
from helpers.commands import refusal, run_json

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing while it interprets", allow_module_level=True)

from elmkernels.testing import CASES  # noqa: E402
from elmkernels.testing.ptx.meter import MODELS, SMALL, cases_of, measure  # noqa: E402


def passes(op, case, dtype=torch.bfloat16):
    return {one.direction: one for one in measure(op, case, dtype)}


MOST = {"forward": 1.05, "backward": 1.1}
ROW_OPS = ("rms_norm", "add_rms_norm", "qk_norm_rope", "swiglu")


@pytest.mark.parametrize("rows", [1, 17, 45])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("op", ROW_OPS)
def test_the_least_sectors(op, model, rows):
    """Of the memory that a launch touches; of the norms' backward by each access of a warp too,
    from a few rows on that fill a program's warps."""
    (case,) = cases_of(op, (rows,), (model,))
    found = passes(op, case)
    for direction, most in MOST.items():
        one = found[direction]
        assert 0.99 < one.total("distinct") / one.least < most, one.row()
        assert one.total("distinct") <= one.total("sectors")
        assert one.total("conflicts") == 0, one.row()
    if op.endswith("rms_norm") and rows > 1:
        assert found["backward"].total("sectors") < MOST["backward"] * found["backward"].least


def test_what_is_read_again_is_named():
    (case,) = cases_of("rms_norm", (17,), ("OpenELM-270M",))
    found = passes("rms_norm", case)
    assert found["forward"].again == {"weight": 17.0}, "once a row, each a program's"
    tensors = found["forward"].launches[0].tensors
    assert tensors == {"x": (17 * 80, 17 * 80), "weight": (17 * 80, 80), "y": (17 * 80, 17 * 80)}


def test_swiglu_by_hand():
    """It reads gate and up and writes half as much; backward reads three and writes two."""
    case = next(c for c in CASES["swiglu"] if c.name.startswith("270M"))
    found = passes("swiglu", case, torch.float32)
    size = found["forward"].elements * 4
    assert found["forward"].least == found["forward"].total("asked") == 3 * size
    assert found["backward"].total("asked") == 5 * size
    assert found["forward"].issued["store"] > 0 and found["forward"].per_element > 1


def test_every_case_is_there():
    for op in SMALL:
        assert len(cases_of(op)) == len(SMALL[op])
    with pytest.raises(ValueError, match="op must be one that Triton has kernels for, got 'dec"):
        cases_of("decode_step")
    with pytest.raises(ValueError, match="op must be one of rms_norm.*, got 'nothing'"):
        cases_of("nothing")


def test_the_command(capsys):
    found = run_json(capsys, "traffic", "rms_norm", "--model", "OpenELM-270M", "--rows", "2,3")
    assert found["complete"] and found["architecture"] == "sm_80"
    assert [r["direction"] for r in found["records"]] == ["forward", "backward"] * 2
    assert [r["case"] for r in found["records"]][::2] == ["270M_rows_2", "270M_rows_3"]
    assert all(r["distinct"] > 0 and r["launches"] for r in found["records"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["decode_step"], "op must be one of rms_norm"),
        (["rms_norm", "--rows", "0"], "rows"),
        (["rms_norm", "--rows", "17,"], "rows"),
        (["rms_norm", "--model", "OpenELM-7B"], "OpenELM-7B"),
    ],
)
def test_wrong_input(given, said, capsys):
    assert said in refusal(capsys, "traffic", *given)

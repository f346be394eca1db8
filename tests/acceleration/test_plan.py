"""A routine is in a plan only if it gives F.linear's products, by the threads there really are."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import ROOT
from torch.nn import functional as F

from elmkernels.acceleration import projections, routines
from elmkernels.acceleration.projections import Products
from elmkernels.acceleration.routines import (
    AS_MANY,
    LINEAR,
    MV,
    ONEDNN,
    PREPACKED,
    STREAM,
    Plan,
    agrees,
    mv,
    onednn_takes,
    stream,
)
from elmkernels.backends import REFERENCE, choose

# Models of four plans after torch's number of threads has changed, in a process whose OpenMP grants
# two threads of the four that torch believes in.
FEWER_THREADS = """
import json, torch
import elmkernels
from elmkernels import OpenELM, Plan
from elmkernels.openelm import OpenELMConfig

torch.set_num_threads(1)
config = OpenELMConfig(
    num_transformer_layers=2, model_dim=256, head_dim=32, num_gqa_groups=2,
    qkv_multipliers=(0.5, 1.0), ffn_multipliers=(0.5, 2.0), ffn_dim_divisor=64,
    normalize_qk_projections=True, share_input_output_layers=True, vocab_size=300,
    rope_max_length=128, max_context_length=64,
)
ids = torch.arange(1, 41)[None]

def results(model):
    with torch.inference_mode():
        logits = model(ids)
    loss = model(ids).logsumexp(-1).square().mean()
    model.zero_grad()
    loss.backward()
    return [logits, *(p.grad for p in model.parameters())]

def model():
    return OpenELM.from_config(config, seed=0)

expected = results(model())
found = {}
for name in ("oneDNN", "oneDNN prepacked"):
    training = "oneDNN"
    early = model()
    elmkernels.accelerate(early, plan=Plan(name, name, name, training))
    results(early)  # with one thread, for which oneDNN is right
    found[f"{name}, before"] = early
torch.set_num_threads(4)
for name in ("oneDNN", "oneDNN prepacked"):
    late = model()
    elmkernels.accelerate(late, plan=Plan(name, name, name, "oneDNN"))
    found[f"{name}, after"] = late
for prepack in (False, True):
    measured = model()
    elmkernels.accelerate(measured, prepack=prepack)
    found[f"measured, prepack={prepack}"] = measured
def worst(model):
    return max(
        ((a - b).norm() / b.norm()).nan_to_num(nan=1e9).item()
        for _ in range(3) for a, b in zip(results(model), expected, strict=True)
    )
print(json.dumps({name: worst(m) for name, m in found.items()}))
"""


def test_fewer_threads_than_torch_believes():
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "4",
        "OMP_THREAD_LIMIT": "2",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", FEWER_THREADS],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout)
    assert len(errors) == 6
    # What is left unwritten is wrong by a part of the product; sums in another order by 1e-6.
    assert all(error < 1e-4 for error in errors.values()), errors


def halved(x, weight):
    """The first half of the columns; the rest is as memory was."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    half = weight.shape[0] // 2
    y[:, :half] = F.linear(x, weight[:half])
    return y


def last_row_missing(x, weight):
    return torch.cat([F.linear(x[:-1], weight), torch.zeros(1, weight.shape[0], dtype=x.dtype)])


WRONG = {
    "half of the columns": halved,
    "all but the last row": last_row_missing,
    "NaN": lambda x, weight: F.linear(x, weight).fill_(torch.nan),
    "products in bfloat16": lambda x, weight: F.linear(x.bfloat16(), weight.bfloat16()).to(x.dtype),
    "one element": lambda x, weight: F.linear(x, weight).index_fill(
        1, torch.tensor([weight.shape[0] // 3]), 0.5
    ),
}


def operands(rows, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    sizes = (rows, 256), (384, 256)
    return (torch.randn(size, generator=generator).to(dtype) for size in sizes)


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("kind", WRONG)
def test_a_routine_that_is_wrong_is_found(kind, rows):
    x, weight = operands(rows)
    assert not agrees(lambda: WRONG[kind](x, weight), x, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_other_orders_of_sums_are_right(rows, dtype):
    x, weight = operands(rows, dtype)
    in_turn = torch.zeros(rows, weight.shape[0])
    for k in range(x.shape[1]):
        in_turn += torch.outer(x[:, k].float(), weight[:, k].float())
    assert agrees(lambda: in_turn.to(dtype), x, weight)
    assert agrees(lambda: F.linear(x, weight), x, weight)
    if rows == 1:
        assert agrees(lambda: mv(x, weight), x, weight)
    assert agrees(lambda: stream(x, weight), x, weight)


@pytest.mark.parametrize("broken", [MV, ONEDNN, STREAM])
def test_what_is_wrong_is_not_timed(monkeypatch, broken):
    """However fast it is."""
    name = {MV: "mv", ONEDNN: "onednn", STREAM: "stream"}[broken]
    timed = []

    def all_but_linear(fns, rounds):
        timed.append(set(fns))
        return {name: float(name == LINEAR) for name in fns}

    monkeypatch.setattr(routines, "_onednn_is_right", lambda dtype, threads: True)
    monkeypatch.setattr(routines, "_best_seconds", all_but_linear)
    monkeypatch.setattr(routines, name, lambda x, w: x.new_empty(x.shape[0], w.shape[0]))
    plan = routines._measured.__wrapped__(torch.float32, False, torch.get_num_threads())
    assert len(timed) == 4 and all(LINEAR in names and broken not in names for names in timed)
    if broken == ONEDNN:
        others = dict(one_row=LINEAR, few_rows=LINEAR, several_rows=AS_MANY)
        assert plan.several_rows == LINEAR and replace(plan, **others) == Plan()


def test_a_plan_is_of_one_number_of_threads(monkeypatch):
    asked = []
    monkeypatch.setattr(
        routines, "_measured", lambda dtype, prepacked, threads: asked.append(threads)
    )
    monkeypatch.setattr(
        routines, "_onednn_is_right", lambda dtype, threads: asked.append(threads) or True
    )
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            routines.measure_plan(torch.float32)
            onednn_takes(torch.float32)
    finally:
        torch.set_num_threads(before)
    assert asked == [1, 1, 3, 3]


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 17])
def test_few_rows_are_streamed_by_this_packages_kernel(monkeypatch, rows):
    """Others go to the routine for many; with gradients nothing is streamed."""
    calls = []
    monkeypatch.setattr(projections, "stream", lambda x, w, b: calls.append(b) or stream(x, w, b))
    products = Products(Plan(STREAM, STREAM), "reference")
    x, weight = operands(rows)
    with torch.inference_mode():
        assert torch.equal(products(x, weight), F.linear(x, weight))
    assert calls == ["reference"] * (rows <= 8)
    products(x, weight.requires_grad_()).sum().backward()
    assert len(calls) == (rows <= 8) and weight.grad is not None


def test_the_kernel_is_a_candidate_for_few_rows_where_it_is_compiled(monkeypatch):
    timed = []

    def linear_alone(fns, rounds):
        timed.append(STREAM in fns)
        return dict.fromkeys(fns, 1.0)

    monkeypatch.setattr(routines, "_best_seconds", linear_alone)
    routines._measured.__wrapped__(torch.float32, False, torch.get_num_threads())
    compiled = choose("linear", "cpu", None) != REFERENCE
    assert timed == [compiled, compiled, False, False]


SECONDS = {LINEAR: 1.0, ONEDNN: 0.8, PREPACKED: 0.75}


@pytest.mark.parametrize(
    ("changes", "asked", "unasked"),
    [
        ({PREPACKED: 0.77}, PREPACKED, ONEDNN),  # 0.96 of oneDNN's: not worth as much memory again
        ({}, PREPACKED, PREPACKED),
        ({ONEDNN: 0.99}, PREPACKED, PREPACKED),
        ({ONEDNN: 0.99, PREPACKED: 0.87}, LINEAR, LINEAR),
        ({PREPACKED: 0.81}, ONEDNN, ONEDNN),
    ],
)
def test_a_copy_that_nobody_asked_for_must_be_worth_its_memory(changes, asked, unasked):
    seconds = SECONDS | changes
    assert routines._fastest(seconds) == asked
    assert routines._fastest(seconds, routines.COPY_MARGIN) == unasked


def test_several_rows_have_a_routine_of_their_own():
    streamed = Plan(STREAM, STREAM, LINEAR, several_rows=PREPACKED)
    expected = {1: STREAM, 8: STREAM, 9: PREPACKED, 64: PREPACKED, 65: LINEAR}
    assert {rows: streamed.of_rows(rows) for rows in expected} == expected
    assert streamed.inference == {STREAM, PREPACKED, LINEAR} and streamed.prepacks
    other = Plan(MV, ONEDNN, PREPACKED)
    expected = {1: MV, 2: ONEDNN, 16: ONEDNN, 17: PREPACKED, 64: PREPACKED, 65: PREPACKED}
    assert {rows: other.of_rows(rows) for rows in expected} == expected

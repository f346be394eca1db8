"""Ceilings are the best of several products, a surpassed one is none; a busy machine is named."""

import json
import time

import pytest
import torch

from elmkernels.acceleration import routines
from elmkernels.bench import (
    ceilings,
    end_to_end,
    generation_figures,
    machine,
    roofline,
)
from elmkernels.bench.benchmark import ACCELERATED, EAGER, OURS
from elmkernels.bench.runners import Task
from elmkernels.cli import ops
from elmkernels.cli.main import main

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def afresh():
    """Products are tried once in a process."""
    ceilings._fastest_products.cache_clear()
    yield
    ceilings._fastest_products.cache_clear()


def test_the_fastest_products_are_chosen(monkeypatch):
    """Of every routine and shape, whichever does most a second."""
    seconds = {"matmul": 0.004, "F.linear": 0.002, "prepacked": 0.001}

    def products(shape, dtype, device):
        names = seconds if shape == (128, 1024, 512) else {"matmul": 1, "F.linear": 1}
        cost = {n: s if names is seconds else 0.02 for n, s in seconds.items() if n in names}
        return {n: lambda s=s: time.sleep(s) for n, s in cost.items()}

    monkeypatch.setattr(ceilings, "_products", products)
    chosen = ceilings.product_probes(torch.float32, CPU, True)
    assert list(chosen) == ["prepacked 128x1024x512", "F.linear 128x1024x512"]
    assert {work for _, work in chosen.values()} == {2.0 * 128 * 1024 * 512}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_routine_multiplies_alike(dtype):
    torch.manual_seed(0)
    products = ceilings._products((48, 32, 64), dtype, CPU)
    assert {"matmul", "F.linear"} <= set(products) <= {"matmul", "F.linear", "prepacked"}
    results = {name: call().float() for name, call in products.items()}
    for result in results.values():
        torch.testing.assert_close(result, results["F.linear"], rtol=0.02, atol=0.1)


def test_the_ceiling_of_a_dtype_is_positive(monkeypatch):
    monkeypatch.setattr(ceilings, "CPU_SHAPES", ((64, 64, 64), (32, 64, 128)))
    assert ceilings.matmul_ceiling(torch.float32) > 1e6


@pytest.mark.parametrize("compiled", [True, False])
def test_memory_is_read_in_several_ways(monkeypatch, compiled):
    """With and without asking for it ahead; each reads all of it."""
    if not compiled:
        monkeypatch.setattr(routines, "streams", lambda: False)
    elif not routines.streams():
        pytest.skip("no compiled CPU backend can run here")
    x = ceilings.numbers(1 << 17, CPU)
    torch_own, streams = ["sum", "mv"], ["stream bfloat16", "stream float32"]
    found = ceilings.reads(x)
    assert list(found) == torch_own + streams * compiled
    for name, read in found.items():
        assert read().isfinite().all(), name
    probes = ceilings.memory_probes(CPU, True)
    assert list(probes) == [*found, "copy"]
    assert {work for _, work in probes.values()} == {2.0**27}


def test_the_fastest_read_is_the_ceiling(monkeypatch):
    """And what is faster than that is said, not printed as a share."""
    slow, fast = (lambda s=s: time.sleep(s) for s in (0.004, 0.002))
    monkeypatch.setitem(
        roofline.PROBES, roofline.MEMORY, lambda *_: {"sum": (slow, 1e6), "stream": (fast, 1e6)}
    )
    work = roofline.Work("generate", 1, 1e6, roofline.MEMORY, torch.float32)
    tasks = {EAGER: lambda: time.sleep(0.02), ACCELERATED: lambda: time.sleep(0.001)}
    found = roofline.measure_tasks(work, tasks, CPU, rounds=3, quick=True, peaks=False)
    assert 0.4e9 < found.ceiling < 0.5e9 + 1e7
    assert found.of_ceiling is None
    assert "accelerated reached" in found.ceiling_missing
    printed = end_to_end.speed_text([found])
    assert "not usable" in printed and "%" not in printed


def measured(seconds: float) -> roofline.Measured:
    """A task whose ceiling is 1 GB/s and whose work is 1 GB."""
    times = {
        name: roofline.Timing(s, s, s, 3) for name, s in ((EAGER, 4.0), (ACCELERATED, seconds))
    }
    return roofline.Measured("task", 8, times, dict.fromkeys(times), 1e9, 1e9, roofline.MEMORY)


def test_a_ceiling_below_what_was_reached_is_not_usable():
    good, wrong = measured(2.0), measured(0.5)
    assert good.of_ceiling == {"eager": 0.25, "accelerated": 0.5} and good.ceiling_missing is None
    assert [row["of ceiling"] for row in good.rows()] == ["25%", "50%"]
    assert wrong.of_ceiling is None
    reason = "ceiling not usable: accelerated reached 2.00 times as much"
    assert wrong.ceiling_missing == reason
    assert [row["of ceiling"] for row in wrong.rows()] == [None, None]
    assert [row["ceiling"] for row in wrong.rows()] == ["not usable", ""]
    found = json.loads(json.dumps(wrong.json()))
    assert found["of_ceiling"] is None and found["ceiling_missing"] == reason
    text = end_to_end.speed_text([wrong])
    assert f"task: {reason}" in text and "200%" not in text
    assert "not usable" not in end_to_end.speed_text([good])


class Fake:
    """A runner of 1000 bytes a token."""

    weight_bytes, cache_token_bytes = 1000, 0

    def __init__(self, name: str, kind: str) -> None:
        self.name, self.kind = name, kind


@pytest.mark.parametrize(("top", "usable"), [(1e3, True), (500.0, False)])
def test_reading_slower_than_a_runner_is_not_usable(top, usable):
    task = Task("decode 2 after 2", torch.zeros(1, 2, dtype=torch.long), 2)
    runners = [Fake("eager bf16", EAGER), Fake("ours bf16", OURS)]
    seconds = {"eager bf16": [8.0, 8.0], "ours bf16": [2.5, 2.5]}  # ours reads 800 bytes a second
    probe = {"sum": top, "weights of ours bf16": 700.0}
    found = generation_figures.figures(task, runners, seconds, [probe] * 2, 2, {})
    ours = found["runners"]["ours bf16"]
    reasons = found["read_bandwidth"]["missing"]
    if usable:
        assert ours["of_read_bandwidth"] == 0.8
        assert found["runners"]["eager bf16"]["of_read_bandwidth"] == 0.25
    else:
        assert ours["of_read_bandwidth"] is None
        assert found["runners"]["eager bf16"]["of_read_bandwidth"] is None
        assert "reading is not usable: ours bf16 reached 1.60 times as much" in reasons[0]
    assert ours["of_reading_its_weights"] is None  # 800 of 700
    assert "reading its weights is not usable: ours bf16 reached 1.14" in reasons[-1]
    about = {
        name: {"kind": f["kind"], "agree": None, "facts": {}}
        for name, f in found["runners"].items()
    }
    text = generation_figures.text("g", {"runners": about, "tasks": [found], "missing": {}})
    assert "not usable" in text and "114%" not in text and "160%" not in text


@pytest.mark.parametrize(("load", "named"), [(2.0, False), (2.1, True), (64.0, True)])
def test_busy_is_half_a_thread_a_processor(monkeypatch, load, named):
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (load, 0.0, 0.0))
    expected = f"busy: a load of {load:.1f} on 4 processors distorts all figures"
    assert machine.busy() == (expected if named else None)


def test_a_load_that_is_not_known_is_not_busy(monkeypatch):
    monkeypatch.delattr(machine.os, "getloadavg")
    assert machine.load() is None and machine.busy() is None


def test_bench_ops_names_a_busy_machine(capsys, monkeypatch):
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (1e3, 0.0, 0.0))
    monkeypatch.setattr(ops, "_chosen", lambda args, device: {})
    assert main(["bench", "ops", "--device", "cpu"]) == 0
    assert "busy: a load of 1000.0" in capsys.readouterr().out
    assert main(["bench", "ops", "--device", "cpu", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["busy"].startswith("busy: a load of 1000.0")
    assert "busy: a load of 1000.0" in captured.err

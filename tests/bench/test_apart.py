"""A baseline that dies is a row that says of what, and the run goes on."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.reports import LLAMA, SIZES, Recorded, load

from elmkernels.acceleration import projections, swap
from elmkernels.bench.baselines.apart import Apart, Died, ending
from elmkernels.bench.generation import Generation

STANDIN = Path(__file__).parents[1] / "helpers" / "standin" / "llama_cpp.py"
TASKS = ["prefill 12", "decode 4 after 6", "decode 4 after 6, batch 2"]


class Mortal:
    """What the tests make in another process."""

    def __init__(self, start: int = 0) -> None:
        self.value = start
        if start < 0:
            os.kill(os.getpid(), -start)

    def add(self, more: int) -> int:
        print("nobody reads this")
        self.value += more
        return self.value

    def refuse(self) -> None:
        raise KeyError("nothing here")

    def die(self, number: int) -> None:
        os.kill(os.getpid(), number)

    def leave(self, code: int) -> None:
        os._exit(code)


def made(*arguments: int) -> Apart:
    return Apart(f"{__name__}:Mortal", *arguments)


def test_it_answers_and_refuses():
    apart = made(3)
    assert apart.call("add", 4) == 7
    with pytest.raises(RuntimeError, match="nothing here"):
        apart.call("refuse")
    assert apart.call("add", 1) == 8
    apart.close()
    assert apart._process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_it_dies_of_a_signal(number):
    apart = made()
    with pytest.raises(Died, match=f"died: signal {number.name}"):
        apart.call("die", int(number))
    with pytest.raises(Died, match=number.name):
        apart.call("add", 1)
    apart.close()
    with pytest.raises(Died, match=f"died: signal {number.name}"):
        made(-number)


def test_it_leaves():
    with pytest.raises(Died, match="died: exit code 3"):
        made().call("leave", 3)
    assert ending(-60) == "signal 60"
    with pytest.raises(RuntimeError, match="No module named 'nowhere'"):
        Apart("nowhere:Nothing")


def test_it_ends_with_the_process_that_started_it():
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, str(made()._process.pid).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    number = int(os.read(read, 20))
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return
        stat = Path(f"/proc/{number}/stat")
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("it is still there")


@pytest.fixture
def orders(tmp_path, monkeypatch):
    """Makes llama.cpp's stand-in die where it is told to."""
    monkeypatch.setattr(swap, "measure_plan", lambda dtype, packing=False: projections.Plan())
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    shutil.copy(STANDIN, tmp_path)

    def write(**given) -> None:
        usual = {"types": ["q8_0"], "where": "decode", "signal": 4, "after": 0, "always": False}
        (tmp_path / "orders.json").write_text(json.dumps(usual | given))

    return write


def measured(*formats: str) -> tuple[dict, str]:
    pytest.importorskip("gguf")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    benchmark = Generation(
        name="tiny",
        weights="random weights",
        load=load,
        sizes=SIZES,
        compiled=False,
        formats=formats,
    )
    results, report = benchmark.start(), Recorded()
    benchmark.run(results, report)
    torch.set_num_threads(before)
    assert results["complete"] is True
    return results["groups"], "\n".join(report.texts)


def rows(group: dict) -> list[set[str]]:
    """Which of llama.cpp's types each task has figures of."""
    assert [task["task"] for task in group["tasks"]] == TASKS
    return [{n.split()[1] for n in t["runners"] if n.startswith("llama")} for t in group["tasks"]]


@pytest.mark.parametrize("where", ["load", "decode"])
def test_an_illegal_instruction_of_the_extra_buffers(orders, where):
    """It is tried without them, and measured; the results say so."""
    orders(where=where)
    groups, _ = measured("int8", "int4")
    assert rows(groups["int8"]) == [{"Q8_0"}] * 3 and rows(groups["int4"]) == [{"Q4_0"}] * 3
    facts = groups["int8"]["runners"]["llama.cpp Q8_0"]["facts"]
    assert facts["extra_buffers"].startswith("off, with them it died: signal SIGILL")
    assert groups["int4"]["runners"]["llama.cpp Q4_0"]["facts"]["extra_buffers"] == "on"
    assert not [who for who in groups["int8"]["missing"] if who.startswith("llama")]


@pytest.mark.parametrize("where", ["load", "decode"])
def test_one_that_always_dies_is_named(orders, where):
    orders(where=where, always=True)
    groups, text = measured("int8", "int4")
    assert rows(groups["int8"]) == [set()] * 3 and rows(groups["int4"]) == [{"Q4_0"}] * 3
    named = {w: why for w, why in groups["int8"]["missing"].items() if w.startswith("llama")}
    assert list(named) == (
        ["llama.cpp Q8_0"] if where == "load" else [f"llama.cpp Q8_0, {task}" for task in TASKS]
    )
    assert all("died: signal SIGILL" in why for why in named.values())
    assert all("ours int8" in task["runners"] for task in groups["int8"]["tasks"])
    assert "missing llama.cpp Q8_0" in text and "died: signal SIGILL" in text


def test_one_that_dies_while_it_is_timed_is_named(orders):
    """The first task's trials, warm-up and watched run are five; then the rounds begin."""
    orders(types=["f16"], signal=11, after=6, always=True)
    groups, text = measured("bf16")
    group = groups["16-bit"]
    assert "llama.cpp F16" not in group["tasks"][0]["runners"]
    assert group["missing"]["llama.cpp F16, prefill 12"].startswith("died: signal SIGSEGV")
    assert all({"eager bf16", "ours bf16", "llama.cpp BF16"} <= set(t["runners"])
               for t in group["tasks"])  # fmt: skip


def test_all_types_run_apart(orders):
    orders(types=[])
    groups, _ = measured("fp32", "bf16")
    for name, group in groups.items():
        assert rows(group) == [set(LLAMA[name])] * 3 and group["missing"].keys() <= {
            f"compiled {dtype}" for dtype in ("fp32", "bf16")
        }
        for type in LLAMA[name]:
            about = group["runners"][f"llama.cpp {type}"]
            assert set(about["facts"]["attention"]) == set(TASKS) and about["weight_bytes"] > 0
        peaks = [group["tasks"][0]["runners"][f"llama.cpp {t}"]["peak_bytes"] for t in LLAMA[name]]
        assert all(isinstance(value, int) for value in peaks)

"""Threads that lose their processor delay nobody who doesn't need what they hold."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

FOLDER = Path(__file__).parent
# Beside processes that never wait, generate with a small model, eager, then accelerated.
BUSY = """
import os, sys, time
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:2]))
import subprocess
spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
try:
    import torch, elmkernels
    from elmkernels.openelm import OpenELM, OpenELMConfig
    threads, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
    torch.set_num_threads(threads)
    model = OpenELM.from_config(OpenELMConfig(
        num_transformer_layers=4, model_dim=256, head_dim=32, num_gqa_groups=2,
        qkv_multipliers=(0.5, 1.0), ffn_multipliers=(0.5, 2.0), ffn_dim_divisor=32,
        normalize_qk_projections=True, share_input_output_layers=True, vocab_size=300,
        rope_max_length=128, max_context_length=64), seed=0, dtype=dtype)
    def tokens_per_second():
        elmkernels.generate(model, [[1, 2, 3]], 2)
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < 1.0:
            count += len(elmkernels.generate(model, [[1, 2, 3]], 10)[0].tokens)
        return count / (time.perf_counter() - begin)
    eager = tokens_per_second()
    elmkernels.accelerate(model, plan=elmkernels.Plan())
    print(eager, tokens_per_second())
finally:
    for process in spinning:
        process.kill()
"""


def built(folder: Path, *flags: str) -> Path:
    """The simulation as a program; skips where there is no compiler."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ was found")
    program = folder / "team"
    command = ["g++", "-std=c++20", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", *flags]
    command += [f"-I{FOLDER / 'host'}", f"-I{ROOT / 'csrc'}", str(FOLDER / "team_simulation.cpp")]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return built(tmp_path_factory.mktemp("team"))


def check(program: Path, *arguments: int) -> None:
    done = subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize(
    ("shares", "threads"), [(1, 1), (2, 2), (3, 3), (8, 8), (16, 16), (8, 3), (5, 2), (4, 1)]
)
def test_each_thing_is_done_once_and_in_order(program, shares, threads):
    check(program, shares, threads, 0, 10, shares)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_nobody_waits_for_a_thread_that_has_not_begun(program, threads):
    check(program, threads, threads, 1, 10, threads)


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_without_races(tmp_path, late):
    probe = ["g++", "-fsanitize=thread", "-x", "c++", "-", "-o", str(tmp_path / "probe")]
    if subprocess.run(probe, input="int main() {}", text=True, capture_output=True).returncode:
        pytest.skip("g++ has no thread sanitizer here")
    if subprocess.run([str(tmp_path / "probe")], capture_output=True).returncode:
        pytest.skip("the thread sanitizer doesn't run here")
    check(built(tmp_path, "-fsanitize=thread"), 8, 8, late, 30, 7)


def busy_rates(threads: int, dtype: str) -> tuple[float, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", BUSY, str(threads), dtype],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    eager, accelerated = map(float, done.stdout.split())
    return eager, accelerated


def check_busy(threads: int, dtype: str) -> None:
    """Not slower than eager in one of three tries: what else runs here disturbs either."""
    tries = []
    for _ in range(3):
        eager, accelerated = busy_rates(threads, dtype)
        if accelerated >= eager:
            return
        tries.append((eager, accelerated))
    raise AssertionError(f"tokens/s eager and accelerated: {tries}")


def test_two_busy_processors():
    check_busy(8, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_busy_processors_by_any_threads(threads, dtype):
    check_busy(threads, dtype)

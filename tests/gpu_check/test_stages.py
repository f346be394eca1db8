"""Stages under a clock: who gets which time, and what is kept of what fails or is stopped."""

import pytest
import torch
from helpers.reports import Recorded

from elmkernels.devices import datasheet, missing_on, runs_on
from elmkernels.gpu_check import op_units
from elmkernels.gpu_check.stages import (
    DONE,
    FAILED,
    INTERRUPTED,
    Clock,
    DeadDevice,
    LeftOut,
    Stage,
    Unit,
    run_stages,
)


class Time:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def time() -> Time:
    return Time()


def takes(time: Time, name: str, seconds: float, log: list | None = None) -> Unit:
    """A unit that lasts so long, and notes what its clock gave it."""

    def run(found: dict, clock: Clock) -> None:
        if log is not None:
            log.append((name, clock.left()))
        time.seconds += seconds

    return Unit(name, run)


def raises(name: str, error: BaseException) -> Unit:
    def run(found: dict, clock: Clock) -> None:
        found["partial"] = 1
        raise error

    return Unit(name, run)


def stage(name: str, *units: Unit, share: float = 1, split: bool = False) -> Stage:
    return Stage(name, share, lambda: units, split)


def done(time: Time, *stages: Stage, seconds: float = 100.0, **options) -> dict:
    results: dict = {}
    run_stages(stages, results, Clock(seconds, time), **options)
    assert results["complete"] is True
    return results["stages"]


def test_what_a_stage_leaves_goes_to_the_next(time):
    log: list = []
    done(
        time,
        stage("short", takes(time, "a", 10, log)),
        stage("long", takes(time, "b", 0, log), share=2),
        stage("last", takes(time, "c", 0, log)),
    )
    assert log == [("a", 25.0), ("b", 60.0), ("c", 90.0)]


def test_units_that_split_their_time(time):
    log: list = []
    units = [takes(time, name, 10, log) for name in "abcd"]
    done(time, stage("s", *units, split=True), seconds=80)
    assert [name for name, _ in log] == list("abcd")
    assert [left for _, left in log] == pytest.approx([20, 70 / 3, 30, 50])


def test_units_without_time_are_named(time):
    found = done(
        time,
        stage("first", takes(time, "a", 60), takes(time, "b", 60), takes(time, "c", 1)),
        stage("second", takes(time, "d", 1)),
    )
    assert list(found["first"]["units"]) == ["a"]
    assert found["first"]["left_out"] == dict.fromkeys("bc", "no time: the stage had 50 s")
    assert found["first"]["seconds"] == 60 and found["second"]["units"]["d"]["seconds"] == 1


def test_a_failure_is_recorded_and_the_rest_goes_on(time):
    report = Recorded()
    results: dict = {}
    stages = [
        stage("s", raises("bad", ValueError("first\nsecond")), takes(time, "good", 1)),
        stage("t", raises("absent", LeftOut("needs 8.0, got 7.5")), takes(time, "more", 1)),
        stage("u", raises("large", torch.OutOfMemoryError("tried 9 GiB"))),
    ]
    run_stages(stages, results, Clock(100, time), report)
    found = results["stages"]
    bad = found["s"]["units"]["bad"]
    assert bad["state"] == FAILED and bad["error"] == "ValueError: first" and bad["partial"] == 1
    assert "second" in bad["trace"]
    assert found["s"]["units"]["good"]["state"] == found["t"]["units"]["more"]["state"] == DONE
    assert found["t"]["left_out"] == {"absent": "needs 8.0, got 7.5"}
    assert found["u"]["left_out"] == {"large": "out of memory: OutOfMemoryError: tried 9 GiB"}
    assert len(report.saved) >= 5
    assert report.stages[:2] == ["s (33 s)", "s: bad"]


def test_an_interruption_keeps_what_there_is_and_can_go_on(time):
    results: dict = {"complete": False}
    stages = [stage("s", takes(time, "a", 1), raises("b", KeyboardInterrupt()))]
    with pytest.raises(KeyboardInterrupt):
        run_stages(stages, results, Clock(100, time))
    assert results["complete"] is False
    states = {name: u["state"] for name, u in results["stages"]["s"]["units"].items()}
    assert states == {"a": DONE, "b": INTERRUPTED}
    log: list = []
    again = [stage("s", takes(time, "a", 1, log), takes(time, "b", 1, log))]
    run_stages(again, results, Clock(100, time))
    assert [name for name, _ in log] == ["b"] and results["complete"] is True


def test_a_unit_that_ended_its_process_is_not_run_again(time):
    results: dict = {
        "stages": {"s": {"seconds": 1.0, "units": {"a": {"state": "running"}}, "left_out": {}}}
    }
    log: list = []
    run_stages([stage("s", takes(time, "a", 1, log))], results, Clock(100, time))
    assert log == []
    assert results["stages"]["s"]["units"]["a"]["error"] == "the process ended in it"


def test_a_dead_device_ends_the_process_s_part(time):
    results: dict = {}
    stages = [stage("s", raises("bad", RuntimeError("illegal")), takes(time, "next", 1))]
    with pytest.raises(DeadDevice, match="s: bad"):
        run_stages(stages, results, Clock(100, time), lives=lambda: False)
    assert list(results["stages"]["s"]["units"]) == ["bad"]
    assert "complete" not in results


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [
        ("NVIDIA A100-SXM4-80GB", 2.039e12),
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA H200", 4.8e12),
        ("NVIDIA B200", 8.0e12),
        ("NVIDIA A100-SXM4-40GB", 1.555e12),
        ("NVIDIA A100 80GB PCIe", 1.935e12),
        ("NVIDIA H100 PCIe", 2.0e12),
        ("NVIDIA H100 NVL", 3.9e12),
        ("NVIDIA GB200", None),
        ("NVIDIA A10G", None),
        ("NVIDIA H200 Something", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        (None, None),
    ],
)
def test_what_the_maker_promises(name, bandwidth):
    found = datasheet(name)
    assert (found and found.bandwidth) == bandwidth


def test_which_gpus_a_library_runs_on():
    built = ["80", "90", "100"]
    assert all(runs_on(c, built) for c in ((8, 0), (8, 9), (9, 0), (10, 3)))
    assert not any(runs_on(c, built) for c in ((7, 5), (12, 0)))
    newer = ["80", "90+PTX"]
    assert all(runs_on(c, newer) for c in ((8, 6), (9, 0), (10, 0), (12, 0)))
    assert not runs_on((7, 5), newer)
    assert missing_on("triton", (7, 5), built) == (
        "needs compute capability 8.0 or newer, this GPU has compute capability 7.5"
    )
    assert "built for sm_80, sm_90, sm_100" in missing_on("cuda", (12, 0), built)
    assert missing_on("triton", (12, 0), built) is None and missing_on("cuda", (12, 0), []) is None
    assert missing_on("triton", None, built) is None


def test_any_beginning_is_spread_over_the_whole():
    items = op_units.evenly(list(range(100)))
    assert sorted(items) == list(range(100))
    for count in (4, 10, 25):
        quarters = {item // 25 for item in items[:count]}
        assert quarters == {0, 1, 2, 3}


def test_a_process_of_its_own_is_ended_in_time():
    assert op_units.run_apart(["sh", "-c", "echo a; echo b >&2; exit 3"], 20) == (3, "a\n", "b\n")
    with pytest.raises(LeftOut, match="not done after 0 s"):
        op_units.run_apart(["sh", "-c", "sleep 30 & sleep 30"], 0.1)

"""What the executor knows of blocks that wait for each other, of functions that are called, and of
threads of a warp that wait for the others: small kernels, right and wrong.
"""

import numpy as np
import pytest
from helpers.ptx import launch, run

from elmkernels.testing.ptx import Fault, PtxError, Settings

X = np.zeros(64, np.uint32)
TURNS = [Settings(), Settings(lanes=64), Settings(lanes=64, order="backward")]
# Thread 33 of two blocks stores, the blocks meet, and every thread reads what the other stored.
MEET = """
 ld.param.u64 %at8, [q0];
 ld.param.u64 %at9, [q1];
 mov.u32 %r1, %ctaid.x;
 mul.wide.u32 %at10, %r1, 4;
 add.u64 %at10, %at9, %at10;
 add.u32 %r2, %r1, 7;
 setp.eq.u32 %p1, %r63, 33;
 @%p1 st.global.u32 [%at10], %r2;
 {fence}
 bar.sync 0;
 setp.ne.u32 %p2, %r63, 0;
 @%p2 bra behind;
 {before}
 {arrive}
spin:
 {poll} %r20, [%at8];
 setp.lt.u32 %p3, %r20, 2;
 @%p3 bra spin;
 {after}
behind:
 bar.sync 0;
 xor.b32 %r3, %r1, 1;
 mul.wide.u32 %at11, %r3, 4;
 add.u64 %at11, %at9, %at11;
 {read} %r21, [%at11];
 add.u32 %r4, %r3, 7;
 setp.ne.u32 %p4, %r21, %r4;
 {check}
"""
RIGHT = {
    "fence": "", "before": "", "arrive": "red.release.gpu.global.add.u32 [%at8], 1;",
    "poll": "ld.acquire.gpu.global.u32", "after": "", "read": "ld.global.cg.u32",
    "check": "@%p4 trap;",
}  # fmt: skip
RELAXED = "red.relaxed.gpu.global.add.u32 [%at8], 1;"
ATOM = "atom.global.add.u32 %r22, [%at8], 1;"


def meet(settings: Settings, **changes: str) -> None:
    body = MEET.format(**(RIGHT | changes))
    launch(body, X, gives=[], threads=64, blocks=2, settings=settings, room=64)


@pytest.mark.parametrize("settings", TURNS, ids=["at once", "in turns", "backward"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"arrive": RELAXED, "fence": "membar.gl;"},
        {"arrive": ATOM, "fence": "fence.sc.gpu;"},
        {"poll": "ld.relaxed.gpu.global.u32", "after": "fence.acq_rel.gpu;"},
        {"poll": "ld.volatile.global.u32", "after": "membar.sys;"},
    ],
    ids=str,
)
def test_blocks_that_meet_are_in_order(settings, changes):
    meet(settings, **changes)


@pytest.mark.parametrize("settings", TURNS, ids=["at once", "in turns", "backward"])
@pytest.mark.parametrize(
    "changes",
    [
        {"poll": "ld.relaxed.gpu.global.u32"},
        {"arrive": RELAXED},
        {"arrive": RELAXED, "before": "membar.gl;"},  # of thread 0 alone: 33 has stored
        {"arrive": RELAXED, "fence": "membar.cta;"},
        {"arrive": "red.release.cta.global.add.u32 [%at8], 1;"},
        {"poll": "ld.acquire.cta.global.u32"},
        {"poll": "mov.u32 %r20, 2; //"},
    ],
    ids=str,
)
def test_what_orders_nothing_is_a_race(settings, changes):
    with pytest.raises(Fault, match="race: .* of block . (reads|writes|overwrites) what thread"):
        meet(settings, **changes, check="")


def test_the_way_for_constants_is_not_for_what_a_launch_stores():
    with pytest.raises(Fault, match="as what never changes, what thread 33 of block"):
        meet(Settings(), read="ld.global.nc.u32")


@pytest.mark.parametrize("settings", TURNS, ids=["at once", "in turns", "backward"])
def test_a_block_that_never_comes_is_a_fault(settings):
    arrive = "setp.eq.u32 %p5, %r1, 0;\n @%p5 " + RIGHT["arrive"]
    with pytest.raises(Fault, match="barrier: blocks wait at .* what no other block will store"):
        meet(settings, arrive=arrive)


OVERWRITE = """
 ld.param.u64 %at9, [q1];
 mov.u32 %r1, %ctaid.x;
 setp.eq.u32 %p6, %r1, 0;
 @%p6 ld.global.u32 %r2, [%at9+64];
 {meet}
 setp.eq.u32 %p7, %r1, {writer};
 @%p7 st.global.u32 [%at9+64], 9;
"""


@pytest.mark.parametrize("writer", [0, 1])
@pytest.mark.parametrize("settings", TURNS[:2], ids=["at once", "in turns"])
def test_what_another_block_has_read_is_overwritten_after_they_met(settings, writer):
    inner = MEET.format(**RIGHT)
    options = {"gives": [], "threads": 64, "blocks": 2, "settings": settings, "room": 64}
    launch(OVERWRITE.format(meet=inner, writer=writer), X, **options)
    if writer:
        with pytest.raises(Fault, match="race: .* of block 1 overwrites what thread"):
            first = inner.replace(RIGHT["poll"], "ld.relaxed.gpu.global.u32")
            first = first.replace("ld.global.cg.u32 %r21", "add.u32 %r21, %r3, 7; //")
            launch(OVERWRITE.format(meet=first, writer=writer), X, **options)


FUNCTIONS = """
.func (.param .b32 result) twice(.param .b32 value, .param .align 4 .b8 pair[8]) {
 .reg .b32 %r<4>;
 .reg .pred %p<2>;
 ld.param.b32 %r0, [value];
 ld.param.b32 %r1, [pair+4];
 setp.gt.u32 %p0, %r0, 20;
 @%p0 bra $large;
 add.u32 %r0, %r0, %r0;
 add.u32 %r0, %r0, %r1;
 st.param.b32 [result], %r0;
 ret;
$large:
 st.param.b32 [result], %r1;
 ret;
}
"""
CALL = """
 {{
 .param .b32 param0; .param .align 4 .b8 param1[8]; .param .b32 retval0;
 st.param.b32 [param0+0], {value};
 st.param.b32 [param1+0], 0;
 st.param.b32 [param1+4], {more};
 call.uni (retval0), twice, (param0, param1);
 ld.param.b32 %r10, [retval0+0];
 }}
"""
TID = np.arange(64, dtype=np.uint32)


def test_a_function_is_called_with_its_own_registers_and_parameters():
    body = CALL.format(value="%r0", more="%r63") + CALL.format(value="%r10", more=5)
    first = np.where(TID > 20, TID, 3 * TID)
    want = np.where(first > 20, 5, 2 * first + 5)
    assert np.array_equal(run(body, TID, threads=64, functions=FUNCTIONS), want)


def test_calls_that_are_not_known_are_errors():
    body = CALL.format(value="%r0", more=1)
    again = FUNCTIONS.replace("$large:", "$large:\n call.uni (result), twice, (value, pair);")
    with pytest.raises(PtxError, match="twice calls itself"):
        run(body, TID, threads=64, functions=again)
    with pytest.raises(PtxError, match="a function isn't known: `call.uni"):
        run(body, TID, threads=64)
    with pytest.raises(PtxError, match="a call under a condition isn't known"):
        guarded = " setp.eq.u32 %p1, %r63, 1;\n" + body.replace("call.uni", "@%p1 call.uni")
        run(guarded, TID, threads=64, functions=FUNCTIONS)


BACK = """
 mov.u32 %r10, %r63;
 setp.lt.u32 %p1, %r63, {};
 @%p1 bra far;
back:
 {}
 bra done;
far:
 add.u32 %r10, %r10, 100;
 bra back;
done:
"""


def test_a_part_of_a_warp_waits_for_what_comes_back_to_it():
    """The others' way to it is behind it in the text."""
    body = BACK.format(17, "shfl.sync.bfly.b32 %r10, %r10, 1, 31, -1;")
    whole = TID + np.where(TID < 17, 100, 0)
    assert np.array_equal(run(body, TID, threads=64), whole[TID ^ 1])
    body = BACK.format(17, "bar.sync 0;")
    assert np.array_equal(run(body, TID, threads=64), whole)


def test_generic_addresses_of_several_spaces():
    body = """
 shl.b32 %r1, %r63, 2;
 mov.u32 %r2, dynamic;
 add.u32 %r1, %r1, %r2;
 mul.lo.u32 %r3, %r63, 3;
 st.shared.u32 [%r1], %r3;
 cvt.u64.u32 %at5, %r1;
 cvta.shared.u64 %at5, %at5;
 setp.lt.u32 %p1, %r63, 20;
 selp.b64 %at6, %at5, %at0, %p1;
 ld.u32 %r10, [%at6];
"""
    want = np.where(TID < 20, 3 * TID, TID + 1000)
    assert np.array_equal(run(body, TID + 1000, threads=64, shared=256), want)

"""The checkers of the executor: small kernels that each do one thing wrong, and the same kernels
right; and compiled kernels with one thing changed.
"""

import numpy as np
import pytest
from helpers.ptx import run

from elmkernels.testing.ptx import Fault, Settings

TID = np.arange(64, dtype=np.uint32)
SHARE = """
 shl.b32 %r1, %r63, 2;
 mov.u32 %r2, dynamic;
 add.u32 %r1, %r1, %r2;
 st.shared.u32 [%r1], %r0;
 {between}
 xor.b32 %r3, %r63, {other};
 shl.b32 %r3, %r3, 2;
 add.u32 %r3, %r3, %r2;
 ld.shared.u32 %r10, [%r3];
"""


def share(between: str, other: int, threads: int = 64, **options) -> np.ndarray:
    """Each thread stores its element in shared memory and reads that of another."""
    body = SHARE.format(between=between, other=other)
    return run(body, TID[:threads] * 7, threads=threads, shared=4 * threads, **options)


def test_a_barrier_orders_a_block():
    assert np.array_equal(share("bar.sync 0;", 33), (TID ^ 33) * 7)
    with pytest.raises(Fault, match="race: thread 0 of block 0 reads what thread 33"):
        share("", 33)


def test_a_synchronized_warp_is_in_order_and_the_others_are_not():
    assert np.array_equal(share("bar.warp.sync -1;", 1), (TID ^ 1) * 7)
    with pytest.raises(Fault, match="race"):
        share("", 1)
    with pytest.raises(Fault, match="race"):
        share("bar.warp.sync -1;", 32)


def test_a_thread_is_in_order_with_itself():
    assert np.array_equal(share("", 0), TID * 7)


def test_without_races_nothing_is_held():
    assert share("", 33, settings=Settings(races=False)).size == 64


def test_overwriting_what_others_read():
    again = (
        "bar.sync 0;\n ld.shared.u32 %r9, [dynamic+4];\n {}\n"
        " st.shared.u32 [%r1], %r63;\n bar.sync 0;"
    )
    share(again.format("bar.sync 0;"), 33)
    with pytest.raises(Fault, match="overwrites what .* has read"):
        share(again.format(""), 33)


def test_different_values_in_one_place_at_once():
    run("st.shared.u32 [dynamic], 5;\n mov.u32 %r10, 0;", shared=4)
    with pytest.raises(Fault, match="stores 0x.* to where thread .* stores 0x.* at once"):
        run("st.shared.u32 [dynamic], %r63;\n mov.u32 %r10, 0;", shared=4)


def test_shared_memory_ends():
    run("st.shared.u32 [dynamic+124], 1;\n mov.u32 %r10, 0;", shared=128)
    with pytest.raises(
        Fault, match="bounds: 4 bytes at byte 128 of shared memory 0, which has 128"
    ):
        run("st.shared.u32 [dynamic+128], 1;\n mov.u32 %r10, 0;", shared=128)


def test_shared_memory_is_read_after_it_is_written():
    with pytest.raises(Fault, match="uninitialized: 4 bytes at byte 4 of shared memory"):
        run("ld.shared.u32 %r10, [dynamic+4];", shared=128)


X = np.arange(32, dtype=np.uint32)


def test_global_memory_ends_where_the_tensor_does():
    with pytest.raises(Fault, match=r"bounds: 4 bytes at byte -4 of q0, which has 128"):
        run("ld.global.u32 %r10, [%at0+-4];", X)
    with pytest.raises(Fault, match=r"bounds: 4 bytes at byte 128 of q0, which has 128"):
        run("ld.global.u32 %r10, [%at0+4];", X)
    with pytest.raises(Fault, match="bounds: 4 bytes at"):
        run("mov.u64 %d0, 64;\n ld.global.u32 %r10, [%d0];", X)


def test_global_memory_is_aligned():
    with pytest.raises(Fault, match="alignment: 4 bytes at byte 1 of q0"):
        run("ld.global.u32 %r10, [%at0+1];", X[:1])
    with pytest.raises(Fault, match="alignment: 16 bytes at byte 4 of q0"):
        run("ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%at0];", X)


OUT = " ld.param.u64 %at9, [q1];\n mad.wide.u32 %at9, %r63, 4, %at9;\n"


def test_outputs_are_read_after_they_are_written():
    with pytest.raises(Fault, match="uninitialized: 4 bytes at byte 0 of q1"):
        run(OUT + "ld.global.u32 %r10, [%at9];", X)
    assert run(OUT + "st.global.u32 [%at9], 3;\n ld.global.u32 %r10, [%at9];", X)[5] == 3


def test_blocks_race_in_global_memory():
    one = " mov.u32 %r10, 7;"
    assert (run(one, X, blocks=2) == 7).all()  # the same value: nobody can tell
    with pytest.raises(
        Fault, match="block 0 stores 0x0 to where thread 0 of block 1 stores 0x1 at once"
    ):
        run(" mov.u32 %r10, %ctaid.x;", X, blocks=2)
    with pytest.raises(Fault, match="thread 0 of block 1 writes what thread 0 of block 0 has"):
        run(" mov.u32 %r10, %ctaid.x;", X, blocks=2, settings=Settings(lanes=32))


def test_threads_race_in_global_memory():
    body = (
        OUT
        + """
 st.global.u32 [%at9], %r63;
 {}
 ld.param.u64 %at9, [q1];
 xor.b32 %r1, %r63, 33;
 mad.wide.u32 %at9, %r1, 4, %at9;
 ld.global.u32 %r10, [%at9];
 bar.sync 0;
"""
    )
    assert np.array_equal(run(body.format("bar.sync 0;"), TID, threads=64), TID ^ 33)
    with pytest.raises(Fault, match="race: .* reads what"):
        run(body.format(""), TID, threads=64)


def test_a_register_is_written_first():
    with pytest.raises(Fault, match="register: %r5 is read before it is written"):
        run("add.u32 %r10, %r5, 1;", X)
    # A move of it alone does no harm: compilers write one on ways that need no value.
    run("mov.u32 %r9, %r5;\n mov.u32 %r10, 1;", X)
    with pytest.raises(Fault, match="register: %r9 is read before it is written"):
        run("mov.u32 %r9, %r5;\n add.u32 %r10, %r9, 1;", X)


BRANCH = """
 setp.lt.u32 %p1, %r63, {};
 mov.u32 %r10, 1;
 @%p1 bra there;
 {}
 mov.u32 %r10, 2;
there:
 add.u32 %r10, %r10, %r63;
"""


def test_threads_that_part_meet_again():
    want = TID + np.where(TID < 17, 1, 2)
    body = BRANCH.format(17, "") + " shfl.sync.bfly.b32 %r11, %r10, 1, 31, -1;"
    assert np.array_equal(run(body, TID, threads=64), want)


def test_loops_of_different_lengths():
    body = """
 mov.u32 %r10, 0;
 mov.u32 %r1, 0;
again:
 add.u32 %r10, %r10, %r1;
 add.u32 %r1, %r1, 1;
 setp.le.u32 %p1, %r1, %r63;
 @%p1 bra again;
 shfl.sync.idx.b32 %r11, %r10, 0, 31, -1;
"""
    assert np.array_equal(run(body, TID, threads=64), TID * (TID + 1) // 2)


def test_a_barrier_for_a_part_of_the_block():
    run(BRANCH.format(32, "") + "bar.sync 0;", TID, threads=64)
    with pytest.raises(Fault, match="barrier: 32 of 64 threads of block 0 wait for others"):
        body = BRANCH.format(32, "bar.sync 1;") + "bar.sync 0;"
        run(body, TID, threads=64)
    with pytest.raises(Fault, match="barrier: a barrier for a part of a warp"):
        run(BRANCH.format(17, "bar.sync 0;"), TID, threads=64)


def test_threads_that_have_ended_need_not_come_to_a_barrier():
    body = "setp.ge.u32 %p1, %r63, 32;\n @%p1 ret;\n bar.sync 0;\n mov.u32 %r10, 4;"
    assert run(body, TID, threads=64)[:32].tolist() == [4] * 32


def test_a_warp_comes_whole_to_what_needs_it():
    with pytest.raises(Fault, match="barrier: shfl.sync names lanes"):
        run(BRANCH.format(17, "shfl.sync.bfly.b32 %r11, %r10, 1, 31, -1;"), TID, threads=64)
    body = BRANCH.format(32, "shfl.sync.bfly.b32 %r11, %r10, 1, 31, -1;")
    run(body, TID, threads=64)


COPY = """
 mov.u32 %r2, dynamic;
 mad.lo.u32 %r1, %r63, 16, %r2;
 ld.param.u64 %at9, [q0];
 mad.wide.u32 %at9, %r63, 16, %at9;
 setp.lt.u32 %p1, %r63, 8;
 @%p1 cp.async.cg.shared.global [%r1], [%at9], 16;
 {}
 mad.lo.u32 %r1, %r63, 4, %r2;
 ld.shared.u32 %r10, [%r1];
"""


def test_asynchronous_copies_are_waited_for_by_all():
    wait = "cp.async.commit_group;\n cp.async.wait_group {};\n {}"
    assert np.array_equal(run(COPY.format(wait.format(0, "bar.sync 0;")), X * 3, shared=128), X * 3)
    with pytest.raises(Fault, match="uninitialized"):
        run(COPY.format(wait.format(1, "bar.sync 0;")), X, shared=128)
    with pytest.raises(Fault, match="uninitialized"):
        run(COPY.format("bar.sync 0;"), X, shared=128)
    with pytest.raises(Fault, match="race"):
        run(COPY.format(wait.format(0, "")), X, shared=128)


def test_a_trap_is_a_fault():
    with pytest.raises(Fault, match="trap"):
        run("trap;")


def test_the_instruction_is_named():
    with pytest.raises(Fault, match=r"by `ld.global.u32 %r10, \[%at0\+4\]`"):
        run("ld.global.u32 %r10, [%at0+4];", X)

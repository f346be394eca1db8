"""qk_norm_rope's CUDA sources, compiled for the host and run under the public op: no GPU needed.

Which head a warp has, where it is read and written, and the arithmetic are the very functions of
the kernels; a grid's warps run one after the other, in any order.
"""

import ctypes
import sys

import pytest
import torch
from helpers.on_host import DTYPES, compiled
from torch import Tensor

from elmkernels import qk_norm_rope, reference
from elmkernels.testing import CASES
from elmkernels.testing.cases.qk_norm_rope import heads_case
from elmkernels.testing.parity import assert_parity

OP = sys.modules["elmkernels.ops.qk_norm_rope"]
WARPS = 4
PLACES = ("qkv", "positions", "slots", "q", "k", "v", "dq", "dk", "dv", "dqkv")
NUMBERS = (
    "tokens", "length", "q_heads", "kv_heads", "head_dim", "table_length", "max_length", "dtype",
    "wide_weight", "backward", "blocks", "groups", "shuffled", "seed",
)  # fmt: skip


class Where(ctypes.Structure):
    """A tensor by its strides, as the launcher gives it to the kernels."""

    _fields_ = [("data", ctypes.c_void_p), *((n, ctypes.c_int64) for n in ("batch", "at", "head"))]


class Call(ctypes.Structure):
    """What heads_simulation.cpp takes."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("q_weight", "k_weight", "table", "dq_partial")),
        ("dk_partial", ctypes.c_void_p),
        *((name, Where) for name in PLACES),
        *((name, ctypes.c_int64) for name in NUMBERS),
        ("eps", ctypes.c_double),
    ]


def where(x: Tensor | None, head_dim: int = 0) -> Where:
    if x is None:
        return Where()
    strides = [0 if size == 1 else s for size, s in zip(x.shape, x.stride(), strict=True)]
    return Where(x.data_ptr(), *strides[:2], strides[2] if x.dim() == 4 else head_dim)


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class Simulation:
    """The raw kernels of the op on a grid: `blocks` of tokens, `groups` of heads (0: the kernel's
    own numbers), whose warps run in their order or shuffled."""

    def __init__(self, library, blocks: int = 0, groups: int = 0, shuffled: bool = True):
        self.library, self.grid, self.shuffled = library, (blocks, groups), shuffled
        self.columns: list[int] = []  # that a lane had at once, call after call

    def run(self, qkv, weights, positions, table, heads, eps, places, backward, partials, grid):
        weights = [None if w is None else w.contiguous() for w in weights]
        table, (q_heads, kv_heads) = table.contiguous(), heads
        head_dim = table.shape[1]
        places |= {"qkv": qkv, "positions": positions}
        cache = places.get("k")
        call = Call(
            *(address(w) for w in weights), address(table), *(address(p) for p in partials),
            *(where(places.get(name), head_dim) for name in PLACES),
            qkv.shape[0] * qkv.shape[1], qkv.shape[1], q_heads, kv_heads, head_dim, len(table),
            0 if cache is None else cache.shape[1], DTYPES[qkv.dtype],
            weights[0] is not None and weights[0].dtype == torch.float32, backward, *grid,
            self.shuffled, len(self.columns), eps,
        )  # fmt: skip
        self.columns.append(self.library.simulate(ctypes.byref(call)))
        assert self.columns[-1] > 0, "not aligned to what is loaded"

    def forward(self, qkv, q_weight, k_weight, positions, table, q_heads, kv_heads, eps, **places):
        q = qkv.new_empty(*qkv.shape[:2], q_heads, table.shape[1])
        if qkv.numel():
            self.run(
                qkv, (q_weight, k_weight), positions, table, (q_heads, kv_heads), eps,
                {"q": q, **places}, False, (None, None), self.grid,
            )  # fmt: skip
        return q

    def qk_norm_rope_fwd(self, qkv, *rest):
        k = qkv.new_empty(*qkv.shape[:2], rest[5], rest[3].shape[1])
        return self.forward(qkv, *rest, k=k), k

    def qk_norm_rope_cache(self, *inputs):
        *inputs, k, v, slots = inputs
        return self.forward(*inputs, k=k, v=v, slots=slots)

    def qk_norm_rope_bwd(self, dq, dk, dv, qkv, q_weight, k_weight, positions, table, eps):
        dqkv = torch.empty(qkv.shape, dtype=qkv.dtype)
        weights, blocks = (q_weight, k_weight), self.grid[0] or 3
        partials = [
            None if w is None else torch.full((blocks * WARPS, len(w)), torch.nan) for w in weights
        ]
        self.run(
            qkv, weights, positions, table, (dq.shape[2], dk.shape[2]), eps,
            {"dq": dq, "dk": dk, "dv": dv, "dqkv": dqkv}, True, partials, (blocks, 1),
        )  # fmt: skip
        pairs = zip(partials, weights, strict=True)
        return dqkv, *(qkv.new_empty(0) if w is None else p.sum(0).to(w.dtype) for p, w in pairs)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    found = compiled("heads_simulation", tmp_path_factory.mktemp("simulation"))
    found.divide.argtypes, found.divide.restype = [ctypes.c_int64] * 2, ctypes.c_int64
    return found


@pytest.fixture
def simulated(library, monkeypatch):
    """Makes the op take a Simulation of the given grid as its kernels."""

    def use(*grid: int, **options) -> Simulation:
        simulation = Simulation(library, *grid, **options)
        monkeypatch.setattr(OP, "kernel", lambda name, backend: getattr(simulation, name))
        monkeypatch.setattr(OP, "rows_backend", lambda *_: "cuda")
        return simulation

    return use


PARITY = [
    (case, dtype)
    for case in CASES["qk_norm_rope"]
    for dtype in case.dtypes
    if case.name != "large"  # its size is nothing to a simulation but time
]


@pytest.mark.parametrize(("case", "dtype"), PARITY, ids=lambda x: str(x).removeprefix("torch."))
def test_every_case_has_parity(simulated, case, dtype):
    simulated()
    assert_parity("qk_norm_rope", case, dtype, None)


def drawn(dtype, head_dim=64, heads=(5, 2), shape=(3, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, kv = heads
    qkv = torch.randn(*shape, (q + 2 * kv) * head_dim, generator=generator).to(dtype)
    weights = [torch.rand(head_dim, generator=generator).to(dtype) for _ in "qk"]
    positions = torch.randint(0, 50, shape, generator=generator)
    return [qkv, *weights, positions, q, kv, reference.rope_table(50, head_dim)]


def gradients(call):
    call = [x.detach().clone() if isinstance(x, Tensor) else x for x in call]
    leaves = [x.requires_grad_() for x in call[:3]]
    outputs = qk_norm_rope(*call)
    generator = torch.Generator().manual_seed(7)
    arriving = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, arriving)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (5, 2), (40, 7)])
def test_a_grid_changes_no_bit_of_a_head(simulated, dtype, grid):
    """Also one of fewer warps than there are heads, or of more; only the sums of the weights'
    gradients have another order."""
    call = drawn(dtype)
    simulated()
    expected = gradients(call)
    simulated(*grid)
    for got, whole in zip(gradients(call)[:4], expected, strict=False):
        assert torch.equal(got, whole)
    again, shuffled = gradients(call), simulated(*grid, shuffled=False)
    assert all(map(torch.equal, gradients(call), again))
    assert shuffled.columns == [16 // dtype.itemsize] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [600, 602, 1100])
@pytest.mark.parametrize("grid", [(0, 0), (2, 1)])
def test_heads_wider_than_a_warp_have_parity(simulated, dtype, head_dim, grid):
    simulation = simulated(*grid)
    case = heads_case(f"head_dim_{head_dim}", 3, 1, head_dim, batch=2, length=3)
    assert_parity("qk_norm_rope", case, dtype, None)
    pack = 16 // dtype.itemsize
    assert set(simulation.columns) == {1 if head_dim // 2 % pack else pack}


@pytest.mark.parametrize("offset", [0, 1])
def test_what_is_not_aligned_is_loaded_number_by_number(simulated, offset):
    """The same bits from a tensor that begins one number later."""
    call = drawn(torch.bfloat16)
    room = torch.empty(call[0].numel() + 1, dtype=torch.bfloat16)
    call[0] = room[offset : offset + call[0].numel()].view(call[0].shape).copy_(call[0])
    simulation = simulated()
    q, k, _ = qk_norm_rope(*call)
    assert simulation.columns == [1 if offset else 8]
    simulation = simulated()
    aligned = qk_norm_rope(call[0].clone(), *call[1:])
    assert simulation.columns == [8]
    assert torch.equal(q, aligned[0])
    assert torch.equal(k, aligned[1])


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("bad", [-1, 50, 2**40, -(2**40)])
def test_a_position_outside_gives_nan_for_its_token_alone(simulated, norm, bad):
    call = drawn(torch.bfloat16)
    if not norm:
        call[1] = call[2] = None
    simulated()
    expected = qk_norm_rope(*call)
    call[3][1, 2] = bad
    got = qk_norm_rope(*call)
    rest = torch.ones(3, 4, dtype=torch.bool)
    rest[1, 2] = False
    for new, old in zip(got[:2], expected[:2], strict=True):
        assert new[1, 2].isnan().all()
        assert torch.equal(new[rest], old[rest])
    call[0].requires_grad_()
    out = qk_norm_rope(*call)
    (dqkv,) = torch.autograd.grad(sum(o.float().sum() for o in out), call[0])
    dq, dv = dqkv.split((7 * 64, 2 * 64), dim=-1)
    assert dq[1, 2].isnan().all()
    assert dq[rest].isfinite().all()
    assert dv.isfinite().all()


@pytest.mark.parametrize("bad", [-1, 9, 2**40])
def test_a_slot_outside_is_not_written(simulated, bad):
    call = drawn(torch.bfloat16)
    caches = [torch.full((3, 9, 2, 64), 7.0, dtype=torch.bfloat16) for _ in "kv"]
    slots = torch.tensor([[0, 8, 3, 5], [1, bad, 2, 0], [8, 7, 6, 5]])
    simulated()
    with torch.no_grad():
        q, k, v = qk_norm_rope(*call, k_cache=caches[0], v_cache=caches[1], slots=slots)
        plain = qk_norm_rope(*call)
    assert torch.equal(q, plain[0])
    for cache, fresh in ((k, plain[1]), (v, plain[2])):
        expected = torch.full_like(cache, 7.0)
        for b in range(3):
            for i, slot in enumerate(slots[b].tolist()):
                if slot != bad:
                    expected[b, slot] = fresh[b, i]
        assert torch.equal(cache, expected)


def test_the_quotients_of_places_are_those_of_whole_numbers(library):
    numbers = [0, 1, 2, 17, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**45 + 3]
    for a in numbers:
        for b in numbers[1:]:
            assert library.divide(a, b) == a // b


@pytest.mark.slow
def test_places_beyond_two_to_the_31_are_reached(simulated):
    """A cache of strides so long that only 64-bit offsets find its end, of which little exists."""
    call = drawn(torch.bfloat16, shape=(1, 2))
    room = torch.empty(2**31 + 2**10, dtype=torch.bfloat16)
    k = room.as_strided((1, 2, 2, 64), (0, 2**31, 64, 1))
    v = torch.empty(1, 2, 2, 64, dtype=torch.bfloat16)
    simulated()
    with torch.no_grad():
        expected = qk_norm_rope(*call)[1]
        qk_norm_rope(*call, k_cache=k, v_cache=v, slots=torch.arange(2)[None])
    assert torch.equal(k, expected)

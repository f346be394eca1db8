"""Which backend few rows take, and many: by the table, for tensors of a GPU that isn't there and
for a CPU that is given a table of its own.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from elmkernels import add_rms_norm, backends, qk_norm_rope, reference, rms_norm
from elmkernels.backends import (
    FEW,
    FEW_ROWS,
    Preference,
    choose,
    defined,
    implements,
    rows_backend,
    traits,
)
from elmkernels.devices import _resolved

OPS = tuple(op for op in defined() if traits(op).by_rows)
KERNELS = choose("rms_norm", "cpu", None)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """The dispatch of a machine with a GPU, on which CUDA C++ and Triton run."""
    for op in OPS:
        monkeypatch.setitem(backends._CHOICE, (op, "cuda", None), "triton")
        for name in ("cuda", "triton", "reference"):
            monkeypatch.setitem(backends._CHOICE, (op, "cuda", name), name)


def on_gpu(*shape, requires_grad=False):
    """All that the choice asks of a tensor."""
    return SimpleNamespace(
        device=torch.device("cuda"),
        shape=torch.Size(shape),
        numel=torch.Size(shape).numel,
        requires_grad=requires_grad,
    )


def taken(x, *weights, named=None):
    return rows_backend("rms_norm", named, x, *weights)


@pytest.mark.parametrize("shape", [(1, 8), (FEW_ROWS, 8), (2, 8, 8), (0, 8), (8,), (3, 0)])
def test_few_rows_on_a_gpu_take_the_cuda_kernels(shape):
    assert taken(on_gpu(*shape), on_gpu(8)) == "cuda"


@pytest.mark.parametrize("shape", [(FEW_ROWS + 1, 8), (3, 6, 8)])
def test_more_rows_take_triton(shape):
    assert taken(on_gpu(*shape), on_gpu(8)) == "triton"


def test_a_gradient_takes_triton_unless_none_is_recorded():
    x, w = on_gpu(2, 8), on_gpu(8, requires_grad=True)
    assert taken(x, w) == "triton"
    assert taken(on_gpu(2, 8, requires_grad=True), None) == "triton"
    with torch.no_grad():
        assert taken(x, w) == "cuda"


@pytest.mark.parametrize("named", ["cuda", "triton", "reference"])
def test_a_named_backend_is_taken_whatever_the_rows(named):
    for rows in (1, 100):
        assert taken(on_gpu(rows, 8), named=named) == named


def test_where_one_can_not_run_the_other_does(monkeypatch):
    monkeypatch.delitem(backends._CHOICE, ("rms_norm", "cuda", "cuda"))
    assert taken(on_gpu(1, 8)) == "triton"
    monkeypatch.delitem(backends._CHOICE, ("rms_norm", "cuda", "triton"))
    monkeypatch.setitem(backends._CHOICE, ("rms_norm", "cuda", None), "reference")
    assert taken(on_gpu(1, 8)) == "reference"


def test_every_op_asks_the_table(monkeypatch):
    """The kernel that a call looks up is that of the backend."""
    asked = []

    def kernel(name, backend):
        asked.append((name, backend))
        return backends.kernel(name, backend)

    for op in OPS:
        monkeypatch.setattr(sys.modules[f"elmkernels.ops.{op}"], "kernel", kernel)
    for rows, backend in ((FEW_ROWS, "cuda"), (FEW_ROWS + 1, "triton")):
        with FakeTensorMode(), torch.device("cuda"):
            weight, x = torch.empty(64), torch.empty(rows, 64)
            rms_norm(x, weight)
            add_rms_norm(x, x, weight)
            table, positions = torch.empty(9, 64), torch.empty(1, rows, dtype=torch.int64)
            qk_norm_rope(torch.empty(1, rows, 192), weight, weight, positions, 1, 1, table)
        assert sorted(asked) == sorted((f"{op}_fwd", backend) for op in OPS)
        asked.clear()


def test_the_report_names_both():
    for op in OPS:
        assert _resolved(op, "cuda", None) == f"cuda up to {FEW_ROWS} rows, then triton"
        assert _resolved(op, "cuda", "triton") == "triton"
        assert _resolved(op, "cpu", None) == choose(op, "cpu", None)


def test_the_table_names_backends_that_have_the_ops_and_says_why():
    assert set(OPS) <= set(defined())
    for preference in FEW.values():
        assert preference.grounds
        for name in preference.order:
            assert all(implements(name, op) for op in OPS)


@pytest.mark.skipif(KERNELS == "reference", reason="no compiled backend runs here")
@pytest.mark.parametrize("dynamic", [None, True])
def test_the_choice_is_traced_whole(monkeypatch, dynamic):
    """Few rows by the reference, many by kernels: two graphs serve every number of rows."""
    monkeypatch.setitem(FEW, "cpu", Preference(("reference",), "to see which one ran"))
    graphs = []

    def keep(graph, inputs):
        graphs.append(f"elmkernels_{KERNELS}" in graph.code)
        return graph

    torch.compiler.reset()
    weight = torch.rand(64)
    traced = torch.compile(
        lambda x: rms_norm(x, weight), backend=keep, fullgraph=True, dynamic=dynamic
    )
    for rows in (4, 9, 16, 40, 300, 2, 17):
        x = torch.randn(rows, 64)
        expected = reference.rms_norm(x, weight) if rows <= FEW_ROWS else rms_norm(x, weight)
        assert torch.equal(traced(x), expected)
    assert set(graphs) == {False, True}
    assert len(graphs) <= (2 if dynamic else 4)
    torch.compiler.reset()

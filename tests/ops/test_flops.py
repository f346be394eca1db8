"""FlopCounterMode sees every op, forward and backward, and counts what the op's record says; ONNX
export says what to do instead."""

import subprocess
import sys

import pytest
import torch
from helpers.calls import CASE, as_tuple
from helpers.checkpoints import SMALL as CONFIG
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from elmkernels import OpenELM, accelerate, ops, restore
from elmkernels.backends import BACKENDS, declared, defined, optional_kernel
from elmkernels.testing import OPS, make, runnable
from elmkernels.testing.parity import _tuple

# {op: a case of each kind of its kernels}
CASES = {
    "rms_norm": ["270M_hidden"],
    "add_rms_norm": ["270M_hidden"],
    "qk_norm_rope": ["ragged"],
    "swiglu": ["270M_ffn_768"],
    "attention": ["causal", "documents"],
    "linear": ["plain_rows_3", "affine8_64_rows_3", "plain_gradient_rows_2", "plain_rows_33"],
    "linear_cross_entropy": ["wide_weight", "wide_weight_losses"],
    "decode_step": ["plain_batch_3", "packed12_batch_2", "plain_tokens_4", "no_layers"],
}


def cases():
    for op in ops.__all__:
        names = [n for n in CASES[op] if n in CASE[op]] or [next(iter(CASE[op]))]
        for name in names:
            for backend in runnable(op):
                if backend != "triton":
                    yield op, name, backend


def counted(call):
    with FlopCounterMode(display=False) as counter:
        found = call()
    return counter.get_total_flops(), found


@pytest.mark.parametrize(("op", "name", "backend"), list(cases()))
def test_the_counter_counts_what_the_record_says(op, name, backend):
    case, record = CASE[op][name], OPS[op]
    args, kwargs = make(case, torch.bfloat16 if torch.bfloat16 in case.dtypes else torch.float32)
    says = record.operations or (lambda args, kwargs, backward: 0)
    with torch.no_grad():
        forward, outputs = counted(lambda: getattr(ops, op)(*args, **kwargs, backend=backend))
    if backend == "sdpa":
        return  # torch's own operation, which torch counts
    assert forward == says(args, kwargs, False)
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    if not leaves or op == "linear":
        return

    def both():
        outputs = as_tuple(getattr(ops, op)(*args, **kwargs, backend=backend))
        outputs = [y for y in outputs if y.requires_grad]
        torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])

    # Losses of each row make their logits again in the backward.
    again = says(args, kwargs, False) if kwargs.get("reduction") == "none" else 0
    assert counted(both)[0] == says(args, kwargs, True) + again


def test_every_kernel_has_a_formula():
    known = {str(packet) for packet in flop_registry}
    for op in defined():
        for suffix in declared(op):
            for backend in BACKENDS:
                if (raw := optional_kernel(f"{op}_{suffix}", backend)) is not None:
                    assert str(raw.overloadpacket) in known
    assert "elmkernels.linear_cross_entropy" in known
    assert _tuple(()) == ()


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "elmkernels"])
def test_formulas_are_there_whatever_is_imported_first(first):
    code = f"""
import sys, {first}
assert {first!r} != "elmkernels" or "torch.utils.flop_counter" not in sys.modules
import elmkernels, torch
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    elmkernels.swiglu(torch.ones(2, 8))
    elmkernels.linear(torch.ones(1, 8), torch.ones(4, 8))
ours = [f for f in sys.meta_path if type(f).__module__.startswith("elmkernels.")]
print(counter.get_total_flops(), len(ours))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["64", "0"], done.stderr


def test_a_model_counts_as_many_as_its_projections_have():
    model = OpenELM.from_config(CONFIG, seed=1)
    ids = torch.randint(0, 60, (2, 9))

    def step():
        model.loss(ids[:, :-1], ids[:, 1:]).backward()

    accelerate(model)
    total, _ = counted(step)
    matrices = [m.weight for m in model.modules() if hasattr(m, "weight") and m.weight.dim() == 2]
    products = 6 * 16 * sum(w.numel() for w in matrices)
    assert total >= products
    assert total <= 1.2 * products


def test_onnx_export_says_what_to_do(monkeypatch):
    """An op does; a fused module falls back on its own class, whose forward ONNX has a form of."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)

    class Norm(torch.nn.Module):
        def forward(self, x):
            return ops.rms_norm(x, torch.ones(16))

    with pytest.raises(Exception, match=r"elmkernels\.restore\(model\) before"):
        torch.export.export(Norm(), (torch.ones(2, 16),))
    model, ids = accelerate_only(), torch.ones(1, 12, dtype=torch.long)
    for change in (lambda: None, lambda: restore(model)):
        change()
        graph = str(torch.export.export(model, (ids,)).graph)
        assert "elmkernels" not in graph


def accelerate_only():
    model = OpenELM.from_config(CONFIG, seed=1).eval()
    accelerate(model)
    return model


def test_the_exporter_passes_it_on(tmp_path):
    pytest.importorskip("onnxscript")
    model, ids = accelerate_only(), torch.ones(1, 12, dtype=torch.long)
    torch.onnx.export(model, (ids,), tmp_path / "model.onnx", dynamo=True)
    assert (tmp_path / "model.onnx").stat().st_size > 0

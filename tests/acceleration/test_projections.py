"""Projections keep a prepacked copy of their weight only as long as it is that weight's."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from helpers.checkpoints import CONFIG
from helpers.golden import assert_as_accurate
from torch import nn

from elmkernels import OpenELM, OpenELMConfig, accelerate, devices
from elmkernels.acceleration import swap
from elmkernels.acceleration.classes import fuse
from elmkernels.acceleration.projections import _COPIES, PATIENCE, Linear, Products
from elmkernels.acceleration.routines import ONEDNN, PREPACKED, Plan


class TestPrepackedWeights:
    """A prepacked copy never outlives the weight it was made from."""

    plan = Plan(PREPACKED, PREPACKED, PREPACKED)

    def make(self) -> tuple[Linear, torch.Tensor]:
        layer = nn.Linear(64, 48, bias=False)
        fuse(layer, Linear, Products(self.plan))
        return layer, torch.randn(3, 64)

    def check(self, layer: Linear, x: torch.Tensor) -> None:
        with torch.no_grad():
            torch.testing.assert_close(layer(x), x @ layer.weight.T)
        assert layer.products.nbytes in (0, layer.weight.nbytes)

    def test_it_is_used(self):
        layer, x = self.make()
        self.check(layer, x)
        assert layer.products.nbytes == layer.weight.nbytes

    @pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_optimizer_steps(self, options, set_to_none):
        layer, x = self.make()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **options)
        for _ in range(3):
            self.check(layer, x)
            layer(x).square().sum().backward()
            self.check(layer, x)  # an evaluation between backward and step
            optimizer.step()
            self.check(layer, x)
            optimizer.zero_grad(set_to_none=set_to_none)
            self.check(layer, x)

    def test_loads_and_moves(self):
        layer, x = self.make()
        for change in (
            lambda: layer.load_state_dict({"weight": torch.randn(48, 64)}),
            lambda: layer.load_state_dict({"weight": torch.randn(48, 64)}, assign=True),
            lambda: nn.init.normal_(layer.weight),
            lambda: layer.weight.data.add_(torch.randn(48, 64)),  # as adapters are merged
        ):
            self.check(layer, x)
            change()
            self.check(layer, x)
        layer.bfloat16()
        with torch.no_grad():
            expected = nn.functional.linear(x.bfloat16(), layer.weight)
            assert_as_accurate(layer(x.bfloat16()), expected, (x @ layer.weight.float().T).double())

    def test_training_drops_it(self):
        layer, x = self.make()
        self.check(layer, x)
        layer.train()
        assert layer.products.nbytes == 0


IDS = torch.arange(2 * 24).view(2, 24) * 7 % CONFIG.vocab_size
OPTIMIZERS = {
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=1e-1, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("by", ["loss", "forward", "gradients that are given"])
def test_the_head_is_never_stale(by, optimizer, untied, set_to_none):
    """Its weight is also the embedding's, and is trained by the loss, which calls no projection."""
    given = CONFIG.to_hf_dict() | {"share_input_output_layers": not untied}
    config = OpenELMConfig.from_hf_dict(given)
    model = OpenELM(config, seed=1)
    accelerate(model, plan=Plan(PREPACKED, PREPACKED, PREPACKED))
    step = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(3):
        with torch.no_grad():  # an evaluation, a sample
            model(IDS)
        if by == "loss":
            model.loss(IDS, IDS).backward()
        elif by == "forward":
            model(IDS).square().mean().backward()
        else:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
        step.step()
        step.zero_grad(set_to_none=set_to_none)
        truth = OpenELM(config, seed=0)
        truth.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
        with torch.no_grad():
            torch.testing.assert_close(model(IDS), truth(IDS), rtol=1e-4, atol=1e-5)


def test_a_prepacked_copy_belongs_to_the_weight():
    """Two modules share it, and whoever trains the weight drops it for both."""
    first, second = nn.Linear(64, 48, bias=False), nn.Linear(64, 48, bias=False)
    second.weight = first.weight
    for layer in (first, second):
        fuse(layer, Linear, Products(Plan(PREPACKED, PREPACKED, PREPACKED)))
    x = torch.randn(3, 64)
    with torch.no_grad():
        first(x), second(x)
    assert first.products.nbytes == first.weight.nbytes
    second(x).sum().backward()
    assert first.products.nbytes == 0
    del first, second, layer


class TestCopiesNobodyAskedFor:
    """By default a copy is made where it pays, when it pays, and if there is much room."""

    plan = Plan(several_rows=PREPACKED, many_rows=PREPACKED)

    @pytest.mark.parametrize("rows", [9, 64, 127, 128, 500])
    def test_a_call_takes_the_copy_by_its_own_rows(self, rows):
        layer = nn.Linear(64, 48, bias=False)
        fuse(layer, Linear, Products(self.plan, None, PATIENCE))
        x = torch.randn(rows, 64)
        with torch.no_grad():
            first = layer(x)
            torch.testing.assert_close(first, x @ layer.weight.T)
            assert layer.products.nbytes == layer.weight.nbytes * (rows >= PATIENCE)
            for others in (8, 100, 200):  # whatever came before, the same bits
                layer(torch.randn(others, 64))
                assert torch.equal(layer(x), first)
        copied = copy.deepcopy(layer)
        assert copied.products.nbytes == 0 and copied.products.patience == PATIENCE
        layer.train()
        assert layer.products.nbytes == 0

    def test_a_prompt_between_steps_leaves_the_copy(self):
        layer = nn.Linear(64, 48, bias=False)
        plan = Plan(several_rows=PREPACKED, many_rows=ONEDNN)
        fuse(layer, Linear, Products(plan))
        with torch.no_grad():
            layer(torch.randn(16, 64))
            held = _COPIES[layer.weight].tensor
            layer(torch.randn(100, 64)), layer(torch.randn(16, 64))
        assert _COPIES[layer.weight].tensor is held

    @pytest.mark.parametrize("free", [None, 0, 3.9, 4.1])
    @pytest.mark.parametrize("prepack", [None, True, False])
    @pytest.mark.parametrize("untied", [False, True])
    def test_memory_decides(self, monkeypatch, free, prepack, untied):
        measured = {None: self.plan, True: self.plan, False: Plan()}
        monkeypatch.setattr(swap, "measure_plan", lambda dtype, prepack: measured[prepack])
        given = CONFIG.to_hf_dict() | {"share_input_output_layers": not untied}
        model = OpenELM(OpenELMConfig.from_hf_dict(given), seed=1)
        matrices = [p for n, p in model.named_parameters() if p.dim() == 2]
        needed = sum(p.nbytes for p in matrices)
        if untied:  # an embedding is no product
            needed -= model.token_embeddings.weight.nbytes
        held = None if free is None else int(free * needed)
        monkeypatch.setattr(swap, "free_memory", lambda: held)
        report = accelerate(model, prepack=prepack)
        room = free is not None and free > 4
        assert report.gemm == (self.plan if prepack or (prepack is None and room) else Plan())
        assert report.prepacked_bytes == (needed if report.gemm.prepacks else 0)
        said = [note for note in report.notes if "no prepacked copies" in note]
        assert len(said) == (prepack is None and not room)
        assert all(f"would take {needed / 2**20:.0f} MiB" in note for note in said)
        patience = model.layers[0].ffn.proj_1.products.patience
        assert patience == (PATIENCE if prepack is None else 0)


def test_free_memory_is_the_least_that_is_known(monkeypatch):
    found = devices.free_memory()
    assert found is None or 0 < found < 1 << 50
    files = {
        "/proc/meminfo": ["MemTotal: 9 kB", "MemAvailable:     4096 kB"],
        "/proc/self/cgroup": ["0::/a"],
        "/sys/fs/cgroup/a/memory.max": ["3000000"],
        "/sys/fs/cgroup/a/memory.current": ["2000000"],
        "/sys/fs/cgroup/a/memory.stat": ["anon 7", "inactive_file 500000"],
    }
    monkeypatch.setattr(devices, "_lines", lambda path: files.get(path, []))
    assert devices.free_memory() == 1500000
    files["/sys/fs/cgroup/a/memory.max"] = ["max"]
    assert devices.free_memory() == 4 << 20
    files["/sys/fs/cgroup/a/memory.max"] = ["1000000"]
    assert devices.free_memory() == 0
    files.clear()
    assert devices.free_memory() is None


# A batch that decodes, in a process whose highest resident set it alone makes. What is measured
# beside it: a copy of each matrix.
PEAK = """
import resource, sys, torch
from elmkernels import OpenELM, OpenELMConfig, Plan, accelerate
from elmkernels.acceleration import swap

torch.set_num_threads(1)
swap.measure_plan = lambda dtype, prepack: Plan(many_rows="oneDNN prepacked")
swap.free_memory = lambda: 1 << 50
config = OpenELMConfig(
    num_transformer_layers=4, model_dim=1024, head_dim=64, num_gqa_groups=2, vocab_size=512,
    ffn_dim_divisor=256, ffn_multipliers=4.0, qkv_multipliers=1.0,
    normalize_qk_projections=True, share_input_output_layers=True, rope_max_length=64,
)
model = OpenELM.from_config(config, seed=0, dtype=torch.bfloat16).eval()
before = {k: v.clone() for k, v in model.state_dict().items()}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
report = accelerate(model)
tokens = torch.arange(256).view(16, 16)
with torch.inference_mode():
    model(tokens[:, :7])  # too few rows for copies
    start = peak()
    model(tokens)
held = sum(m.products.nbytes for m in model.modules() if hasattr(m, "products"))
largest = max(p.nbytes for p in model.parameters())
assert held == report.prepacked_bytes > 64 << 20, (held, report.prepacked_bytes)
after = model.state_dict()
assert all(torch.equal(v, after[k]) for k, v in before.items())
print(peak() - start, held + largest)
"""


def test_copies_take_what_the_report_says_and_a_matrix_at_most():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PEAK], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    taken, most = map(int, done.stdout.split())
    assert taken <= most

"""A accelerated model that decodes by Triton, run by test_interpreted.py in an interpreted
process.
"""

import copy
import importlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.tape import record

from elmkernels.acceleration import small_batch  # fmt: skip
from elmkernels.acceleration.decode_modes import CALLS, GRAPH
from elmkernels.acceleration.routines import Plan
from elmkernels.generation.gpu_decoder import Decoder
from elmkernels.openelm import KVCache, OpenELM, OpenELMConfig, Session, accelerate, pack, quantize
from elmkernels.testing.rule import ATTENTION_SLACK, compare
from elmkernels.triton import linear as kernels
from elmkernels.triton._linear_weights import Block
from elmkernels.triton.common import NVIDIA

CONFIG = OpenELMConfig(
    num_transformer_layers=2,
    model_dim=64,
    head_dim=16,
    num_gqa_groups=2,
    qkv_multipliers=(0.5, 1.0),
    ffn_multipliers=(0.5, 2.0),
    ffn_dim_divisor=32,
    normalize_qk_projections=True,
    share_input_output_layers=True,
    vocab_size=96,
    rope_max_length=64,
)
CONFIGS = {
    "whole": CONFIG,
    "no gate, untied": replace(CONFIG, ffn_with_glu=False, share_input_output_layers=False),
    "no QK norm": replace(CONFIG, normalize_qk_projections=False),
}


def model_of(config=CONFIG, bits=None, dtype=torch.float32) -> OpenELM:
    model = OpenELM.from_config(config, seed=0, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones would hide a norm that is left out
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(1 + 0.3 * drawn.to(dtype))
    if bits:
        quantize(model, bits=bits, group_size=32, progress=False)
    return model


@pytest.fixture(autouse=True)
def few_programs(monkeypatch) -> None:
    """The interpreter takes its time by the program; the kernel's own table is tested elsewhere."""
    monkeypatch.setattr(kernels, "PRODUCT", (Block(NVIDIA, None, None, 32, 1, "a test"),))


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """How many layers went the mode of few rows, by their rows."""
    taken: list[int] = []
    forward = small_batch.forward

    def counted(layer, x, *rest):
        taken.append(x.shape[0] * x.shape[1])
        return forward(layer, x, *rest)

    monkeypatch.setattr(small_batch, "forward", counted)
    return taken


@torch.inference_mode()
def logits(model: OpenELM, batch: int, dtype: torch.dtype) -> torch.Tensor:
    """Of two tokens at once and then two one by one, with a cache."""
    ids = torch.randint(0, 96, (batch, 4), generator=torch.Generator().manual_seed(batch))
    cache = KVCache(model.config, batch, 8, dtype=dtype)
    found = [model(ids[:, :2], cache=cache)]
    found += [model(ids[:, i : i + 1], cache=cache) for i in range(2, 4)]
    return torch.cat(found, dim=1)


def check(model: OpenELM, batch: int, dtype=torch.float32, plan: Plan | None = None) -> None:
    truth = logits(copy.deepcopy(model).double(), batch, torch.float64)
    accelerate(model, backend="reference", plan=Plan())
    yardstick = logits(model, batch, dtype)
    accelerate(model, backend="triton", plan=plan or Plan())
    found = compare(truth, yardstick, logits(model, batch, dtype), "logits", ATTENTION_SLACK)
    assert found.ok, found.reason


@pytest.mark.parametrize("batch", [1, 3, 8, 9])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_decoding(bits, batch, passes):
    check(model_of(bits=bits), batch)
    expected = [] if batch == 9 else [batch] * 4
    assert passes == ([2 * batch] * 2 if 2 * batch <= 8 else []) + expected


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_by_other_layers(name, passes):
    check(model_of(CONFIGS[name]), 2)
    assert passes == [4] * 2 + [2] * 4


def test_decoding_in_float16(passes):
    check(model_of(dtype=torch.float16), 2, torch.float16)
    assert passes


def test_decoding_by_packed_weights(passes):
    """The same as by plain ones, up to the order of sums: the interpreter's bfloat16 is its own."""
    model = model_of(dtype=torch.bfloat16)
    accelerate(model, backend="triton", plan=Plan())
    plain = logits(model, 3, torch.bfloat16).float()
    count = len(passes)
    pack(model, progress=False)
    packed = logits(model, 3, torch.bfloat16).float()
    assert len(passes) == 2 * count > 0
    assert (packed - plain).square().mean() < 1e-4 * plain.square().mean()


def test_plain_weights_can_stay_with_torch(passes):
    plan = Plan(streamed=False)
    check(model_of(), 2, plan=plan)
    assert not passes
    check(model_of(bits=8), 2, plan=plan)
    assert passes


def test_what_hangs_on_a_module_is_called(passes):
    model = model_of()
    accelerate(model, backend="triton")
    seen = []
    model.layers[1].ffn.proj_1.register_forward_hook(lambda *_: seen.append(1))
    logits(model, 1, torch.float32)
    assert len(seen) == 3
    assert len(passes) == 3


def test_with_gradients_the_modules_are_called(passes):
    model = model_of()
    accelerate(model, backend="triton")
    model(torch.tensor([[1, 2]])).sum().backward()
    assert not passes
    assert model.layers[0].ffn.proj_1.weight.grad is not None


def test_the_report_says_so():
    assert "any weights" in str(accelerate(model_of(), backend="triton"))
    report = accelerate(model_of(), backend="triton", plan=Plan(streamed=False))
    assert "compressed weights" in str(report)
    assert "up to 8 rows" not in str(accelerate(model_of(), backend="reference"))


def test_a_step_is_compiled_whole(passes):
    model = model_of(bits=4)
    accelerate(model, backend="triton")
    ids = torch.tensor([[1, 2, 3]])
    torch.compiler.reset()
    with torch.inference_mode():
        expected = model(ids)
        assert passes
        traced = torch.compile(lambda ids: model(ids), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(traced(ids), expected)


def test_a_session_replays_the_graph_of_a_step(passes, monkeypatch):
    """From a tape, as a GPU does: prompts of their own lengths, then tokens one by one."""
    generate = importlib.import_module("elmkernels.generation.session")
    monkeypatch.setattr(generate, "wanted", lambda model, cache: True)
    monkeypatch.setattr(generate, "Decoder", partial(Decoder, captured=False))
    captured = lambda self, body: record(body, self._restorer())  # noqa: E731
    monkeypatch.setattr(Decoder, "_captured", captured)
    model, prompts = model_of(), [[5, 9, 2], [7]]
    expected = Session(model, 2, 64, decode_mode=CALLS).generate(prompts, 6)
    accelerate(model, backend="triton", plan=Plan())
    session = Session(model, 2, 64, decode_mode=GRAPH)
    assert session.generate(prompts, 6) == expected
    # Two warm-ups and one recording of a step; replays call no Python.
    assert passes == [2] * 2 * 2
    assert session.decoder().captures == [(GRAPH, 64)]

"""What a GPU can't run, by stand-ins for GPUs: what is named, what is taken instead, what works."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.golden import GLU_FREE, load_tiny
from torch import nn

from elmkernels import OpenELM, accelerate, backends, devices, pack, restore
from elmkernels.acceleration import swap
from elmkernels.acceleration.decode_modes import MOST_LAYERS, modes_of
from elmkernels.acceleration.report import Report
from elmkernels.backends import BACKENDS
from elmkernels.cli.main import main
from elmkernels.generation import gpu_decoder
from elmkernels.openelm import KVCache, Session, cache
from elmkernels.surgery import mark_of

GPU = torch.device("cuda", 0)
NO_TRITON = {"triton": "triton is not installed (pip install triton)"}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Dispatch and models as on a GPU of this capability; nothing can be run."""

    def make(capability=(9, 0), built=("80", "90", "100"), missing=None) -> None:
        for name in ("cuda", "triton"):
            backend = replace(BACKENDS[name], devices=("cuda",), missing=(missing or {}).get(name))
            monkeypatch.setitem(BACKENDS, name, backend)
        monkeypatch.setattr(backends, "_CHOICE", {})
        for op in backends.defined():
            backends._decide(op)
        monkeypatch.setattr(
            devices, "capability", lambda d: capability if d.type == "cuda" else None
        )
        monkeypatch.setattr(devices, "architectures", lambda: list(built))
        monkeypatch.setattr(devices, "cooperative", lambda device: True)
        monkeypatch.setattr(swap, "_device_of", lambda weight: GPU)

    return make


def tiny(dtype: torch.dtype = torch.float32) -> OpenELM:
    return load_tiny("tiny_layerwise").model(dtype)


def given(model: OpenELM) -> dict[str, str | None]:
    """What the modules of the first layer, the last norm and the loss take."""
    layer = model.layers[0]
    return {
        "add_rms_norm": layer.backend,
        "rms_norm": model.norm.backend,
        "qk_norm_rope": layer.attn.backend,
        "attention": layer.attn.attention_backend,
        "swiglu": layer.ffn.backend,
        "linear_cross_entropy": model.loss_head.backend,
    }


def accelerated() -> tuple[OpenELM, Report]:
    model = tiny()
    return model, accelerate(model)


def named(**asked) -> dict[str, str | None]:
    return {op: c.named for op, c in devices.backend_choices(GPU, **asked).items()}


def test_one_call_chooses_for_every_op(stand_in):
    stand_in()
    choices = devices.backend_choices(GPU)
    assert set(choices) == set(backends.defined())
    assert all(c.named is None and not c.why and c.op == op for op, c in choices.items())
    assert choices["rms_norm"].resolved == f"cuda up to {backends.FEW_ROWS} rows, then triton"
    assert choices["attention"].resolved == "sdpa" and choices["decode_step"].resolved == "cuda"


def test_an_op_that_the_asked_backend_lacks_takes_the_best_other(stand_in):
    stand_in()
    found = devices.backend_choices(GPU, "triton")
    assert {c.named for op, c in found.items() if op != "decode_step"} == {"triton"}
    step = found["decode_step"]
    assert step.named is None and step.resolved == "cuda"
    assert step.why == {"triton": "it has no kernels for decode_step"}
    assert set(named(asked="reference").values()) == {"reference"}
    with pytest.raises(RuntimeError, match="backend 'cuda' has no kernels for swiglu"):
        devices.backend_choices(GPU, "cuda")
    with pytest.raises(ValueError, match="backend must be one of .*, got 'mkl'"):
        devices.backend_choices(GPU, "mkl")
    with pytest.raises(RuntimeError, match="runs on cpu or cuda, got a tensor on mps"):
        devices.backend_choices(torch.device("mps"))


def test_what_this_gpu_cannot_run_is_overruled_with_the_reason(stand_in):
    stand_in(capability=(12, 0))
    found = devices.backend_choices(GPU)
    assert found["rms_norm"].named == "triton" and found["swiglu"].named is None
    assert found["decode_step"].named == "reference"
    assert found["rms_norm"].why.keys() == found["decode_step"].why.keys() == {"cuda"}
    assert "built for sm_80, sm_90, sm_100" in found["decode_step"].why["cuda"]
    assert not found["swiglu"].why and not found["attention"].why


def test_where_all_fits_every_call_decides(stand_in):
    stand_in()
    model, report = accelerated()
    assert set(given(model).values()) == {None}
    assert report.fallbacks == [] and report.decode_modes == {"graph": None, "one-launch": None}
    assert report.backends["swiglu"] == "triton" and report.attention == "sdpa"
    assert "decoding: by graph or one-launch" in str(report)


def test_without_triton(stand_in):
    stand_in(missing=NO_TRITON)
    model, report = accelerated()
    (line,) = report.fallbacks
    assert line.startswith(f"triton can't run on cuda:0: {NO_TRITON['triton']}; taken instead: ")
    taken = dict(part.split(" for ") for part in line.partition("instead: ")[2].split("; "))
    assert "add_rms_norm, rms_norm" in taken["cuda"] and "swiglu" in taken["reference"]
    assert report.backends["rms_norm"] == "cuda" and report.backends["swiglu"] == "reference"
    assert line in str(report) and report.decode_modes["one-launch"] is None


def test_an_old_gpu_takes_the_reference(stand_in):
    stand_in(capability=(7, 5))
    model, report = accelerated()
    assert given(model).pop("attention") == "sdpa"
    assert {name for op, name in given(model).items() if op != "attention"} == {"reference"}
    assert report.backends == dict.fromkeys(report.backends, "reference")
    for name in ("triton", "cuda"):
        (line,) = (text for text in report.fallbacks if text.startswith(name))
        assert "needs compute capability 8.0 or newer, this GPU has compute capability 7.5" in line
        assert "taken instead: reference for add_rms_norm" in line
    assert "another device" in report.fallbacks[-1]
    assert report.decode_modes["graph"] is None and "7.5" in report.decode_modes["one-launch"]
    assert "decoding: by graph\nnot by one-launch: its kernel is backend 'cuda'" in str(report)


def test_a_library_for_other_gpus(stand_in):
    stand_in(capability=(12, 0))
    model, report = accelerated()
    found = given(model)
    assert found["rms_norm"] == found["add_rms_norm"] == "triton"
    assert found["swiglu"] is found["attention"] is found["linear_cross_entropy"] is None
    assert "built for sm_80, sm_90, sm_100" in report.fallbacks[0] and "12.0" in report.fallbacks[0]
    assert "triton for add_rms_norm, rms_norm" in report.fallbacks[0]
    assert "built for sm_80, sm_90, sm_100" in report.decode_modes["one-launch"]


def test_a_conversion_accelerates_again_as_it_was_asked(stand_in):
    stand_in(capability=(12, 0))
    model = tiny(torch.bfloat16)
    accelerate(model)
    assert mark_of(model).arguments["backend"] is None
    pack(model, progress=False)
    assert given(model)["attention"] is None and given(model)["rms_norm"] == "triton"
    restore(model)
    assert not any(name.startswith("_elmkernels") for name in vars(model))


@pytest.mark.parametrize("name", ["triton", "sdpa"])
def test_a_named_backend_never_falls_back(stand_in, name):
    stand_in(capability=(7, 5))
    model = tiny()
    before = dict(model.named_modules())
    with pytest.raises(RuntimeError, match="can't run on cuda:0: needs .*7.5|no kernels") as error:
        accelerate(model, backend=name)
    assert dict(model.named_modules()) == before
    if name == "triton":
        assert str(error.value).endswith("what works there: 'sdpa', 'reference'")
    accelerate(model, backend="reference")
    assert given(model)["rms_norm"] == "reference"


def test_modes_and_what_is_missing(stand_in, monkeypatch):
    stand_in()
    model = tiny()
    cpu = modes_of(model, torch.device("cpu"))
    assert set(cpu) == set(gpu_decoder.DECODE_MODES) - {gpu_decoder.CALLS}
    assert cpu == dict.fromkeys(cpu, "it needs a CUDA device, the model is on cpu")
    assert "Linear, not an elmkernels.OpenELM" in modes_of(nn.Linear(2, 2), GPU)["graph"]
    assert "the model is torch.float64" in modes_of(tiny().double(), GPU)["one-launch"]
    mixed = tiny()
    mixed.layers[0].attn.out_proj.bfloat16()
    assert "of one dtype, got torch.bfloat16, torch.float32" in modes_of(mixed, GPU)["graph"]
    monkeypatch.setattr(devices, "cooperative", lambda device: False)
    assert "cooperative launches" in modes_of(model, GPU)["one-launch"]
    monkeypatch.setattr("elmkernels.acceleration.decode_modes.MOST_LAYERS", 2)
    assert f"2 layers, the model has {len(model.layers)}" in modes_of(model, GPU)["one-launch"]
    assert modes_of(model, GPU)["graph"] is None and MOST_LAYERS == 128
    model.layers[0].register_forward_hook(lambda *_: None)
    assert "layers.0 has hooks" in modes_of(model, GPU)["graph"]


def no_memory(monkeypatch, free: int) -> None:
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cache, "_zeros", full)
    monkeypatch.setattr(devices, "check_here", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 34))


def test_a_cache_that_does_not_fit_says_what_would(monkeypatch):
    token = 2 * sum(GLU_FREE.num_kv_heads) * GLU_FREE.head_dim * 2
    wanted = {"dtype": torch.bfloat16, "device": "cuda"}
    no_memory(monkeypatch, free=2 * 64 * token)
    with pytest.raises(MemoryError) as error:
        KVCache(GLU_FREE, 4, 64, **wanted)
    text = str(error.value)
    assert f"needs {4 * 64 * token} bytes" in text and f"{2 * 64 * token} of {1 << 34}" in text
    assert "a max_length of 32 for 4 rows or 2 rows of 64 tokens would fit" in text
    no_memory(monkeypatch, free=token - 1)
    with pytest.raises(MemoryError, match="at most nothing of it would fit"):
        KVCache(GLU_FREE, 1, 64, **wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_named_with_what_works(tmp_path):
    match = r"'cuda' is not here: torch .* sees no CUDA device.*; device 'cpu' works"
    model = OpenELM(GLU_FREE, seed=0)
    model.save_pretrained(tmp_path)
    for make in (
        lambda: KVCache(GLU_FREE, 1, device="cuda"),
        lambda: OpenELM.from_config(GLU_FREE, device="cuda"),
        lambda: OpenELM.from_pretrained(tmp_path, device="cuda"),
    ):
        with pytest.raises(RuntimeError, match=match):
            make()
    assert Session(model).cache.device.type == "cpu"
    with pytest.raises(RuntimeError, match="'cpu:3' is not here: torch sees 1 of cpu"):
        devices.check_here(torch.device("cpu", 3))


def test_a_gpu_that_is_not_there_beside_those_that_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda:1", "cuda"):
        assert devices.missing_device(torch.device(name)) is None
    assert devices.missing_device(torch.device("cuda:2")).endswith("torch sees 2 of cuda")


@pytest.mark.parametrize("form", ["text", "json"])
def test_info_shows_every_gpu_and_what_fits_it(stand_in, monkeypatch, capsys, form):
    stand_in(capability=(12, 0))
    card = SimpleNamespace(name="NVIDIA Something", major=12, minor=0, total_memory=24 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert main(["info", *(["--json"] if form == "json" else [])]) == 0
    out = capsys.readouterr().out
    assert "NVIDIA Something" in out and "built for sm_80, sm_90, sm_100" in out
    if form == "text":
        lines = [" ".join(line.split()) for line in out.partition("\nGPUs\n")[2].splitlines()]
        assert lines[0] == "cuda:0 NVIDIA Something, compute capability 12.0, 24 GiB"
        assert "triton fits" in lines and "reference fits" in lines
        assert any(line.startswith("cuda can't run there: built for") for line in lines)


def test_the_most_layers_are_those_of_the_kernel():
    plan = Path(__file__).parents[2] / "csrc" / "cuda" / "decode" / "plan.cuh"
    found = re.search(r"kMaxLayers = (\d+);", plan.read_text())
    assert found and int(found[1]) == MOST_LAYERS

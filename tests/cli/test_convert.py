"""`elmkernels convert`, in this process."""

import json
import shutil
import sys

import pytest
import torch
from helpers import GOLDEN

from elmkernels import OpenELM, pack, quantize
from elmkernels.cli.main import main
from elmkernels.openelm.compressed import Compressed, weight_of
from elmkernels.reference import dense

TINY = GOLDEN / "hf_tiny"
IDS = torch.arange(9)[None]


def refusal(capsys: pytest.CaptureFixture, *argv: str) -> str:
    assert main(["convert", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("bits", [8, 4])
def test_to_quantized(capsys, tmp_path, bits):
    how = ["--bits", str(bits), "--group-size", "32"]
    argv = ["--checkpoint", str(TINY), "--to", "quantized", "--out", str(tmp_path / "q")]
    assert main(["convert", *argv, *how]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"quantized to {bits} bits 13 matrices: ")
    assert out.endswith(f"wrote {tmp_path / 'q'}\n")
    expected = OpenELM.from_pretrained(TINY)
    quantize(expected, bits, 32)
    assert torch.equal(OpenELM.from_pretrained(tmp_path / "q")(IDS), expected(IDS))


def test_to_packed_with_what_stands_beside(capsys, tmp_path):
    source = shutil.copytree(TINY, tmp_path / "source")
    (source / "tokenizer.model").write_text("any")
    argv = ["--checkpoint", str(source), "--to", "packed12", "--out", str(tmp_path / "p"), "--json"]
    assert "must be bfloat16 to be packed, got torch.float32" in refusal(capsys, *argv)
    assert not (tmp_path / "p").exists()
    assert main(["convert", *argv, "--dtype", "bf16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["to"] == "packed12" and found["report"][0].startswith("packed 13 matrices")
    assert (tmp_path / "p" / "tokenizer.model").read_text() == "any"
    expected = OpenELM.from_pretrained(TINY, dtype=torch.bfloat16)
    loaded = OpenELM.from_pretrained(tmp_path / "p")
    assert torch.equal(loaded(IDS), expected(IDS))
    assert pack(loaded).matrices == 0


FORMS = {"packed12": pack, "quantized": lambda model: quantize(model, 4, 32), "plain": None}


@pytest.mark.parametrize("dtype", [None, "fp32"])
@pytest.mark.parametrize("form", FORMS)
def test_to_plain(capsys, tmp_path, form, dtype):
    """Of any form, with the very weights that it stands for."""
    model = OpenELM.from_pretrained(TINY, dtype=torch.bfloat16)
    if FORMS[form] is not None:
        FORMS[form](model)
    model.save_pretrained(tmp_path / "source")
    argv = ["--checkpoint", str(tmp_path / "source"), "--to", "plain", "--out", str(tmp_path / "o")]
    assert main(["convert", *argv, *([] if dtype is None else ["--dtype", dtype])]) == 0
    count = 0 if form == "plain" else 13
    assert capsys.readouterr().out.startswith(f"made plain {count} matrices: ")
    made = OpenELM.from_pretrained(tmp_path / "o")
    assert not any(isinstance(module, Compressed) for module in made.modules())
    for name, module in made.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None:
            held = dense(weight_of(model.get_submodule(name)), torch.bfloat16)
            assert torch.equal(weight, held.to(torch.float32 if dtype else torch.bfloat16)), name


def test_to_gguf(capsys, tmp_path):
    pytest.importorskip("gguf")
    argv = ["--checkpoint", str(TINY), "--to", "gguf", "--out", str(tmp_path / "m.gguf")]
    assert main(["convert", *argv, "--type", "q8_0"]) == 0
    assert "q8_0, no vocabulary" in capsys.readouterr().out
    assert (tmp_path / "m.gguf").read_bytes()[:4] == b"GGUF"


def test_wrong_input(capsys, tmp_path, monkeypatch):
    out = ["--out", str(tmp_path / "o")]
    source = ["--checkpoint", str(TINY)]
    for argv, message in (
        ([*source, "--to", "packed12"], "arguments are required: --out"),
        (["--to", "packed12", *out], "arguments are required: --checkpoint"),
        ([*source, *out], "--to"),
        (
            [*source, *out, "--to", "gptq"],
            "one of plain, quantized, packed12, gguf, onnx, got",
        ),
        ([*source, *out, "--to", "gguf", "--type", "q6_k"], "q8_0, q4_0, got 'q6_k'"),
        ([*source, *out, "--to", "quantized", "--bits", "3"], "invalid choice: 3"),
        ([*source, *out, "--to", "packed12", "--bits", "4"], "--bits belongs to --to quantized"),
        ([*source, *out, "--to", "packed12", "--type", "f16"], "--type belongs to --to gguf"),
        ([*source, "--out", str(TINY), "--to", "packed12"], "--out must be another place"),
        (["--checkpoint", "nowhere", *out, "--to", "packed12"], "nowhere does not exist"),
        ([*source, *out, "--to", "gguf", "--tokenizer", "nowhere"], "--tokenizer: nowhere is not"),
        ([*source, *out, "--to", "gguf", "--tokenizer", str(tmp_path)], "--tokenizer: /"),
    ):
        assert message in refusal(capsys, *argv)
    for package, form in (("gguf", "gguf"), ("onnx", "onnx")):
        monkeypatch.setitem(sys.modules, package, None)
        assert f"pip install {package}" in refusal(capsys, *source, *out, "--to", form)
    assert not (tmp_path / "o").exists()

"""Files for others, read by them: MLX's folders, llama.cpp's files, ONNX's; MLX's own folders read
here. `pip install 'mlx[cpu]' mlx-lm`, `llama-cpp-python gguf`, `onnx onnxscript onnxruntime`; run
with `python -m pytest -m ecosystem`.
"""

import copy

import pytest
import torch
from helpers.exports import asked

from elmkernels import OpenELM, OpenELMConfig, accelerate, pack, quantize
from elmkernels.cli.main import main
from elmkernels.integrations.onnx import export_onnx
from elmkernels.openelm.gguf import export_gguf
from elmkernels.testing.rule import ATTENTION_SLACK, compare

ecosystem = pytest.mark.ecosystem
NEW = 24
SHAPE = dict(
    num_transformer_layers=3, model_dim=128, head_dim=32, num_gqa_groups=2, ffn_dim_divisor=64,
    qkv_multipliers=(0.5, 1.5), ffn_multipliers=(0.5, 2.0), normalize_qk_projections=True,
    share_input_output_layers=True, vocab_size=128, rope_max_length=128,
)  # fmt: skip
CONFIG = OpenELMConfig(**SHAPE)
UNTIED = OpenELMConfig(**SHAPE | {"share_input_output_layers": False, "ffn_with_glu": False})
NO_NORMS = OpenELMConfig(**SHAPE | {"normalize_qk_projections": False})
IDS = [1, 5, 9, 2, 44, 101, 7, 7, 30]


def drawn(config: OpenELMConfig = CONFIG) -> OpenELM:
    model = OpenELM(config, seed=4).eval()
    with torch.no_grad():  # so that the last token's own embedding doesn't always win
        for layer in model.layers:
            layer.attn.out_proj.weight *= 6
            layer.ffn.proj_2.weight *= 6
    return model


@torch.no_grad()
def greedy(model: OpenELM) -> list[int]:
    ids = torch.tensor([IDS])
    for _ in range(NEW):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), 1)
    return ids[0, len(IDS) :].tolist()


def held(model: OpenELM, got: dict, times: float) -> None:
    """Another program's float32: its greedy tokens are ours, its logits at most so many times as
    far from the truth as ours are."""
    ids = torch.tensor([IDS])
    with torch.no_grad():
        ours, exact = model(ids)[0], copy.deepcopy(model).double()(ids)[0]
    error = (torch.tensor(got["logits"]).double() - exact).abs().max()
    assert error <= times * (ours - exact).abs().max()
    assert got["tokens"] == greedy(model)


@ecosystem
@pytest.mark.parametrize("form", ["plain", "8 bits", "4 bits"])
def test_our_folders_in_mlx(tmp_path, form):
    model = drawn()
    if form != "plain":
        quantize(model, int(form[0]), 32)
    model.save_pretrained(tmp_path)
    held(model, asked("in_mlx", "mlx_lm", folder=tmp_path, ids=IDS, new=NEW), 16)


@ecosystem
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_s_folders_here(tmp_path, bits, group_size):
    """Quantized by MLX: loaded, saved and loaded again, with MLX's logits and tokens."""
    drawn().save_pretrained(tmp_path / "plain")
    got = asked("in_mlx", "mlx_lm", folder=tmp_path / "plain", ids=IDS, new=NEW,
                quantize=(bits, group_size), out=tmp_path / "mlx")  # fmt: skip
    model = OpenELM.from_pretrained(tmp_path / "mlx")
    held(model, got, 16)
    own = drawn()
    quantize(own, bits, group_size)
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), model.state_dict()[name].view(torch.uint8))
    model.save_pretrained(tmp_path / "again")
    held(model, asked("in_mlx", "mlx_lm", folder=tmp_path / "again", ids=IDS, new=NEW), 16)


@ecosystem
@pytest.mark.parametrize("source", ["plain", "packed12", "8 bits"])
def test_our_files_in_llama_cpp(tmp_path, source):
    """Of any form of weights."""
    pytest.importorskip("gguf")
    model = drawn()
    if source == "packed12":
        pack(model.bfloat16())
    elif source == "8 bits":
        quantize(model, 8, 32)
    export_gguf(model, tmp_path / "m.gguf", "f32")
    exact = copy.deepcopy(drawn()) if source == "plain" else dense(model)
    got = asked("in_llama_cpp", "llama_cpp", file=tmp_path / "m.gguf", ids=IDS, new=NEW)
    held(exact, got, 8)


def dense(model: OpenELM) -> OpenELM:
    from elmkernels.compression.plain import make_plain

    made = copy.deepcopy(model)
    make_plain(made, progress=False)
    return made.float()


FORMS = {
    "tied": (CONFIG, None), "untied": (UNTIED, None), "no norms": (NO_NORMS, None),
    "accelerated": (CONFIG, lambda model: accelerate(model)),
    "quantized": (CONFIG, lambda model: quantize(model, 4, 32)),
}  # fmt: skip


@ecosystem
@pytest.mark.parametrize("form", FORMS)
def test_onnx(tmp_path, form):
    """Any batch, length and past: in one piece, in pieces, with padding on the left, token by
    token; and the model is what it was.
    """
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    config, change = FORMS[form]
    model = drawn(config)
    if change is not None:
        change(model)
    before = model(torch.tensor([IDS]))
    export_onnx(model, tmp_path / "m.onnx")
    assert torch.equal(model(torch.tensor([IDS])), before)
    assert {path.name for path in tmp_path.iterdir()} <= {"m.onnx", "m.onnx.data"}
    plain = dense(model) if form == "quantized" else drawn(config)
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    names = [x.name for x in session.get_inputs()]
    assert names[:4] == [
        "input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value",
    ]  # fmt: skip

    def run(ids: torch.Tensor, mask: torch.Tensor, past: list) -> tuple[torch.Tensor, list]:
        found = session.run(None, dict(zip(names, [ids.numpy(), mask.numpy(), *past], strict=True)))
        return torch.from_numpy(found[0]), found[1:]

    def empty(batch: int) -> list:
        sizes = [(batch, heads, 0, config.head_dim) for heads in config.num_kv_heads]
        return [torch.zeros(size).numpy() for size in sizes for _ in range(2)]

    rows = torch.tensor([IDS, IDS[::-1], [3] * 4 + IDS[:5]])
    mask = torch.ones_like(rows)
    mask[2, :4] = 0
    with torch.no_grad():
        ours = plain(rows, mask)
        exact = copy.deepcopy(plain).double()(rows, mask)
    for cuts in ([9], [4, 9], [1, 2, 9], [8, 9]):
        past, start, found = empty(3), 0, []
        for end in cuts:
            logits, past = run(rows[:, start:end], mask[:, :end], past)
            found.append(logits)
            start = end
        got = torch.cat(found, 1)
        real = mask.bool()
        told = compare(exact[real], ours[real], got[real], "logits", slack=ATTENTION_SLACK)
        assert told.ok, f"{cuts}: {told.reason}"
    tokens, (logits, past) = [], run(rows[:1], mask[:1], empty(1))
    for i in range(NEW):
        tokens.append(int(logits[0, -1].argmax()))
        real = torch.ones(1, len(IDS) + i + 1, dtype=torch.int64)
        logits, past = run(torch.tensor([tokens[-1:]]), real, past)
    assert tokens == greedy(plain)


@ecosystem
def test_onnx_by_the_command(tmp_path, capsys):
    pytest.importorskip("onnxscript")
    drawn().save_pretrained(tmp_path / "model")
    argv = [
        "--checkpoint",
        str(tmp_path / "model"),
        "--to",
        "onnx",
        "--out",
        str(tmp_path / "m.onnx"),
    ]
    assert main(["convert", *argv]) == 0
    assert "each of 3 layers" in capsys.readouterr().out
    assert (tmp_path / "m.onnx").stat().st_size > 0


@pytest.mark.parametrize(
    "model, path, error, message",
    [
        (torch.nn.Linear(2, 2), "m.onnx", TypeError, "model must be an elmkernels.OpenELM"),
        (OpenELM(CONFIG, device="meta"), "", ValueError, "path must be a file, got the folder"),
    ],
)
def test_what_onnx_refuses(tmp_path, model, path, error, message):
    with pytest.raises(error, match=message):
        export_onnx(model, tmp_path / path)
    assert not list(tmp_path.iterdir())

"""Folders by anybody: what a journal, a configuration or a tensor may say, and what it may cost."""

import errno
import json
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import CONFIG, GROUPED, assert_same, same_bits
from safetensors.torch import load_file, save_file

from elmkernels import OpenELM, accelerate, generate, pack, quantize
from elmkernels.cli.main import main
from elmkernels.openelm import KVCache, rotary
from elmkernels.openelm.compressed import Packed12Module, Quantized
from elmkernels.weights import storage

JOURNAL = ".elmkernels-save.json"
WRITTEN = ".{}.0123abcd.elmkernels-tmp"  # as a save names what it writes


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }  # fmt: skip


JOURNALS = {
    "nothing": {},
    "null": {"rename": None, "remove": None},
    "lists": {"rename": [], "remove": {}},
    "an absolute source": {"rename": {"{out}/secret": "config.json"}, "remove": []},
    "an absolute target": {"rename": {WRITTEN.format("x"): "{out}/moved"}, "remove": []},
    "a target above": {"rename": {WRITTEN.format("../moved"): "../moved"}, "remove": []},
    "a source above": {"rename": {"../out/secret": "secret"}, "remove": []},
    "a source of another name": {"rename": {WRITTEN.format("a"): "b"}, "remove": []},
    "a source that no save wrote": {"rename": {"tokenizer.json": "config.json"}, "remove": []},
    "a target on another drive": {"rename": {WRITTEN.format("c:x"): "c:x"}, "remove": []},
    "the journal itself": {"rename": {WRITTEN.format(JOURNAL): JOURNAL}, "remove": []},
    "a target that is no text": {"rename": {WRITTEN.format("5"): 5}, "remove": []},
    "two of one name": {
        "rename": {WRITTEN.format("a"): "a", ".a.89abcdef.elmkernels-tmp": "a"}, "remove": [],
    },
    "removing above": {"rename": {}, "remove": ["../out/secret"]},
    "removing an absolute path": {"rename": {}, "remove": ["{out}/secret"]},
    "removing what is no weights": {"rename": {}, "remove": ["tokenizer.json"]},
    "removing a folder": {"rename": {}, "remove": ["."]},
    "removing a number": {"rename": {}, "remove": [7]},
    "removing digits of another script": {
        "rename": {}, "remove": ["model-\u0660\u0660\u0660\u0660\u0661-of-00002.safetensors"],
    },
    "removing what it renames": {
        "rename": {WRITTEN.format("model.safetensors"): "model.safetensors"},
        "remove": ["model.safetensors"],
    },
}  # fmt: skip


@pytest.mark.parametrize("journal", JOURNALS)
def test_a_journal_that_no_save_has_written_is_refused(folder, tmp_path, journal):
    """Neither loading nor saving touches a file, in the folder or beside it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "secret").write_text("precious")
    (folder / "tokenizer.json").write_text("{}")
    text = json.dumps(JOURNALS[journal]).replace("{out}", str(tmp_path / "out"))
    (folder / JOURNAL).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"{JOURNAL}.*must"):
        OpenELM.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"{JOURNAL}.*must"):
        OpenELM(CONFIG, seed=2).save_pretrained(folder)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["", "[", "[" * 200_000, "[1]", '{"rename": ' + "9" * 5000 + "}"])
def test_a_journal_that_is_no_json_is_refused(folder, text):
    (folder / JOURNAL).write_text(text)
    with pytest.raises(ValueError, match=JOURNAL):
        OpenELM.from_pretrained(folder)


def reconfigured(folder: Path, **values) -> None:
    file = folder / "config.json"
    kept = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in kept.items() if v is not None}))


BOMBS = {
    "layers": dict(num_transformer_layers=10**7, num_query_heads=None, num_kv_heads=None,
                   ffn_multipliers=1.0, qkv_multipliers=1.0),
    "more layers": dict(num_transformer_layers=10**18, ffn_multipliers=1.0, qkv_multipliers=1.0),
    "a vocabulary": dict(vocab_size=10**18),
    "a head": dict(head_dim=10**30),
    "a divisor": dict(ffn_dim_divisor=10**30),
    "thousands of digits": dict(vocab_size=10**4000),
    "a base of thousands of digits": dict(rope_freq_constant=10**4000),
    "layers of thousands of digits": dict(num_transformer_layers=10**4000),
    "a wide model": dict(model_dim=2**31 - 2),
    "an infinite width": dict(ffn_multipliers=[1e308, 1e308]),
    "a width that is infinite": dict(ffn_multipliers=[float("inf")] * 2),
    "a width that is no number": dict(ffn_multipliers=float("nan")),
    "many positions": dict(rope_max_length=10**30),
    "an infinite base": dict(rope_freq_constant=float("inf")),
    "a huge base": dict(rope_freq_constant=10**60),
    "a tiny base": dict(rope_freq_constant=1e-300),
    "a true base": dict(rope_freq_constant=True),
    "an infinite eps": dict(norm_eps=float("inf")),
    "an eps that is no number": dict(norm_eps=float("nan")),
    "a word for true": dict(normalize_qk_projections="false"),
    "a number for true": dict(share_input_output_layers=1),
    "a word for a gate": dict(ffn_with_glu="x"),
    "half a padding index": dict(padding_index=1.5),
    "a word for a padding index": dict(padding_index="a"),
    "heads without end": dict(num_query_heads=[10**30] * 3),
    "a name for layers": dict(num_transformer_layers="3"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_configuration_of_another_size_than_the_weights_is_refused(folder, bomb):
    import tracemalloc

    reconfigured(folder, **BOMBS[bomb])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="config.json: |does not fit its configuration"):
            OpenELM.from_pretrained(folder)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_more_positions_than_memory(folder):
    """The table has the rows that are asked for."""
    expected = OpenELM.from_pretrained(folder)
    reconfigured(folder, rope_max_length=2**31 - 1)
    model = OpenELM.from_pretrained(folder)
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids), expected(ids))
    assert model.rope_table.shape == (rotary.ROWS, CONFIG.head_dim)
    accelerate(model)
    assert generate(model, [[1, 2]], 3)[0].tokens == generate(expected, [[1, 2]], 3)[0].tokens


@pytest.mark.parametrize("accelerated", [False, True])
def test_the_table_grows(monkeypatch, accelerated):
    """Whatever its first length, the same logits and tokens; decoding sees it grow."""
    expected, model = OpenELM(CONFIG, seed=1), OpenELM(CONFIG, seed=1)
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(rotary, "ROWS", 4)
    model.rope_table = torch.empty(0, device="meta")
    if accelerated:
        accelerate(model), accelerate(expected)
    for length, rows in ((3, 4), (5, 8), (40, 64), (3, 64)):
        assert torch.equal(model(ids[:, :length]), expected(ids[:, :length]))
        assert model.rope_table.shape[0] == rows
    model.rope_table = torch.empty(0, device="meta")
    found, wanted = ([r.tokens for r in generate(m, ids[:, :3], 30)] for m in (model, expected))
    assert found == wanted and model.rope_table.shape[0] == 32
    cache = KVCache(CONFIG, 2)
    with torch.inference_mode():
        model.rope_table = torch.empty(0, device="meta")
        parts = [model(ids[:, i : i + 4], cache=cache) for i in range(0, 40, 4)]
    assert torch.allclose(torch.cat(parts, 1), expected(ids), atol=1e-4)
    loss = model.loss(ids[:, :9], ids[:, 1:10])
    model(ids)  # the table grows before the backward pass reads it
    loss.backward()


def test_a_tensor_that_repeats_a_few_bytes(tmp_path):
    state = OpenELM(CONFIG, seed=1).state_dict()
    state["token_embeddings.weight"] = torch.zeros(1).expand(96, 64)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="must be stored in 24576 bytes, got 4"):
        OpenELM.from_pretrained(tmp_path / "model.pt", config=CONFIG)


def test_a_torch_file_with_compressed_parts(tmp_path):
    import zipfile

    torch.save(OpenELM(CONFIG, seed=1).state_dict(), tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in parts.items():
            packed.writestr(name, data)
    with pytest.raises(ValueError, match="is compressed"):
        OpenELM.from_pretrained(tmp_path / "model.pt", config=CONFIG)


@pytest.mark.parametrize("kind", ["sparse", "meta", "quantized"])
def test_tensors_of_another_kind(tmp_path, kind):
    state = OpenELM(CONFIG, seed=1).state_dict()
    x = torch.ones(64)
    state["norm.weight"] = {
        "sparse": x.to_sparse,
        "meta": lambda: x.to("meta"),
        "quantized": lambda: torch.quantize_per_tensor(x, 1.0, 0, torch.qint8),
    }[kind]()
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match="dtype: norm.weight must be floating point|not a complete"
    ):
        OpenELM.from_pretrained(tmp_path / "model.pt", config=CONFIG)


# What a kernel trusts.


def compressed(form: str) -> OpenELM:
    model = OpenELM(GROUPED, seed=1, dtype=torch.bfloat16)
    if form == "packed12":
        with torch.no_grad():  # more exponents in a row than have codes
            model.layers[0].ffn.proj_1.weight[3, :40] = 2.0 ** -torch.arange(30, 70)
        pack(model, progress=False)
    else:
        quantize(model, 8, 32, progress=False)
    return model


def module_of(model: OpenELM) -> tuple[str, torch.nn.Module]:
    return next(
        (n, m) for n, m in model.named_modules()
        if isinstance(m, Packed12Module | Quantized)
        and (isinstance(m, Quantized) or int(m.escape_starts.diff().max()) > 1)
    )  # fmt: skip


def _unordered(state: dict, prefix: str) -> None:
    starts, columns = (state[f"{prefix}.escape_{part}"] for part in ("starts", "columns"))
    at = int(starts[int(starts.diff().argmax())])
    columns[at : at + 2] = columns[at : at + 2].flip(0)


def _twice(state: dict, prefix: str) -> None:
    starts, columns = (state[f"{prefix}.escape_{part}"] for part in ("starts", "columns"))
    at = int(starts[int(starts.diff().argmax())])
    columns[at + 1] = columns[at]


def put(part: str, value):
    def change(state: dict, prefix: str) -> None:
        state[f"{prefix}.{part}"].view(-1)[-1] = value

    return change


def replaced(part: str, make):
    def change(state: dict, prefix: str) -> None:
        state[f"{prefix}.{part}"] = make(state[f"{prefix}.{part}"])

    return change


DAMAGE = {
    "columns out of order": ("packed12", _unordered, "ascend"),
    "a column twice": ("packed12", _twice, "ascend"),
    "a column outside": ("packed12", put("escape_columns", 1 << 20), "escape_columns"),
    "a column below": ("packed12", put("escape_columns", -1), "escape_columns"),
    "starts past the end": ("packed12", put("escape_starts", 1 << 20), "escape_starts"),
    "too few values": ("packed12", replaced("escape_values", lambda x: x[:-1].clone()), "values"),
    "infinite scales": ("quantized", put("scales", float("inf")), "scales"),
    "scales that are none": ("quantized", put("scales", float("nan")), "scales"),
    "infinite biases": ("quantized", put("biases", -float("inf")), "biases"),
}
FOR_A_STATE = {
    "columns in float": ("packed12", replaced("escape_columns", lambda x: x.float()), "int32"),
    "exponents in int64": ("packed12", replaced("exponents", lambda x: x.long()), "uint8"),
    "a list of starts": ("packed12", replaced("escape_starts", lambda x: x.tolist()), "a tensor"),
    "too few rows": ("packed12", replaced("packed", lambda x: x[1:].clone()), r"\["),
    "words in int64": ("quantized", replaced("weight", lambda x: x.long()), "uint32"),
    "too few scales": ("quantized", replaced("scales", lambda x: x[:, :0].clone()), "scales"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_whose_indices_lie(tmp_path, damage):
    form, change, message = DAMAGE[damage]
    model = compressed(form)
    name, _ = module_of(model)
    model.save_pretrained(tmp_path)
    weights = {k: v.clone() for k, v in load_file(tmp_path / "model.safetensors").items()}
    change(weights, f"transformer.{name}")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} is damaged: .*{message}"):
        OpenELM.from_pretrained(tmp_path)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("damage", DAMAGE | FOR_A_STATE)
def test_a_state_whose_indices_lie(damage, assign):
    """The module is then what it was, and so is one that gets only the lie (strict=False)."""
    form, change, message = (DAMAGE | FOR_A_STATE)[damage]
    model = compressed(form)
    name, module = module_of(model)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    whole = {k: v.clone() for k, v in state.items()}
    change(state, name)
    lies = {k: v for k, v in state.items() if not torch.is_tensor(v) or not same_bits(v, whole[k])}
    for given, strict in ((state, True), (state, False), (lies, False)):
        with pytest.raises(RuntimeError, match=f"{name}.*{message}"):
            model.load_state_dict(given, assign=assign, strict=strict)
        now = module.state_dict()
        assert now.keys() == before.keys()
        assert all(same_bits(value, now[key]) for key, value in before.items())
    model.load_state_dict(whole, assign=assign)


def test_a_part_of_a_weight_that_fits_no_other(tmp_path):
    """Escapes alone, of another weight: refused, though each tensor has a shape of its own."""
    model, other = compressed("packed12"), compressed("packed12")
    name, module = module_of(model)
    count = module.escape_columns.numel()
    parts = {f"{name}.escape_columns": torch.zeros(count + 3, dtype=torch.int32)}
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=name):
            model.load_state_dict(parts, strict=False, assign=assign)
    assert_same(model, other)


# A full disk.


@contextmanager
def small_disk(size: int):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("how", ["a limit", "no space"])
def test_a_full_disk(folder, monkeypatch, capsys, how):
    before = contents(folder)
    model = OpenELM(CONFIG, seed=2)
    number = errno.EFBIG if how == "a limit" else errno.ENOSPC

    def full(out) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, small_disk(20_000 if how == "a limit" else -1):
        if how == "no space":
            patch.setattr(storage, "_sync_file", full)
        with pytest.raises(OSError, match=f"{folder} can't be written: ") as caught:
            model.save_pretrained(folder)
        assert caught.value.errno == number and os.strerror(number) in str(caught.value)
        assert contents(folder) == before
        other = folder.parent / "other"
        argv = ["convert", "--checkpoint", str(folder), "--to", "packed12", "--out", str(other)]
        assert main([*argv, "--dtype", "bf16"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and f"{other} can't be written: " in lines[0]
        assert "Errno" not in lines[0] and not other.exists()
    assert_same(OpenELM.from_pretrained(folder), OpenELM(CONFIG, seed=1))


@pytest.mark.parametrize("what", ["a GGUF file", "results"])
def test_a_full_disk_and_other_files(tmp_path, what):
    """Whatever is written in one step: named, and not half there."""
    path = tmp_path / ("model.gguf" if what == "a GGUF file" else "results.json")
    path.write_text("what was before")
    with small_disk(10_000):
        if what == "a GGUF file":
            pytest.importorskip("gguf")
            from elmkernels.openelm.gguf import export_gguf

            with pytest.raises(OSError, match=f"{path} can't be written: "):
                export_gguf(OpenELM(CONFIG, seed=1), path)
        else:
            from elmkernels.cli.console import Output, WrongInput

            with pytest.raises(WrongInput, match=f"{path} can't be written: "):
                Output(str(tmp_path)).save({"x": "y" * 20_000})
    assert [p.read_text() for p in tmp_path.iterdir()] == ["what was before"]

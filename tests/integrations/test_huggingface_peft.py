"""PEFT on the kernels: every kind of adapter, on every form of weights, before and after
`accelerate`; a step and its tokens are those of plain PyTorch with the same adapter.
"""

import warnings

import pytest
import torch
from helpers.transformers_models import body, ids, wrapped

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft

import elmkernels
from elmkernels import hf
from elmkernels.acceleration import fused
from elmkernels.acceleration.projections import Products
from elmkernels.openelm.compressed import Compressed
from elmkernels.weights.affine import quantize_weight

pytestmark = pytest.mark.ecosystem
PROJECTIONS = ["qkv_proj", "out_proj", "proj_1", "proj_2"]
TASK = {"task_type": "CAUSAL_LM"}
LORA = TASK | {"r": 4, "target_modules": PROJECTIONS, "init_lora_weights": False}
IA3 = TASK | {
    "target_modules": ["qkv_proj", "proj_2"], "feedforward_modules": ["proj_2"],
    "init_ia3_weights": False,
}  # fmt: skip
ADAPTERS = {
    "LoRA": lambda: peft.LoraConfig(**LORA),
    "LoRA of all that is linear": lambda: peft.LoraConfig(
        **LORA | {"target_modules": "all-linear", "use_rslora": True}
    ),
    "LoRA of two": lambda: peft.LoraConfig(**LORA | {"target_modules": ["qkv_proj", "proj_1"]}),
    "DoRA": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "LoRA and whole norms": lambda: peft.LoraConfig(
        **LORA, modules_to_save=["ffn_norm", "attn_norm", "q_norm"]
    ),
    "LoRA and the embedding": lambda: peft.LoraConfig(**LORA, modules_to_save=["token_embeddings"]),
    "LoRA of the embedding too": lambda: peft.LoraConfig(
        **LORA | {"target_modules": [*PROJECTIONS, "token_embeddings"]}
    ),
    "IA3": lambda: peft.IA3Config(**IA3),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=PROJECTIONS, init_weights=False),
}
FORMS = {
    "plain": None,
    "8 bits": lambda m: elmkernels.quantize(m, 8, 32, progress=False),
    "4 bits": lambda m: elmkernels.quantize(m, 4, 32, progress=False),
    "packed12": lambda m: elmkernels.pack(m, progress=False),
}


def model_of(form: str, kernels: str | None, **values):
    """A small model in transformers' interface, its weights in a form."""
    narrow = form in ("packed12", "dense")  # the same weights
    held = body(torch.bfloat16 if narrow else torch.float32, **values)
    if FORMS.get(form) is not None:
        FORMS[form](held)
    if form == "dense":
        held.float()
    model = hf.OpenELMForCausalLM.from_openelm(held, pad_token_id=0).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    if kernels is None:
        model.set_attn_implementation("eager")
    else:
        model.accelerate(kernels)
    return model


def adapted(adapter: str, form: str, when: str | None):
    """With an adapter that came before acceleration or after it, or to plain PyTorch."""
    model = model_of(form, "auto" if when == "after" else None)
    torch.manual_seed(5)
    wrapper = peft.get_peft_model(model, ADAPTERS[adapter]())
    if when == "before":
        model.set_attn_implementation("elmkernels")
        model.accelerate()
    return wrapper


def step(model) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids(2, 8), labels=ids(2, 8)).loss
    loss.backward()
    model.eval()
    return {"loss": loss.detach()} | {
        n: p.grad for n, p in model.named_parameters() if p.requires_grad
    }


def logits(model, **options):
    with torch.no_grad():
        return model(input_ids=ids(2, 7), **options).logits.float()


def assert_same(found: dict, wanted: dict, slack: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        size = value.float().norm()
        assert size > 0 and (found[name].float() - value.float()).norm() <= slack * size, name


def assert_no_worse(found: dict, yardstick: dict, truth: dict) -> None:
    assert found.keys() == yardstick.keys() == truth.keys()
    for name, value in truth.items():
        ours, theirs = ((x[name].float() - value).norm() for x in (found, yardstick))
        assert ours <= 2 * theirs + 1e-3 * value.norm(), name


CASES = [(a, f) for f in FORMS for a in ADAPTERS if f == "plain" or a in ("LoRA", "DoRA", "IA3")]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("adapter", "form"), CASES)
def test_a_step_is_that_of_plain_pytorch(adapter, form, when):
    """when the adapter came: before acceleration, or after."""
    ours, theirs = adapted(adapter, form, when), adapted(adapter, form, None)
    if form == "packed12":  # bfloat16: no further from float32 than twice what plain PyTorch is
        truth = adapted(adapter, "dense", None)
        adapters = {n: p.float() for n, p in theirs.named_parameters() if p.requires_grad}
        truth.load_state_dict(adapters, strict=False)
        assert_no_worse(step(ours), step(theirs), step(truth))
        return
    assert_same(step(ours), step(theirs), 1e-4)
    options = {"max_new_tokens": 6, "do_sample": False}
    tokens = [m.generate(input_ids=ids(2, 5), **options).tolist() for m in (ours, theirs)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(("adapter", "form"), CASES)
def test_adapters_are_disabled_saved_and_loaded(adapter, form, tmp_path):
    ours = adapted(adapter, form, "after")
    plain = logits(model_of(form, "auto"), use_cache=False)
    changed = logits(ours)
    with ours.disable_adapter():
        torch.testing.assert_close(logits(ours, use_cache=False), plain, rtol=1e-4, atol=1e-4)
    assert (changed - plain).norm() > 1e-3 * plain.norm()
    ours.save_pretrained(tmp_path / "adapter")
    for kernels in ("auto", None):
        again = peft.PeftModel.from_pretrained(model_of(form, kernels), tmp_path / "adapter")
        close = (logits(again.eval()) - changed).norm() / changed.norm()
        assert close <= (3e-2 if form == "packed12" else 1e-4)


# Merged into a tied matrix, the embedding's adapter would change the head as well.
MERGED = [case for case in CASES if case[0] != "LoRA of the embedding too"]


@pytest.mark.parametrize(("adapter", "form"), MERGED)
def test_merged_adapters(adapter, form):
    ours = adapted(adapter, form, "after")
    before, changed = logits(model_of(form, "auto")), logits(ours)
    ours.merge_adapter()
    merged = logits(ours)
    # Merged into 4 bits a change is rounded to 4 bits.
    slack = {"plain": 1e-4, "8 bits": 3e-2, "4 bits": 0.4, "packed12": 3e-2}[form]
    assert (merged - changed).norm() <= slack * changed.norm()
    assert (merged - changed).norm() < (before - changed).norm()
    ours.unmerge_adapter()
    assert (logits(ours) - changed).norm() <= slack * changed.norm()
    whole = ours.merge_and_unload()
    assert isinstance(whole, hf.OpenELMForCausalLM)
    assert not any(type(m).__module__.startswith("peft") for m in whole.modules())
    report = whole.accelerate()
    assert report.left == [] and report.wrapped == {}
    assert (logits(whole) - changed).norm() <= 2 * slack * changed.norm()


def test_the_head_of_a_compressed_embedding_is_read_but_not_written():
    model = model_of("4 bits", "auto")
    head, hidden = model.get_output_embeddings(), torch.randn(3, 128)
    torch.testing.assert_close(head(hidden), hidden @ head.weight.t(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="weight must be left as it is"):
        head.weight.data += 1
    lora = peft.get_peft_model(model, ADAPTERS["LoRA"]())
    assert lora.merge_and_unload().config.tie_word_embeddings


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_merged_is_quantized_as_a_matrix_is(bits):
    ours = adapted("LoRA", f"{bits} bits", "after")
    layer = ours.base_model.model.transformer.layers[1].ffn.proj_1
    held = layer.base_layer.compressed()
    delta = layer.get_delta_weight("default")
    wanted = quantize_weight(held.dense() + delta, bits, 32)
    layer.merge()
    got = layer.base_layer.compressed()
    for a, b in zip(got.parts(), wanted.parts(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert list(layer.base_layer.state_dict()) == ["weight", "scales", "biases"]


def test_a_merged_model_is_saved_and_decoded_in_one_call(tmp_path, monkeypatch):
    whole = adapted("LoRA", "8 bits", "after").merge_and_unload()
    whole.save_pretrained(tmp_path / "merged")
    again = hf.OpenELMForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(whole))
    from elmkernels.generation import step as stepping

    calls, real = [], stepping.ops.decode_step
    monkeypatch.setattr(
        stepping.ops, "decode_step", lambda *a, **k: (calls.append(1), real(*a, **k))[1]
    )
    whole.generate(ids(1, 4), max_new_tokens=5, do_sample=False)
    assert len(calls) == 4


OPS = {
    "rms_norm": 4, "qk_norm_rope": 3, "attention": 3, "add_rms_norm": 3, "swiglu": 3,
    "linear_cross_entropy": 1,
}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("adapter", [
    "LoRA", "DoRA", "IA3", "LoRA of two", "LoRA and the embedding", "LoRA of the embedding too",
])  # fmt: skip
def test_adapters_leave_the_fused_path(adapter, when, monkeypatch):
    """Of three layers: each norm, rotation, attention and SwiGLU is our kernel, each projection's
    own product is our routine, and the loss makes no logits. What is made again to be compared
    (see `recompute`) is made without gradients.
    """
    model = adapted(adapter, "plain", when)
    counts = dict.fromkeys((*OPS, "products"), 0)

    def counted(name, real):
        def call(*args, **kwargs):
            counts[name] += torch.is_grad_enabled()
            return real(*args, **kwargs)

        return call

    for name in OPS:
        monkeypatch.setattr(fused.ops, name, counted(name, getattr(fused.ops, name)))
    monkeypatch.setattr(Products, "__call__", counted("products", Products.__call__))
    model.train()
    model(input_ids=ids(2, 8), labels=ids(2, 8)).loss  # noqa: B018
    assert counts == OPS | {"products": 12}


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_linear_is_the_projections(tied):
    """And not the head."""
    model = model_of("plain", "auto", share_input_output_layers=tied)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, lora)
    names = {n.rpartition(".")[2] for n in tuned.targeted_module_names}
    assert names == set(PROJECTIONS) and len(tuned.targeted_module_names) == 12


def test_the_report_says_where_adapters_are():
    model = adapted("LoRA of two", "plain", "after")
    report = model.base_model.model.report
    assert report.wrapped == {"peft's Linear": 6} and report.left == []
    assert "6 projections inside of peft's Linear are called through it" in str(report)
    assert report.accelerated["projections"] == 12
    assert adapted("LoRA of two", "4 bits", "before").base_model.model.report.wrapped == {
        "peft's Linear": 6
    }
    assert model.merge_and_unload().report.wrapped == {}


@pytest.mark.parametrize("form", ["8 bits", "4 bits"])
def test_qlora_as_peft_prepares_it(form):
    """Norms in float32, inputs that want gradients, activation checkpointing."""
    found = []
    for kernels in ("auto", None):
        model = peft.prepare_model_for_kbit_training(model_of(form, kernels))
        torch.manual_seed(5)
        found.append(step(peft.get_peft_model(model, ADAPTERS["LoRA"]())))
    assert_same(*found, 1e-4)


def test_compressed_weights_stay_what_they_are_in_training():
    model = adapted("LoRA", "4 bits", "after")
    held = [m for m in model.modules() if isinstance(m, Compressed)]
    before = [b.clone() for m in held for b in m.buffers()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(float(step(model)["loss"]))
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, (b for m in held for b in m.buffers()), strict=True)
    )


def test_transformers_own_doors_to_adapters(tmp_path):
    """add_adapter, and a folder of an adapter alone."""
    from transformers.integrations.peft import MIN_PEFT_VERSION, check_peft_version

    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(f"transformers refuses this PEFT in add_adapter: {error}")
    model_of("plain", "auto").save_pretrained(tmp_path / "base")
    model = hf.OpenELMForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(5)
    model.add_adapter(ADAPTERS["LoRA"]())
    changed = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter/model.safetensors").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = hf.OpenELMForCausalLM.from_pretrained(tmp_path / "adapter")
    assert again.report.wrapped == {"peft's Linear": 12}
    torch.testing.assert_close(logits(again.eval()), changed, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_another_shape_is_one_error(tmp_path):
    other = peft.get_peft_model(model_of("plain", None, model_dim=64), ADAPTERS["LoRA"]())
    other.save_pretrained(tmp_path / "adapter")
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(wrapped("auto"), tmp_path / "adapter")

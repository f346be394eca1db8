"""What others do with the model: TRL, lm-eval, pipelines, torch.compile."""

import pytest
import torch
from helpers.tokenizers import hugging_face
from helpers.transformers_models import eager, ids, wrapped

pytest.importorskip("transformers")

from transformers import PreTrainedTokenizerFast, pipeline

import elmkernels

pytestmark = pytest.mark.ecosystem


@pytest.fixture
def tokenizer(tmp_path):
    file = str(hugging_face(tmp_path))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_file=file, **names)


RUNS = {
    "plain": {},
    "bf16": {"bf16": True},
    "packed": {"packing": True, "max_length": 16},
    "padding-free": {"padding_free": True, "max_length": None},
}


@pytest.mark.parametrize("run", RUNS)
def test_supervised_fine_tuning(run, tmp_path, tokenizer):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [{"input_ids": ids(1, 6 + i, seed=i)[0].tolist()} for i in range(8)]
    losses = []
    for model in (wrapped("auto"), wrapped(None)):
        settings = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to=[], logging_steps=1,
            per_device_train_batch_size=2, **({"bf16": False} | RUNS[run]),
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model=model, args=settings, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        losses.append([h["loss"] for h in trainer.state.log_history if "loss" in h])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2 if run == "bf16" else 1e-3)


def quantized(kernels):
    model = wrapped(None)
    elmkernels.quantize(model, 4, 32, progress=False)
    if kernels is not None:
        model.accelerate(kernels)
    return model


@pytest.mark.parametrize("trainer", ["SFT", "DPO"])
@pytest.mark.parametrize("make", [wrapped, quantized])
def test_adapters_in_trl(make, trainer, tmp_path, tokenizer):
    """LoRA of plain weights and of 4-bit ones; DPO then compares with the model without it."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    peft = pytest.importorskip("peft")
    row = {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " ran"}
    if trainer == "SFT":
        row = {"text": "the cat sat on the mat"}
    losses = []
    for kernels in ("auto", None):
        torch.manual_seed(5)
        settings = getattr(trl, f"{trainer}Config")(
            output_dir=str(tmp_path), max_steps=3, use_cpu=True, report_to=[], logging_steps=1,
            per_device_train_batch_size=2, bf16=False, learning_rate=1e-2,
        )  # fmt: skip
        lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        made = getattr(trl, f"{trainer}Trainer")(
            model=make(kernels), args=settings, processing_class=tokenizer, peft_config=lora,
            train_dataset=datasets.Dataset.from_list([row] * 4),
        )  # fmt: skip
        made.train()
        losses.append([h["loss"] for h in made.state.log_history if "loss" in h])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("loss", ["hinge", "sigmoid"])
def test_preference_tuning(loss, tmp_path, tokenizer):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    row = {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " ran"}
    losses = []
    for kernels in ("auto", None):
        settings = trl.DPOConfig(
            output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to=[], logging_steps=1,
            per_device_train_batch_size=2, bf16=False, loss_type=loss, learning_rate=1e-3,
        )  # fmt: skip
        trainer = trl.DPOTrainer(
            model=wrapped(kernels), ref_model=wrapped(kernels), args=settings,
            train_dataset=datasets.Dataset.from_list([row] * 4), processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        losses.append([h["loss"] for h in trainer.state.log_history if "loss" in h])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][-1] < losses[0][0]


def test_log_likelihoods(tokenizer):
    """lm-eval's own class for models of transformers."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    pairs = [("the cat", " sat"), ("a dog", " ran to the cat"), ("", "the cat sat")]
    found = []
    for model in (wrapped("auto", vocab_size=290), eager(vocab_size=290)):
        lm = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
        assert lm.max_length == 128
        asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        found.append([value for value, _ in lm.loglikelihood(asked)])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_pipeline(tokenizer):
    generator = pipeline(
        "text-generation", model=wrapped("auto", vocab_size=290), tokenizer=tokenizer
    )
    (found,) = generator("the cat", max_new_tokens=4, do_sample=False)
    assert found["generated_text"].startswith("the cat")


@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_model(training):
    model = wrapped("auto").train(training)
    compiled = torch.compile(model)
    if training:
        inputs = {"input_ids": ids(2, 8), "labels": ids(2, 8)}
        loss = compiled(**inputs).loss
        loss.backward()
        torch.testing.assert_close(loss, model(**inputs).loss, rtol=1e-5, atol=1e-5)
    else:
        with torch.no_grad():
            got = compiled(ids(1, 8), use_cache=False).logits
            torch.testing.assert_close(got, model(ids(1, 8)).logits, rtol=1e-5, atol=1e-5)

"""Apple's own code for transformers 4.40 to 4.53, eager and accelerated.

It is found in the Hub's local cache, where `from_pretrained` with trust_remote_code puts it.
"""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from helpers.golden import load_hf_tiny

from elmkernels import OpenELM, accelerate, restore
from elmkernels.acceleration.classes import Fused
from elmkernels.bench.baselines import remote_code

pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.skipif(remote_code.missing() is not None, reason=str(remote_code.missing())),
]
GOLDEN = Path(__file__).parents[1] / "golden" / "hf_tiny"
IDS = torch.randint(4, 320, (2, 9), generator=torch.Generator().manual_seed(1))
ONES = torch.ones_like(IDS)
LEFT = ONES.index_put((torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2])), torch.tensor(0))
RIGHT = ONES.index_put((torch.tensor([1, 1, 1]), torch.tensor([6, 7, 8])), torch.tensor(0))


@pytest.fixture
def pair(tmp_path):
    models = []
    for name in ("eager", "fast"):
        shutil.copytree(GOLDEN, tmp_path / name)
        model = remote_code.load(tmp_path / name, remote_code.found(), torch.float32)
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
        models.append(model)
    report = accelerate(models[1])
    assert not report.left and report.accelerated["models"] == report.accelerated["bodies"] == 1
    return models


def close(got, expected) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert (got - expected).norm() <= 2e-5 * expected.norm()


def test_golden_logits_by_every_door(pair, tmp_path):
    tensors = load_hf_tiny().tensors
    ours = OpenELM.from_pretrained(GOLDEN)
    with torch.inference_mode():
        for model in (*pair, ours):
            logits = model(tensors["input_ids"])
            logits = getattr(logits, "logits", logits)
            assert (logits - tensors["logits"]).abs().max() <= 2e-5


WAYS = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "top p": {"do_sample": True, "top_p": 0.8},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "groups of beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "padded on the left": {"attention_mask": LEFT},
    "padded on the right": {"attention_mask": RIGHT},
    "padded beams": {"attention_mask": LEFT, "num_beams": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_generating(pair, way):
    tokens = []
    for model in pair:
        torch.manual_seed(3)
        how = {"max_new_tokens": 16, "do_sample": False, "attention_mask": ONES} | WAYS[way]
        tokens.append(model.generate(IDS * how["attention_mask"], **how))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("mask", [None, ONES, LEFT, RIGHT], ids=["none", "ones", "left", "right"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_forward_and_gradients(pair, mask, checkpointing):
    found = []
    for model in pair:
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        out = model(IDS, attention_mask=mask, labels=IDS, output_hidden_states=True)
        out.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([out.loss, out.logits, *out.hidden_states, *gradients])
    for got, expected in zip(*reversed(found), strict=True):
        close(got, expected)


def test_it_stays_apples_model(pair, tmp_path):
    _, fast = pair
    fast.save_pretrained(tmp_path / "saved")
    assert '"OpenELMForCausalLM"' in (tmp_path / "saved" / "config.json").read_text()
    with torch.inference_mode():
        expected = fast(IDS).logits
        assert torch.equal(copy.deepcopy(fast)(IDS).logits, expected)
        restore(fast)
        assert not any(isinstance(m, Fused) for m in fast.modules())
        close(fast(IDS).logits, expected)

"""What the tests of transformers share: small models as its class, prompts, padded batches."""

import torch
from torch.utils.data import Dataset

from elmkernels.openelm import OpenELM, OpenELMConfig

from . import GOLDEN

APPLE = GOLDEN / "hf_tiny"
VOCABULARY = 320
SHAPE = dict(
    num_transformer_layers=3, model_dim=128, head_dim=32, num_gqa_groups=2, ffn_dim_divisor=64,
    qkv_multipliers=(0.5, 1.0), ffn_multipliers=(0.5, 2.0), vocab_size=VOCABULARY,
    normalize_qk_projections=True, share_input_output_layers=True, max_context_length=128,
    rope_max_length=256,
)  # fmt: skip
KINDS = {
    "tied": {},
    "untied": {"share_input_output_layers": False},
    "without QK norm, one query head a key head": {
        "normalize_qk_projections": False, "num_gqa_groups": 1,
    },
    "without a gate, padded": {"ffn_with_glu": False, "padding_index": 3},
}  # fmt: skip


def shape(**values) -> OpenELMConfig:
    """A small model's shape."""
    return OpenELMConfig(**(SHAPE | values))


def body(dtype: torch.dtype = torch.float32, seed: int = 0, **values) -> OpenELM:
    """A small model of this package."""
    return OpenELM(shape(**values), seed=seed, dtype=dtype)


def wrapped(kernels: str | None = "auto", dtype: torch.dtype = torch.float32, seed: int = 0, **v):
    """A small model of transformers, in evaluation mode."""
    from elmkernels import hf

    model = hf.OpenELMForCausalLM.from_openelm(body(dtype, seed, **v), pad_token_id=0).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if kernels is not None:
        model.accelerate(kernels)
    return model


def eager(**values):
    """The same model by transformers' eager attention: no kernel and no cache of ours."""
    model = wrapped(None, **values)
    model.set_attn_implementation("eager")
    return model


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (batch, length), generator=generator)


def left_padded(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of so many real tokens behind padding, and their mask."""
    rows = ids(len(lengths), max(lengths), seed)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return rows.masked_fill(~mask, 0), mask.long()


class Rows(Dataset):
    """Something that can be learned."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict:
        tokens = (torch.arange(16) * (i % 3 + 1) + i) % 300 + 4
        return {"input_ids": tokens, "labels": tokens.clone()}


def trained(tmp_path, model=None, resume=None, **options):
    """The Trainer after six steps on them, and the losses."""
    from transformers import Trainer, TrainingArguments

    arguments = dict(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=6, learning_rate=3e-3,
        lr_scheduler_type="constant", logging_steps=1, report_to=[], save_strategy="no",
        use_cpu=True, seed=1, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    model = wrapped("auto") if model is None else model
    trainer = Trainer(
        model=model, args=TrainingArguments(**(arguments | options)), train_dataset=Rows(),
        eval_dataset=Rows(),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

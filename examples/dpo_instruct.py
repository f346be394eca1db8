"""Instruction tuning by DPO with TRL, with the figures that Apple's repository gives for
OpenELM-Instruct (projects/openelm/instruction_tuning; its data are cleaned UltraFeedback pairs).

    pip install 'elmkernels[peft]'
    python examples/dpo_instruct.py --checkpoint OpenELM-270M --data pairs.jsonl --out tuned

A line of the data has "prompt", "chosen" and "rejected".
"""

import argparse

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import elmkernels.hf  # noqa: F401

# Epochs, learning rate and loss of each model.
TUNED = {
    "270M": (5, 2e-5, "hinge"),
    "450M": (8, 3e-5, "hinge"),
    "1_1B": (5, 5e-5, "sigmoid"),
    "3B": (10, 1e-4, "hinge"),
}


def settings(model: str, out: str, steps: int) -> DPOConfig:
    epochs, rate, loss = TUNED[model]
    return DPOConfig(
        out, num_train_epochs=epochs, max_steps=steps, learning_rate=rate, loss_type=[loss],
        beta=0.01, bf16=True, lr_scheduler_type="cosine", warmup_steps=0.1, optim="adamw_torch",
        max_length=1024, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
        seed=42, report_to=[], use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="a folder")
    parser.add_argument("--data", required=True, help="a file of JSON lines")
    parser.add_argument("--out", required=True, help="a folder for the result")
    parser.add_argument("--model", default="270M", choices=TUNED, help="whose figures are taken")
    parser.add_argument("--steps", type=int, default=-1, help="stop after so many (default: all)")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint)
    trainer = DPOTrainer(
        model,
        args=settings(args.model, args.out, args.steps),
        train_dataset=Dataset.from_json(args.data),
        processing_class=AutoTokenizer.from_pretrained(args.checkpoint),
    )
    trainer.train()
    trainer.save_model()
    print(model.report)


if __name__ == "__main__":
    main()

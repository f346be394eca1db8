"""LoRA or DoRA on commonsense tasks with PEFT, with the figures in Apple's repository
(projects/openelm/peft_configs; its data are the 170k rows of LLM-Adapters), but for the z-loss.

    pip install 'elmkernels[peft]'
    python examples/lora_commonsense.py --checkpoint OpenELM-270M --data rows.json --out adapter

A row of the data has "instruction", "input" and "output".
"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import elmkernels.hf  # noqa: F401

TARGETS = ["token_embeddings", "qkv_proj", "out_proj", "proj_1", "proj_2"]


def settings(out: str, steps: int) -> TrainingArguments:
    return TrainingArguments(
        out, max_steps=steps, warmup_steps=1000, learning_rate=3e-4, weight_decay=0.0,
        lr_scheduler_type="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 3e-5, "warmup_lr_rate": 1e-6 / 3e-4}, adam_beta1=0.9,
        adam_beta2=0.95, adam_epsilon=1e-8, max_grad_norm=1.0, bf16=True, report_to=[],
        per_device_train_batch_size=8, gradient_accumulation_steps=2, remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip


def batch(rows: list[dict], tokenizer) -> dict:
    texts = ["\n\n".join(r[n] for n in ("instruction", "input", "output") if r[n]) for r in rows]
    texts = [text + tokenizer.eos_token for text in texts]
    made = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=2048)
    return {**made, "labels": made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("checkpoint", "data", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    parser.add_argument("--steps", type=int, default=4375, help="Apple's, of its own batches")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint, padding_side="right")
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint)
    adapter = LoraConfig(r=32, lora_alpha=32, lora_dropout=0.1, target_modules=TARGETS,
                         use_dora=args.dora, task_type="CAUSAL_LM")  # fmt: skip
    trainer = Trainer(get_peft_model(model, adapter), settings(args.out, args.steps),
                      lambda rows: batch(rows, tokenizer),
                      train_dataset=Dataset.from_json(args.data))  # fmt: skip
    trainer.train()
    trainer.save_model()
    print(model.report)


if __name__ == "__main__":
    main()

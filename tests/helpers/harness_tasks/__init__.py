"""Tasks of lm-eval in a folder, with their data beside: nothing is fetched."""

import json
import random
from pathlib import Path

from ..tokenizers import hugging_face
from ..transformers_models import body

WORDS = "the cat sat on a mat dog ran to and then it was gone".split()
_DATA = """task: {name}
output_type: {kind}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {file}
    test: {file}
training_split: train
fewshot_split: train
test_split: test
"""
_MEANS = "metric_list:\n" + "".join(
    f"  - metric: {name}\n    aggregation: mean\n    higher_is_better: true\n"
    for name in ("acc", "acc_norm")
)
TASKS = {
    "choices": (
        "multiple_choice",
        'doc_to_text: "Q: {{question}}\\nA:"\ndoc_to_target: answer\n'
        'doc_to_choice: "{{choices}}"\n' + _MEANS,
    ),
    "letters": (
        "multiple_choice",
        'doc_to_text: "Q: {{question}}\\nA:"\ndoc_to_target: answer\n'
        'doc_to_choice: ["a", "b", "c"]\n' + _MEANS,
    ),
    "whole": (  # without a context
        "multiple_choice",
        'doc_to_text: ""\ndoc_to_target: answer\ndoc_to_choice: "{{choices}}"\n' + _MEANS,
    ),
    "last_word": (
        "loglikelihood",
        'doc_to_text: "{{question}} "\ndoc_to_target: "{{choices[0]}}"\n'
        "metric_list:\n  - metric: perplexity\n  - metric: acc\n",
    ),
    "rolling": (
        "loglikelihood_rolling",
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n",
    ),
    "writing": (
        "generate_until",
        'doc_to_text: "Q: {{question}}\\nA:"\ndoc_to_target: "{{choices[0]}}"\n'
        'generation_kwargs:\n  until: ["t", "zz"]\n  max_gen_toks: 12\n'
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n"
        "    higher_is_better: true\n",
    ),
}  # fmt: skip


def _text(drawn: random.Random, words: int) -> str:
    return " ".join(drawn.choice(WORDS) for _ in range(words))


def write_tasks(folder: Path, questions: int = 9) -> Path:
    """The tasks, each of so many questions; one text is longer than a small model's context."""
    folder.mkdir(exist_ok=True)
    drawn, file = random.Random(0), folder / "questions.jsonl"
    rows = [
        {
            "question": _text(drawn, 4 + i % 4),
            "choices": [_text(drawn, 1 + j) for j in range(3)],
            "answer": drawn.randrange(3),
            "text": _text(drawn, 90 if i == 0 else 12),
        }
        for i in range(questions)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, (kind, rest) in TASKS.items():
        head = _DATA.format(name=name, kind=kind, file=file)
        (folder / f"{name}.yaml").write_text(head + rest)
    return folder


def write_checkpoint(folder: Path, **values) -> Path:
    """A small model with a tokenizer."""
    body(**values).save_pretrained(folder)
    hugging_face(folder)
    return folder

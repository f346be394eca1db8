"""The table of doors in docs/support.md: what comes in, what goes out, and which test holds it."""

from collections.abc import Sequence
from pathlib import Path

from elmkernels.cli.convert import FORMS
from elmkernels.integrations.vllm.versions import TESTED
from elmkernels.openelm.compressed import STORED_FORMS
from elmkernels.openelm.gguf import TYPES
from elmkernels.weights.formats import BITS, GROUP_SIZES

from .figures import table

ROOT = Path(__file__).resolve().parents[2]


def _of(values: Sequence[object]) -> str:
    return " or ".join(map(str, values))


# Of each form that `elmkernels convert` writes: what reads it, and the test.
OUT = {
    "plain": ("a folder of Apple's keys", "this package, transformers, vLLM, MLX",
              "tests/cli/test_convert.py"),
    "quantized": (f"MLX's folder, {_of(BITS)} bits, groups of {_of(GROUP_SIZES)}",
                  "this package, mlx-lm", "tests/compression/test_exports.py"),
    "packed12": ("a folder, bfloat16 without loss", "this package",
                 "tests/openelm/test_compressed_folders.py"),
    "gguf": (f"a file, {_of(TYPES)}", "llama.cpp", "tests/compression/test_exports.py"),
    "onnx": ("a file, cache in and out", "onnxruntime", "tests/compression/test_exports.py"),
}  # fmt: skip
# Of each word in config.json that says how weights are compressed.
COMPRESSED = {
    "quantization": ("MLX's quantized folder, mlx-lm's own too",
                     "tests/compression/test_exports.py"),
    "elmkernels": ("a packed12 folder", "tests/openelm/test_compressed_folders.py"),
}  # fmt: skip


def incoming() -> list[list[str]]:
    """What is read, by what, and the test."""
    load = "`OpenELM.from_pretrained`, every command"
    stored = [[COMPRESSED[word][0], load, COMPRESSED[word][1]] for word in STORED_FORMS]
    return [
        ["Apple's folder, one file or shards", load, "tests/openelm/test_checkpoint.py"],
        ["CoreNet's `.pt` with its YAML", load, "tests/openelm/test_checkpoint.py"],
        *stored,
        ["a name in the Hub's cache", load, "tests/openelm/test_hub.py"],
        ["Apple's code, CoreNet's model", "`accelerate`", "tests/acceleration/test_foreign.py"],
        ["any of these folders", "transformers: `import elmkernels.hf`",
         "tests/integrations/test_huggingface_loading.py"],
        ["Apple's folder, or a plain one", f"vLLM {_of(TESTED)}: `vllm serve`",
         "tests/integrations/test_vllm_engine.py"],
        ["any of these folders", "lm-eval: `elmkernels eval`",
         "tests/evaluation/test_harness.py"],
    ]  # fmt: skip


def outgoing() -> list[list[str]]:
    """What is written, what reads it, and the test."""
    return [[f"`convert --to {form}`: {OUT[form][0]}", *OUT[form][1:]] for form in FORMS]


def tables() -> str:
    """Both, as a section."""
    parts = []
    for title, head, rows in (
        ("In", ["what", "read by", "held by"], incoming()),
        ("Out", ["what", "read by", "held by"], outgoing()),
    ):
        for *_, test in rows:
            if not (ROOT / test).is_file():
                raise FileNotFoundError(f"no {test}, which a door names")
        parts.append(f"{title}:\n\n{table(head, [[*row[:-1], f'`{row[-1]}`'] for row in rows])}")
    return "\n\n".join(parts)

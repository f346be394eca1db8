"""A benchmark's report that remembers what it was told, and the tiny model of such benchmarks."""

import copy

import torch

from elmkernels import OpenELM, OpenELMConfig
from elmkernels.bench.benchmark import Report
from elmkernels.bench.generation import GenerationSizes


class Recorded(Report):
    """results: copied at every save. stop: the stage at which it is interrupted."""

    def __init__(self, results: dict | None = None, stop: str | None = None) -> None:
        self.results, self.stop = results, stop
        self.stages: list[str] = []
        self.texts: list[str] = []
        self.saved: list[dict | None] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)
        if text == self.stop:
            raise KeyboardInterrupt

    def print(self, text: str) -> None:
        self.texts.append(text)

    def save(self) -> None:
        self.saved.append(copy.deepcopy(self.results))


# Heads and groups that llama.cpp and every format take.
CONFIG = OpenELMConfig(
    num_transformer_layers=2,
    model_dim=128,
    head_dim=64,
    num_gqa_groups=2,
    vocab_size=256,
    ffn_dim_divisor=64,
    qkv_multipliers=(0.5, 1.0),
    ffn_multipliers=(0.5, 2.0),
    normalize_qk_projections=True,
    ffn_with_glu=True,
    share_input_output_layers=True,
    rope_max_length=64,
)
SIZES = GenerationSizes(prefill=12, prompt=6, steps=4, batch=2, rounds=2, agree=4, probe=1 << 20)
LLAMA = {"fp32": ["F32"], "16-bit": ["F16", "BF16"], "int8": ["Q8_0"], "int4": ["Q4_0"]}


def load(dtype: torch.dtype) -> OpenELM:
    return OpenELM.from_config(CONFIG, seed=3, dtype=dtype)

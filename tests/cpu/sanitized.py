"""Every CPU kernel on every case, and whole models: sanitized.py BACKEND, in a process whose
library of that backend has sanitizers in it. `sanitized.py BACKEND heap` and `... stack` give a
kernel what no check lets through, for a sanitizer to find.
"""

import copy
import sys
from collections.abc import Callable

import torch

import elmkernels
from elmkernels import OpenELM, Plan, linear
from elmkernels.backends import implements
from elmkernels.openelm import KVCache, OpenELMConfig
from elmkernels.testing import CASES
from elmkernels.testing.cases import OPS
from elmkernels.testing.cases.draw import make
from elmkernels.testing.parity import run_case
from elmkernels.weights.packed12 import pack_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def calls(op: str, backend: str) -> Callable:
    fn = getattr(elmkernels, op)
    return OPS[op].observe(lambda *args, **kwargs: fn(*args, backend=backend, **kwargs))


def all_ops(backend: str) -> int:
    """Forward and backward, by one thread and by three, of which two share a core."""
    count = 0
    for op, cases in CASES.items():
        if not implements(backend, op):
            continue
        for case in cases:
            for dtype in (t for t in DTYPES if t in case.dtypes):
                inputs = make(case, dtype, "cpu", 0)
                for threads in (1, 3):
                    torch.set_num_threads(threads)
                    run_case(calls(op, backend), case, inputs, None, 0)
                    count += 1
    return count


def config(**changes) -> OpenELMConfig:
    fields = {
        "num_transformer_layers": 2,
        "model_dim": 192,
        "head_dim": 64,
        "num_gqa_groups": 3,
        "qkv_multipliers": (0.5, 1.0),
        "ffn_multipliers": (0.5, 2.0),
        "ffn_dim_divisor": 64,
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
        "vocab_size": 257,
        "rope_max_length": 40,
        "max_context_length": 40,
    }
    return OpenELMConfig(**fields | changes)


def all_models(backend: str) -> int:
    """Each form of the weights up to the cache's last place, in every size of a batch."""
    forms = {
        "plain": lambda model: None,
        "packed12": lambda model: elmkernels.pack(model, progress=False),
        "int8": lambda model: elmkernels.quantize(model, 8, 64, progress=False),
        "int4": lambda model: elmkernels.quantize(model, 4, 32, progress=False),
    }
    count = 0
    for shape in (config(), config(ffn_with_glu=False, share_input_output_layers=False)):
        for dtype in DTYPES:
            plain = OpenELM.from_config(shape, seed=0, dtype=dtype)
            for name, convert in forms.items():
                if name == "packed12" and dtype != torch.bfloat16:
                    continue
                model = copy.deepcopy(plain)
                convert(model)
                elmkernels.accelerate(model, backend=backend, plan=Plan())
                for threads in (1, 3):
                    torch.set_num_threads(threads)
                    to_the_end(model, shape)
                    count += 1
    return count


@torch.inference_mode()
def to_the_end(model: OpenELM, shape: OpenELMConfig) -> None:
    last, room = shape.vocab_size - 1, shape.rope_max_length
    for batch in (1, 2, 3, 5, 8):
        elmkernels.generate(model, [[last] * (1 + i) for i in range(batch)], room - batch)
    for length in (1, 7, room):  # a cache without a place to spare
        cache = KVCache(model.config, 2, length, dtype=model.activation_dtype)
        ids = torch.full((2, length), last)
        model(ids, cache=cache)
        cache.truncate(length - 1)
        model(ids[:, :1], cache=cache)


def odd_weights(backend: str) -> int:
    """Packed tables with escapes in every place, none, and rows of any length."""
    generator = torch.Generator().manual_seed(0)
    count = 0
    for k in (1, 31, 64, 127, 129, 320, 1000):
        for spread in (0.0, 1.0, 40.0):
            w = torch.randn(70, k, generator=generator)
            w = w * torch.exp2(-spread * torch.rand(70, k, generator=generator))
            for weight in (pack_weight(w.bfloat16()), w.bfloat16(), w):
                dtype = torch.float32 if weight is w else torch.bfloat16
                for rows in (1, 2, 3, 8, 9, 20):
                    linear(
                        torch.randn(rows, k, generator=generator).to(dtype), weight, backend=backend
                    )
                    count += 1
    return count


def broken(backend: str, where: str) -> None:
    """What an op would have refused: rows that end too soon, an escape before its segment."""
    raw = getattr(torch.ops, f"elmkernels_{backend}").linear_fwd
    if where == "heap":
        raw(torch.ones(1, 128), torch.ones(4, 64), *[None] * 6, 0)
    else:
        packed = pack_weight(torch.ones(1, 128, dtype=torch.bfloat16))
        starts = torch.tensor([0, 1], dtype=torch.int32)
        columns = torch.tensor([-8], dtype=torch.int32)
        table = (packed.exponents, starts, columns, torch.ones(1, dtype=torch.bfloat16))
        raw(torch.ones(1, 128, dtype=torch.bfloat16), packed.data, None, None, *table, 12)


if __name__ == "__main__":
    name = sys.argv[1]
    if len(sys.argv) > 2:
        broken(name, sys.argv[2])
    else:
        print(all_ops(name), "calls of ops", flush=True)
        print(odd_weights(name), "products", flush=True)
        print(all_models(name), "models", flush=True)

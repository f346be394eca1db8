"""Stands in for llama.cpp's Python package: the functions that are called of it, tokens that mean
nothing, and a death as orders.json beside it says: {"types": [...], "signal": N, "where": "load" or
"decode", "after": calls, "always": whether without extra buffers too}.
"""

import ctypes
import json
import os
from pathlib import Path
from types import SimpleNamespace

__version__ = "0.0"
LLAMA_FLASH_ATTN_TYPE_ENABLED, LLAMA_FLASH_ATTN_TYPE_DISABLED = 1, 0
ORDERS = json.loads((Path(__file__).parent / "orders.json").read_text())
calls = 0


def obey(where: str, model: SimpleNamespace) -> None:
    global calls
    calls += where == ORDERS["where"]
    ordered = where == ORDERS["where"] and model.type in ORDERS["types"]
    if ordered and (ORDERS["always"] or model.extra) and calls > ORDERS["after"]:
        os.kill(os.getpid(), ORDERS["signal"])


def llama_log_callback(fn):
    return fn


def llama_log_set(callback, data):
    print("what libraries print")


def llama_backend_init():
    pass


def llama_model_default_params():
    return SimpleNamespace(n_gpu_layers=0, use_extra_bufts=True)


def llama_model_load_from_file(path, options):
    model = SimpleNamespace(type=Path(path.decode()).stem, extra=options.use_extra_bufts)
    obey("load", model)
    return model


def llama_context_default_params():
    return SimpleNamespace()


def llama_init_from_model(model, options):
    return SimpleNamespace(model=model, logits=[(ctypes.c_float * 4096)() for _ in range(8)])


def llama_batch_init(tokens, embedding, sequences):
    return SimpleNamespace(
        token=[0] * tokens,
        pos=[0] * tokens,
        n_seq_id=[0] * tokens,
        seq_id=[[0] for _ in range(tokens)],
        logits=[False] * tokens,
        n_tokens=0,
    )


def llama_decode(context, batch):
    obey("decode", context.model)
    return 0


def llama_get_logits_ith(context, i):
    return ctypes.cast(context.logits[i], ctypes.POINTER(ctypes.c_float))


def llama_get_memory(context):
    return context


def nothing(*arguments):
    pass


llama_memory_seq_rm = llama_batch_free = llama_free = llama_model_free = nothing

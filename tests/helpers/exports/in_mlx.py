"""A folder in mlx_lm: its logits of some ids, its greedy tokens; with `quantize` it is quantized by
MLX itself and saved into `out` first. JSON in and out.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm import utils
from mlx_lm.models.cache import make_prompt_cache

mx.set_default_device(mx.cpu)
said = json.load(sys.stdin)
model, config = utils.load_model(Path(said["folder"]))
if said.get("quantize"):
    bits, group_size = said["quantize"]
    model, config = utils.quantize_model(model, config, group_size, bits)
    utils.save_model(said["out"], model)
    utils.save_config(config, Path(said["out"]) / "config.json")
ids = mx.array([said["ids"]])
logits = model(ids).astype(mx.float32)
tokens, cache, new = [], make_prompt_cache(model), ids
for _ in range(said["new"]):
    last = model(new, cache=cache)[:, -1].argmax(-1)
    tokens.append(int(last.item()))
    new = last[:, None]
print(json.dumps({"logits": logits[0].tolist(), "tokens": tokens}))

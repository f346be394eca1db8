"""A GGUF file in llama.cpp: its logits of some ids, its greedy tokens. JSON in and out."""

import json
import sys

import llama_cpp
import numpy as np

said = json.load(sys.stdin)
exact = llama_cpp.GGML_TYPE_F32  # of the cache: halves would hide an error of ours
model = llama_cpp.Llama(
    said["file"], n_ctx=128, n_threads=1, verbose=False, logits_all=True, type_k=exact, type_v=exact
)
model.eval(said["ids"])
logits = np.array(model.scores[: len(said["ids"])], dtype=np.float32)
tokens, count = [], len(said["ids"])
for _ in range(said["new"]):
    tokens.append(int(model.scores[count - 1].argmax()))
    model.eval(tokens[-1:])
    count += 1
print(json.dumps({"logits": logits.tolist(), "tokens": tokens}))

"""One step of decoding, one token a row: by `ops.decode_step` if the model is accelerated (or holds
compressed weights) and nothing hangs on its modules that the op would skip; else by the model.
"""

import torch
from torch import Tensor

from .. import ops
from ..acceleration.decoder_weights import Snapshot, snapshot_of
from ..openelm.cache import KVCache
from ..openelm.model import OpenELM
from ..openelm.surgery import given_backend, is_accelerated
from ..ops.decode_step import MAX_BATCH


def next_logits(model: OpenELM, tokens: Tensor, cache: KVCache) -> Tensor:
    """One step of decoding: tokens int64 [batch], each after those its row of the cache holds ->
    logits [batch, vocab_size]; the cache then holds one token more a row.
    """
    known = _in_one_call(model, tokens, cache)
    if known is None:
        return model(tokens[:, None], cache=cache, logits_to_keep=1)[:, -1]
    cache.check_room(1)
    backend = given_backend(model, "decode_step")
    logits = ops.decode_step(known.weights, tokens, cache.lengths, cache.arena, backend=backend)
    cache.advance(1)
    return logits


def _in_one_call(model: OpenELM, tokens: Tensor, cache: KVCache) -> Snapshot | None:
    """The model as data, if `ops.decode_step` computes what the model would."""
    if (
        not isinstance(model, OpenELM)  # torch.compile's wrapper
        or tokens.device.type != "cpu"
        or cache.device.type != "cpu"
        or tokens.shape != (cache.batch,)
        or cache.batch > MAX_BATCH
        or cache.dtype != model.activation_dtype
        or (cache.kv_heads, cache.head_dim) != (model.config.num_kv_heads, model.config.head_dim)
        or torch.is_autocast_enabled("cpu")
        or (torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()))
        or torch.compiler.is_compiling()
    ):
        return None
    try:
        known = snapshot_of(model)
    except ValueError:
        return None
    wanted = known.compressed or is_accelerated(model)
    return known if wanted and known.dtypes == {cache.dtype} else None

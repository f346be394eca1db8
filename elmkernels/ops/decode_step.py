"""decode_step: one token of each sequence through a whole decoder, in one call.

The layers are rows of a table of pointers and sizes, so that layer-wise scaling is data. A kernel
runs all of them in one parallel region or one launch and reads every weight once for the batch. It
rounds where the reference does: at the output of every norm, projection, rotation and addition.
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import reference
from ..backends import REFERENCE, choose, define, kernel
from ..checks import fail, integers, tensor, within
from ..formats import Affine, Arena, Stack, Weight
from ..weights import check_stack, parts
from .linear import MAX_ROWS

MAX_BATCH = MAX_ROWS
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_AFFINE_FORMS, _PACKED_FORM = {8: 3, 4: 4}, 5
_CPU = torch.device("cpu")

define(
    "decode_step",
    fwd=(
        "(Tensor table, Tensor tokens, Tensor positions, Tensor(a!) arena, Tensor offsets, "
        "Tensor rope_table, int max_length, int vocab_size, bool gated, float eps, int model_dim, "
        "int qkv_width, int ffn_dim, Tensor(b!)? chosen) -> Tensor",
        lambda table, tokens, positions, arena, offsets, rope_table, max_length, vocab_size, *_: (
            arena.new_empty((tokens.shape[0], vocab_size))
        ),
    ),
)


def _fields(weight: Weight) -> list[int]:
    """A weight as csrc/shared/weight_table.h reads it: form, n, k, bytes a row, data; element type,
    scales, biases, group; exponents, escapes' starts, columns, values.
    """
    data, *rest, _ = parts(weight)
    n, k = weight.shape
    row_bytes = data.stride(0) * data.element_size()
    pointers = [0 if t is None else t.data_ptr() for t in rest]
    scales, biases, *packed = pointers
    form = _ELEMENTS.get(data.dtype, _PACKED_FORM)
    element = group = 0
    if isinstance(weight, Affine):
        form, element = _AFFINE_FORMS[weight.bits], _ELEMENTS[weight.scales.dtype]
        group = weight.group_size
    return [form, n, k, row_bytes, data.data_ptr(), element, scales, biases, group, *packed]


class _Table(NamedTuple):
    """int64 [layers + 1, fields]: a row for each layer, then embedding, head and last norm. It is
    where the weights are: a GPU's kernel reads it there, and is launched by the widest layers.
    """

    rows: Tensor
    qkv_width: int
    ffn_dim: int


def _table(stack: Stack) -> _Table:

    def pointer(x: Tensor | None) -> int:
        return 0 if x is None else x.data_ptr()

    rows = []
    for layer in stack.layers:
        weights = (layer.qkv_proj, layer.out_proj, layer.proj_1, layer.proj_2)
        norms = (layer.attn_norm, layer.q_norm, layer.k_norm, layer.ffn_norm)
        rows.append([f for w in weights for f in _fields(w)] + [pointer(x) for x in norms])
        rows[-1] += [layer.q_heads, layer.kv_heads]
    width = 4 * len(_fields(stack.head)) + 6
    last = _fields(stack.embedding) + _fields(stack.head)
    last += [0] * (width - 6 - len(last)) + [pointer(stack.norm)]
    rows.append(last + [0] * (width - len(last)))
    device, layers = stack.norm.device, stack.layers
    return _Table(
        torch.tensor(rows, dtype=torch.int64).to(device),
        max((layer.qkv_proj.shape[0] for layer in layers), default=0),
        max((layer.proj_2.shape[1] for layer in layers), default=0),
    )


# Tables of stacks that were checked, by identity: a Stack is immutable. Weak, since a table keeps
# addresses: it must go with the weights that they are of.
_TABLES: WeakKeyDictionary[Stack, _Table] = WeakKeyDictionary()


def table_of(stack: Stack) -> _Table:
    """The checked table of a stack, made once for each."""
    table = _TABLES.get(stack)
    if table is None:
        check_stack(stack)
        table = _TABLES[stack] = _table(stack)
    return table


def _check_arena(arena: Arena, stack: Stack, batch: int) -> None:
    if arena.data.dtype != stack.norm.dtype:
        fail("arena", f"{stack.norm.dtype} like the norms", arena.data.dtype, TypeError)
    if arena.data.device != stack.norm.device:
        fail("arena", f"on {stack.norm.device} like the norms", arena.data.device)
    if arena.data.dim() != 1 or not arena.data.is_contiguous():
        fail("arena.data", "[elements], contiguous", list(arena.data.shape))
    if arena.batch != batch:
        fail("arena", f"of {batch} sequences like tokens", arena.batch)
    layers = len(stack.layers)
    if arena.offsets.shape != (layers, 2):
        fail("arena.offsets", [layers, 2], list(arena.offsets.shape))
    integers("arena.offsets", arena.offsets, _CPU)
    if not arena.offsets.is_contiguous():
        fail("arena.offsets", "contiguous", f"strides {arena.offsets.stride()}")
    if arena.head_dim != stack.head_dim:
        fail("arena.head_dim", stack.head_dim, arena.head_dim)


def _check_chosen(chosen: Tensor, tokens: Tensor) -> None:
    integers("chosen", chosen, tokens.device)
    if chosen.shape != tokens.shape:
        fail("chosen", f"{list(tokens.shape)} like tokens", list(chosen.shape))
    if not chosen.is_contiguous():
        fail("chosen", "contiguous", f"strides {chosen.stride()}")


def decode_step(
    stack: Stack,
    tokens: Tensor,
    positions: Tensor,
    arena: Arena,
    *,
    chosen: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The next logits of every sequence, whose keys and values are written on the way.

    tokens, positions: int64 [batch], batch up to MAX_BATCH; row b's token goes to position (and
    slot) positions[b] and sees the positions before. arena: its keys and values, in the dtype of
    the norms. Weights may be plain, `Affine` or `Packed`. Returns [batch, vocab_size].
    chosen: int64 [batch], contiguous, receives the most likely token of each row, as torch.argmax
    finds it: the first of the largest, NaN being the largest. It may be `tokens` itself.
    Raises TypeError or ValueError for a wrong argument, RuntimeError for a backend that can't run.
    The CUDA kernel can't raise for a token or position out of range, as nobody waits for it: that
    row's logits are NaN, its chosen token is 0, and nothing is written to its keys and values.
    No gradients: call it with weights that need none, or under torch.no_grad().
    """
    tensor("arena.data", arena.data)
    integers("tokens", tokens, arena.data.device)
    integers("positions", positions, arena.data.device)
    if tokens.dim() != 1 or tokens.shape[0] > MAX_BATCH:
        fail("tokens", f"[batch] of at most {MAX_BATCH}", list(tokens.shape))
    if positions.shape != tokens.shape:
        fail("positions", f"{list(tokens.shape)} like tokens", list(positions.shape))
    _check_arena(arena, stack, tokens.shape[0])
    if chosen is not None:
        _check_chosen(chosen, tokens)
    backend = choose("decode_step", arena.data.device.type, backend)
    if backend == REFERENCE or tokens.shape[0] == 0:
        check_stack(stack)
        within("tokens", tokens, stack.embedding.shape[0], "the vocabulary")
        within("positions", positions, stack.rope_table.shape[0], "rope_table's length")
        within("positions", positions, arena.max_length, "the cache's max_length")
        return reference.decode_step(stack, tokens, positions, arena, chosen)
    table = table_of(stack)
    return kernel("decode_step_fwd", backend)(
        table.rows,
        tokens.contiguous(),
        positions.contiguous(),
        arena.data,
        arena.offsets,
        stack.rope_table,
        arena.max_length,
        stack.vocab_size,
        stack.gated,
        stack.eps,
        stack.model_dim,
        table.qkv_width,
        table.ffn_dim,
        chosen,
    )

"""A decoder's weights as kernels read them: a table of addresses and sizes, a row for each layer.

csrc/shared/weight_table.h reads the rows that are written here.
"""

from operator import attrgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .checks import check_decoder_weights
from .formats import DecoderWeights, Weight, form_of

_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FIELDS, _OTHERS = 13, 6  # of each of a row's four weights; addresses of norms and counts
_FORMS = {8: 3, 4: 4, 12: 5}  # of compressed weights, by their bits
_INT8_FORMS = {8: 6, 4: 7}  # that meet activations of 8 bits


def _fields(weight: Weight, activations: str | None = None) -> list[int]:
    """A weight as csrc/shared/weight_table.h reads it: form, n, k, bytes a row, data; element type,
    scales, biases, group; exponents, escapes' starts, columns, values.
    """
    data, *rest, bits = form_of(weight).parts()
    n, k = weight.shape
    row_bytes = data.stride(0) * data.element_size()
    scales, biases, *packed12 = (0 if x is None else x.data_ptr() for x in rest)
    element = _ELEMENTS[rest[0].dtype] if rest[0] is not None and scales else 0
    form = _FORMS[bits] if bits else _ELEMENTS[data.dtype]
    if activations is not None:
        form = _INT8_FORMS.get(bits, form)
    group = form_of(weight).group_size
    return [form, n, k, row_bytes, data.data_ptr(), element, scales, biases, group, *packed12]


class _Table(NamedTuple):
    """int64 [layers + 1, fields]: a row for each layer, then embedding, head and last norm. It is
    where the weights are: a GPU's kernel reads it there, and is launched by the widest layers.
    """

    rows: Tensor
    qkv_width: int
    ffn_dim: int
    kv_heads: tuple[int, ...]
    # What must still hold for it to describe the weights: a Parameter's memory can be replaced.
    tensors: list[Tensor]
    places: list[list[Any]]
    indices: list[Tensor]  # whose writes torch counts
    writes: list[int]

    def holds(self) -> bool:
        """Asked at every step, so that it only compares numbers."""
        return (
            _places(self.tensors) == self.places
            and [x._version for x in self.indices] == self.writes
        )


def _places(tensors: list[Tensor]) -> list[list[Any]]:
    """Where the numbers of tensors are, and how they lie there."""
    how = Tensor.data_ptr, Tensor.stride, Tensor.size, attrgetter("dtype")
    return [list(map(asked, tensors)) for asked in how]


def _table(weights: DecoderWeights) -> _Table:

    def pointer(x: Tensor | None) -> int:
        return 0 if x is None else x.data_ptr()

    rows = []
    for layer in weights.layers:
        matrices = (layer.qkv_proj, layer.out_proj, layer.proj_1, layer.proj_2)
        norms = (layer.attn_norm, layer.q_norm, layer.k_norm, layer.ffn_norm)
        rows.append(
            [f for w in matrices for f in _fields(w, weights.activations)]
            + [pointer(x) for x in norms]
        )
        rows[-1] += [layer.q_heads, layer.kv_heads]
    width = 4 * _FIELDS + _OTHERS
    last = _fields(weights.embedding) + _fields(weights.head, weights.activations)
    last += [0] * (width - _OTHERS - len(last)) + [pointer(weights.norm)]
    rows.append(last + [0] * (width - len(last)))
    device, layers = weights.norm.device, weights.layers
    forms = [form_of(w) for w in weights.weights()]
    tensors = [x for f in forms for x in f.parts() if isinstance(x, Tensor)]
    tensors.append(weights.rope_table)
    indices = [x for f in forms for x in f.indices if not x.is_inference()]
    return _Table(
        torch.tensor(rows, dtype=torch.int64).to(device),
        max((layer.qkv_proj.shape[0] for layer in layers), default=0),
        max((layer.proj_2.shape[1] for layer in layers), default=0),
        tuple(layer.kv_heads for layer in layers),
        tensors,
        _places(tensors),
        indices,
        [x._version for x in indices],
    )


def matrices_of(row: list[int]) -> list[tuple[int, int]]:
    """[n, k] of the matrices in a row of a table."""
    found = [(row[i + 1], row[i + 2]) for i in range(0, len(row) - _OTHERS, _FIELDS)]
    return [(n, k) for n, k in found if n]


# Tables of weights that were checked, by identity: DecoderWeights are immutable. Weak, since a
# table keeps addresses: it must go with the weights that they are of.
_TABLES: WeakKeyDictionary[DecoderWeights, _Table] = WeakKeyDictionary()


def table_of(weights: DecoderWeights) -> _Table:
    """The checked table of a decoder's weights, made once for each and again if they moved."""
    table = _TABLES.get(weights)
    if table is None or not table.holds():
        check_decoder_weights(weights)
        table = _TABLES[weights] = _table(weights)
    return table

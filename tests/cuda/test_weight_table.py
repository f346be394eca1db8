"""The table of a decoder's weights: what Python writes is what the C++ sources read."""

import ctypes

import pytest
import torch
from helpers.on_host import compiled

from elmkernels.weights import pack_weight, quantize_weight
from elmkernels.weights.formats import ESCAPE, SEGMENT_BYTES, SEGMENT_COLUMNS, DecoderWeights, Layer
from elmkernels.weights.table import _fields, table_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FIELDS = (
    "n", "k", "row_bytes", "group_size", "data", "scales", "biases", "exponents", "escape_starts",
    "escape_columns", "escape_values",
)  # fmt: skip
WEIGHTS = ("qkv_proj", "out_proj", "proj_1", "proj_2")
NORMS = ("attn_norm", "q_norm", "k_norm", "ffn_norm")
HEADS = ("q_heads", "kv_heads")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    found = compiled("weight_table", tmp_path_factory.mktemp("weight_table"))
    for name in ("layer_field", "last_field", "constant"):
        function = getattr(found, name)
        function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_int64
    for name in ("form_of", "element_of"):
        function = getattr(found, name)
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_char_p
    found.read_weight.argtypes = [ctypes.c_void_p] * 2
    return found


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read(library, fields: torch.Tensor) -> dict[str, int]:
    """A weight's fields by their names in C++."""
    out = torch.empty(len(FIELDS), dtype=torch.int64)
    library.read_weight(fields.data_ptr(), out.data_ptr())
    return dict(zip(FIELDS, out.tolist(), strict=True))


def written(weight, activations: str | None = None) -> torch.Tensor:
    return torch.tensor(_fields(weight, activations), dtype=torch.int64)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_plain_weight_is_read_as_it_was_written(library, dtype):
    weight = torch.randn(6, 96).to(dtype)[1:4, :40]
    fields = written(weight)
    expected = dict.fromkeys(FIELDS, 0) | {"n": 3, "k": 40, "data": weight.data_ptr()}
    assert read(library, fields) == expected | {"row_bytes": 96 * dtype.itemsize}
    assert library.form_of(fields.data_ptr()).decode() == name_of(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("bits", "group_size"), [(8, 32), (8, 64), (4, 32), (4, 64)])
def test_an_affine_weight_is_read_as_it_was_written(library, bits, group_size, dtype):
    weight = quantize_weight(torch.randn(3, 192).to(dtype), bits, group_size)
    fields = written(weight)
    expected = dict.fromkeys(FIELDS, 0) | {"n": 3, "k": 192, "row_bytes": 192 * bits // 8}
    expected |= {"group_size": group_size, "data": weight.q.data_ptr()}
    expected |= {"scales": weight.scales.data_ptr(), "biases": weight.biases.data_ptr()}
    assert read(library, fields) == expected
    assert library.form_of(fields.data_ptr()).decode() == f"affine{bits}"
    assert library.element_of(fields.data_ptr()).decode() == name_of(dtype)
    rounded = written(weight, "int8")
    assert library.form_of(rounded.data_ptr()).decode() == f"affine{bits} by int8"
    assert torch.equal(rounded[1:], fields[1:])


def test_a_packed12_weight_is_read_as_it_was_written(library):
    weight = pack_weight(torch.randn(3, 300).bfloat16())
    fields = written(weight)
    expected = dict.fromkeys(FIELDS, 0) | {"n": 3, "k": 300, "row_bytes": 3 * SEGMENT_BYTES}
    names = ("data", "exponents", "escape_starts", "escape_columns", "escape_values")
    expected |= {name: getattr(weight, name).data_ptr() for name in names}
    assert read(library, fields) == expected
    assert library.form_of(fields.data_ptr()).decode() == "packed12"
    assert torch.equal(written(weight, "int8"), fields)  # only codes meet rounded activations


def stack() -> DecoderWeights:
    """Two layers of one head_dim 64 without anything in common."""
    layers = []
    for q, kv, ffn in ((4, 1, 96), (6, 2, 160)):
        shapes = ((q + 2 * kv) * 64, 128), (128, q * 64), (2 * ffn, 128), (128, ffn)
        qkv_proj, out_proj, proj_1, proj_2 = (torch.randn(*shape) for shape in shapes)
        norms = torch.randn(128), torch.randn(64), torch.randn(64), torch.randn(128)
        attn_norm, q_norm, k_norm, ffn_norm = norms
        layers.append(
            Layer(
                attn_norm, qkv_proj, q_norm, k_norm, out_proj, ffn_norm, proj_1, proj_2, q, kv
            )  # fmt: skip
        )
    table, norm = torch.randn(32, 64), torch.randn(128)
    return DecoderWeights(
        torch.randn(50, 128), tuple(layers), norm, torch.randn(50, 128), table, 64, True, 1e-6
    )


def test_each_part_of_a_layer_is_where_it_was_written(library):
    decoder = stack()
    rows = table_of(decoder).rows
    assert rows.is_contiguous() and rows.dtype == torch.int64
    assert rows.shape == (3, library.constant(1))
    places = [library.layer_field(i) for i in range(10)]
    for layer, row in zip(decoder.layers, rows, strict=False):
        for name, at in zip(WEIGHTS, places, strict=False):
            found, weight = read(library, row[at:]), getattr(layer, name)
            assert [found["n"], found["k"]] == list(weight.shape), name
            assert found["data"] == weight.data_ptr(), name
        for name, at in zip(NORMS, places[4:], strict=False):
            assert row[at] == getattr(layer, name).data_ptr(), name
        for name, at in zip(HEADS, places[8:], strict=True):
            assert row[at] == getattr(layer, name), name
    embedding, head, norm = (library.last_field(i) for i in range(3))
    assert read(library, rows[2, embedding:])["data"] == decoder.embedding.data_ptr()
    assert read(library, rows[2, head:])["data"] == decoder.head.data_ptr()
    assert rows[2, norm] == decoder.norm.data_ptr()


def test_the_constants_are_those_of_the_formats(library):
    expected = [SEGMENT_COLUMNS, SEGMENT_BYTES, ESCAPE]
    assert [library.constant(i) for i in (2, 3, 4)] == expected
    assert len(_fields(torch.randn(2, 2))) == library.constant(0)

"""Packed12 weights: every bit of every bfloat16 matrix comes back, and models keep their
numbers.
"""

import copy
import pickle

import pytest
import torch
from helpers.checkpoints import CONFIG, GROUPED, assert_held, assert_same, same_bits

from elmkernels import OpenELM, accelerate, pack, quantize, reference, restore, unpack
from elmkernels.compression.packing import MAX_ESCAPES
from elmkernels.openelm import greedy
from elmkernels.openelm.compressed import Packed12Embedding, Packed12Linear, product
from elmkernels.weights import count_exponents, pack_weight

IDS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(4))
GENERATOR = torch.Generator().manual_seed(7)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR).bfloat16()


def of_bits(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int16).view(torch.bfloat16)


def exponents(values: list[int], *shape: int) -> torch.Tensor:
    """Any sign and mantissa with one of these exponents."""
    chosen = torch.tensor(values)[torch.randint(0, len(values), shape, generator=GENERATOR)]
    rest = torch.randint(0, 256, shape, generator=GENERATOR)
    return of_bits((rest & 128) << 8 | chosen << 7 | rest & 127)


MATRICES = {
    "normal": normal(40, 256) * 0.03,
    "every bit pattern": of_bits(torch.arange(-(2**15), 2**15)).view(128, 512),
    "every bit pattern, short rows": of_bits(torch.arange(-(2**15), 2**15)).view(1024, 64),
    "zeros": torch.zeros(3, 128).bfloat16(),
    "zeros and normal": normal(8, 256) * (normal(8, 256) > 0),
    "minus zeros": -torch.zeros(2, 130).bfloat16(),
    "denormals": exponents([0], 4, 200),
    "inf and nan": exponents([255, 120], 4, 200),
    "one exponent": exponents([100], 4, 128),
    "the code of an escape is no exponent's": exponents([0, 15, 200], 4, 128),
    "15 apart": exponents(list(range(3, 200, 14)), 9, 300),
    "two runs": exponents([*range(10, 16), *range(90, 99)], 9, 300),
    "16 exponents": exponents(list(range(100, 116)), 9, 300),
    "the ends": exponents([*range(5), *range(246, 256)], 9, 300),
    "one column": normal(5, 1),
    "one weight": normal(1, 1),
    "one row": normal(1, 127),
    "129 columns": normal(6, 129),
    "a transposed view": normal(130, 70).t(),
    "two chunks": normal(600, 2048),
}


@pytest.mark.parametrize("name", MATRICES)
def test_every_bit_comes_back(name):
    w = MATRICES[name]
    packed = pack_weight(w)
    assert packed.shape == w.shape and packed.dtype == w.dtype
    assert same_bits(reference.dense(packed), w)


@pytest.mark.parametrize("seed", range(20))
def test_every_bit_comes_back_of_random_bits(seed):
    generator = torch.Generator().manual_seed(seed)
    n, k = torch.randint(1, 400, (2,), generator=generator).tolist()
    bits = torch.randint(-(2**15), 2**15, (n, k), generator=generator)
    keep = int(torch.randint(-1, 2**15, (), generator=generator)) | 0x807F
    w = of_bits(bits & keep)
    assert same_bits(reference.dense(pack_weight(w)), w)


def test_the_layout_by_hand():
    """One row of 128 weights whose exponents are 100 + column % 20: 15 codes and 5 escapes."""
    columns = torch.arange(128)
    w = of_bits((columns % 2) << 15 | (100 + columns % 20) << 7 | columns)[None]
    packed = pack_weight(w)
    # 100..107 occur 7 times, the others 6 times; of those the larger are taken: 113..119.
    table = [*range(100, 108), *range(113, 120)]
    assert packed.exponents.tolist() == [*table, 0]
    assert packed.escape_columns.tolist() == [c for c in range(128) if c % 20 in range(8, 13)]
    assert packed.escape_starts.tolist() == [0, len(packed.escape_columns)]
    assert same_bits(packed.escape_values, w[0, packed.escape_columns.long()])
    data = packed.data[0, 0].tolist()
    for block in range(2):
        for byte in range(64):
            j, i = divmod(byte, 16)
            column = 64 * block + (8 * j + i if i < 8 else 32 + 8 * j + i - 8)
            assert data[64 * block + byte] == (column % 2) << 7 | column
            exponent = 100 + column % 20
            code = table.index(exponent) if exponent in table else 15
            assert (data[128 + byte] >> 4 * block) & 15 == code


def test_twelve_bits_a_weight():
    w = normal(512, 1280) * 0.03
    assert 0.75 <= pack_weight(w).nbytes / w.nbytes < 0.755


def test_the_table_and_the_escapes_are_counted():
    w = MATRICES["16 exponents"]
    table = count_exponents(w)
    counts = torch.bincount((w.view(torch.int16).int() >> 7 & 255).flatten(), minlength=256)
    assert table.size == 15 and table.escapes == int(counts[counts > 0].min())
    assert pack_weight(w).escape_columns.numel() == table.escapes


@pytest.mark.parametrize("name", ["normal", "every bit pattern", "two runs"])
def test_rows_by_index(name):
    packed, w = pack_weight(MATRICES[name]), MATRICES[name]
    ids = torch.tensor([5, 0, 5, 8])
    assert same_bits(reference.dense(packed.gather(ids)), w[ids])
    nothing = packed.gather(ids[:0])
    assert reference.dense(nothing).shape == (0, w.shape[1])


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (torch.zeros(2, 64), r"bfloat16, got \[2, 64\] torch.float32"),
        (torch.zeros(64).bfloat16(), r"\[n, k\] of bfloat16, got \[64\]"),
        (torch.zeros(0, 64).bfloat16(), r"must hold weights, got \[0, 64\]"),
    ],
)
def test_wrong_weights_are_refused(w, message):
    with pytest.raises(ValueError, match=message):
        pack_weight(w)


def bf16(seed: int = 1) -> OpenELM:
    return OpenELM(CONFIG, seed=seed, dtype=torch.bfloat16)


@pytest.mark.parametrize("embeddings", [True, False])
def test_a_packed_model_has_the_same_logits(embeddings):
    plain, model = bf16(), bf16()
    done = pack(model, embeddings)
    assert done.matrices == 12 + embeddings and done.left == []
    assert isinstance(model.token_embeddings, Packed12Embedding) == embeddings
    assert isinstance(model.layers[0].ffn.proj_1, Packed12Linear)
    assert_held(model, plain, IDS)
    wide = copy.deepcopy(model).float()
    assert torch.equal(greedy(wide, IDS, 5), greedy(copy.deepcopy(plain).float(), IDS, 5))
    assert unpack(model).matrices == 12 + embeddings
    assert_same(model, plain)
    assert all(p.requires_grad for p in model.parameters())
    assert model.training == plain.training


def test_a_matrix_that_does_not_pay_is_left_and_reported():
    model, plain = bf16(), bf16()
    wide = torch.exp2(torch.arange(64.0) / 2).bfloat16()
    with torch.no_grad():
        for m in (model, plain):
            m.layers[1].attn.qkv_proj.weight.mul_(wide)
    escapes = count_exponents(plain.layers[1].attn.qkv_proj.weight).escapes
    assert escapes > MAX_ESCAPES * plain.layers[1].attn.qkv_proj.weight.numel()
    done = pack(model)
    assert [name for name, _ in done.left] == ["layers.1.attn.qkv_proj"]
    assert "exponent" in str(done) and "layers.1.attn.qkv_proj" in str(done)
    assert type(model.layers[1].attn.qkv_proj) is torch.nn.Linear
    assert torch.equal(model.double()(IDS), plain.double()(IDS))


def test_casting_a_packed_model_keeps_its_weights():
    """The activations follow, the weights stay bfloat16, and back again nothing is lost."""
    plain, model = bf16(), bf16()
    with torch.no_grad():
        for m in (plain, model):
            # Escapes that float16 can't hold.
            m.layers[0].ffn.proj_1.weight[0] = torch.exp2(torch.arange(20.0, 84.0))
    pack(model)
    assert model.layers[0].ffn.proj_1.escape_values.numel() > 0
    state = copy.deepcopy(model.state_dict())
    model.half()
    assert model.token_embeddings(IDS).dtype == model.activation_dtype == torch.float16
    assert model.layers[0].ffn.proj_1.escape_values.dtype == torch.bfloat16
    model.float()
    assert torch.equal(model(IDS), plain.float()(IDS))
    model.bfloat16()
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, state[name]), name


def test_gradients_pass_to_x():
    w = normal(1100, 130)
    x = normal(4, 130).float().requires_grad_()
    packed = pack_weight(w)
    dy = normal(4, 1100).float()
    (dx,) = torch.autograd.grad(product(x, packed), x, dy)
    torch.testing.assert_close(dx, dy @ w.float())


def test_copies_and_state_dicts():
    model, other = bf16(1), bf16(2)
    for m in (model, other):
        pack(m)
    assert_same(model, copy.deepcopy(model))
    assert_same(model, pickle.loads(pickle.dumps(model)))
    lengths = [
        [m.escape_columns.numel() for m in each.modules() if isinstance(m, Packed12Linear)]
        for each in (model, other)
    ]
    assert lengths[0] != lengths[1], "the escapes must differ for this to be a test"
    other.load_state_dict(model.state_dict())
    assert_same(model, other)


def test_accelerated_before_or_after():
    before, after, plain = bf16(), bf16(), bf16()
    accelerate(before, backend="reference")
    pack(before)
    pack(after)
    report = accelerate(after, backend="reference")
    assert report.left == [] and "kept 12 Packed12Linear" in report.notes
    for model in (before, after):
        assert model.layers[0].ffn.proj_1.backend == "reference"
        assert type(model.norm).__name__ == "FusedRMSNorm"
        unpack(model)
        assert type(model.norm).__name__ == "FusedRMSNorm"
        restore(model)
        assert_same(model, plain)


def test_what_cannot_be_packed_stays_as_it_was():
    with pytest.raises(TypeError, match="Linear"):
        pack(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="token_embeddings must be bfloat16.*float32"):
        pack(OpenELM(CONFIG, seed=1))
    model = bf16()
    with torch.no_grad():
        model.layers[2].ffn.proj_2 = model.layers[2].ffn.proj_2.float()
    with pytest.raises(ValueError, match="layers.2.ffn.proj_2 must be bfloat16"):
        pack(model)
    assert not any(isinstance(m, Packed12Linear | Packed12Embedding) for m in model.modules())
    with pytest.raises(ValueError, match="no packed|none"):
        unpack(model)
    quantized = OpenELM(GROUPED, seed=1, dtype=torch.bfloat16)
    quantize(quantized, 4, 32)
    with pytest.raises(ValueError, match="token_embeddings must be plain.*QuantizedEmbedding"):
        pack(quantized)

"""A small model's configuration, and equality of models, for the checkpoint tests."""

import copy

import torch

from elmkernels.openelm import OpenELM, OpenELMConfig
from elmkernels.testing.parity import compare

CONFIG = OpenELMConfig(
    num_transformer_layers=3,
    model_dim=64,
    head_dim=16,
    num_gqa_groups=2,
    qkv_multipliers=(0.5, 1.0),
    ffn_multipliers=(0.5, 2.0),
    ffn_dim_divisor=16,
    normalize_qk_projections=True,
    share_input_output_layers=True,
    vocab_size=96,
    rope_max_length=64,
)
# The same with widths that groups of 32 divide.
GROUPED = OpenELMConfig.from_hf_dict(CONFIG.to_hf_dict() | {"ffn_dim_divisor": 32})
# Two layers, fewer tokens and positions.
SMALL = OpenELMConfig(
    num_transformer_layers=2, model_dim=64, head_dim=16, num_gqa_groups=2,
    qkv_multipliers=(0.5, 1.0), ffn_multipliers=(0.5, 2.0), ffn_dim_divisor=32,
    normalize_qk_projections=True, share_input_output_layers=True, vocab_size=60,
    rope_max_length=32, max_context_length=16,
)  # fmt: skip


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shapes, dtypes and bits. (torch can't compare uint32; nan is equal to itself here.)"""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(
        *(t.detach().cpu().contiguous().reshape(-1, 1).view(torch.uint8) for t in (a, b))
    )


def assert_held(model: OpenELM, plain: OpenELM, ids: torch.Tensor) -> None:
    """The logits of a compressed model are held, by the ops' rule, to those of the plain model of
    its dense weights: of all the tokens at once, and of one row as in decoding.
    """
    exact = copy.deepcopy(plain).double()
    with torch.inference_mode():
        for tokens in (ids, ids[:1, :1]):
            found = compare(exact(tokens), plain(tokens), model(tokens), "logits")
            assert found.ok, found.reason


def assert_same(a: OpenELM, b: OpenELM) -> None:
    assert a.config == b.config
    state, other = a.state_dict(), b.state_dict()
    assert state.keys() == other.keys()
    for name, weight in state.items():
        assert same_bits(weight, other[name]), name

"""A small model's configuration, and equality of models and weights."""

import copy

import torch
from torch import nn

from elmkernels.acceleration.projections import Linear
from elmkernels.openelm import OpenELM, OpenELMConfig
from elmkernels.testing.parity import compare
from elmkernels.weights.prepacked import held_of

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


IDS = torch.arange(2 * 12).view(2, 12) * 7 % CONFIG.vocab_size


def made(untied: bool = False, dtype: torch.dtype = torch.float32) -> OpenELM:
    given = CONFIG.to_hf_dict() | {"share_input_output_layers": not untied}
    return OpenELM.from_config(OpenELMConfig.from_hf_dict(given), seed=1, dtype=dtype).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS)


def linears(model: nn.Module) -> list[Linear]:
    return [m for m in model.modules() if isinstance(m, Linear)]


def held(model: nn.Module) -> int:
    """How many projections hold their weight prepacked alone."""
    return sum(held_of(m) is not None for m in linears(model))


def same(found: dict, expected: dict) -> bool:
    """Whether two state dicts have the same bits."""
    return found.keys() == expected.keys() and all(
        same_bits(v, expected[k]) for k, v in found.items()
    )

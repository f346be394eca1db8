"""Inputs to `linear` and `decode_step`: weights in every form, and small layer-wise decoders."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...openelm.config import OpenELMConfig
from ...reference import rope_table
from ...weights.affine import quantize_weight
from ...weights.formats import Arena, DecoderWeights, Layer, Weight
from ...weights.packed12 import pack_weight
from .draw import ALL, HALF, LAYOUTS, Case, Draw, Inputs, grad, models

# {form of a weight: (bits, group_size)}; a plain or a packed one has none.
FORMS: dict[str, tuple[int, int] | None] = {
    "plain": None,
    "affine8_64": (8, 64),
    "affine8_32": (8, 32),
    "affine4_64": (4, 64),
    "affine4_32": (4, 32),
    "packed12": None,
}


def dtypes_of(form: str) -> tuple[torch.dtype, ...]:
    """A packed weight is bfloat16, and so are the activations that it meets."""
    return (torch.bfloat16,) if form == "packed12" else ALL


def compressed(form: str, w: Tensor) -> Weight:
    """w [n, k] in one of the forms."""
    if scheme := FORMS[form]:
        return quantize_weight(w, *scheme)
    return pack_weight(w) if form == "packed12" else w


def weight(d: Draw, form: str, n: int, k: int, dtype: torch.dtype | None = None) -> Weight:
    """Random weights that keep the magnitude of their input; dtype: of an affine one's scales."""
    return compressed(form, d.normal(n, k, scale=max(1, k) ** -0.5, dtype=dtype))


def _many_escapes(d: Draw, n: int, k: int) -> Tensor:
    """Weights over 60 powers of two, most of them without a code; a tenth are subnormal."""
    shifts = torch.randint(0, 60, (n, k), generator=d.generator, device=d.device)
    w = d.normal(n, k) * torch.exp2(-shifts.float()).to(d.dtype)
    return w.masked_fill(shifts < 6, 5e-39)


def _linear_case(
    name: str,
    form: str,
    shape: tuple[int, ...],
    n: int,
    *,
    draw: Callable[..., Tensor] = Draw.normal,
    draw_weight: Callable[[Draw], Weight] | None = None,
    train: bool = False,
    **options,
) -> Case:
    """shape: of x. train: x requires a gradient, and so does a plain weight."""

    def build(d: Draw) -> Inputs:
        x = draw(d, *shape)
        w = weight(d, form, n, shape[-1]) if draw_weight is None else draw_weight(d)
        if train:
            x, w = grad(x), grad(w) if isinstance(w, Tensor) else w
        return (x, w), {}

    options = {"dtypes": dtypes_of(form)} | options
    return Case("linear", name, build, **options)


def linear_cases() -> list[Case]:
    """Few rows stream the weight as it is stored; from 9 rows on a dense product takes over."""
    found = []
    for form in FORMS:
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 33):
            found.append(_linear_case(f"{form}_rows_{rows}", form, (rows, 256), 70))
        found += [
            _linear_case(f"{form}_gradient_rows_2", form, (2, 192), 70, train=True),
            _linear_case(f"{form}_gradient_rows_17", form, (17, 192), 70, train=True),
            # More than one block of dense rows: of half types, two roundings for one. Large, since
            # that is near what the rule allows.
            _linear_case(f"{form}_gradient_blocks", form, (33, 256), 3000, train=True),
            _linear_case(f"{form}_rows_9_blocks", form, (9, 64), 2100),
            _linear_case(f"{form}_many_outputs", form, (3, 64), 1031),
            _linear_case(f"{form}_one_output", form, (4, 320), 1),
            _linear_case(f"{form}_one_dimension", form, (128,), 33),
            _linear_case(f"{form}_three_dimensions", form, (2, 3, 128), 33),
            _linear_case(f"{form}_no_rows", form, (0, 128), 33),
            _linear_case(f"{form}_no_batch", form, (2, 0, 128), 33),
            _linear_case(f"{form}_huge", form, (3, 192), 70, draw=_huge),
            _linear_case(f"{form}_outliers", form, (3, 192), 70, draw=Draw.outliers),
            _linear_case(f"{form}_k_64", form, (2, 64), 40),
            _linear_case(f"{form}_k_320", form, (7, 320), 40),
        ]
        for layout in ("row_slices", "transposed", "last_stride_2", "broadcast_rows"):
            # Two times three rows, of the columns that every group divides.
            draw = LAYOUTS[layout]
            found.append(_linear_case(f"{form}_{layout}", form, (2, 3, 192), 50, draw=draw))
    for form in ("affine8_32", "affine4_32"):
        for k in (32, 96, 160, 224):
            found.append(_linear_case(f"{form}_k_{k}", form, (5, k), 40))
    for form in ("plain", "packed12"):
        for k in (1, 7, 31, 33, 200, 1000):
            found.append(_linear_case(f"{form}_k_{k}", form, (5, k), 40))
    found += _other_scales()
    found += [
        _linear_case("plain_no_outputs", "plain", (2, 64), 0),
        _linear_case(
            "plain_strided_rows",
            "plain",
            (3, 200),
            40,
            draw_weight=lambda d: d.normal(40, 333, scale=0.07)[:, 5:205],
        ),
        _linear_case(
            "plain_transposed_weight",
            "plain",
            (3, 200),
            40,
            draw_weight=lambda d: d.normal(200, 40, scale=0.07).T,
        ),
        _linear_case(
            "packed_many_escapes",
            "packed12",
            (4, 300),
            70,
            draw_weight=lambda d: pack_weight(_many_escapes(d, 70, 300)),
        ),
        _linear_case(
            "packed_many_escapes_rows_12",
            "packed12",
            (12, 300),
            70,
            draw_weight=lambda d: pack_weight(_many_escapes(d, 70, 300)),
        ),
    ]
    return found + _layer_shapes()


def _huge(d: Draw, *shape: int) -> Tensor:
    # float16 must hold sums of them.
    return d.uniform(*shape, scale=1e4 if d.dtype == torch.float16 else 3e5)


def _other_scales() -> list[Case]:
    """Scales and biases in another dtype than the activations."""
    found = []
    for form in ("affine8_64", "affine4_32"):
        for scales in ALL:
            name = f"{form}_scales_{str(scales).removeprefix('torch.')}"
            dtypes = tuple(t for t in ALL if t != scales)
            found += [
                _linear_case(
                    f"{name}_rows_{rows}",
                    form,
                    (rows, 192),
                    40,
                    draw_weight=lambda d, f=form, s=scales: weight(d, f, 40, 192, s),
                    dtypes=dtypes,
                )
                for rows in (3, 9)
            ]
    return found


def _layer_shapes() -> list[Case]:
    """The widths of the real layers, and a few of their rows."""
    found = []
    for name, config in models().items():
        for layer in (0, -1):
            heads = config.num_query_heads[layer] * config.head_dim
            for k in {config.model_dim, heads, config.ffn_dims[layer]}:
                for form in ("plain", "affine4_64", "packed12"):
                    case = f"{name}_{form}_layer_{layer % config.num_transformer_layers}_k_{k}"
                    found.append(_linear_case(case, form, (2, k), 24))
    return found


def arena(d: Draw, stack: DecoderWeights, batch: int, max_length: int) -> Arena:
    """Keys and values of random tokens, each layer's from a multiple of 64 elements on."""
    offsets, end = [], 0
    for layer in stack.layers:
        count = batch * layer.kv_heads * max_length * stack.head_dim
        room = -(-count // 64) * 64
        offsets.append([end, end + room])
        end += 2 * room
    starts = torch.tensor(offsets, dtype=torch.int64).view(-1, 2)
    return Arena(d.normal(end), starts, batch, max_length, stack.head_dim)


def decoder(
    d: Draw,
    form: str = "plain",
    model_dim: int = 256,
    head_dim: int = 64,
    heads: tuple[tuple[int, int], ...] = ((8, 2), (12, 3)),
    ffn_dims: tuple[int, ...] = (256, 384),
    vocab_size: int = 203,
    *,
    norm: bool = True,
    gated: bool = True,
    tied: bool = True,
    table_length: int = 256,
) -> DecoderWeights:
    """A decoder with its own heads (queries, keys) and feed-forward width in every layer."""

    def norm_weight(n: int) -> Tensor:
        return d.weight(n).detach()

    layers = []
    for (q, kv), ffn in zip(heads, ffn_dims, strict=True):
        layers.append(
            Layer(
                norm_weight(model_dim),
                weight(d, form, (q + 2 * kv) * head_dim, model_dim),
                norm_weight(head_dim) if norm else None,
                norm_weight(head_dim) if norm else None,
                weight(d, form, model_dim, q * head_dim),
                norm_weight(model_dim),
                weight(d, form, (2 if gated else 1) * ffn, model_dim),
                weight(d, form, model_dim, ffn),
                q,
                kv,
            )
        )
    embedding = weight(d, form, vocab_size, model_dim)
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(layers),
        norm=norm_weight(model_dim),
        head=embedding if tied else weight(d, form, vocab_size, model_dim),
        rope_table=rope_table(table_length, head_dim, device=d.device),
        head_dim=head_dim,
        gated=gated,
        eps=1e-6,
    )


def _decode_case(
    name: str, form: str = "plain", positions: tuple[int, ...] = (9,), max_length: int = 0,
    dtypes: tuple[torch.dtype, ...] | None = None, **sizes,
) -> Case:  # fmt: skip
    """positions: of each sequence's new token. max_length: of the cache, 0: as short as can be."""

    def build(d: Draw) -> Inputs:
        stack = decoder(d, form, **sizes)
        shape = (len(positions),)
        options = {"generator": d.generator, "device": d.device}
        tokens = torch.randint(0, stack.embedding.shape[0], shape, **options)
        place = torch.tensor(positions, dtype=torch.int64, device=d.device)
        longest = max_length or max(positions, default=0) + 1
        return (stack, tokens, place, arena(d, stack, len(positions), longest)), {}

    return Case("decode_step", name, build, dtypes=dtypes or dtypes_of(form))


def decode_step_cases() -> list[Case]:
    """Two or three layers: what a deeper stack makes of rounding is luck, in the reference too.

    A sequence's errors all come from one row of hidden numbers, so that a narrow decoder takes
    several sequences, or half of its errors are the luck of a few numbers too.
    """
    ragged = (0, 150, 63, 64, 1, 129, 17, 200)
    several = (3, 70, 0, 131)
    found = []
    for form in FORMS:
        for batch in (1, 2, 3, 4, 8):
            found.append(_decode_case(f"{form}_batch_{batch}", form, ragged[-batch:]))
        found.append(_decode_case(f"{form}_untied", form, (5, 70), tied=False))
    for name, config in models().items():
        found.append(_decode_case(f"{name}_layers", **_narrow(config)))
    return found + [
        _decode_case("no_batch", positions=()),
        _decode_case("no_layers", positions=(0, 3), heads=(), ffn_dims=()),
        _decode_case("first_token", positions=(0,)),
        _decode_case("first_tokens", positions=(0, 0, 0, 0)),
        _decode_case("batch_5", positions=(5, 4, 3, 2, 1)),
        _decode_case("past_of_150", positions=(150,)),
        _decode_case("long_cache", positions=several, max_length=250),
        _decode_case("no_norm", positions=several, norm=False),
        _decode_case("no_norm_affine4_64", "affine4_64", several, norm=False),
        _decode_case("no_gate", positions=several, gated=False),
        _decode_case("no_gate_packed12", "packed12", several, gated=False),
        _decode_case("head_dim_128", positions=several, head_dim=128),
        _decode_case("head_dim_20", positions=ragged, head_dim=20),
        _decode_case("head_dim_2", positions=ragged, head_dim=2),
        _decode_case("group_1", positions=several, heads=((3, 3), (5, 5))),
        _decode_case("group_8", positions=several, heads=((8, 1), (16, 2))),
        _decode_case("odd_widths", positions=ragged, model_dim=45, ffn_dims=(37, 101)),
        _decode_case("odd_widths_packed12", "packed12", ragged, model_dim=45, ffn_dims=(37, 101)),
        _decode_case("width_1", positions=ragged, model_dim=1, ffn_dims=(1, 1), vocab_size=1),
        _decode_case("large_vocabulary", positions=several, vocab_size=3001),
        _decode_case("wide", positions=several, model_dim=1280, ffn_dims=(768, 2560)),
        _decode_case("wide_half", "affine4_64", (9,), model_dim=1280, ffn_dims=(768, 256),
                     dtypes=HALF),
    ]  # fmt: skip


def _narrow(config: OpenELMConfig) -> dict:
    """The first, middle and last layer of a model, with an eighth of its widths."""
    layers = (0, config.num_transformer_layers // 2, config.num_transformer_layers - 1)
    return {
        "positions": (7, 66, 0, 130),
        "model_dim": config.model_dim // 8,
        "head_dim": config.head_dim,
        "heads": tuple((config.num_query_heads[i], config.num_kv_heads[i]) for i in layers),
        "ffn_dims": tuple(config.ffn_dims[i] // 8 for i in layers),
    }


def bench_linear(model: str, config: OpenELMConfig, rows: tuple[int, ...]) -> list[Case]:
    """proj_2 of the last layer: 33 MB of bfloat16 in 1.1B, which some caches hold between two
    calls. Up to 512 rows; more are torch's product alone.
    """
    k, n = config.ffn_dims[-1], config.model_dim

    def case(form: str, count: int, n: int, check: Case | None) -> Case:
        return _linear_case(f"{model}_{form}_rows_{count}", form, (count, k), n, check=check)

    return [
        case(form, count, n, case(form, count, 128, None))
        for form in ("plain", "affine8_64", "affine4_64", "packed12")
        for count in rows
        if count <= 512
    ]


def bench_decode_step(model: str, config: OpenELMConfig, rows: tuple[int, ...]) -> list[Case]:
    """Four layers of 270M, from its first to its last, after 512 tokens, whatever the model: the
    reference makes all weights dense at every call. `rows` that fit a batch, and an eighth of the
    vocabulary so that the head doesn't outweigh the layers.
    """
    config = models()["270M"]
    last = config.num_transformer_layers - 1
    layers = [last * i // 3 for i in range(4)]
    sizes = {
        "model_dim": config.model_dim,
        "head_dim": config.head_dim,
        "heads": tuple((config.num_query_heads[i], config.num_kv_heads[i]) for i in layers),
        "ffn_dims": tuple(config.ffn_dims[i] for i in layers),
        "vocab_size": config.vocab_size // 8,
        "table_length": 1024,
    }
    return [
        _decode_case(f"270M_{form}_rows_{count}", form, (512,) * count, **sizes)
        for form in ("plain", "affine8_64", "affine4_64", "packed12")
        for count in rows
        if 0 < count <= 8
    ]


BENCH = {"linear": bench_linear, "decode_step": bench_decode_step}

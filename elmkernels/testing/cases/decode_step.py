"""What is known of `decode_step`: small layer-wise decoders, what a step writes and must read."""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ... import reference
from ...openelm.config import OpenELMConfig
from ...ops._flops import of_step
from ...reference import rope_table
from ...weights.formats import Arena, DecoderWeights, Dense, Layer, Weight, form_of
from ..equivalent import Orders, put_back, take
from .draw import HALF, Case, Draw, Inputs, models
from .spec import OpSpec, total_bytes
from .weights import FORMS, dtypes_of, weight


def arena(d: Draw, weights: DecoderWeights, batch: int, max_length: int) -> Arena:
    """Keys and values of random tokens, each layer's from a multiple of 64 elements on."""
    offsets, end = [], 0
    for layer in weights.layers:
        count = batch * layer.kv_heads * max_length * weights.head_dim
        room = -(-count // 64) * 64
        offsets.append([end, end + room])
        end += 2 * room
    starts = torch.tensor(offsets, dtype=torch.int64).view(-1, 2)
    return Arena(d.normal(end), starts, batch, max_length, weights.head_dim)


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
    activations: str | None = None,
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
        activations=activations,
    )


def _decode_case(
    name: str, form: str = "plain", positions: tuple[int, ...] = (9,), max_length: int = 0,
    dtypes: tuple[torch.dtype, ...] | None = None, sequences: tuple[int, ...] | None = None,
    batch: int = 0, **sizes,
) -> Case:  # fmt: skip
    """positions, sequences: of each token. max_length, batch: of the cache, 0: as small as can
    be."""

    def build(d: Draw) -> Inputs:
        weights = decoder(d, form, **sizes)
        shape = (len(positions),)
        options = {"generator": d.generator, "device": d.device}
        tokens = torch.randint(0, weights.embedding.shape[0], shape, **options)
        place = torch.tensor(positions, dtype=torch.int64, device=d.device)
        longest = max_length or max(positions, default=0) + 1
        if sequences is None:
            return (weights, tokens, place, arena(d, weights, len(positions), longest)), {}
        rows = torch.tensor(sequences, dtype=torch.int64, device=d.device)
        cache = arena(d, weights, batch or max(sequences) + 1, longest)
        return (weights, tokens, place, cache), {"sequences": rows}

    return Case("decode_step", name, build, dtypes=dtypes or dtypes_of(form))


def several_tokens() -> dict[str, dict]:
    """Several tokens of a sequence: within a block of keys and across its end, ragged, from an
    empty cache on, in any order of sequences, of which some have none."""
    return {
        "tokens_2": {"positions": (70, 71), "sequences": (0, 0)},
        "tokens_4": {"positions": (126, 127, 128, 129), "sequences": (0,) * 4},
        "tokens_8": {"positions": tuple(range(60, 68)), "sequences": (0,) * 8},
        "first_tokens": {"positions": (0, 1, 2, 3, 4), "sequences": (0,) * 5},
        "ragged_tokens": {
            "positions": (30, 31, 32, 150, 0, 1, 63, 64),
            "sequences": (3, 3, 3, 0, 4, 4, 1, 1),
            "batch": 6,
        },
    }


def cases() -> list[Case]:
    """Two or three layers: what a deeper weights makes of rounding is luck, in the reference too.

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
        if form.startswith("affine"):
            # In float32 a code that falls to the other side of a tie outweighs all other errors.
            rounded = {"activations": "int8", "dtypes": HALF}
            found.append(_decode_case(f"{form}_int8", form, several, **rounded))
            found.append(_decode_case(f"{form}_int8_untied", form, several, tied=False, **rounded))
        for which, tokens in several_tokens().items():
            found.append(_decode_case(f"{form}_{which}", form, **tokens))
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


def bench_cases(model: str, rows: tuple[int, ...], layer: int) -> list[Case]:
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


def rows_of(positions: Tensor, sequences: Tensor | None) -> Tensor:
    """The sequence of each token."""
    return torch.arange(len(positions), device=positions.device) if sequences is None else sequences


def with_written(decode_step: Callable) -> Callable:
    """decode_step that also returns what it wrote: keys and values, layer after layer."""

    def run(weights: DecoderWeights, tokens: Tensor, positions: Tensor, arena: Arena, **kwargs):
        logits = decode_step(weights, tokens, positions, arena, **kwargs)
        rows = rows_of(positions, kwargs.get("sequences"))
        views = [
            v for i, layer in enumerate(weights.layers) for v in arena.views(i, layer.kv_heads)
        ]
        written = [v[rows, positions].flatten() for v in views]
        return logits, torch.cat(written) if written else logits.new_empty(0)

    return run


def _matrices(weights: DecoderWeights) -> list[Weight]:
    """Every weight that a token is multiplied by."""
    parts = [(x.qkv_proj, x.out_proj, x.proj_1, x.proj_2) for x in weights.layers]
    return [*itertools.chain(*parts), weights.head]


def least_bytes(args: tuple, kwargs: dict, outputs: tuple[Tensor, ...], backward: bool) -> int:
    """Every weight but the embedding's other rows, and the keys and values that are seen."""
    weights, tokens, positions, arena = args
    norms = [x for layer in weights.layers for x in layer if isinstance(x, Tensor) and x.dim() == 1]
    embedded = weights.embedding.nbytes // weights.embedding.shape[0] * tokens.numel()
    token = 2 * sum(layer.kv_heads for layer in weights.layers) * weights.head_dim
    ends: dict[int, int] = {}  # of the sequences, whose keys are read once
    for row, place in zip(
        rows_of(positions, kwargs.get("sequences")).tolist(), positions.tolist(), strict=True
    ):
        ends[row] = max(ends.get(row, 0), place + 1)
    cached = token * arena.data.element_size() * sum(ends.values())
    read = sum(w.nbytes for w in _matrices(weights)) + total_bytes(*norms) + embedded + cached
    return read + total_bytes(*outputs)


def operations(args: tuple, kwargs: dict, backward: bool) -> int:
    weights, tokens = args[:2]
    return of_step([w.shape for w in _matrices(weights)], tokens.numel())


class _Rounding(Dense):
    """A dense matrix in the place of an affine one."""

    takes_int8 = True


def reordered(
    orders: Orders,
    weights: DecoderWeights,
    tokens: Tensor,
    positions: Tensor,
    arena: Arena,
    sequences: Tensor | None = None,
) -> Tensor:
    """The columns of the hidden numbers, of a head (pairs of queries' and keys', any of values')
    and of the feed-forward network, and the heads of a group."""
    rounded = weights.activations is not None
    # Columns that are rounded to 8 bits together stay so.
    together = partial(orders.within, reference.INT8_GROUP) if rounded else orders
    hidden, columns, of_v = (
        together(weights.model_dim), orders.pairs(weights.head_dim), together(weights.head_dim)
    )  # fmt: skip

    def matrix(w: Weight, outputs: Tensor | None, inputs: Tensor | None) -> Weight:
        dense = take(reference.dense(w, arena.data.dtype), outputs, inputs)
        return _Rounding(dense) if rounded and form_of(w).takes_int8 else dense

    def vector(w: Tensor | None, order: Tensor) -> Tensor | None:
        return None if w is None else take(w, order)

    layers = []
    for layer in weights.layers:
        q_heads, kv_heads = layer.q_heads, layer.kv_heads
        heads = orders.heads(kv_heads, q_heads // kv_heads)
        ffn = together(layer.proj_2.shape[1])
        of_k = q_heads + torch.arange(kv_heads, device=heads.device)
        parts = ((heads, columns), (of_k, columns), (of_k + kv_heads, of_v))
        qkv = torch.cat([(h[:, None] * weights.head_dim + c).flatten() for h, c in parts])
        gated = torch.cat((ffn, ffn + len(ffn))) if weights.gated else ffn
        out = (heads[:, None] * weights.head_dim + of_v).flatten()
        layers.append(
            layer._replace(
                attn_norm=take(layer.attn_norm, hidden),
                qkv_proj=matrix(layer.qkv_proj, qkv, hidden),
                q_norm=vector(layer.q_norm, columns),
                k_norm=vector(layer.k_norm, columns),
                out_proj=matrix(layer.out_proj, hidden, out),
                ffn_norm=take(layer.ffn_norm, hidden),
                proj_1=matrix(layer.proj_1, gated, hidden),
                proj_2=matrix(layer.proj_2, hidden, ffn),
            )
        )
    changed = {
        "embedding": matrix(weights.embedding, None, hidden),
        "layers": tuple(layers),
        "norm": take(weights.norm, hidden),
        "head": matrix(weights.head, None, hidden),
        "rope_table": take(weights.rope_table, None, columns),
    }
    own = arena._replace(data=arena.data.clone())
    caches = [
        (mine, theirs, order)
        for i, layer in enumerate(layers)
        for mine, theirs, order in zip(
            own.views(i, layer.kv_heads),
            arena.views(i, layer.kv_heads),
            (columns, of_v),
            strict=True,
        )
    ]
    for mine, theirs, order in caches:
        mine.copy_(take(theirs, None, None, None, order))
    other = DecoderWeights(**{**vars(weights), **changed})
    logits = reference.decode_step(other, tokens, positions, own, sequences)
    rows = rows_of(positions, sequences)
    for mine, theirs, order in caches:
        theirs[rows, positions] = put_back(mine[rows, positions], None, None, order)
    return logits


SPEC = OpSpec(
    "decode_step",
    outputs=("logits", "keys and values"),
    cases=cases(),
    bench_cases=bench_cases,
    observe=with_written,
    backward=False,  # it has none
    # The number of keys breaks the graph, and the widths of the layers exceed torch's limit of
    # recompilations.
    compiled=False,
    least_bytes=least_bytes,
    operations=operations,
    reordered=reordered,
)

"""Models for llama.cpp: one GGUF file of its `openelm` architecture.

llama.cpp knows OpenELM with QK norm, a gated feed-forward and tied embeddings. proj_1 is stored as
its two halves, ffn_gate and ffn_up; norms are always float32. In q4_0 every matrix is q4_0, where
llama.cpp's own tool would keep the tied output in q6_K. The package `gguf` writes the file.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..ops.linear import dense_rows
from ..weights.chunks import each_chunk
from ..weights.formats import Weight, form_of
from ..weights.storage import replacing
from .compressed import weight_of
from .config import OpenELMConfig
from .layers import DecoderLayer
from .model import OpenELM
from .progress import progress
from .vocabulary import chat_template, file_beside, said_json, vocabulary_of

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
_QUANTIZED = ("q8_0", "q4_0")
_BLOCK = 32  # weights that share a scale in q8_0 and q4_0


def export_gguf(
    model: OpenELM,
    path: str | Path,
    type: str = "f16",
    *,
    tokenizer: str | Path | None = None,
    name: str | None = None,
) -> None:
    """Write a model, plain or compressed, to a GGUF file, which is replaced in one step.

    Args:
        model: an `elmkernels.OpenELM`.
        path: the file.
        type: of the matrices: "f32", "f16", "bf16", "q8_0" or "q4_0".
        tokenizer: a SentencePiece tokenizer.model to embed, with the tokens that are added beside
            it or by the model's checkpoint; without one the file has no vocabulary, and takes and
            gives token ids alone. What ends a text is what the checkpoint says.
        name: the model's name in the file; None for its configuration's.

    Raises:
        ImportError: a package is missing.
        TypeError: the model is another one.
        ValueError: llama.cpp's OpenELM can't say this configuration, or the type can't hold the
            weights.

    Example:
        >>> export_gguf(model, "model.gguf", "q8_0")
    """
    gguf = _package("gguf", "GGUF files", "elmkernels[gguf]")
    if type not in TYPES:
        raise ValueError(f"type must be one of {', '.join(TYPES)}, got {type!r}")
    if not isinstance(model, OpenELM):
        raise TypeError(f"model must be an elmkernels.OpenELM, got {model.__class__.__name__}")
    _check(model.config, type)
    vocabulary = None if tokenizer is None else Path(tokenizer)
    if vocabulary is not None:
        vocabulary_of(vocabulary, model.config)  # refused before anything is written
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path must be a file, {path} is a folder")
    kind = gguf.GGMLQuantizationType[type.upper()]
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "openelm")
        try:
            _describe(gguf, writer, model.config, kind, name or model.config.model_name)
            _write_vocabulary(gguf, writer, model.config, vocabulary)
            _write_tensors(gguf, writer, model, kind, path.name)
            for file in writer.fout or ():
                file.flush()
                os.fsync(file.fileno())
        finally:
            if writer.fout:
                writer.close()


def _write_tensors(gguf: Any, writer: Any, model: OpenELM, kind: Any, name: str) -> None:
    """The header, what each tensor is, and the tensors themselves."""
    tensors = list(_tensors(model))
    for key, (rows, columns), _ in tensors:
        matrix = kind if rows else gguf.GGMLQuantizationType.F32
        shape = (rows, columns) if rows else (columns,)
        size = gguf.quant_shape_to_byte_shape(shape, matrix)
        data = np.dtype(np.uint8)
        writer.add_tensor_info(key, size, data, int(np.prod(size)), raw_dtype=matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    read = {key: (rows, take) for key, (rows, _), take in tensors}
    for key in progress(read, f"writing {name}"):
        rows, take = read[key]
        writer.write_tensor_data(_bytes(gguf, key, take(), kind if rows else None))


def _package(name: str, what: str, extra: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(f"{what} need {name}: pip install {name} (or {extra})") from error


def _check(config: OpenELMConfig, type: str) -> None:
    for field, needed in (
        ("share_input_output_layers", True),
        ("normalize_qk_projections", True),
        ("ffn_with_glu", True),
    ):
        if getattr(config, field) is not needed:
            raise ValueError(
                f"llama.cpp's OpenELM has {field} {needed}, the model's configuration has "
                f"{getattr(config, field)}"
            )
    for key, shape in config.parameter_shapes().items():
        if type in _QUANTIZED and len(shape) == 2 and shape[1] % _BLOCK:
            raise ValueError(
                f"type {type} needs columns in multiples of {_BLOCK}, {key} has {shape[1]}"
            )


def _describe(gguf: Any, writer: Any, config: OpenELMConfig, kind: Any, name: str | None) -> None:
    files = {"F32": "ALL_F32"}.get(kind.name, f"MOSTLY_{kind.name}")
    writer.add_type("model")
    writer.add_name(name or "OpenELM")
    writer.add_file_type(gguf.LlamaFileType[files])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_transformer_layers)
    writer.add_context_length(config.max_context_length)
    writer.add_embedding_length(config.model_dim)
    writer.add_feed_forward_length(list(config.ffn_dims))
    writer.add_head_count(list(config.num_query_heads))
    writer.add_head_count_kv(list(config.num_kv_heads))
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_freq_constant)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _write_vocabulary(
    gguf: Any, writer: Any, config: OpenELMConfig, tokenizer: Path | None
) -> None:
    """The tokens, the ids that begin and end texts, and all else that the checkpoint says."""
    folder = Path() if tokenizer is None else tokenizer.parent
    own = None if tokenizer is None else vocabulary_of(tokenizer, config)
    if own is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([piece.text.encode() for piece in own.pieces])
        writer.add_token_scores([piece.score for piece in own.pieces])
        writer.add_token_types([gguf.TokenType[piece.kind] for piece in own.pieces])
        if own.unk >= 0:
            writer.add_unk_token_id(own.unk)
        if (template := chat_template(folder, config)) is not None:
            writer.add_chat_template(template)
    said = {**config.metadata.generation, **config.metadata.values}
    bos = config.bos_token_id if own is None or "bos_token_id" in said else own.bos
    ends = config.eos_token_ids if own is None or "eos_token_id" in said else (own.eos,)
    adds = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    ids = [(writer.add_bos_token_id, bos), (writer.add_pad_token_id, config.pad_token_id)]
    for add, token in [*ids, *zip(adds, ends, strict=False)]:
        if token is not None and 0 <= token < config.vocab_size:
            add(token)
    writer.add_add_bos_token(bos is not None and bos >= 0)
    writer.add_add_eos_token(False)
    for name, text in said_json(config).items():
        writer.add_string(f"elmkernels.{name}", text)
    if (data := file_beside(folder, config, "tokenizer.json")) is not None:
        writer.add_string(gguf.Keys.Tokenizer.HF_JSON, data.decode("utf-8", "replace"))


def _tensors(model: OpenELM) -> Iterator[tuple[str, tuple[int, int], Any]]:
    """Name in the file, (rows or 0, columns), and how to get the tensor."""

    def matrix(key: str, module: Any, part: slice | None = None) -> tuple:
        weight = weight_of(module)
        if part is not None:
            weight = cast(Weight, form_of(weight).rows(part.start, part.stop))
        n = weight.shape[0]
        return f"{key}.weight", tuple(weight.shape), lambda: dense_rows(weight, weight.dtype, 0, n)

    def vector(key: str, norm: Any) -> tuple:
        return f"{key}.weight", (0, norm.weight.shape[0]), lambda: norm.weight

    yield matrix("token_embd", model.token_embeddings)
    for i, layer in enumerate(cast(Iterable[DecoderLayer], model.layers)):
        block, ffn = f"blk.{i}", weight_of(layer.ffn.proj_2).shape[1]
        yield vector(f"{block}.attn_norm", layer.attn_norm)
        yield matrix(f"{block}.attn_qkv", layer.attn.qkv_proj)
        yield vector(f"{block}.attn_q_norm", layer.attn.q_norm)
        yield vector(f"{block}.attn_k_norm", layer.attn.k_norm)
        yield matrix(f"{block}.attn_output", layer.attn.out_proj)
        yield vector(f"{block}.ffn_norm", layer.ffn_norm)
        yield matrix(f"{block}.ffn_gate", layer.ffn.proj_1, slice(0, ffn))
        yield matrix(f"{block}.ffn_up", layer.ffn.proj_1, slice(ffn, 2 * ffn))
        yield matrix(f"{block}.ffn_down", layer.ffn.proj_2)
    yield vector("output_norm", model.norm)


def _bytes(gguf: Any, key: str, weight: Tensor, kind: Any) -> np.ndarray:
    """A tensor in a type of GGML (None: float32), as bytes."""
    w = weight.detach().to("cpu").contiguous()
    if kind is not None and kind.name.lower() in _QUANTIZED:
        chunks = each_chunk(
            lambda rows: gguf.quants.quantize(w[rows].float().numpy(), kind), *w.shape
        )
        return np.concatenate(chunks)
    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16}
    cast = w.to(dtypes.get(kind.name, torch.float32) if kind is not None else torch.float32)
    if cast.dtype == torch.float16 and not torch.equal(cast.isfinite(), w.isfinite()):
        raise ValueError(f"type f16 can't hold the largest weights of {key}: use bf16 or f32")
    return cast.view(torch.uint8).numpy()


def rounded(weight: Tensor, type: str) -> Tensor:
    """A matrix as a file of that type holds it, in float32: what llama.cpp computes with.

    Raises ImportError where the package `gguf` is missing.
    """
    gguf = _package("gguf", "GGUF files", "elmkernels[gguf]")
    if type not in _QUANTIZED:
        dtypes = {"f16": torch.float16, "bf16": torch.bfloat16}
        return weight.detach().to(dtypes.get(type, torch.float32)).float()
    kind = gguf.GGMLQuantizationType[type.upper()]
    data = _bytes(gguf, "", weight, kind)
    chunks = each_chunk(lambda rows: gguf.quants.dequantize(data[rows], kind), *weight.shape)
    return torch.from_numpy(np.concatenate(chunks))

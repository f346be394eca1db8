"""OpenELM as an ONNX file: the reference model by torch's exporter, with a cache that goes in and
comes out.

    inputs   input_ids        int64 [batch, length]
             attention_mask   int64 [batch, past + length], 1 = real and 0 = padding
             past_key_values.I.key, .value    [batch, kv_heads of layer I, past, head_dim]
    outputs  logits           [batch, length, vocab_size]
             present.I.key, .value            [batch, kv_heads of layer I, past + length, head_dim]

batch, length and past are free, and past is 0 at first. The names are those that runtimes of
decoders know. Positions follow from the mask: the first real token of a row is at 0.
"""

import importlib
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from ..acceleration.swap import restore
from ..checks import fail
from ..compression.plain import make_plain
from ..openelm import OpenELM
from ..openelm.layers import Context, Rotation
from ..reference import attention
from ..surgery import mark_of, twin
from ..weights.storage import told

Cache = list[tuple[Tensor, Tensor]]


class Decoder(nn.Module):
    """A model whose cache is an argument and a result. The keys that a layer has rotated are
    joined to those of the past, which hold their own positions already.
    """

    def __init__(self, model: OpenELM) -> None:
        super().__init__()
        self.model = model
        config = model.config
        model._place_rope_table(model.norm.weight.device, config.rope_max_length)
        self.register_buffer("rope_table", model.rope_table, persistent=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: Cache
    ) -> tuple[Tensor, Cache]:
        """logits, and the cache with the new tokens in it."""
        length, real, present = input_ids.shape[1], attention_mask.bool(), []
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]

        def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            before = past[len(present)]
            k, v = (
                torch.cat((old, new.transpose(1, 2)), 2)
                for old, new in zip(before, (k, v), strict=True)
            )
            present.append((k, v))
            return attention(q, k.transpose(1, 2), v.transpose(1, 2), real)

        context = Context(positions, Rotation(self.rope_table), None, None, None, attend=attend)
        x = self.model.token_embeddings(input_ids)
        for layer in self.model.layers:
            x = layer(x, context)
        return self.model.logits(x), present


def export_onnx(model: OpenELM, path: str | Path) -> None:
    """Write a model to an ONNX file in place of one that is there; its weights lie beside it, in
    PATH.data.

    Args:
        model: an `elmkernels.OpenELM`, which stays as it is; compressed weights are written plain,
            and all in the dtype of the model. (onnxruntime multiplies no bfloat16 on a CPU.)
        path: the file.

    Raises:
        ImportError: onnx or onnxscript isn't installed.
        TypeError: the model is another one.
        ValueError: the path is a folder.

    Example:
        >>> export_onnx(model, "model.onnx")
    """
    if not isinstance(model, OpenELM):
        fail("model", "an elmkernels.OpenELM", type(model).__name__, TypeError)
    path = Path(path)
    if path.is_dir():
        fail("path", "a file", f"the folder {path}")
    for name in ("onnx", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            message = f"ONNX files need {name}: pip install {name} (or elmkernels[onnx])"
            raise ImportError(message) from error
    plain = twin(model).eval()
    if mark_of(plain) is not None:
        restore(plain)
    make_plain(plain, progress=False)
    with told(path), tempfile.TemporaryDirectory(dir=path.parent or ".") as folder:
        _write(Decoder(plain), Path(folder) / path.name)
        for made in sorted(Path(folder).iterdir(), key=lambda p: p.name == path.name):
            os.replace(made, path.with_name(made.name))


def _write(decoder: Decoder, path: Path) -> None:
    batch, length, past = (torch.export.Dim(name) for name in ("batch", "length", "past"))
    kept, names = _example(decoder.model, 2, 5)
    shape = {0: batch, 2: past}
    with torch.no_grad():
        torch.onnx.export(
            decoder,
            (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64), kept),
            path,
            input_names=["input_ids", "attention_mask", *(f"past_key_values.{n}" for n in names)],
            output_names=["logits", *(f"present.{n}" for n in names)],
            dynamic_shapes=(
                {0: batch, 1: length},
                {0: batch, 1: torch.export.Dim.DYNAMIC},
                [(shape, shape) for _ in kept],
            ),
            dynamo=True,
            external_data=True,
            verbose=False,
        )


def _example(model: OpenELM, batch: int, past: int) -> tuple[Cache, list[str]]:
    """A cache of that many tokens, and what its tensors are called."""
    config, dtype = model.config, model.activation_dtype
    cache = [
        (torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype))
        for heads in config.num_kv_heads
        for size in [(batch, heads, past, config.head_dim)]
    ]
    return cache, [f"{i}.{part}" for i in range(len(cache)) for part in ("key", "value")]

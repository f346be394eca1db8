"""Golden cases as models, and the rule that compares a model's tensors with them.

No tolerance is chosen by hand: float32 results may differ from the golden ones by a small multiple
of what float32 itself costs, which is measured against the same model in float64; bfloat16
results are held to the error of the bfloat16 golden tensors.
"""

import json
import zlib
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from elmkernels.openelm import OpenELM, OpenELMConfig, next_token_loss
from elmkernels.testing.rule import ATTENTION_SLACK, compare

from . import GOLDEN

TINY = ("tiny_layerwise", "tiny_mha_untied")
# No golden file: every shape that the two above don't have.
GLU_FREE = OpenELMConfig(
    num_transformer_layers=2,
    model_dim=64,
    head_dim=16,
    num_gqa_groups=2,
    ffn_with_glu=False,
    ffn_dim_divisor=16,
    vocab_size=96,
    rope_max_length=64,
    share_input_output_layers=True,
)


@dataclass
class Golden:
    """One golden file: its configuration, weights and expected tensors."""

    config: OpenELMConfig
    weights: dict[str, torch.Tensor]
    tensors: dict[str, torch.Tensor]
    decode_prefix: int = 0
    grads: dict[str, torch.Tensor] = field(default_factory=dict)

    def model(self, dtype: torch.dtype = torch.float32) -> OpenELM:
        model = OpenELM(self.config, device="meta")
        weights = {name: weight.to(dtype, copy=True) for name, weight in self.weights.items()}
        model.load_state_dict(weights, assign=True)
        return model

    @cached_property
    def exact(self) -> dict[str, torch.Tensor]:
        """logits, loss and gradients of the reference model in float64, also if the first to ask
        keeps no gradients.
        """
        with torch.inference_mode(False), torch.enable_grad():
            ids = self.tensors["input_ids"]
            return logits_loss_gradients(self.model(torch.float64), ids)

    @property
    def expected(self) -> dict[str, torch.Tensor]:
        """The golden tensors under the names of `logits_loss_gradients`."""
        loss = self.tensors["loss"].squeeze()
        return {"logits": self.tensors["logits"], "loss": loss, **self.grads}


@cache
def load_tiny(name: str) -> Golden:
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    return Golden(
        config=OpenELMConfig(**json.loads(metadata["config"])),
        weights={
            k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")
        },
        grads={k: v for k, v in tensors.items() if k.startswith("grad.")},
        tensors={k: v for k, v in tensors.items() if not k.startswith(("weight.", "grad."))},
        decode_prefix=int(metadata["decode_prefix"]),
    )


@cache
def load_hf_tiny() -> Golden:
    folder = GOLDEN / "hf_tiny"
    weights = load_file(folder / "model.safetensors")
    return Golden(
        config=OpenELMConfig.from_hf_dict(json.loads((folder / "config.json").read_text())),
        weights={name.removeprefix("transformer."): weight for name, weight in weights.items()},
        tensors=load_file(folder / "expected.safetensors"),
    )


def load_seeded_270m() -> Golden:
    """The whole 270M shape (1 GB of float32), its weights drawn by the golden files' recipe."""
    path = GOLDEN / "openelm_270m_seeded.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    config = OpenELMConfig.from_name(metadata["model"])
    weights = seeded_weights(config, int(metadata["seed"]))
    return Golden(config=config, weights=weights, tensors=load_file(path))


def seeded_weights(config: OpenELMConfig, seed: int) -> dict[str, torch.Tensor]:
    """Weights that anyone can draw again from their names and shapes alone."""
    weights = {}
    for name, shape in config.parameter_shapes().items():
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = generator.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            values = np.float32(1.0) + np.float32(0.1) * values
        else:
            values *= np.float32(shape[-1] ** -0.5)
        weights[name] = torch.from_numpy(values)
    return weights


def logits_loss_gradients(model: OpenELM, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """logits, loss and `grad.<name>` of every parameter, of any model with OpenELM's call."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids)
    loss = loss_of(logits, input_ids)
    loss.backward()
    grads = {f"grad.{name}": weight.grad for name, weight in model.named_parameters()}
    return {"logits": logits.detach(), "loss": loss.detach(), **grads}


def loss_of(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """next_token_loss, except that float64 stays float64."""
    if logits.dtype != torch.float64:
        return next_token_loss(logits, input_ids)
    losses = logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])
    return -losses.mean()


def max_and_rms(difference: torch.Tensor) -> tuple[float, float]:
    wide = difference.double()
    return wide.abs().max().item(), wide.square().mean().sqrt().item()


def assert_matches(
    got: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor, what: str = "tensor"
) -> None:
    """got and expected are two evaluations of `exact` (float64) in one dtype, so the distance of
    each from it is a rounding error: they may not be further apart than twice got's own, by the
    largest difference and by the root mean square, and got's own is at most twice expected's.
    Each with one ulp of the largest value on top.
    """
    assert got.shape == expected.shape == exact.shape, what
    assert torch.isfinite(got).all(), what
    assert got.dtype == expected.dtype, what
    ulp = torch.finfo(got.dtype).eps * exact.abs().max().item()
    apart = max_and_rms(got.double() - expected.double())
    error = max_and_rms(got.double() - exact)
    golden_error = max_and_rms(expected.double() - exact)
    for kind, a, own, golden in zip(("max", "rms"), apart, error, golden_error, strict=True):
        assert a <= 2 * own + ulp, f"{what}: {kind} {a:.3e} from golden, own error {own:.3e}"
        assert own <= 2 * golden + ulp, f"{what}: {kind} error {own:.3e}, golden's {golden:.3e}"


def assert_as_accurate(
    got: torch.Tensor, yardstick: torch.Tensor, truth: torch.Tensor, what: str = "tensor"
) -> None:
    """got may be no further from truth than 2 times (max) and 1.5 times (rms) the yardstick, an
    evaluation in the same dtype."""
    assert got.shape == yardstick.shape == truth.shape, what
    assert got.dtype == yardstick.dtype, what
    assert torch.isfinite(got).all(), what
    error_max, error_rms = max_and_rms(got.double() - truth.double())
    allowed_max, allowed_rms = max_and_rms(yardstick.double() - truth.double())
    assert error_max <= 2 * allowed_max, (
        f"{what}: max error {error_max:.3e} > 2 * {allowed_max:.3e}"
    )
    assert error_rms <= 1.5 * allowed_rms, (
        f"{what}: rms error {error_rms:.3e} > 1.5 * {allowed_rms:.3e}"
    )


def assert_parity(
    got: torch.Tensor, golden: torch.Tensor, exact: torch.Tensor, what: str = "tensor"
) -> None:
    """The project's rule of parity, with the golden tensor as the reference's own error."""
    comparison = compare(exact, golden, got, what, slack=ATTENTION_SLACK)
    assert comparison.ok, f"{what}: {comparison.reason}"

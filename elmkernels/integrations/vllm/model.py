"""OpenELM as a model of vLLM: its own number of heads and width in each layer, vLLM's attention
over a paged cache and its parallel projections, this package's ops between them.
"""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CompilationMode, VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention as PagedAttention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from ...openelm.config import OpenELMConfig
from ...reference import rope_table
from . import ops, products, shapes, weights


class Parts:
    """What the layers of a model share while they are built."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.shape: OpenELMConfig = shapes.shape_of(vars(vllm_config.model_config.hf_config))
        self.cache = vllm_config.cache_config
        self.quant = vllm_config.quant_config
        self.tensor_parallel = get_tensor_model_parallel_world_size()
        self.positions = vllm_config.model_config.max_model_len
        self._table: Tensor | None = None

    def table(self) -> Tensor:
        """The rotary table: float32 whatever the model is, with the same bits on every device."""
        if self._table is None:
            made = rope_table(
                self.positions, self.shape.head_dim, float(self.shape.rope_freq_constant),
                device="cpu",
            )  # fmt: skip
            self._table = made.to(current_platform.device_type)
        return self._table


class Attention(nn.Module):
    def __init__(self, parts: Parts, layer: int, prefix: str) -> None:
        super().__init__()
        shape, size = parts.shape, parts.tensor_parallel
        dim, eps = shape.head_dim, shape.norm_eps
        query, key_value = shape.num_query_heads[layer], shape.num_kv_heads[layer]
        own = shapes.heads(shape, layer, size)
        self.qkv_proj = QKVParallelLinear(
            shape.model_dim, dim, query, key_value, bias=False,
            quant_config=parts.quant, prefix=f"{prefix}.qkv_proj",
        )  # fmt: skip
        self.out_proj = RowParallelLinear(
            query * dim, shape.model_dim, bias=False,
            quant_config=parts.quant, prefix=f"{prefix}.out_proj",
        )  # fmt: skip
        self.q_norm = self.k_norm = None
        if shape.normalize_qk_projections:
            self.q_norm, self.k_norm = ops.norm(dim, eps), ops.norm(dim, eps)
        self.fused = ops.runs(ops.QKNormRope)
        if self.fused:
            self.rotated = ops.QKNormRope(own, eps, parts.table())
        else:
            base = float(shape.rope_freq_constant)
            self.rotated = ops.NativeQKNormRope(own, dim, eps, parts.positions, base)
        self.attn = PagedAttention(
            own.query, dim, dim**-0.5, num_kv_heads=own.key_value, cache_config=parts.cache,
            quant_config=parts.quant, prefix=f"{prefix}.attn",
        )  # fmt: skip

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(x)
        norms = self.q_norm, self.k_norm
        if self.fused:
            norms = tuple(None if norm is None else norm.weight for norm in norms)
        q, k, v = self.rotated(qkv, *norms, positions)
        out, _ = self.out_proj(self.attn(q, k, v))
        return out


class FeedForward(nn.Module):
    def __init__(self, parts: Parts, layer: int, prefix: str) -> None:
        super().__init__()
        shape, width = parts.shape, parts.shape.ffn_dims[layer]
        options = {"bias": False, "quant_config": parts.quant}
        if shape.ffn_with_glu:
            self.proj_1 = MergedColumnParallelLinear(
                shape.model_dim, [width, width], prefix=f"{prefix}.proj_1", **options
            )
            self.activation = ops.gated()
        else:
            self.proj_1 = ColumnParallelLinear(
                shape.model_dim, width, prefix=f"{prefix}.proj_1", **options
            )
            self.activation = F.silu
        self.proj_2 = RowParallelLinear(
            width, shape.model_dim, prefix=f"{prefix}.proj_2", **options
        )

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.proj_1(x)
        x, _ = self.proj_2(self.activation(x))
        return x


class DecoderLayer(nn.Module):
    def __init__(self, parts: Parts, prefix: str) -> None:
        super().__init__()
        layer, shape = extract_layer_index(prefix), parts.shape
        self.attn = Attention(parts, layer, f"{prefix}.attn")
        self.ffn = FeedForward(parts, layer, f"{prefix}.ffn")
        self.attn_norm = ops.norm(shape.model_dim, shape.norm_eps)
        self.ffn_norm = ops.norm(shape.model_dim, shape.norm_eps)

    def forward(
        self, positions: Tensor, x: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(what is added to the residual, the residual) before and after."""
        if residual is None:
            x, residual = self.attn_norm(x), x
        else:
            x, residual = self.attn_norm(x, residual)
        x, residual = self.ffn_norm(self.attn(positions, x), residual)
        return self.ffn(x), residual


@support_torch_compile
class Transformer(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        parts = Parts(vllm_config)
        shape = parts.shape
        ends = get_pp_group()
        shared = ends.is_last_rank and shape.share_input_output_layers
        self.token_embeddings = (
            VocabParallelEmbedding(
                shape.vocab_size, shape.model_dim, quant_config=parts.quant,
                prefix=f"{prefix}.token_embeddings",
            )
            if ends.is_first_rank or shared
            else PPMissingLayer()
        )  # fmt: skip
        self.start_layer, self.end_layer, self.layers = make_layers(
            shape.num_transformer_layers,
            lambda prefix: DecoderLayer(parts, prefix),
            prefix=f"{prefix}.layers",
        )
        last = ends.is_last_rank
        self.norm = ops.norm(shape.model_dim, shape.norm_eps) if last else PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], shape.model_dim
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.token_embeddings(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if get_pp_group().is_first_rank:
            x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            residual = None
        else:
            x, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x, residual = layer(positions, x, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x, "residual": residual})
        x, _ = self.norm(x, residual)
        return x


def warm_up(vllm_config: VllmConfig) -> None:
    """Have vLLM's runner on a CPU run a later stage once, even if nothing is compiled: there alone
    it makes the buffers that take the stage before's output, and fails at the first request without
    them. The layers, which are built, stay as they are: this mode compiles in other runners only.
    """
    compilation = vllm_config.compilation_config
    if current_platform.is_cpu() and compilation.mode == CompilationMode.NONE:
        compilation.mode = CompilationMode.STOCK_TORCH_COMPILE


class OpenELMForCausalLM(nn.Module, SupportsPP, SupportsLoRA):
    """The model that vLLM makes of a folder whose architecture has this name."""

    # qkv_proj and proj_1 are whole in a folder, and so in an adapter.
    packed_modules_mapping = {"qkv_proj": ["qkv_proj"], "proj_1": ["proj_1"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.shape: OpenELMConfig = shapes.shape_of(vars(self.config))
        self.folder, self.complete = vllm_config.model_config.model, False
        self.transformer = Transformer(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "transformer")
        )
        self.lm_head: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                self.shape.vocab_size, self.shape.model_dim,
                quant_config=vllm_config.quant_config, prefix=maybe_prefix(prefix, "lm_head"),
            )  # fmt: skip
            if self.shape.share_input_output_layers:
                self.lm_head = self.lm_head.tie_weights(self.transformer.token_embeddings)
        self.logits_processor = LogitsProcessor(self.shape.vocab_size)
        self.make_empty_intermediate_tensors = self.transformer.make_empty_intermediate_tensors
        ops.report()
        products.few_rows(self, vllm_config.model_config.dtype)
        if not get_pp_group().is_first_rank:
            warm_up(vllm_config)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.transformer.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        return self.transformer(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, stored: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take the folder's tensors.

        Raises:
            ValueError: one is none of the model's, has another shape, or is missing. (What is
                loaded later, over a model that is complete, may be a part of it.)
        """
        found = AutoWeightsLoader(self).load_weights(weights.mapped(self.shape, stored))
        if not self.complete:
            held = (name for name, _ in self.named_parameters())
            weights.check_complete(self.shape, held, found, self.folder)
            self.complete = True
        return found

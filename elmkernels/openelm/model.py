"""OpenELM in plain PyTorch, built on the reference of every op: what the fast model must equal.

    h = x + out_proj(attention(qk_norm_rope(qkv_proj(attn_norm(x)))))
    y = h + proj_2(swiglu(proj_1(ffn_norm(h))))
    logits = norm(y of the last layer) @ classifier.T    (token_embeddings when they are tied)

Modules and parameters have CoreNet's names (see `layers`).
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checks import fail, to_dtype
from ..devices import autocast_dtype, check_here
from ..reference import rope_table
from .cache import KVCache
from .checkpoint import load, save
from .compressed import weight_of
from .config import OpenELMConfig
from .documents import check_documents, positions_of
from .layers import Context, DecoderLayer, LogitsHead, RMSNorm, TiedHead
from .loss import LossHead, plain_weight
from .surgery import set_module


class OpenELM(nn.Module):
    """The language model: token ids in, logits out.

    `seed` draws the initial weights from a generator of its own (the stream depends on the
    device's kind); without it the default generator is used. `gradient_checkpointing`, True or
    the layers by their numbers, recomputes them in the backward pass instead of keeping their
    activations.
    """

    def __init__(
        self,
        config: OpenELMConfig,
        *,
        seed: int | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, OpenELMConfig):
            hint = "OpenELM.from_config takes a name as well"
            fail("config", f"an OpenELMConfig ({hint})", type(config).__name__, TypeError)
        dtype = to_dtype("dtype", dtype)
        self.config = config
        self.gradient_checkpointing: bool | Collection[int] = False
        device = torch.get_default_device() if device is None else torch.device(device)
        check_here(device)
        # Built on "meta" first, so that nn.Linear's own initialization costs nothing.
        with torch.device("meta"):
            # Not nn.Embedding(): its normal_() on "meta" imports half of torch, a second or two.
            self.token_embeddings = nn.Embedding.from_pretrained(
                torch.empty(config.vocab_size, config.model_dim, dtype=dtype),
                freeze=False,
                padding_idx=config.padding_index,
            )
            self.layers = nn.ModuleList(
                DecoderLayer(config, i, dtype=dtype) for i in range(config.num_transformer_layers)
            )
            self.norm = RMSNorm(config.model_dim, config.norm_eps, dtype=dtype)
            self.classifier = (
                None
                if config.share_input_output_layers
                else nn.Linear(config.model_dim, config.vocab_size, bias=False, dtype=dtype)
            )
        self.tied_head = TiedHead() if config.share_input_output_layers else None
        self.logits_head = LogitsHead()
        self.loss_head = LossHead()
        # A plain attribute, not a buffer: it stays float32 under .to(dtype) and real under
        # to_empty() and load_state_dict(assign=True), and no state_dict holds it.
        self.rope_table = torch.empty(0, device="meta")
        if device.type == "meta":
            self._place_rope_table(device)
        else:
            self.to_empty(device=device)
            generator = None if seed is None else torch.Generator(device).manual_seed(seed)
            self.reset_parameters(generator)

    @classmethod
    def from_config(
        cls,
        config: OpenELMConfig | str,
        seed: int | None = 0,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> "OpenELM":
        """A freshly initialized model of a configuration or of a variant's name ("OpenELM-270M");
        the same seed gives the same weights.
        """
        if isinstance(config, str):
            config = OpenELMConfig.from_name(config)
        return cls(config, seed=seed, dtype=dtype, device=device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        config: OpenELMConfig | str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> "OpenELM":
        """See `checkpoint.load`: a Hugging Face folder, or CoreNet's .pt with its `config`."""
        loaded = load(path, config=config, dtype=dtype, device=device)
        model = cls(loaded.config, device="meta")
        for name, module in loaded.modules.items():
            set_module(model, name, module)
        # Not strict: `load` has seen that nothing is missing, and the modules hold the rest.
        model.load_state_dict(loaded.weights, assign=True, strict=False)
        return model

    def save_pretrained(self, path: str | Path, max_shard_bytes: int | None = None) -> None:
        """See `checkpoint.save`: a Hugging Face folder, replaced in one step."""
        save(self, self.config, path, max_shard_bytes=max_shard_bytes)

    @property
    def activation_dtype(self) -> torch.dtype:
        """What a cache must hold: autocast's dtype if it is on, else the weights'."""
        weight = self.norm.weight  # the others may be compressed
        return autocast_dtype(weight.device.type) or weight.dtype

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal with std in_features^-0.5, out_proj and proj_2 model_dim^-0.5 (2 layers)^-0.5."""
        residual_std = (2 * len(self.layers) * self.config.model_dim) ** -0.5
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
            elif name.endswith(("out_proj.weight", "proj_2.weight")):
                weight.normal_(0.0, residual_std, generator=generator)
            else:
                weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
        counts: Sequence[int] | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """input_ids integer [batch, length] -> logits [batch, length, vocab_size], or of the last
        `logits_to_keep` positions where that is not 0. With a cache the tokens follow those that
        each row holds. attention_mask [batch, past + length], 1 = real and 0 = padding, moves the
        positions: the first real token of a row is at 0.

        counts, with a cache and instead of a mask: row b's tokens are its first counts[b], from 0
        to length, the rest is padding on the right. The cache counts the tokens alone, but needs
        room for all. logits_to_keep then keeps the last of each row's tokens (repeating its first
        position where it has fewer).

        cu_seqlens, instead of all these but logits_to_keep: int64 [documents + 1], rising from 0
        to batch * length, where documents end in the rows one after another; every row begins one.
        Positions restart in each document, and its tokens see no other.
        """
        x, new = self._hidden(
            input_ids, attention_mask, cache, logits_to_keep, counts, cu_seqlens,
            self.token_embeddings,
        )  # fmt: skip
        logits = self.logits(x)
        if cache is not None:  # last of all: what fails before leaves the cache as it was
            cache.advance(new)
        return logits

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
        counts: Sequence[int] | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """What `forward` projects to logits, [batch, length, model_dim], of the same arguments."""
        x, new = self._hidden(
            input_ids, attention_mask, cache, logits_to_keep, counts, cu_seqlens,
            self.token_embeddings,
        )  # fmt: skip
        x = self.norm(x)
        if cache is not None:
            cache.advance(new)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """The logits of what the last layer gives, [..., model_dim]."""
        return self.logits_head(self, x)

    def project(self, hidden: Tensor) -> Tensor:
        """The logits of hidden states [..., model_dim]."""
        if self.classifier is None:
            return self.tied_head(hidden, weight_of(self.token_embeddings))
        return self.classifier(hidden)

    def loss(
        self,
        input_ids: Tensor,
        targets: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> Tensor:
        """The float32 loss of predicting targets, int64 [batch, length] like input_ids, at every
        position: see `elmkernels.linear_cross_entropy`, which it is in an accelerated model, so
        that no logits lie in memory. Targets that are `ignore_index` don't count; padding has to
        be among them (`openelm.next_tokens` gives targets). A plain method: wrappers that act on
        `forward` alone (DDP) don't see it.
        """
        if targets.shape != input_ids.shape:
            raise ValueError(
                f"targets must be {list(input_ids.shape)} like input_ids, got {list(targets.shape)}"
            )
        shared = None
        if self.classifier is None:
            shared = self.loss_head.shared_gradient(self.token_embeddings)
        embed = self.token_embeddings if shared is None else shared.embed
        hidden, _ = self._hidden(input_ids, attention_mask, None, 0, None, cu_seqlens, embed)
        head = self.token_embeddings if self.classifier is None else self.classifier
        weight = plain_weight(head) if shared is None else shared.projection()
        return self.loss_head(
            self.norm(hidden), targets, weight, self.project, ignore_index=ignore_index,
            z_loss=z_loss, label_smoothing=label_smoothing, reduction=reduction,
        )  # fmt: skip

    def _hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: KVCache | None,
        logits_to_keep: int,
        counts: Sequence[int] | None,
        cu_seqlens: Tensor | None,
        embed: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, int | list[int]]:
        """The last layer's output, and how many tokens are new to a cache, of each row or all."""
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep must be at least 0, got {logits_to_keep}")
        context = self._context(input_ids, attention_mask, cache, cu_seqlens)
        counts = self._check_counts(counts, input_ids, attention_mask, cache)
        x = embed(input_ids)
        recomputed = self._recomputed() if cache is None and torch.is_grad_enabled() else ()
        again = context._replace(checkpointed=True)
        for i, layer in enumerate(self.layers):
            x = (
                checkpoint(layer, x, again, use_reentrant=False)
                if i in recomputed
                else layer(x, context)
            )
        x = _kept(x, logits_to_keep, counts)
        return x, input_ids.shape[1] if counts is None else counts

    def _recomputed(self) -> Collection[int]:
        """The layers that the backward pass computes again."""
        chosen, count = self.gradient_checkpointing, len(self.layers)
        if isinstance(chosen, bool):
            return range(count) if chosen else ()
        if not all(0 <= i < count for i in chosen):
            raise ValueError(
                f"gradient_checkpointing must be a bool or layers in [0, {count}), got {chosen}"
            )
        return chosen

    def _context(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: KVCache | None,
        cu_seqlens: Tensor | None = None,
    ) -> Context:
        if not isinstance(input_ids, Tensor):
            fail(
                "input_ids",
                "a tensor [batch, length] of int64 or int32, as torch.tensor([[1, 2]]) is",
                type(input_ids).__name__,
                TypeError,
            )
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                "input_ids must be int64 or int32 [batch, length], "
                f"got {input_ids.dtype} {list(input_ids.shape)}"
            )
        batch, length = input_ids.shape
        past = 0 if cache is None else cache.length
        self._check_ids(input_ids)
        if past + length > self.config.rope_max_length:
            raise ValueError(
                f"the rotary table has {self.config.rope_max_length} positions (rope_max_length), "
                f"got {past} past + {length} new tokens"
            )
        if cache is not None:
            self._check_cache(cache, batch, length, input_ids.device)
        self._place_rope_table(input_ids.device)
        if cu_seqlens is not None:
            if cache is not None or attention_mask is not None:
                raise ValueError("cu_seqlens must be given without cache and attention_mask")
            check_documents(cu_seqlens, input_ids)
            positions = positions_of(cu_seqlens, batch * length).view(batch, length)
            return Context(positions, self.rope_table, None, None, None, None, cu_seqlens)
        if cache is not None and cache.ragged:
            if attention_mask is not None:
                raise ValueError(
                    f"attention_mask must be None for a cache whose rows differ, got {cache.rows}"
                )
            offsets = cache.lengths.to(input_ids.device)
            new = offsets[:, None] + torch.arange(length, device=input_ids.device)
            return Context(new, self.rope_table, None, cache, new, offsets)
        new = torch.arange(past, past + length, device=input_ids.device).expand(batch, -1)
        slots = None if cache is None else new
        if attention_mask is None:
            return Context(new, self.rope_table, None, cache, slots)
        if attention_mask.shape != (batch, past + length):
            raise ValueError(
                f"attention_mask must be {[batch, past + length]} (past + new tokens), "
                f"got {list(attention_mask.shape)}"
            )
        key_mask = attention_mask.bool()
        positions = (key_mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
        return Context(positions, self.rope_table, key_mask, cache, slots)

    def _check_counts(
        self,
        counts: Sequence[int] | None,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: KVCache | None,
    ) -> list[int] | None:
        """counts as a list; None where every token counts."""
        if counts is None:
            return None
        if cache is None or attention_mask is not None:
            raise ValueError("counts must be given with a cache and without attention_mask")
        counts = [int(count) for count in counts]
        batch, length = input_ids.shape
        if len(counts) != batch or not all(0 <= count <= length for count in counts):
            raise ValueError(f"counts must be {batch} numbers in [0, {length}], got {counts}")
        return None if min(counts) == length else counts

    def _check_ids(self, input_ids: Tensor) -> None:
        # On a GPU the check would wait for the device; there the embedding itself fails.
        if input_ids.device.type != "cpu" or torch.compiler.is_compiling() or not input_ids.numel():
            return
        low, high = (int(i) for i in torch.aminmax(input_ids))
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"input_ids must lie in [0, {self.config.vocab_size}), got {low} to {high}"
            )

    def _check_cache(self, cache: KVCache, batch: int, length: int, device: torch.device) -> None:
        for name, expected, got in (
            ("batch", batch, cache.batch),
            ("dtype", self.activation_dtype, cache.dtype),
            ("device", device, cache.device),
            ("key/value heads of each layer", list(self.config.num_kv_heads),
             list(cache.kv_heads)),
            ("head_dim", self.config.head_dim, cache.head_dim),
        ):  # fmt: skip
            if got != expected:
                raise ValueError(f"cache: {name} must be {expected}, got {got}")
        cache.check_room(length)

    def _place_rope_table(self, device: torch.device) -> None:
        """Make the table on the CPU, for the same bits on every device, and bring it there."""
        if self.rope_table.device == device and self.rope_table.shape[0]:
            return
        config = self.config
        shape = config.rope_max_length, config.head_dim
        if device.type == "meta":  # arange there would import half of torch too
            self.rope_table = torch.empty(shape, dtype=torch.float32, device=device)
            return
        with torch.inference_mode(False):  # an inference tensor could not be saved for backward
            table = rope_table(*shape, config.rope_freq_constant, device="cpu")
            self.rope_table = table.to(device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._place_rope_table(self.norm.weight.device)
        return self


def _kept(x: Tensor, last: int, counts: list[int] | None) -> Tensor:
    """The last positions of x [batch, length, ...], of the first counts[b] in row b; 0 = all."""
    if counts is None or not last:
        return x[:, -last:]
    at = [[max(count - last + i, 0) for i in range(last)] for count in counts]
    index = torch.tensor(at, device=x.device)[..., None]
    return x.gather(1, index.expand(-1, -1, x.shape[2]))

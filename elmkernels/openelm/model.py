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

from ..checks import fail, integer, to_dtype
from ..devices import autocast_dtype, check_here
from ..surgery import gathered, knows, plain, set_module
from .cache import KVCache
from .checkpoint import load, save
from .compressed import dtype_of, weight_of
from .config import OpenELMConfig
from .layers import (
    DecoderLayer,
    LogitsHead,
    RMSNorm,
    TiedHead,
    check_cache,
    check_counts,
    check_inputs,
    context_of,
    kept,
    of_kept,
    recomputed_layers,
)
from .loss import LossHead, plain_weight
from .rotary import placed


@knows("logits", "project", "_hidden")
class OpenELM(nn.Module):
    """The language model: token ids in, logits out.

    Args:
        config: its shape.
        seed: of the initial weights; None draws them from torch's default generator.
        dtype: of the weights; None for torch's default.
        device: where they are; None for torch's default. "meta" makes none.

    Attributes:
        gradient_checkpointing: True, or the numbers of layers whose activations the backward pass
            computes again instead of keeping them.

    Raises:
        TypeError, ValueError: config or dtype is something else.
        RuntimeError: the device isn't here.

    Example:
        >>> model = OpenELM(config, seed=0)
        >>> model(torch.tensor([[1, 2, 3]])).shape == (1, 3, config.vocab_size)
        True
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
            generator = None if seed is None else torch.Generator(device).manual_seed(int(seed))
            self.reset_parameters(generator)

    @classmethod
    def from_config(
        cls,
        config: OpenELMConfig | str,
        seed: int | None = 0,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> "OpenELM":
        """A freshly initialized model; the same seed gives the same weights. Raises as the class.

        Args:
            config: a configuration, or a variant's name ("OpenELM-270M").
            seed, dtype, device: as the class takes them.

        Returns:
            The model.
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
        """A model with the weights of a file or folder on this machine; nothing is downloaded.

        Args:
            path: a Hugging Face folder, one CoreNet (.pt) or safetensors file, or the name of a
                model ("apple/OpenELM-270M") that the Hub's cache on this machine holds.
            config: of a file, not of a folder: a configuration, a variant's name or a CoreNet YAML.
            dtype: of weights, of quantized ones' scales and biases; None: as stored.
            device: where they are; None for torch's default.

        Returns:
            The model; compressed matrices stay compressed.

        Raises:
            FileNotFoundError: there is no such path.
            TypeError, ValueError: what is stored isn't an OpenELM of that configuration.
            RuntimeError: the device isn't here.

        Example:
            >>> model = OpenELM.from_pretrained("OpenELM-270M", dtype="bfloat16")
        """
        loaded = load(path, config=config, dtype=dtype, device=device)
        model = cls(loaded.config, device="meta")
        for name, module in loaded.modules.items():
            set_module(model, name, module)
        # Not strict: `load` has seen that nothing is missing, and the modules hold the rest.
        model.load_state_dict(loaded.weights, assign=True, strict=False)
        return model

    def save_pretrained(self, path: str | Path, max_shard_bytes: int | None = None) -> None:
        """Write a Hugging Face folder, in one step in place of a checkpoint that is already there.

        Args:
            path: the folder.
            max_shard_bytes: a file of more bytes is split between tensors; None for one file.

        Raises:
            ValueError: the path is a file, or holds something else.
        """
        save(self, self.config, path, max_shard_bytes=max_shard_bytes)

    @property
    def activation_dtype(self) -> torch.dtype:
        """Of the keys that a cache must hold: autocast's if it is on, else the embedding's."""
        norm = self.norm.weight
        return autocast_dtype(norm.device.type) or dtype_of(self.token_embeddings, norm.dtype)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew: normal with std in_features^-0.5, of out_proj and proj_2
        model_dim^-0.5 (2 layers)^-0.5.

        Args:
            generator: what draws; None for torch's default one.
        """
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
        """Token ids to logits.

        Args:
            input_ids: int64 or int32 [batch, length].
            attention_mask: [batch, past + length], 1 = real and 0 = padding: the first real
                token of a row is at position 0. None if all are real.
            cache: what each row holds already: the tokens follow it, and are counted at the end.
            logits_to_keep: how many of the last positions get logits; 0 for all.
            counts: with a cache and without a mask: row b's tokens are its first counts[b], from 0
                to length; the rest is padding on the right, which the cache has room for but
                doesn't count. logits_to_keep then keeps the last of each row's tokens, repeating
                its first position if it has fewer.
            cu_seqlens: int64 [documents + 1], rising from 0 to batch * length: where documents end
                in the rows one after another; every row begins one. Positions restart in each, and
                its tokens see no other. Without mask, cache and counts.

        Returns:
            logits [batch, length or logits_to_keep, vocab_size].

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape or value.
        """
        x, new = self._hidden(
            input_ids, attention_mask, cache, logits_to_keep, counts, cu_seqlens,
            self.token_embeddings,
        )  # fmt: skip
        logits = self.logits(x)
        if cache is not None:  # last of all: what fails before leaves the cache as it was
            cache.advance(new)
        return logits

    @gathered
    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
        counts: Sequence[int] | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """What `forward` projects to logits.

        Args:
            input_ids, attention_mask, cache, logits_to_keep, counts, cu_seqlens: see `forward`.

        Returns:
            [batch, length or logits_to_keep, model_dim], after the last norm.
        """
        x, new = self._hidden(
            input_ids, attention_mask, cache, logits_to_keep, counts, cu_seqlens,
            self.token_embeddings,
        )  # fmt: skip
        x = self.norm(x)
        if cache is not None:
            cache.advance(new)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """The logits of what the last layer gives.

        Args:
            x: [..., model_dim], before the last norm.

        Returns:
            [..., vocab_size].
        """
        return self.logits_head(self, x)

    def project(self, hidden: Tensor) -> Tensor:
        """The logits of hidden states.

        Args:
            hidden: [..., model_dim], after the last norm.

        Returns:
            [..., vocab_size].
        """
        if self.classifier is None:
            return self.tied_head(hidden, weight_of(self.token_embeddings))  # pyright: ignore
        return self.classifier(hidden)

    @gathered
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
        """The loss of predicting targets at every position.

        In an accelerated model no logits lie in memory (`elmkernels.linear_cross_entropy`).
        Wrappers that act on `forward` alone (DDP) don't see this method.

        Args:
            input_ids: int64 or int32 [batch, length].
            targets: int64 [batch, length], as `openelm.next_tokens` gives them; padding has to be
                `ignore_index` among them.
            cu_seqlens, attention_mask: as `forward` takes them.
            z_loss, label_smoothing, ignore_index, reduction: as `elmkernels.linear_cross_entropy`
                takes them.

        Returns:
            float32: one number, or with reduction "none" [batch, length].

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape or value.

        Example:
            >>> loss = model.loss(input_ids, next_tokens(input_ids))
            >>> loss.backward()
        """
        if targets.shape != input_ids.shape:
            raise ValueError(
                f"targets must be {list(input_ids.shape)} like input_ids, got {list(targets.shape)}"
            )
        shared, straight = None, plain(self.loss_head) and self._straight()
        if straight and self.classifier is None:
            shared = self.loss_head.shared_gradient(self.token_embeddings)
        embed = self.token_embeddings if shared is None else shared.embed
        hidden, _ = self._hidden(input_ids, attention_mask, None, 0, None, cu_seqlens, embed)
        head = self.token_embeddings if self.classifier is None else self.classifier
        weight = plain_weight(head) if straight and shared is None else None
        weight = weight if shared is None else shared.projection()
        return self.loss_head(
            self.norm(hidden), targets, weight, self.project, ignore_index=ignore_index,
            z_loss=z_loss, label_smoothing=label_smoothing, reduction=reduction,
        )  # fmt: skip

    def _straight(self) -> bool:
        """Whether `project` is this class's, and the tied head, if there is one, is plain."""
        own = "project" not in self.__dict__ and type(self).project is _PROJECT
        return own and (self.classifier is not None or plain(self.tied_head))

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
        logits_to_keep = integer("logits_to_keep", logits_to_keep, 0)
        check_inputs(self.config, input_ids, cache)
        if cache is not None:
            check_cache(self.config, self.activation_dtype, cache, input_ids)
        past = 0 if cache is None else cache.length
        self._place_rope_table(input_ids.device, past + input_ids.shape[1])
        context = context_of(self.rope_table, input_ids, attention_mask, cache, cu_seqlens)
        counts = check_counts(counts, input_ids, attention_mask, cache)
        x = embed(input_ids)
        chosen = cache is None and torch.is_grad_enabled() and self.gradient_checkpointing
        recomputed = recomputed_layers(chosen, len(self.layers))
        length, end = input_ids.shape[1], len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            if i == end:
                context = of_kept(context, layer, length, logits_to_keep, counts)
            if i in recomputed:
                x = checkpoint(layer, x, context, use_reentrant=False)
            else:
                x = layer(x, context)
        x = kept(x, logits_to_keep, counts) if x.shape[1] == length else x
        return x, length if counts is None else counts

    def _place_rope_table(self, device: torch.device, length: int = 0) -> None:
        """Have the table there, with rows for at least `length` positions."""
        table = placed(self.rope_table, self.config, device, length)
        if table is not self.rope_table:
            self.rope_table = table

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._place_rope_table(self.norm.weight.device)
        return self


_PROJECT = OpenELM.project  # as it is made: a class's methods can be replaced

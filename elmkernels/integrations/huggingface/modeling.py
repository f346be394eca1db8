"""OpenELM as a model of transformers: this package's own model, called and loaded as theirs are."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ...checks import fail, is_integer
from ...generation.step import MOST_TOKENS, in_one_call, next_logits, several_logits
from ...openelm import OpenELM
from ...openelm.compressed import Compressed
from ...openelm.documents import positions_of
from ...openelm.layers import Context, RMSNorm, Rotation, check_inputs, of_kept
from . import losses
from .attention import NAME, Attend
from .cache import OpenELMCache
from .configuration import OpenELMConfig
from .embeddings import HasEmbeddings, TiedProjection
from .generating import CACHE, Generates
from .loading import LoadsAndSaves
from .output import DeferredLogits
from .placement import Placement, in_cache, is_next, real_tokens, without_cache

_VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class _Call(NamedTuple):
    """What one forward pass was asked for."""

    batch: int
    length: int
    past: int  # tokens in the cache, padding among them
    cache: Cache | None
    kept: bool  # whether the cache is among the outputs
    native: bool  # by this package's attention and its cache, or with none
    real: Tensor | None  # of a native pass: bool [batch, past + length], None if all are real
    options: dict[str, Any]  # what forward was called with besides


class OpenELMForCausalLM(LoadsAndSaves, Generates, HasEmbeddings, PreTrainedModel, GenerationMixin):
    """OpenELM with transformers' interface.

    Args:
        config: its shape.
        transformer: the model itself, of that shape; None for a freshly initialized one.

    Attributes:
        transformer: an `elmkernels.OpenELM`, which `elmkernels.accelerate`, `quantize` and `pack`
            take; its parameters' names are Apple's.

    Raises:
        TypeError, ValueError: config or transformer is something else.

    Example:
        >>> model = OpenELMForCausalLM.from_pretrained("OpenELM-270M")
        >>> ids = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=20)
    """

    config: OpenELMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: OpenELMConfig, transformer: OpenELM | None = None) -> None:
        super().__init__(config)
        if transformer is None:
            transformer = OpenELM(config.shape)
        elif not isinstance(transformer, OpenELM):
            fail("transformer", "an elmkernels.OpenELM", type(transformer).__name__, TypeError)
        elif replace(transformer.config, model_name=None) != config.shape:
            fail("transformer", f"of the shape {config.shape}", transformer.config)
        self.transformer = transformer
        if transformer.classifier is None:
            self.lm_head = TiedProjection(self)
        for weight in transformer.parameters():
            if weight.device.type != "meta":  # drawn or loaded already: once is enough
                weight._is_hf_initialized = True
        self.gradient_checkpointing = False
        self._checkpoint: tuple[Callable, int] = (checkpoint, 1)
        self.post_init()

    @classmethod
    def from_openelm(cls, model: OpenELM, **values: Any) -> "OpenELMForCausalLM":
        """transformers' interface round a model of this package; the weights are shared.

        Args:
            model: an `elmkernels.OpenELM`, accelerated or not.
            values: of the configuration, beside the shape.

        Returns:
            The model.

        Raises:
            TypeError: model is something else.
        """
        if not isinstance(model, OpenELM):
            fail("model", "an elmkernels.OpenELM", type(model).__name__, TypeError)
        return cls(OpenELMConfig.from_shape(model.config, **values), model).train(model.training)

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """The name of the implementation of attention that is taken: ours if none is asked for.

        Args:
            requested_attention, is_init_check: as transformers gives them.

        Returns:
            The name.
        """
        return super().get_correct_attn_implementation(requested_attention or NAME, is_init_check)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As `OpenELM.reset_parameters`, of one module, unless its weights were loaded."""
        body = self.transformer
        if isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, nn.Linear | nn.Embedding) and not isinstance(module, Compressed):
            layers = body.layers
            residual = {id(m) for layer in layers for m in (layer.attn.out_proj, layer.ffn.proj_2)}
            columns = 2 * len(layers) * body.config.model_dim
            columns = columns if id(module) in residual else module.weight.shape[-1]
            init.normal_(module.weight, mean=0.0, std=columns**-0.5)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint,
        every_n_layers: int = 1,
    ) -> None:  # fmt: skip
        self.gradient_checkpointing = enable
        self._checkpoint = gradient_checkpointing_func, every_n_layers

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        cache: Cache | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Token ids to logits, and with labels to the loss.

        Args:
            input_ids: int64 or int32 [batch, length].
            attention_mask: [batch, past + length], 0 for padding; None if there is none. Another
                form is given to transformers' attention as it is.
            position_ids: [batch, length]; None if they follow from the padding. Positions that
                begin anew in a row, without a mask, are documents: no token sees another's.
            cache, past_key_values: what each row holds already, of any class; the first is the
                newer name.
            inputs_embeds: [batch, length, model_dim], instead of ids.
            labels: int64 [batch, length], -100 where nothing is to be predicted: the loss is that
                of each next token. The logits are then made if the output is asked for them.
            use_cache: whether keys and values are kept; None for what the configuration says,
                and not with labels.
            logits_to_keep: how many of the last positions get logits, 0 for all, or which.
            output_attentions: whether to give the weights; by attn_implementation="eager" alone.
            output_hidden_states: whether to give what goes from layer to layer.
            kwargs: `num_items_in_batch` divides the summed loss; `shift_labels` are labels that
                are the next tokens already; `hidden_only` gives `last_hidden_state` instead.

        Returns:
            The loss, the logits, the cache, and what was asked for besides.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape or value.
            RuntimeError: gradients would have to go through an `OpenELMCache`.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        call = self._call(
            input_ids, inputs_embeds, labels, attention_mask, past_key_values, use_cache,
            {**kwargs, "cache": cache, "attentions": output_attentions},
        )  # fmt: skip
        if labels is None and not output_hidden_states and not kwargs.get("hidden_only"):
            logits = self._step(call, input_ids, position_ids, logits_to_keep)
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, **{CACHE: call.cache})
        body = self.transformer
        shared = None if labels is None else losses.shared_gradient(body)
        x = inputs_embeds
        if x is None:
            x = (body.token_embeddings if shared is None else shared.embed)(input_ids)
        placement, attend = self._place(call, x, attention_mask, position_ids)
        states: list[Tensor] | None = [] if output_hidden_states else None
        alone = call.native and placement.order is None and labels is None and states is None
        asked = kwargs.get("hidden_only") or kwargs.get("shift_labels") is not None
        last = logits_to_keep if alone and not asked and is_integer(logits_to_keep) else 0
        x = placement.back(self._layers(placement.moved(x), placement.context, states, last))
        values = self._heads(x, labels, shared, logits_to_keep, kwargs)
        if states is not None:
            values["hidden_states"] = (*map(placement.back, states[:-1]), body.norm(x))
        if output_attentions:
            values["attentions"] = tuple(attend.weights)
        if call.native and call.cache is not None:  # last: what fails before leaves it as it was
            call.cache.kv.advance(placement.new)
            call.cache.note(call.length, placement.real)
        values[CACHE] = call.cache if call.kept else None
        kinds = {"make_logits": DeferredLogits, "last_hidden_state": BaseModelOutputWithPast}
        kind = next((kinds[name] for name in values if name in kinds), CausalLMOutputWithPast)
        return kind(**values)

    def _call(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, labels: Tensor | None,
        mask: Any, cache: Cache | None, use_cache: bool | None, options: dict[str, Any],
    ) -> _Call:  # fmt: skip
        """The arguments, checked, with a cache if one is to be made."""
        batch, length = self._check(input_ids, inputs_embeds, labels)
        newer = options.pop("cache")
        cache = cache if newer is None else newer
        if options.pop("attentions") and self.config._attn_implementation != "eager":
            fail("attn_implementation", "'eager' for output_attentions",
                 repr(self.config._attn_implementation))  # fmt: skip
        own, given = self.takes_own_cache(), cache is not None
        recorded = torch.is_grad_enabled() and self._records(inputs_embeds)
        if use_cache is None:
            kept = labels is None and not (self.training and self.gradient_checkpointing)
            use_cache = bool(self.config.use_cache) and kept
        if cache is None and use_cache:
            fresh = own and not recorded
            cache = OpenELMCache(self.config) if fresh else DynamicCache(config=self.config)
        past = 0 if cache is None else int(cache.get_seq_length())
        limit = self.config.rope_max_length
        if past + length > limit:
            raise ValueError(
                f"the model has {limit} positions (rope_max_length), got {past} past + {length} "
                "new tokens"
            )
        fits = cache is None or isinstance(cache, OpenELMCache)
        flat = mask is None or getattr(mask, "ndim", 0) == 2
        native = own and fits and flat
        if isinstance(cache, OpenELMCache) and recorded:
            raise RuntimeError(
                "an OpenELMCache holds no gradients: call the model under torch.no_grad(), or with "
                "a DynamicCache"
            )
        real = real_tokens(mask, batch, past, length) if flat else None
        return _Call(batch, length, past, cache, use_cache or given, native, real, options)

    def _check(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, labels: Tensor | None
    ) -> tuple[int, int]:
        """batch and length of what was given."""
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            fail("input_ids", "given, or inputs_embeds, and not both", got)
        if inputs_embeds is None:
            check_inputs(self.transformer.config, input_ids, None)
            batch, length = input_ids.shape
        else:
            dim = self.config.model_dim
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != dim:
                fail("inputs_embeds", f"[batch, length, {dim}]", list(inputs_embeds.shape))
            batch, length = inputs_embeds.shape[:2]
        if labels is not None and labels.shape != (batch, length):
            fail("labels", f"{[batch, length]} like input_ids", list(labels.shape))
        return batch, length

    def _records(self, inputs_embeds: Tensor | None) -> bool:
        """Whether anything of a pass could have a gradient."""
        if inputs_embeds is not None and inputs_embeds.requires_grad:
            return True
        return any(p.requires_grad for p in self.parameters())

    def _step(
        self, call: _Call, input_ids: Tensor | None, position_ids: Tensor | None, keep: Any
    ) -> Tensor | None:
        """The logits [batch, n, vocab_size] of n tokens a row in one call, None if it is no step:
        of one, or of the guesses that transformers checks.
        """
        cache, n = call.cache, call.length
        if not call.native or input_ids is None or cache is None or cache.kv is None:
            return None
        if n > 1 and (not is_integer(keep) or call.batch * n > MOST_TOKENS):
            return None
        if not is_next(cache, call.real, position_ids, n):
            return None
        kv = cache.make_room(call.batch, n, self.transformer.activation_dtype, input_ids.device)
        if n == 1:
            logits = next_logits(self.transformer, input_ids[:, 0], kv)[:, None]
        elif in_one_call(self.transformer, kv, n) is None:
            return None
        else:
            logits = several_logits(self.transformer, input_ids.tolist(), kv)
            logits = logits.unflatten(0, (call.batch, n))[:, -keep:]
        cache.note(n)
        return logits

    def _place(
        self, call: _Call, x: Tensor, mask: Any, position_ids: Tensor | None
    ) -> tuple[Placement, Attend | None]:
        """Where the tokens go, and what takes attention's place, if anything does."""
        body, batch, length, cache = self.transformer, call.batch, call.length, call.cache
        body._place_rope_table(
            x.device, call.past + length if position_ids is None else body.config.rope_max_length
        )
        table = body.rope_table
        ends = call.options.get("cu_seq_lens_q")
        if position_ids is None and cache is None and ends is not None:
            position_ids = positions_of(ends.long(), batch * length).view(batch, length)
        if call.native and cache is None:
            return without_cache(table, call.real, position_ids, batch, length), None
        if call.native:
            cache.make_room(batch, length, body.activation_dtype, x.device)
            return in_cache(table, cache, call.real, position_ids, batch, length), None
        pairs = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=mask, position_ids=position_ids,
            **{CACHE: cache},
        )  # fmt: skip
        varlen = {n: call.options[n] for n in _VARLEN if call.options.get(n) is not None}
        attend = Attend(self.config, cache, pairs, varlen)
        positions = torch.arange(call.past, call.past + length, device=x.device)
        if position_ids is not None:
            positions = position_ids.long()
        elif getattr(mask, "ndim", 0) == 2 and mask.shape[1] == call.past + length:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, call.past :]
        context = Context(
            positions.expand(batch, -1), Rotation(table), None, None, None, attend=attend
        )
        return Placement(context, length), attend

    def _layers(
        self, x: Tensor, context: Context, states: list[Tensor] | None, last: int = 0
    ) -> Tensor:
        """The last layer's output, of the last positions at least (0: of all); what each takes, and
        that output, are added to states.
        """
        end = len(self.transformer.layers) - 1
        run, every = self._checkpoint
        recomputed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for i, layer in enumerate(self.transformer.layers):
            if states is not None:
                states.append(x)
            if i == end:
                context = of_kept(context, layer, x.shape[1], last, None)
            if recomputed and i % every == 0:
                x = run(layer.__call__, x, context)
            else:
                x = layer(x, context)
        if states is not None:
            states.append(x)
        return x

    def _heads(
        self, x: Tensor, labels: Tensor | None, shared: Any, keep: int | Tensor,
        options: dict[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        """Logits and loss of the last layer's output, by the names they have in the output."""
        if options.get("hidden_only"):
            return {"last_hidden_state": self.transformer.norm(x)}

        def logits() -> Tensor:
            return self.transformer.logits(losses.positions_kept(x, keep))

        if labels is None and options.get("shift_labels") is None:
            return {"logits": logits()}
        chosen = getattr(self, "_loss_function", None)
        if chosen is None and torch.is_grad_enabled():
            loss = losses.fused(self.transformer, x, labels, shared, options)
            if torch.compiler.is_compiling():
                return {"loss": loss}
            return {"loss": loss, "make_logits": logits}
        everywhere = self.transformer.logits(x)
        if chosen is None:
            loss = losses.of_logits(everywhere, labels, options)
        else:
            vocab_size = self.config.vocab_size
            loss = chosen(logits=everywhere, labels=labels, vocab_size=vocab_size, **options)
        return {"loss": loss, "logits": losses.positions_kept(everywhere, keep)}

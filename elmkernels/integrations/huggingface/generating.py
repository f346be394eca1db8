"""What `generate` needs to know of the model."""

from functools import partial
from typing import Any, NoReturn

from ...checks import fail
from . import contrastive
from .attention import NAME
from .cache import OpenELMCache
from .versions import cache_name

CACHE = cache_name()


class Generates:
    """An `OpenELMForCausalLM` in transformers' generation: its own cache by default."""

    def generate(
        self, inputs: Any = None, generation_config: Any = None, *args: Any,
        custom_generate: Any = None, **options: Any,
    ) -> Any:  # fmt: skip
        """Tokens after a prompt, as transformers' `generate` gives them.

        Contrastive search (penalty_alpha and top_k) is `contrastive_search`, for which transformers
        itself would fetch code from the Hub.

        Args:
            inputs, generation_config, args, custom_generate, options: of transformers' generate.

        Returns:
            int64 [rows, tokens], the prompt first, or what return_dict_in_generate asks for.

        Raises:
            TypeError, ValueError: as transformers' generate does.

        Example:
            >>> ids = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=20)
        """
        own = getattr(self, "generation_config", None)
        if custom_generate is None and contrastive.wanted(generation_config, own, options):
            streamer = options.get("streamer")
            custom_generate = partial(contrastive.contrastive_search, streamer=streamer)
        return super().generate(
            inputs, generation_config, *args, custom_generate=custom_generate, **options
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if (
            model_kwargs.get(CACHE) is None
            and generation_config.use_cache is not False
            and generation_config.cache_implementation is None
            and self.takes_own_cache()
        ):
            room = args[2] if len(args) > 2 else kwargs.get("max_cache_length")
            limit = self.config.rope_max_length
            model_kwargs[CACHE] = OpenELMCache(
                self.config, None if room is None else max(1, min(int(room), limit))
            )
            return None
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: Any, generation_mode_kwargs: dict[str, Any]
    ) -> None:
        assistant = generation_mode_kwargs.get("assistant_model")
        guessing = {
            "assistant_model": type(assistant).__name__ if assistant is not None else None,
            "prompt_lookup_num_tokens": generation_config.prompt_lookup_num_tokens,
        }
        beams = generation_config.num_beams or 1
        for name, value in guessing.items():
            if value is not None and beams > 1:
                fail(name, f"None with beams (num_beams {beams}), which aren't guessed", value)
        if assistant is not None and not generation_mode_kwargs.get("assistant_tokenizer"):
            ours, its = self.config.vocab_size, assistant.config.get_text_config().vocab_size
            if its != ours:
                what = f"of the model's vocabulary of {ours} tokens (or both tokenizers be given)"
                fail("assistant_model", what, its)
        super()._validate_generation_mode(
            generation_mode, generation_config, generation_mode_kwargs
        )

    def _get_candidate_generator(
        self, generation_config: Any, *args: Any, assistant_model: Any = None, **kwargs: Any
    ) -> Any:
        limit = getattr(getattr(assistant_model, "config", None), "rope_max_length", None)
        length = generation_config.max_length
        if limit is not None and limit < length:
            what = f"of at least {length} positions (rope_max_length), which rows may have"
            fail("assistant_model", what, limit)
        return super()._get_candidate_generator(
            generation_config, *args, assistant_model=assistant_model, **kwargs
        )

    def takes_own_cache(self) -> bool:
        """Whether its keys and values are kept in an `OpenELMCache`.

        Returns:
            False with another implementation of attention, or on several devices.
        """
        devices = set(getattr(self, "hf_device_map", {}).values())
        return self.config._attn_implementation == NAME and len(devices) <= 1

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise NotImplementedError: a paged cache has one number of heads for all layers.

        Args:
            args, kwargs: of transformers' generate_batch.
        """
        self.init_continuous_batching()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise NotImplementedError, as `generate_batch` does.

        Args:
            args, kwargs: of transformers' init_continuous_batching.
        """
        heads = sorted(set(self.config.num_kv_heads))
        raise NotImplementedError(
            "continuous batching of transformers keeps one number of key/value heads for all "
            f"layers, this model's have {heads}: use generate, whose rows may differ in length"
        )

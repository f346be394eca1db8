"""The embedding and the output projection, as transformers reaches for them."""

from dataclasses import replace
from typing import Any, NoReturn

from torch import Tensor, nn

from ...acceleration.swap import restore
from ...checks import fail
from ...openelm.compressed import Compressed
from ...surgery import is_accelerated
from ...weights.as_tensor import AsTensor


class Backbone:
    """The model without its head, as transformers calls a base model: what a trainer that projects
    by itself asks for. Everything else that it has is the `elmkernels.OpenELM`'s.

    Args:
        model: the model with its head.
    """

    _tp_plan = _pp_plan = None

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the last norm, `last_hidden_state` [batch, length, model_dim]."""
        # The class's own: that of the instance may be what is calling.
        return type(self._model).forward(self._model, *args, hidden_only=True, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model.transformer, name)


class TiedProjection(nn.Module):
    """The output projection by the embedding's weight, a module of the model for those who look for
    one: it holds no weight of its own, and no state_dict holds it.

    Args:
        model: the model that it is a part of.
    """

    bias = None

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = (model,)  # no child

    @property
    def weight(self) -> Any:
        """The embedding's; a compressed one is read as the dense matrix, and can't be set."""
        embedding = self._model[0].transformer.token_embeddings
        if not isinstance(embedding, Compressed):
            return embedding.weight

        def put(value: Tensor) -> NoReturn:
            fail("weight", "left as it is, in the compressed embedding", list(value.shape))

        return AsTensor(embedding.compressed(), embedding.dtype, put)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., model_dim], after the last norm, -> logits [..., vocab_size]."""
        return self._model[0].transformer.project(hidden)


class HasEmbeddings:
    """An `OpenELMForCausalLM`'s embedding, which is its projection too if the two are tied."""

    _asked: tuple[str, dict[str, Any]] = ("auto", {})  # of `accelerate`, the last time

    @property
    def base_model(self) -> Backbone:
        """The model without its head."""
        return Backbone(self)

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings.

        Returns:
            The module.
        """
        return self.transformer.token_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put others in place of the token embeddings.

        Args:
            value: the module.
        """
        self.transformer.token_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        """The output projection.

        Returns:
            The module.
        """
        body = self.transformer
        return self.lm_head if body.classifier is None else body.classifier

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another in place of the output projection.

        Args:
            new_embeddings: the module.

        Raises:
            ValueError: the projection is the embedding's weight.
        """
        if self.transformer.classifier is None:
            fail("new_embeddings", "None for a model whose projection is the embedding's weight",
                 type(new_embeddings).__name__)  # fmt: skip
        self.transformer.classifier = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Have another number of token ids, as transformers' own does it.

        Args:
            args, kwargs: of transformers' resize_token_embeddings.

        Returns:
            The token embeddings.

        Raises:
            ValueError: they are compressed.
        """
        body = self.transformer
        if isinstance(body.token_embeddings, Compressed):
            fail("token_embeddings", "plain to be resized", type(body.token_embeddings).__name__)
        accelerated = is_accelerated(body)
        if accelerated:  # what was prepared of the old weight would be stale
            restore(body)
        if body.classifier is None:  # there is one matrix to be resized
            vars(self)["get_output_embeddings"] = lambda: None
        try:
            embeddings = super().resize_token_embeddings(*args, **kwargs)
        finally:
            vars(self).pop("get_output_embeddings", None)
        body.config = replace(body.config, vocab_size=self.config.vocab_size)
        if accelerated:
            kernels, options = self._asked
            self.accelerate(kernels, **options)
        return embeddings

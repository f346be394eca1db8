"""Which versions of transformers this works with."""

from importlib.metadata import PackageNotFoundError, version

LEAST = (5, 24)  # what the tests run with


def check_versions() -> None:
    """Raise ImportError, with both versions, unless transformers is there and new enough."""
    least = ".".join(map(str, LEAST))
    install = f"pip install 'transformers>={least}'"
    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise ImportError(
            f"elmkernels.integrations.huggingface needs transformers >= {least}, which is not "
            f"installed: {install}"
        ) from None
    numbers = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in found.split(".")[:2])
    if numbers < LEAST:
        raise ImportError(
            f"elmkernels.integrations.huggingface needs transformers >= {least}, got {found}: "
            f"{install}"
        )


def cache_name() -> str:
    """What transformers calls the cache among the arguments and outputs of a model."""
    from dataclasses import fields

    from transformers.modeling_outputs import CausalLMOutputWithPast

    names = {f.name for f in fields(CausalLMOutputWithPast)}
    return "cache" if "cache" in names else "past_key_values"

"""Which backend an attention call takes if the caller names none.

On a CPU backends.PREFERENCE decides, but for prompts on kinds of processors where another was
measured to be faster (`processors.ATTENTION`). On a GPU it depends on the call: torch's own
attention has hand-written kernels, but they don't serve a call that needs a mask or the documents'
lengths.
"""

import torch
from torch import Tensor

from ..backends import SDPA, Preference, choose, of_dtype
from ..checks import DTYPES, fail
from ..derivatives import refuse_tangents
from ..processors import ATTENTION, OWN, row

TRITON = "triton"
TRITON_HEAD_DIM = 256  # the largest whose tiles fit registers and shared memory

_DENSE = "reasoned, not measured: SDPA needs a dense mask, with which it takes its slower kernels"
_LOOP = "reasoned, not measured: SDPA needs the lengths on the host and a launch for each document"
_FLASH = "reasoned, not measured: SDPA runs flash attention written for the architecture"

ON_GPU: dict[str, Preference] = {
    "documents": Preference((TRITON, SDPA), _LOOP),
    "padded": Preference((TRITON, SDPA), _DENSE),
    "ragged": Preference((TRITON, SDPA), _DENSE),
    "chunk": Preference((TRITON, SDPA), _DENSE),
    "token": Preference((SDPA, TRITON), _FLASH),
    "prompt": Preference((SDPA, TRITON), _FLASH),
}


# {dtype: what goes before backends.PREFERENCE for a prompt on this kind of processor}
ON_CPU: dict[torch.dtype, tuple[str, ...]] = {
    dtype: (found.choice,)
    for dtype in DTYPES
    if (found := row(ATTENTION, dtype)) is not None and found.choice != OWN
}

# Of derivatives that aren't there: torch's fast ways have them no more than kernels do.
REMEDY = 'call it with backend="reference" under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)'


def refuse_forward_mode(*tensors: Tensor) -> None:
    """Raise NotImplementedError where torch's own attention would name an operation of its own."""
    refuse_tangents("attention", *tensors, remedy=REMEDY)


def kind_of(
    lq: int,
    lk: int,
    key_mask: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
) -> str:
    """The row of ON_GPU that a call falls under."""
    if cu_seqlens is not None:
        return "documents"
    if key_mask is not None:
        return "padded"
    if offsets is not None:
        return "ragged"
    if lq == 1:
        return "token"
    return "prompt" if lq == lk else "chunk"


def attention_backend(
    device: str, named: str | None, kind: str, head_dim: int, dtype: torch.dtype | None = None
) -> str:
    """The backend of a call: the named one, or the first that can run it here. Triton has no
    kernels for heads of more than TRITON_HEAD_DIM: ValueError if it is named for them.
    """
    fits = head_dim <= TRITON_HEAD_DIM
    order = ON_GPU[kind].order if device == "cuda" else ()
    if device == "cpu" and kind == "prompt" and dtype is not None:
        order = ON_CPU.get(dtype, ())
    chosen = choose("attention", device, named, order if fits else (SDPA,))
    if chosen == TRITON and not fits:
        fail("q", f"of a head_dim up to {TRITON_HEAD_DIM} for backend {TRITON!r}", head_dim)
    return chosen if dtype is None else of_dtype(chosen, dtype)

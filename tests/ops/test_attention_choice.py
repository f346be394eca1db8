"""Which backend an attention call takes where none is named."""

import pytest
import torch

from elmkernels import attention
from elmkernels.backends import _CHOICE, BACKENDS, SDPA, choose
from elmkernels.ops._attention_choice import ON_GPU, TRITON, attention_backend, kind_of

SOME = torch.zeros(1)
ON_CPU = choose("attention", "cpu", None)


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU, for which Triton and torch's own attention can run."""
    for name in (TRITON, SDPA):
        monkeypatch.setitem(_CHOICE, ("attention", "cuda", name), name)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ((8, 8, None, None, None), "prompt"),
        ((1, 1, None, None, None), "token"),
        ((1, 8, None, None, None), "token"),
        ((3, 8, None, None, None), "chunk"),
        ((1, 8, None, SOME, None), "ragged"),
        ((8, 8, SOME, None, None), "padded"),
        ((3, 8, SOME, SOME, None), "padded"),
        ((8, 8, None, None, SOME), "documents"),
    ],
)
def test_a_call_falls_under_one_row(arguments, kind):
    assert kind_of(*arguments) == kind
    assert kind in ON_GPU


def test_torch_goes_first_where_it_needs_no_mask_and_no_loop(gpu):
    for kind, preference in ON_GPU.items():
        first = SDPA if kind in ("token", "prompt") else TRITON
        assert attention_backend("cuda", None, kind, 64) == first
        assert set(preference.order) == {SDPA, TRITON}
        assert "not measured" in preference.grounds


def test_what_cannot_run_is_passed_over(gpu, monkeypatch):
    monkeypatch.delitem(_CHOICE, ("attention", "cuda", TRITON))
    for kind in ON_GPU:
        assert attention_backend("cuda", None, kind, 64) == SDPA


@pytest.mark.parametrize("kind", ON_GPU)
def test_a_named_backend_is_never_overridden(gpu, kind):
    for name in (TRITON, SDPA):
        assert attention_backend("cuda", name, kind, 64) == name
    assert attention_backend("cpu", None, kind, 64) == ON_CPU


def test_heads_too_wide_for_triton_are_torchs_unless_triton_is_named(gpu):
    for kind in ON_GPU:
        assert attention_backend("cuda", None, kind, 257) == SDPA
    with pytest.raises(ValueError, match="q must be of a head_dim up to 256 .*'triton', got 257"):
        attention_backend("cuda", TRITON, "prompt", 257)


@pytest.mark.skipif(BACKENDS[TRITON].missing is not None, reason="Triton can't run here")
def test_triton_refuses_heads_that_it_has_no_kernels_for():
    device = BACKENDS[TRITON].devices[-1]
    x = torch.randn(1, 2, 1, 264, device=device)
    with pytest.raises(ValueError, match="q must be of a head_dim up to 256"):
        attention(x, x, x, backend=TRITON)

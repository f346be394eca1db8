"""Packed12 sequences: documents one after another, document d the tokens cu_seqlens[d] to
cu_seqlens[d + 1]."""

import torch
from torch import Tensor


def document_of(cu_seqlens: Tensor, total: int) -> Tensor:
    """int64 [total]: which document each token is in. Documents without tokens are passed over."""
    tokens = torch.arange(total, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)


def positions_of(cu_seqlens: Tensor, total: int) -> Tensor:
    """int64 [total]: the place of each token in its document, from 0 on."""
    tokens = torch.arange(total, device=cu_seqlens.device)
    return tokens - cu_seqlens[document_of(cu_seqlens, total)]

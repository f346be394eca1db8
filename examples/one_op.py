"""Use one op alone: causal grouped-query attention with its backward, without any model.

    python examples/one_op.py --length 512 --q-heads 32 --kv-heads 8

Every op takes `backend=None` for the best that can run here, or a backend's name, which never falls
back to another: it raises with the reason. `elmkernels info` lists them.
"""

import argparse

import torch

from elmkernels import attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--q-heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    args = parser.parse_args()

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(1, args.length, heads, args.head_dim, requires_grad=True)

    torch.manual_seed(0)
    q, k, v = draw(args.q_heads), draw(args.kv_heads), draw(args.kv_heads)
    out = attention(q, k, v)  # [batch, length, q_heads, head_dim]
    out.square().mean().backward()
    mine = [t.grad.clone() for t in (q, k, v)]

    for t in (q, k, v):
        t.grad = None
    attention(q, k, v, backend="reference").square().mean().backward()
    for name, ours, t in zip("qkv", mine, (q, k, v), strict=True):
        print(f"gradient of {name}: largest difference {(ours - t.grad).abs().max():.1e}")

    # Two documents in one row: none of the second's tokens sees the first.
    ends = torch.tensor([0, args.length // 2, args.length])
    both = attention(q, k, v, cu_seqlens=ends)
    first = attention(*(t[:, : args.length // 2] for t in (q, k, v)))
    print("documents stay apart:", torch.allclose(both[:, : args.length // 2], first, atol=1e-5))

    try:
        attention(q, k, v, backend="avx1024")
    except ValueError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main()

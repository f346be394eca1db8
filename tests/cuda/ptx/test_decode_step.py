"""decode_step as nvcc compiles it for sm_80, launched by its own host code and executed: its grid
barrier, every form of weights, and that each weight is read once.
"""

import pytest
import torch
from helpers.decode_simulation import assert_parity, decoding
from helpers.nvcc.gpu import Gpu, executed, parts_of

import elmkernels
from elmkernels.testing.cases.weights import FORMS, dtypes_of
from elmkernels.testing.ptx import Settings
from elmkernels.testing.ptx.traffic import SECTOR

# Two layers with heads and widths of their own, queries that share keys; four tokens of two
# sequences, one of which has keys for two items.
SIZES = {
    "model_dim": 128, "head_dim": 32, "heads": ((4, 2), (6, 3)), "ffn_dims": (128, 192),
    "vocab_size": 101,
}  # fmt: skip
POSITIONS, SEQUENCES = (70, 71, 3, 4), (0, 0, 1, 1)
EVERY = tuple((form, dtype) for form in FORMS for dtype in dtypes_of(form))
QUICK = (("plain", torch.bfloat16), ("packed12", torch.bfloat16))


def named(quick: tuple = EVERY) -> list:
    found = []
    for form, dtype in EVERY:
        marks = () if (form, dtype) in quick else pytest.mark.slow
        name = f"{form}-{str(dtype).removeprefix('torch.')}"
        found.append(pytest.param(form, dtype, id=name, marks=marks))
    return found


def step_of(gpu: Gpu, weights):
    gpu.known = parts_of(weights)

    def step(*args, **kwargs):
        with executed(gpu), torch.no_grad():
            return elmkernels.decode_step(*args, **kwargs, backend="cuda")

    return step


def hold(compiled, form, dtype, settings=None, positions=POSITIONS, sequences=SEQUENCES, **sizes):
    weights, *call = decoding(form, dtype, positions, **(SIZES | sizes))
    for part in parts_of(weights).values():
        part.data = part.data.clone()  # aligned to lines, as everything of torch's is
    gpu = Gpu(compiled, settings or Settings())
    kwargs = {} if sequences is None else {"sequences": torch.tensor(sequences)}
    assert_parity(step_of(gpu, weights), weights, *call, **kwargs)
    return gpu, weights


def in_turns() -> Settings:
    """A block after another, each up to where it waits for the others."""
    return Settings(lanes=256, order="shuffled")


@pytest.mark.parametrize(("form", "dtype"), named(QUICK))
def test_parity_and_each_weight_is_read_once(compiled, form, dtype):
    gpu, weights = hold(compiled, form, dtype, Settings(traffic=True))
    (ran,) = gpu.launches
    assert (ran.kernel, ran.grid, ran.block) == ("decode_step_kernel", (4, 1, 1), (256, 1, 1))
    assert ran.traffic is not None
    for name in matrices(weights):
        begin, size = ran.parts[name]
        sectors, distinct = ran.traffic.of(begin, size)
        least = -(-size // SECTOR)
        assert distinct >= least, name  # all of it
        assert sectors <= 1.05 * least, name


def matrices(weights) -> list[str]:
    names = ("qkv_proj", "out_proj", "proj_1", "proj_2")
    return [f"layer {i} {name}" for i in range(len(weights.layers)) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "dtype"), named())
def test_parity_of_every_form(compiled, form, dtype):
    """Four sequences, then tokens one by one, whose kernel has a row of inputs."""
    hold(compiled, form, dtype, positions=(3, 70, 0, 131), sequences=None)
    weights, tokens, _, cache = decoding(form, dtype, (0,), **SIZES)
    for i in range(4):
        gpu = Gpu(compiled)
        assert_parity(step_of(gpu, weights), weights, tokens, torch.tensor([i]), cache)
        with torch.no_grad():
            logits = step_of(gpu, weights)(weights, tokens, torch.tensor([i]), cache)
        tokens = logits.argmax(-1)


@pytest.mark.slow
def test_blocks_in_turns_give_the_same_bits_and_choose_the_same_tokens(compiled):
    """Each block goes on until it waits at the barrier; the blocks are taken in any order."""
    weights, tokens, positions, cache = decoding("plain", torch.bfloat16, (3, 70, 9), **SIZES)
    found = []
    for settings in (Settings(), in_turns()):
        own, chosen = cache._replace(data=cache.data.clone()), torch.full_like(tokens, -1)
        step = step_of(Gpu(compiled, settings), weights)
        logits = step(weights, tokens, positions, own, chosen=chosen)
        assert torch.equal(chosen, logits.argmax(-1))
        found.append((logits, own.data))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("blocks", [1, 3, 16])
def test_any_number_of_blocks_has_parity(compiled, blocks, head_dim):
    weights, *call = decoding("plain", torch.bfloat16, (3, 70), **(SIZES | {"head_dim": head_dim}))
    gpu = Gpu(compiled, in_turns(), multiprocessors=blocks)
    assert_parity(step_of(gpu, weights), weights, *call)
    assert gpu.launches[0].grid == (blocks, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["token", "position"])
def test_an_index_outside_gives_nan_for_its_row_alone(compiled, what):
    weights, tokens, positions, cache = decoding("plain", torch.bfloat16, (3, 70), **SIZES)
    call = {"token": tokens, "position": positions}
    call[what][1] = 2**40
    got = step_of(Gpu(compiled), weights)(weights, tokens, positions, cache)
    assert got[1].isnan().all() and got[0].isfinite().all()

"""The step that a CUDA graph captures, called on a CPU: the same tokens, nothing read back."""

import pytest
import torch

from elmkernels import OpenELM, OpenELMConfig, accelerate
from elmkernels.acceleration.decode_modes import GRAPH, ONE_LAUNCH
from elmkernels.bench.baselines.torch_baseline import TorchBaseline, TorchBaselineRunner
from elmkernels.bench.runners import Task
from elmkernels.generation.cuda_graph import Window, bucket_of, step, width_of
from elmkernels.generation.gpu_decoder import Decoder
from elmkernels.generation.sampling import Sampler, Sampling
from elmkernels.generation.step import greedy
from elmkernels.gpu_check.model_units import agreement
from elmkernels.gpu_check.models import TINY
from elmkernels.gpu_check.runners import DecoderRunner, room_for
from elmkernels.openelm import KVCache
from elmkernels.surgery import twin

CONFIG = OpenELMConfig.from_name("OpenELM-270M", **TINY)
LENGTH, STEPS = 250, 12  # across the border of the first bucket


@pytest.fixture(scope="module")
def model() -> OpenELM:
    return OpenELM.from_config(CONFIG, seed=3).eval()


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(CONFIG.vocab_size, (2, LENGTH), generator=generator)


@pytest.fixture(scope="module")
def expected(model, prompts) -> torch.Tensor:
    return greedy(model, prompts, STEPS)


def accelerated(model: OpenELM, backend: str | None) -> OpenELM:
    """A accelerated twin; "eager" is the model itself, "sdpa" has torch's attention."""
    if backend == "eager":
        return model
    copy = twin(model)
    accelerate(copy)
    for layer in copy.layers:
        layer.attn.attention_backend = backend
    return copy


def decoded(model, prompts, steps=STEPS, spoil=False):
    """Tokens of the prompts' first pass and of steps by the graph's body, called."""
    cache = KVCache(CONFIG, len(prompts), 400)
    decoder = Decoder(model, cache, GRAPH, captured=False)
    with torch.inference_mode():
        logits = model(prompts, cache=cache, logits_to_keep=1)[:, -1]
    if spoil:
        for buffer in (*cache.k, *cache.v):
            buffer[:, prompts.shape[1] :] = 100.0  # an earlier run's: finite, and wrong
    sampler = Sampler(Sampling(), [[]] * len(prompts), CONFIG.vocab_size, cache.device, steps)
    decoder.begin(logits, sampler, steps)
    return decoder.rest()


@pytest.mark.parametrize("backend", ["eager", None, "sdpa", "reference"])
def test_the_same_tokens_as_without_fixed_shapes(model, prompts, expected, backend):
    assert torch.equal(decoded(accelerated(model, backend), prompts), expected)


@pytest.mark.parametrize("backend", ["sdpa", None])
def test_what_lies_beyond_the_tokens_is_not_seen(model, prompts, expected, backend):
    assert torch.equal(decoded(accelerated(model, backend), prompts, spoil=True), expected)


@torch.inference_mode()
@pytest.mark.parametrize("backend", ["eager", None, "sdpa"])
def test_a_padded_prompt_of_rows_of_their_own_lengths(model, prompts, backend):
    model = accelerated(model, backend)
    cache = KVCache(CONFIG, 2, 300)
    window = Window(cache, 256, torch.tensor([0, 0]))
    counts = torch.tensor([7, 16])
    step(model, prompts[:, :16], window, counts)
    window.lengths.copy_(counts)
    more = torch.tensor([3, 1])
    got = step(model, prompts[:, 16:20], window, more)
    for row, (first, second) in enumerate(zip(counts, more, strict=True)):
        ids = torch.cat((prompts[row, :first], prompts[row, 16 : 16 + second]))
        torch.testing.assert_close(got[row], model(ids[None])[0, -1], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("n", [1, 5])
def test_a_step_asks_the_host_for_nothing(model, n):
    """In one graph of torch.compile: a value that Python had to know would break it."""
    torch.compiler.reset()
    window = Window(KVCache(CONFIG, 2, 300), 256, torch.tensor([5, 9]))
    tokens, counts = torch.arange(2 * n).view(2, n), torch.tensor([n, 1])
    whole = torch.compile(lambda t: step(model, t, window, counts), fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(tokens), step(model, tokens, window, counts))


@pytest.mark.parametrize(
    ("length", "room", "bucket"),
    [(1, 4096, 256), (256, 4096, 256), (257, 4096, 512), (600, 4096, 1024), (257, 300, 300)],
)
def test_buckets(length, room, bucket):
    assert bucket_of(length, room) == bucket


def test_widths():
    assert [width_of(n) for n in (1, 16, 17, 128, 129)] == [16, 16, 32, 128, None]


@pytest.mark.parametrize("options", [None, {"backend": "eager"}], ids=["eager", "compiled"])
def test_the_torch_baseline_decodes_the_same_tokens(model, prompts, expected, options):
    task = Task("decode", prompts, STEPS - 1)
    torch.compiler.reset()
    run = TorchBaselineRunner(model, options).run(task)
    for _ in range(2):  # a second call starts after the prompt again
        assert agreement(expected.tolist(), run()) == STEPS
    prompt = TorchBaselineRunner(model, options).run(Task("prefill", prompts, 0))
    assert prompt() == expected[:, :1].tolist()


@pytest.mark.parametrize("way", [GRAPH, ONE_LAUNCH])
def test_the_runner_starts_over(model, prompts, expected, way):
    runner = DecoderRunner("", accelerated(model, None), way, captured=False)
    run = runner.run(Task("", prompts, STEPS - 1))
    assert run() == run() == expected.tolist()


def test_a_static_cache_is_a_multiple_of_what_masks_are_aligned_to(model):
    ids = torch.zeros(1, 100, dtype=torch.int64)
    assert room_for(Task("", ids, 4), model) == 128
    assert room_for(Task("", ids, 28), model) == 256
    assert room_for(Task("", ids, 412), model) == CONFIG.rope_max_length


def test_the_fair_rival_refuses_other_shapes():
    config = OpenELMConfig.from_name("OpenELM-270M", **TINY | {"normalize_qk_projections": False})
    with pytest.raises(ValueError, match="must have QK norms"):
        TorchBaseline(OpenELM.from_config(config), 1, 8)


def test_agreement_counts_from_the_start():
    assert agreement([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 0, 6]]) == 1

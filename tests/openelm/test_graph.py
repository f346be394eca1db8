"""The step that a CUDA graph captures, called on a CPU: the same tokens, nothing read back."""

import pytest
import torch

from elmkernels import OpenELM, OpenELMConfig, accelerate
from elmkernels.openelm import graph
from elmkernels.openelm.fair import FairOpenELM
from elmkernels.openelm.generate import greedy
from elmkernels.openelm.gpu_models import TINY, agreement
from elmkernels.openelm.gpu_runners import FairRunner, GraphRunner, room_for
from elmkernels.openelm.graph import GraphDecoder, Window, bucket_of, step
from elmkernels.openelm.proof import twin
from elmkernels.openelm.runners import Task

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


def swapped(model: OpenELM, backend: str | None) -> OpenELM:
    """A swapped twin; "eager" is the model itself, "sdpa" has torch's attention."""
    if backend == "eager":
        return model
    copy = twin(model)
    accelerate(copy)
    for layer in copy.layers:
        layer.attn.attention_backend = backend
    return copy


@pytest.mark.parametrize("backend", ["eager", None, "sdpa", "reference"])
def test_the_same_tokens_as_without_fixed_shapes(model, prompts, expected, backend):
    decoder = GraphDecoder(swapped(model, backend), 2, 400, captured=False)
    first = decoder.prompt(prompts)
    got = torch.cat((first[:, None], decoder.decode(STEPS - 1)), dim=1)
    assert torch.equal(got, expected)
    assert decoder.cache.length == LENGTH + STEPS - 1
    assert decoder.lengths.tolist() == [decoder.cache.length] * 2
    decoder.rewind(LENGTH + 2, expected[:, 2])
    assert torch.equal(decoder.decode(4), expected[:, 3:7])


def test_one_capture_for_each_bucket_leaves_no_trace(model, prompts, expected, monkeypatch):
    """All but the capture itself: warm-ups are undone, and a bucket's replay is kept."""
    made = []

    def pretended(body, restore, device):
        made.append(device)
        for _ in range(graph.WARM_UPS):
            body()
            restore()
        return body

    monkeypatch.setattr(graph, "capture", pretended)
    decoder = GraphDecoder(swapped(model, None), 2, 400, captured=False)
    decoder.captured = True
    for _ in range(2):
        first = decoder.prompt(prompts)
        got = torch.cat((first[:, None], decoder.decode(STEPS - 1)), dim=1)
        assert torch.equal(got, expected)
    assert decoder.captures == [256, 400] and len(made) == 2


def test_what_lies_beyond_the_tokens_is_not_seen(model, prompts, expected):
    decoder = GraphDecoder(swapped(model, "sdpa"), 2, 400, captured=False)
    first = decoder.prompt(prompts)
    for buffer in (*decoder.cache.k, *decoder.cache.v):
        buffer[:, LENGTH:] = 100.0  # an earlier run's: finite, and wrong
    got = torch.cat((first[:, None], decoder.decode(STEPS - 1)), dim=1)
    assert torch.equal(got, expected)


@torch.inference_mode()
def test_a_step_asks_the_host_for_nothing(model):
    """In one graph of torch.compile: a value that Python had to know would break it."""
    decoder = GraphDecoder(model, 2, 300, captured=False)
    window = Window(decoder.cache, 256, torch.tensor([5, 9]))
    tokens = torch.tensor([3, 4])
    whole = torch.compile(lambda t: step(model, t, window), fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(tokens), step(model, tokens, window))


def test_a_cpu_captures_nothing_and_a_full_cache_is_an_error(model):
    with pytest.raises(RuntimeError, match="needs a CUDA device, the model is on cpu"):
        GraphDecoder(model, 1, 16)
    decoder = GraphDecoder(model, 1, 16, captured=False)
    decoder.prompt(torch.ones(1, 12, dtype=torch.int64))
    with pytest.raises(ValueError, match="holds 16 tokens"):
        decoder.decode(5)
    assert decoder.captures == []


@pytest.mark.parametrize(
    ("length", "bucket"), [(0, 256), (255, 256), (256, 512), (299, 300), (600, 300)]
)
def test_buckets(length, bucket):
    assert bucket_of(length, 300 if bucket == 300 else 4096) == bucket


@pytest.mark.parametrize("options", [None, {"backend": "eager"}], ids=["eager", "compiled"])
def test_the_fair_rival_decodes_the_same_tokens(model, prompts, expected, options):
    task = Task("decode", prompts, STEPS - 1)
    torch.compiler.reset()
    run = FairRunner(model, options).run(task)
    for _ in range(2):  # a second call starts after the prompt again
        assert agreement(expected.tolist(), run()) == STEPS
    prompt = FairRunner(model, options).run(Task("prefill", prompts, 0))
    assert prompt() == expected[:, :1].tolist()


def test_the_runner_of_the_graph_starts_over(model, prompts, expected):
    run = GraphRunner(swapped(model, None), captured=False).run(Task("", prompts, STEPS - 1))
    assert run() == run() == expected.tolist()


def test_a_static_cache_is_a_multiple_of_what_masks_are_aligned_to(model):
    ids = torch.zeros(1, 100, dtype=torch.int64)
    assert room_for(Task("", ids, 4), model) == 128
    assert room_for(Task("", ids, 28), model) == 256
    assert room_for(Task("", ids, 412), model) == CONFIG.rope_max_length


def test_the_fair_rival_refuses_other_shapes():
    config = OpenELMConfig.from_name("OpenELM-270M", **TINY | {"normalize_qk_projections": False})
    with pytest.raises(ValueError, match="must have QK norms"):
        FairOpenELM(OpenELM.from_config(config), 1, 8)


def test_agreement_counts_from_the_start():
    assert agreement([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 0, 6]]) == 1

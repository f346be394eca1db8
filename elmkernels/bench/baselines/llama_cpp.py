"""llama.cpp as a baseline: the same weights in a GGUF file, stepped through its C functions, in a
process of its own (`Session`; see `apart`).

`llama_cpp.Llama` copies logits and keeps a sampler for every token. Here a step is two C calls,
llama_decode and llama_get_logits_ith, and an argmax over the logits where they lie:
`Context.inside` counts the seconds in llama_decode, so that what Python adds can be told.
"""

import ctypes
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...openelm.config import OpenELMConfig
from ..roofline import peak

UBATCH = 512  # tokens of a prompt that go through its layers at once: its own default
TRIAL_STEPS = 16  # to choose the attention by
FLASH = {"flash attention": "ENABLED", "no flash attention": "DISABLED"}
_keep: list[Any] = []  # C calls it for every line of log: it must outlive all of them


def missing() -> str | None:
    """Why llama.cpp can't take part here, or None."""
    for name, package in (("llama_cpp", "llama-cpp-python"), ("gguf", "gguf")):
        if importlib.util.find_spec(name) is None:  # not imported: it could end this process
            return f"{name} is not installed: pip install {package}"
    return None


class Model:
    """A GGUF file, mapped. Raises RuntimeError if llama.cpp can't load it.

    extra_buffers: whether weights may be laid out for what a processor has beyond vectors, such as
    tile instructions.
    """

    def __init__(self, path: Path, config: OpenELMConfig, extra_buffers: bool = True) -> None:
        import llama_cpp

        if not _keep:
            _keep.append(llama_cpp.llama_log_callback(lambda level, text, data: None))
            llama_cpp.llama_log_set(_keep[0], ctypes.c_void_p(0))
            llama_cpp.llama_backend_init()
        self.api, self.config = llama_cpp, config
        # The matrices and norms; of what describes them there is little in a file without words.
        self.weight_bytes = path.stat().st_size
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        if not extra_buffers:
            if not hasattr(options, "use_extra_bufts"):
                raise RuntimeError("this llama.cpp can't leave its extra buffers out")
            options.use_extra_bufts = False
        self.handle = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.handle:
            raise RuntimeError(f"llama.cpp can't load {path.name}")

    @property
    def version(self) -> str:
        return f"llama-cpp-python {self.api.__version__}"

    def close(self) -> None:
        if self.handle:
            self.api.llama_model_free(self.handle)
            self.handle = None


class Context:
    """A cache for `sequences` of up to `length` tokens, all as long as each other, and the threads
    that torch uses. cache_token_bytes: keys and values of a token, which it keeps as halves.
    """

    def __init__(self, model: Model, length: int, sequences: int, flash: str) -> None:
        api, self.model = model.api, model
        self.api, self.sequences, self.length = api, sequences, 0
        options = api.llama_context_default_params()
        # Each sequence gets its share, in multiples of 256.
        options.n_ctx = sequences * -(-length // 256) * 256
        options.n_seq_max = sequences
        options.n_batch = options.n_ubatch = UBATCH
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.flash_attn_type = getattr(api, f"LLAMA_FLASH_ATTN_TYPE_{FLASH[flash]}")
        self.handle = api.llama_init_from_model(model.handle, options)
        if not self.handle:
            raise RuntimeError(f"llama.cpp can't start with {flash}")
        self.memory = api.llama_get_memory(self.handle)
        self.batch = api.llama_batch_init(max(UBATCH, sequences), 0, 1)
        self.inside = 0.0
        config = model.config
        self.cache_token_bytes = 2 * 2 * config.head_dim * sum(config.num_kv_heads)
        self._row = ctypes.c_float * config.vocab_size
        self._rows: dict[int, np.ndarray] = {}

    def close(self) -> None:
        if self.handle:
            self.api.llama_batch_free(self.batch)
            self.api.llama_free(self.handle)
            self.handle = None

    def truncate(self, length: int) -> None:
        """Forget every token from index `length` on."""
        for sequence in range(self.sequences):
            self.api.llama_memory_seq_rm(self.memory, sequence, length, -1)
        self.length = length

    def prompt(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """A prompt for each sequence, of one length -> the likeliest token after each."""
        chosen = []
        for sequence, row in enumerate(rows):
            for start in range(0, len(row), UBATCH):
                part = row[start : start + UBATCH]
                for i, token in enumerate(part):
                    self._put(i, token, self.length + start + i, sequence, i == len(part) - 1)
                self._decode(len(part))
            chosen.append(self._likeliest(-1))
        self.length += len(rows[0])
        return chosen

    def step(self, tokens: Sequence[int]) -> list[int]:
        """One token for each sequence -> the likeliest after it."""
        for i, token in enumerate(tokens):
            self._put(i, token, self.length, i, True)
        self._decode(len(tokens))
        self.length += 1
        return [self._likeliest(i) for i in range(len(tokens))]

    def _put(self, i: int, token: int, position: int, sequence: int, wanted: bool) -> None:
        batch = self.batch
        batch.token[i], batch.pos[i] = token, position
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        batch.logits[i] = wanted

    def _decode(self, count: int) -> None:
        self.batch.n_tokens = count
        start = time.perf_counter()
        code = self.api.llama_decode(self.handle, self.batch)
        self.inside += time.perf_counter() - start
        if code:
            raise RuntimeError(f"llama_decode failed with {code}")

    def _likeliest(self, i: int) -> int:
        pointer = self.api.llama_get_logits_ith(self.handle, i)
        address = ctypes.addressof(pointer.contents)
        row = self._rows.get(address)
        if row is None:
            row = np.frombuffer(self._row.from_address(address), np.float32)
            self._rows[address] = row
        return int(row.argmax())


class Session:
    """A file of one type, and the work of one task at a time: what runs in the other process."""

    def __init__(
        self, path: Path, config: OpenELMConfig, threads: int, extra_buffers: bool
    ) -> None:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        self.model = Model(path, config, extra_buffers)
        self.load_seconds = time.perf_counter() - start
        self.context: Context | None = None
        self._run: Callable[[], list[list[int]]] | None = None

    def about(self) -> dict[str, Any]:
        return {
            "load_seconds": self.load_seconds,
            "version": self.model.version,
            "weight_bytes": self.model.weight_bytes,
        }

    def prepare(self, rows: list[list[int]], steps: int) -> tuple[str, float]:
        """The work of a task, with the faster of the two attentions: which that is, and what share
        of a trial was spent outside of llama_decode.
        """
        taken, outside = {}, {}
        for flash in FLASH:
            run = self._work(self._start(rows, steps, flash), rows, min(steps, TRIAL_STEPS))
            run()
            self.context.inside = 0.0
            start = time.perf_counter()
            run()
            taken[flash] = time.perf_counter() - start
            outside[flash] = 1 - self.context.inside / taken[flash]
        best = min(taken, key=lambda flash: taken[flash])
        self._run = self._work(self._start(rows, steps, best), rows, steps)
        return best, outside[best]

    def run(self) -> list[list[int]]:
        """The work that was prepared: the tokens of each row."""
        return self._run()

    def peak(self) -> int | None:
        """Bytes that the work needs at its highest."""
        return peak(self._run, torch.device("cpu"))

    def end(self) -> None:
        self._run = None
        if self.context is not None:
            self.context.close()
            self.context = None

    def _start(self, rows: list[list[int]], steps: int, flash: str) -> Context:
        self.end()
        self.context = Context(self.model, len(rows[0]) + steps, len(rows), flash)
        return self.context

    @staticmethod
    def _work(context: Context, rows: list[list[int]], steps: int) -> Callable:
        length = len(rows[0])

        def prefill() -> list[list[int]]:
            context.truncate(0)
            return [[token] for token in context.prompt(rows)]

        if not steps:
            return prefill
        first = [row[0] for row in prefill()]

        def decode() -> list[list[int]]:
            context.truncate(length)
            chosen = [first]
            for _ in range(steps):
                chosen.append(context.step(chosen[-1]))
            return [list(row) for row in zip(*chosen, strict=True)]

        return decode

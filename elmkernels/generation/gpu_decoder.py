"""GPU decoding without host synchronization: tokens are sampled on the device and read back a few
steps late.

A step is one launch for the host, in one of two modes:

    one-launch   `ops.decode_step`: the whole decoder is one kernel, whatever the rows hold
    graph        the model's own layers, captured for every bucket of the cache (see `cuda_graph`)

both followed by the choice of the tokens, in one CUDA graph. If both are possible they are timed on
the session's own state and the faster one is taken, for each bucket. What neither can do is done by
calls, with the same numbers on the device.

Everything that changes from step to step lies at fixed addresses: tokens, lengths, the numbers that
are drawn from, and the tokens chosen so far, which a second stream copies to the host.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import ops
from ..acceleration.decode_modes import CALLS, DECODE_MODES, GRAPH, ONE_LAUNCH, missing
from ..acceleration.decoder_weights import snapshot_of
from ..backends import Reason
from ..checks import one_line
from ..openelm.cache import KVCache
from ..openelm.model import OpenELM
from ..surgery import given_backend
from ..weights.formats import DecoderWeights
from . import cuda_graph
from .cuda_graph import Window, bucket_of, step, width_of
from .readback import Reader
from .sampling import Sampler, Sampling, unless_nan

AHEAD = 8  # steps that are launched before a token is waited for
ROUNDS = 7  # of each mode, when they are timed

# The faster mode for a batch and a bucket, of models that were timed in this process.
_MEASURED: WeakKeyDictionary[DecoderWeights, dict[tuple[int, int], str]] = WeakKeyDictionary()


class Decoder:
    """The steps of one cache. mode: one of DECODE_MODES, None for the fastest; captured: False
    runs the same steps call by call, on any device.

    Raises RuntimeError for a named mode that this model, batch or device can't be decoded in, or
    whose capture fails; ValueError for a name that is no mode.
    """

    def __init__(
        self, model: OpenELM, cache: KVCache, mode: str | None = None, *, captured: bool = True
    ) -> None:
        if mode is not None and mode not in DECODE_MODES:
            raise ValueError(f"decode_mode must be one of {', '.join(DECODE_MODES)}, got {mode!r}")
        device = cache.device
        if captured and mode != CALLS and device.type != "cuda":
            raise RuntimeError(
                f"decoding by {mode or 'graph'!r} needs a CUDA device, the model is on {device}: "
                f"{CALLS!r} works there"
            )
        self.model, self.cache, self.mode, self.captured = model, cache, mode, captured
        self._known: Any = None
        self.refused: dict[str, Reason] = {}
        self._examine()
        batch, room = cache.batch, cache.max_length + 1
        integers = {"dtype": torch.int64, "device": device}
        self.tokens = torch.zeros(batch, **integers)
        self.lengths = torch.zeros(batch, **integers)
        self.index = torch.zeros(1, **integers)  # of the next choice
        self.chosen = torch.zeros(room, batch, **integers)
        self.sampler = self._sampler(Sampling())
        self.graph_bytes = 0
        self._pool = None
        self._reader = Reader(self.chosen)
        self._steps = self._launched = self._read = self._longest = 0

    def _examine(self) -> None:
        """What is possible for the model as it is now; what was captured before it changed goes."""
        reasons = {mode: missing(mode, self.model, self.cache) for mode in DECODE_MODES}
        known = None if reasons[GRAPH] else snapshot_of(self.model)
        if known is self._known and (known or self.refused):
            return
        self._known = known
        self._replays: dict[tuple, Callable[[], None]] = {}
        self._prompts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._begun: set[tuple] = set()  # prompts of these keys were run before
        self.taken: dict[int, str] = {}  # the mode of each bucket
        self.refused = {mode: reason for mode, reason in reasons.items() if reason}
        if self.mode in self.refused:
            raise RuntimeError(self._cannot(self.mode))
        if isinstance(self.model, OpenELM):
            self.model._place_rope_table(self.cache.device, self.cache.max_length)

    def _cannot(self, mode: str) -> str:
        others = [other for other in DECODE_MODES if other not in self.refused]
        works = " and ".join(repr(other) for other in others)
        return f"decoding by {mode!r} is not possible: {self.refused[mode]}; {works} is"

    def _sampler(self, sampling: Sampling) -> Sampler:
        """One with room for as many choices as the cache has tokens."""
        held = [[]] * self.cache.batch
        room = (self.model.config.vocab_size, self.cache.device, self.cache.max_length + 1)
        return Sampler(sampling, held, *room)

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory that the captures have reserved, about."""
        return self.graph_bytes

    @property
    def captures(self) -> list[tuple]:
        """What was captured: (mode, bucket), and (a prompt's width, bucket)."""
        return list(self._replays)

    @torch.inference_mode()
    def begin(self, logits: Tensor, sampler: Sampler, steps: int) -> None:
        """Choose the first of `steps` tokens a row from logits [batch, vocab_size], after what the
        cache holds; `next_tokens` gives them.
        """
        self._examine()
        if sampler.form != self.sampler.form:
            self.sampler = self._sampler(sampler.sampling)
            self._replays = {
                key: r for key, r in self._replays.items() if key[0] not in DECODE_MODES
            }
        self.sampler.take(sampler)
        self.index.zero_()
        self._place()
        self._choose(logits)
        self._steps, self._launched, self._read = steps, 1, 0
        self._reader.send(0)

    @torch.inference_mode()
    def next_tokens(self) -> list[int]:
        """The next token of each row, -1 if its logits were NaN; the cache then holds the ones
        before it.
        """
        while self._launched < min(self._steps, self._read + AHEAD):
            self._launch()
        tokens = self._reader.read(self._read)
        if self._read:
            self.cache.advance(1)
        self._read += 1
        return tokens

    @torch.inference_mode()
    def rest(self) -> Tensor:
        """Every step that is left, launched at once -> the tokens since `begin`, int64 [batch,
        steps] on the device, -1 if logits were NaN. The cache then holds all but the last.
        """
        while self._launched < self._steps:
            self._launch(send=False)
        self.cache.advance(self._steps - max(self._read, 1))
        self._read = self._steps
        return self.chosen[: self._steps].t().clone()

    def width_for(self, length: int) -> int | None:
        """The width to which a prompt of `length` more tokens a row is padded for `prefill`, or
        None: it is long, there is no room for the padding, or nothing can be captured.
        """
        width = width_of(length)
        if width is None or max(self.cache.rows) + width > self.cache.max_length:
            return None
        return None if GRAPH in self.refused or self.mode == CALLS else width

    @torch.inference_mode()
    def prefill(self, ids: Tensor, counts: list[int]) -> Tensor:
        """ids int64 [batch, one of WIDTHS] of which row b's first counts[b] are real -> the logits
        after them, [batch, vocab_size] (of no meaning where counts[b] is 0). The caller counts.
        """
        self._examine()
        width, device = ids.shape[1], self.cache.device
        if width not in self._prompts:
            logits = torch.empty(
                ids.shape[0], self.model.config.vocab_size, dtype=self.cache.dtype, device=device
            )
            self._prompts[width] = torch.zeros_like(ids), torch.ones_like(self.lengths), logits
        static, static_counts, logits = self._prompts[width]
        static.copy_(ids)
        static_counts.copy_(torch.tensor(counts).clamp(min=1))
        self._place()
        bucket = bucket_of(self._longest + width, self.cache.max_length)

        def body() -> None:
            window = Window(self.cache, bucket, self.lengths)
            logits.copy_(step(self.model, static, window, static_counts))

        # The first prompt of a width is run as it is: a capture costs as much as a few of them.
        key = width, bucket
        replay = self._kept(key, GRAPH, lambda: body) if key in self._begun else None
        self._begun.add(key)
        (replay or body)()
        return logits.clone()

    def _place(self) -> None:
        """Bring the lengths of the rows to the device."""
        rows = self.cache.rows
        self._longest = max(rows)
        self.lengths.copy_(torch.tensor(rows))

    def _choose(self, logits: Tensor) -> None:
        chosen = self.sampler(logits)
        # A choice that failed is known to the host later; until then any token does.
        self.tokens.copy_(chosen.clamp(min=0))
        self._record(chosen)

    def _record(self, chosen: Tensor) -> None:
        self.chosen.index_copy_(0, self.index, chosen[None])
        self.index.add_(1)

    def _launch(self, send: bool = True) -> None:
        self._longest += 1
        self._replay_of(bucket_of(self._longest, self.cache.max_length))()
        if send:
            self._reader.send(self._launched)
        self._launched += 1

    def _body(self, mode: str, bucket: int) -> Callable[[], None]:
        """A step: what is captured."""
        if mode != ONE_LAUNCH:
            window = Window(self.cache, bucket, self.lengths)

            def body() -> None:
                logits = step(self.model, self.tokens[:, None], window)
                self.lengths.add_(1)
                self._choose(logits)

            return body

        place = self._known.weights, self.tokens, self.lengths, self.cache.arena
        backend, greedy = given_backend(self.model, "decode_step"), self.sampler.greedy

        def one_launch() -> None:
            # The kernel itself chooses the largest, and puts it there for the next step.
            chosen = self.tokens if greedy else None
            logits = ops.decode_step(*place, chosen=chosen, backend=backend)
            self.lengths.add_(1)
            if greedy:
                self._record(unless_nan(self.tokens, logits))
            else:
                self._choose(logits)

        return one_launch

    def _replay_of(self, bucket: int) -> Callable[[], None]:
        """What runs a step of a bucket, by the mode that is named or fastest."""
        if bucket not in self.taken:
            ready = {mode: self._made(mode, bucket) for mode in self._candidates(bucket)}
            ready = {mode: replay for mode, replay in ready.items() if replay is not None}
            self.taken[bucket] = self._fastest(ready, bucket) if ready else CALLS
        replay = self._made(self.taken[bucket], bucket)
        if replay is None:  # it was captured before, for another sampling, and can't be any more
            del self.taken[bucket]
            return self._replay_of(bucket)
        return replay

    def _candidates(self, bucket: int) -> list[str]:
        """The modes to try: the one that is named, or was faster before, or all that are left."""
        if self.mode is not None:
            return [self.mode]
        left = [mode for mode in (ONE_LAUNCH, GRAPH) if mode not in self.refused]
        known = self._measured.get((self.cache.batch, bucket)) if left else None
        return [known] if known in left else left

    def _made(self, mode: str, bucket: int) -> Callable[[], None] | None:
        """The replay of a step, captured if it isn't yet; None if that fails."""
        key = mode, None if mode == ONE_LAUNCH else bucket
        return self._kept(key, mode, lambda: self._body(mode, bucket))

    def _kept(
        self, key: tuple, mode: str, make: Callable[[], Callable[[], None]]
    ) -> Callable[[], None] | None:
        if key not in self._replays:
            try:
                body = make()
                self._replays[key] = body if mode == CALLS else self._captured(body)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                self.refused[mode] = _failure(error)
                if mode == self.mode:
                    raise RuntimeError(self._cannot(mode)) from error
                return None
        return self._replays[key]

    @property
    def _measured(self) -> dict[tuple[int, int], str]:
        return _MEASURED.setdefault(self._known.weights, {})

    def _captured(self, body: Callable[[], None]) -> Callable[[], None]:
        if not self.captured:
            return body
        device = self.cache.device
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        before = torch.cuda.memory_reserved(device)
        replay = cuda_graph.capture(body, self._restorer(), device, self._pool)
        self.graph_bytes += max(0, torch.cuda.memory_reserved(device) - before)
        return replay

    def _restorer(self) -> Callable[[], None]:
        """What undoes steps: of the cache the next step writes the same again."""
        held = (self.tokens, self.lengths, self.index, self.sampler.count, self.sampler.seen)
        state = [(t, t.clone()) for t in held if t is not None]

        def restore() -> None:
            for tensor, value in state:
                tensor.copy_(value)

        return restore

    def _fastest(self, replays: dict[str, Callable[[], None]], bucket: int) -> str:
        """The mode that takes least time here, by timing them in turns."""
        if len(replays) == 1:
            return next(iter(replays))
        restore = self._restorer()
        seconds: dict[str, list[float]] = {mode: [] for mode in replays}
        for _ in range(ROUNDS):
            for mode, replay in replays.items():
                seconds[mode].append(_timed(replay, self.cache.device))
                restore()
        best = min(seconds, key=lambda mode: median(seconds[mode]))
        self._measured[self.cache.batch, bucket] = best
        return best


def _failure(error: RuntimeError) -> str:
    return f"its capture failed: {one_line(error)}"


def _timed(replay: Callable[[], None], device: torch.device) -> float:
    """Seconds on the device."""
    if device.type != "cuda":
        start = time.perf_counter()
        replay()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        replay()
        events[1].record()
        events[1].synchronize()
    return events[0].elapsed_time(events[1]) / 1000

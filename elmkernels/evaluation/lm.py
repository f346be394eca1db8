"""This package's model as lm-eval calls one: `lm_eval.simple_evaluate(model="elmkernels", ...)`.

Importing it registers the name with lm-eval. It is no HFLM: log-likelihoods are `likelihood`'s, and
what is generated comes from `generate`.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..acceleration.swap import accelerate
from ..checks import fail, integer
from ..generation.session import generate
from ..openelm.model import OpenELM
from ..openelm.tokenizer import Tokenizer
from ..ops.decode_step import MAX_BATCH
from .likelihood import Scorer, budget_of
from .sharing import Request, plan
from .store import Kept, Store

# Told how many units there are, gives what is told the task of each before it is computed.
Progress = Callable[[int], Callable[[str], None]]
_NEW_TOKENS = 256  # of a task that doesn't say


@register_model("elmkernels")
class OpenELMLM(TemplateLM):
    """An OpenELM for lm-eval.

    Texts begin with <s>, as OpenELM was trained and as Apple evaluated it (add_bos_token=True).

    Args:
        pretrained: the model, or the path of its checkpoint, which is then accelerated.
        tokenizer: of its texts; None for the checkpoint's own. A path finds one.
        dtype: of weights that are loaded; None as they are stored.
        device: where they are; None for torch's default.
        backend: of the kernels; None for the best.
        max_length: tokens of a context; None for those that the model was trained with.
        budget: tokens that are computed together; None for what suits the device.
        store: keeps results; None for none.
        progress: is told how far it is; None for nobody.
        options: that lm-eval gives every model, as batch_size; none means anything here.

    Raises:
        FileNotFoundError: there is no checkpoint, or no tokenizer.
        TypeError, ValueError: an argument has a wrong type or value.

    Example:
        >>> lm = OpenELMLM("OpenELM-270M", dtype="bfloat16")
        >>> results = lm_eval.simple_evaluate(lm, tasks=["arc_easy"])
    """

    def __init__(
        self,
        pretrained: OpenELM | str | Path,
        tokenizer: Tokenizer | str | Path | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        backend: str | None = None,
        max_length: int | None = None,
        budget: int | None = None,
        store: Store | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        del options
        if tokenizer is None:
            if isinstance(pretrained, OpenELM):
                fail("tokenizer", "given with a model that is loaded already", None)
            tokenizer = pretrained
        if not isinstance(tokenizer, Tokenizer):
            tokenizer = Tokenizer.from_pretrained(tokenizer)
        if isinstance(pretrained, OpenELM):
            self.openelm = pretrained
        else:
            dtype = None if dtype == "auto" else dtype
            self.openelm = OpenELM.from_pretrained(pretrained, dtype=dtype, device=device).eval()
            accelerate(self.openelm, backend=backend)
        config = self.openelm.config
        most = config.max_context_length if max_length is None else max_length
        self.max_length = integer("max_length", most, 1)
        if self.max_length > config.rope_max_length:
            fail("max_length", f"at most rope_max_length {config.rope_max_length}", most)
        self._device = self.openelm.norm.weight.device
        self.budget = budget_of(self._device) if budget is None else integer("budget", budget, 1)
        self.text, self._bare = tokenizer, Tokenizer(tokenizer.path, None)
        self.store = Store(None) if store is None else store
        self.report = progress

    @property
    def eot_token_id(self) -> int:
        """The first id that ends a text."""
        return next(iter(self.openelm.config.eos_token_ids), 2)

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context follows."""
        return self.eot_token_id if self.text.bos is None else self.text.bos

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval tells caches of tokenizers apart by."""
        return str(self.text.path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text, after <s> unless add_special_tokens is False."""
        return (self._bare if add_special_tokens is False else self.text).encode(string)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """How likely each continuation is after its context, and whether it is the likeliest."""
        pairs = self._pairs([request.args for request in requests])
        return self._scores("loglikelihood", requests, [[pair] for pair in pairs], _one)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = [self._request(context, continuation) for _, context, continuation in requests]
        scorer, found = Scorer(self.openelm, asked), {}
        for unit in plan(asked, self.budget):
            found |= zip(unit.requests, map(tuple, scorer(unit)), strict=True)
        return [found[i] for i in range(len(asked))]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """How likely each text is: in windows of max_length, each token predicted once."""
        texts = self.text.encode_batch([request.args[0] for request in requests])
        windows = [
            [
                self._request(*make_disjoint_window(pair))
                for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            ]
            for ids in texts
        ]
        return self._scores("loglikelihood_rolling", requests, windows, _sum)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What is written after each context, up to one of its `until`."""
        found = [""] * len(requests)
        work = []
        for task, indices in _by_task(requests):
            units = self._generations(requests, indices)
            asked = [[requests[i].args[0], _plain(requests[i].args[1])] for i in indices]
            work.append((task, units, self.store.open(f"{task}-generate_until", asked, len(units))))
        step = self._begin([(len(units), kept) for _, units, kept in work])
        for task, units, kept in work:
            for u, unit in enumerate(units):
                if u not in kept.done:
                    step(task)
                    kept.add(u, self._generate([requests[i].args for i in unit]))
                for i, text in zip(unit, kept.done[u], strict=True):
                    found[i] = text
        return found

    def _begin(self, work: Iterable[tuple[int, Kept]]) -> Callable[[str], None]:
        left = sum(units - len(kept.done) for units, kept in work)
        return _nothing if self.report is None else self.report(left)

    def _scores(
        self,
        kind: str,
        instances: list[Instance],
        requests: list[list[Request]],
        of: Callable[[list[tuple[float, bool]]], Any],
    ) -> list[Any]:
        """The scores of each instance's requests, put together by `of`. Tasks are computed one
        after another, so that what is kept of one doesn't depend on the others.
        """
        work = []
        for task, indices in _by_task(instances):
            asked = [request for i in indices for request in requests[i]]
            units = plan(asked, self.budget)
            kept = self.store.open(f"{task}-{kind}", [self.budget, asked], len(units))
            work.append((task, indices, asked, units, kept))
        step = self._begin((len(units), kept) for *_, units, kept in work)
        found: list[Any] = [None] * len(instances)
        for task, indices, asked, units, kept in work:
            scorer, scores = Scorer(self.openelm, asked), {}
            for u, unit in enumerate(units):
                if u not in kept.done:
                    step(task)
                    kept.add(u, scorer(unit))
                scores |= zip(unit.requests, map(tuple, kept.done[u]), strict=True)
            position = 0
            for i in indices:
                end = position + len(requests[i])
                found[i] = of([scores[r] for r in range(position, end)])
                position = end
        return found

    def _request(self, context: Sequence[int], continuation: Sequence[int]) -> Request:
        """Tokens after others, of a long context its end alone."""
        ids = (*context, *continuation)[-(self.max_length + 1) :]
        return Request(ids, max(1, len(ids) - len(continuation)))

    def _pairs(self, pairs: list[tuple[str, str]]) -> list[Request]:
        """Contexts and continuations as ids, split where the context's own ids end: blanks at its
        end belong to what follows.
        """
        whole, contexts, places = [], [], {}
        for context, continuation in pairs:
            kept = context.rstrip()
            whole.append(context + continuation)
            places.setdefault(kept, len(places))
            contexts.append(places[kept])
        known = self.text.encode_batch(list(places))
        found = []
        empty = [i for i, (context, _) in enumerate(pairs) if not context]
        bare = dict(zip(empty, self._bare.encode_batch([pairs[i][1] for i in empty]), strict=True))
        for i, ids in enumerate(self.text.encode_batch(whole)):
            if i in bare:
                ids = bare[i]
                ids = ids if ids[:1] == [self.prefix_token_id] else [self.prefix_token_id, *ids]
                found.append(self._request(ids[:1], ids[1:]))
            else:
                length = len(known[contexts[i]])
                found.append(self._request(known[contexts[i]], ids[length:]))
        return found

    def _generations(self, requests: list[Instance], indices: list[int]) -> list[list[int]]:
        """Indices in batches of one set of arguments, the longest contexts first."""
        kinds: dict[str, list[int]] = {}
        for i in indices:
            kinds.setdefault(repr(sorted(requests[i].args[1].items())), []).append(i)
        batches = []
        for kind in kinds.values():
            kind.sort(key=lambda i: (-len(requests[i].args[0]), requests[i].args[0]))
            batches += [kind[i : i + MAX_BATCH] for i in range(0, len(kind), MAX_BATCH)]
        return batches

    def _generate(self, arguments: list[tuple[str, dict[str, Any]]]) -> list[str]:
        options = dict(normalize_gen_kwargs(arguments[0][1], _NEW_TOKENS))
        until, new = [u for u in options.pop("until") if u], options.pop("max_gen_toks")
        if not 0 < new < self.max_length:
            fail("max_gen_toks", f"from 1 to {self.max_length - 1}, less than a context", new)
        sampling = {
            name: options[name]
            for name in ("temperature", "top_k", "top_p", "repetition_penalty")
            if options.get(name) is not None
        }
        if not (options.get("do_sample") and options.get("temperature")):
            sampling = {k: v for k, v in sampling.items() if k == "repetition_penalty"}
        contexts = self.text.encode_batch([context for context, _ in arguments])
        rows = generate(
            self.openelm, [ids[-(self.max_length - new) :] for ids in contexts], new,
            stop_strings=until, tokenizer=self.text, seed=0, **sampling,
        )  # fmt: skip
        return [postprocess_generated_text(self.text.decode(r.tokens), until, None) for r in rows]


def _one(scores: list[tuple[float, bool]]) -> tuple[float, bool]:
    return scores[0]


def _sum(scores: list[tuple[float, bool]]) -> float:
    return sum(logprob for logprob, _ in scores)


def _nothing(task: str) -> None:
    pass


def _plain(options: dict[str, Any]) -> list[list[str]]:
    """Arguments of a generation, as JSON can hold any."""
    return sorted([str(name), repr(value)] for name, value in options.items())


def _by_task(requests: list[Instance]) -> list[tuple[str, list[int]]]:
    """Indices of requests by the name of their task, in the order in which the tasks come."""
    found: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
        found.setdefault(request.task_name or "task", []).append(i)
    return list(found.items())

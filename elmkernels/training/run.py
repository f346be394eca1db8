"""A whole run: from a recipe to OUT with its log, checkpoints, and the models at the end.

OUT/train.jsonl     the log (see `journal`)        OUT/data/      tokenized text
OUT/checkpoints/    to go on from (see `state`)    OUT/earlier-1/ what --fresh set aside
OUT/train.lock      while it runs (see `lock`)
OUT/final/          the model                      OUT/average/   the mean of the last checkpoints
"""

import signal
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .. import checks
from ..openelm.config import OpenELMConfig
from ..openelm.model import OpenELM
from ..openelm.tokenizer import FILES as TOKENIZER_FILES
from ..text.added import added_beside, added_tokens
from ..text.metadata import TOKENIZERS
from ..weights.storage import made_folder
from . import routines, state
from .data import prepare as data
from .data import tokenizers
from .data.sequences import Sequences
from .journal import FILE, Journal
from .lock import alone
from .loop import Trainer, check_kernels, check_share
from .parallel import World
from .recipe import Recipe, model_config, to_mapping

AUTO, RESUME, FRESH = "auto", "resume", "fresh"
_OURS = ("checkpoints", "final", "average", "tensorboard", FILE)


class Start(NamedTuple):
    """Where a run begins. how: AUTO goes on from OUT's newest checkpoint where there is one,
    RESUME must, FRESH begins anew and sets aside what an earlier run left. step: of the checkpoint
    to go on from instead of the newest.
    """

    how: str = AUTO
    step: int | None = None


def train(
    recipe: Recipe,
    out: str | Path,
    world: World,
    start: Start = Start(),  # noqa: B008  (a tuple)
    steps: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Train, evaluate, save; called by every process of the world. steps: stop when so many are
    done in all; the schedule stays the recipe's. say: gets lines for the user. cache: of tokenized
    text, instead of OUT/data.

    Gives a summary, whose `stopped` is the name of a signal that ended the run early, else None.
    Raises ValueError, TypeError, FileNotFoundError, ImportError or OSError for what can't be begun
    (another run in OUT among it), loop.Failed and journal.NotSaved for what ended it; `Reported` in
    the other processes.
    """
    out = Path(out)
    with ExitStack() as held:

        def begin() -> None:
            check_share(recipe, world)
            check_kernels(recipe, world)
            if out.exists() and not out.is_dir():
                checks.fail("out", "a folder", f"the file {out}")
            held.enter_context(made_folder(out))  # gone again if nothing comes of the run
            held.enter_context(alone(out))

        world.together(begin)
        return _train(recipe, out, world, start, steps, say, cache or out / "data")


def _train(
    recipe: Recipe,
    out: Path,
    world: World,
    start: Start,
    steps: int | None,
    say: Callable[[str], None],
    cache: Path,
) -> dict[str, Any]:
    config = model_config(recipe)
    chosen = world.together(lambda: _begin(recipe, config, out, start, say))
    sequences = _sequences(recipe, cache, "train", world, say)
    held_out = _sequences(recipe, cache, "validation", world, say)
    plan = None
    if chosen is None and recipe.engine.plan == routines.MEASURED:
        plan = world.together(lambda: routines.noted(out))
    if chosen is not None:
        path, facts = chosen
        if facts["tokens"] != len(sequences.tokens):
            expected = f"{facts['tokens']} tokens, as when {path} was written"
            checks.fail("the corpus", expected, len(sequences.tokens))
        plan = routines.named(facts["plan"]) if facts.get("plan") else None
    trainer = Trainer(recipe, out, world, sequences, held_out, plan)
    if trainer.accelerated is not None and world.first:
        if trainer.accelerated.missing:
            say(trainer.accelerated.missing)
        for name, why in trainer.accelerated.left:
            say(f"left {name}: {why}")
    if chosen is not None:
        trainer.resume(path, facts)
    until = min(steps or recipe.schedule.steps, recipe.schedule.steps)
    journal = Journal(out, until, recipe.keep.tensorboard) if world.first else None
    try:
        return _go(trainer, until, journal, say)
    finally:
        if journal is not None:
            journal.close()


def _go(
    trainer: Trainer, until: int, journal: Journal | None, say: Callable[[str], None]
) -> dict[str, Any]:
    recipe, out, first = trainer.recipe, trainer.out, trainer.done
    if journal is not None:
        event = "start" if first == 0 else "resume"
        about = {"processes": trainer.world.size, "recipe": to_mapping(recipe)}
        about["plan"] = trainer.plan
        journal.event(event, first, parameters=trainer.config.num_parameters, **about)
        if first:
            say(f"going on from step {first}")
    stopped = trainer.run(until, journal)
    name = None if stopped is None else signal.Signals(stopped).name
    kept = state.path_of(out, trainer.saved) if trainer.saved is not None else None
    last = trainer.last
    tokens = (trainer.done - first) * recipe.batch.sequences * recipe.data.sequence_length
    summary = {
        "steps": trainer.done,
        "of": recipe.schedule.steps,
        "stopped": name,
        "loss": None if last is None else last.loss,
        "evaluation": trainer.evaluated,
        "tokens": trainer.position * recipe.data.sequence_length,
        "tokens_per_second": tokens / trainer.seconds if trainer.seconds else None,
        "skipped": trainer.skipped,
        "log": str(out / FILE),
        "checkpoint": None if kept is None else str(kept),
        "final": None,
        "average": None,
    }
    if name is not None:
        if journal is not None:
            journal.event("stopped", trainer.done, signal=name)
        return summary
    weights = state.whole_weights(trainer.model)
    trainer.world.together(lambda: _export(trainer, weights, summary))
    if journal is not None:
        journal.event("end", trainer.done, **{k: v for k, v in summary.items() if k != "steps"})
    return summary


def _begin(
    recipe: Recipe, config: OpenELMConfig, out: Path, start: Start, say: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, and its facts; by the first process."""
    if start.how == FRESH:
        _set_aside(out, say)
        return None
    chosen = state.choose(out, start.step)
    if chosen is None:
        if start.how == RESUME:
            raise FileNotFoundError(f"{out / 'checkpoints'} has no checkpoint to go on from")
        return None
    path, facts = chosen
    state.check_config(path, facts, config)
    lines, order = state.recipe_changes(facts, to_mapping(recipe))
    if order:
        raise ValueError(
            f"the recipe must take the same data in the same order as {path}: {'; '.join(lines)} "
            "(--fresh begins anew)"
        )
    for line in lines:
        say(f"the recipe has changed since {path.name}: {line}")
    return path, facts


def _set_aside(out: Path, say: Callable[[str], None]) -> None:
    left = [out / name for name in _OURS if (out / name).exists()]
    if not left:
        return
    number = 1
    while (out / f"earlier-{number}").exists():
        number += 1
    aside = out / f"earlier-{number}"
    aside.mkdir()
    for path in left:
        path.rename(aside / path.name)
    say(f"an earlier run's files are in {aside} now")


def _sequences(
    recipe: Recipe, cache: Path, split: str, world: World, say: Callable[[str], None]
) -> Sequences | None:
    """The first process tokenizes, the others then find what it has written."""

    def prepare() -> Any:
        return data.prepare(recipe, cache, split)

    found: list[Any] = []
    world.together(lambda: found.append(prepare()))
    tokens = found[0] if found else prepare()
    if tokens is None:
        if split == "train":
            checks.fail("data.train", "one path or more", "none")
        return None
    settings = recipe.data
    # Evaluations see the same sequences every time: the first ones.
    seed = recipe.seed if split == "train" else None
    try:
        found = Sequences(tokens, settings.sequence_length, settings.separate_documents, seed)
    except ValueError as error:
        raise ValueError(f"data.{split}: {error}") from error
    if world.first:
        say(f"{split}: {len(tokens):,} tokens, {len(found):,} sequences")
    return found


def _export(trainer: Trainer, weights: dict[str, Tensor], summary: dict[str, Any]) -> None:
    """OUT/final and OUT/average; by the first process."""
    out, recipe, config = trainer.out, trainer.recipe, trainer.config
    write = partial(_write_model, config, recipe.data)
    state.publish(out / "final", lambda folder: write(weights, folder))
    summary["final"] = str(out / "final")
    if not recipe.keep.average:
        return
    paths = [path for step, path in state.found(out).items() if step <= trainer.done]
    paths = paths[-recipe.keep.average :]
    if len(paths) > 1:
        mean = state.average({path: state.examine(path) for path in paths}, config)
        state.publish(out / "average", lambda folder: write(mean, folder))
        summary["average"] = str(out / "average")
        summary["averaged"] = [path.name for path in paths]


def _write_model(
    config: OpenELMConfig, settings: Any, weights: dict[str, Tensor], folder: Path
) -> None:
    """A Hugging Face folder with its tokenizer and the ids that begin and end its documents."""
    ids = _tokenizer(settings, folder)
    said = config.metadata
    written = {
        name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()
    }
    if written and not (
        all(said.files.get(name) == data for name, data in written.items())
        and (TOKENIZER_FILES[0] in written or added_tokens(said.files.get) == added_beside(folder))
    ):
        said = said.without(TOKENIZERS)  # of the model that it began with
    model = OpenELM(config.with_metadata(said.with_ids(ids)), device="meta")
    model.load_state_dict(weights, assign=True)
    model.save_pretrained(folder)


def _tokenizer(settings: Any, folder: Path) -> dict[str, Any]:
    """Its file beside the weights, where the data is text of one; else only what ends documents."""
    try:
        return tokenizers.save(folder, settings.tokenizer, settings.eos)
    except (ImportError, FileNotFoundError):
        return {} if settings.eos is None else {"eos_token_id": settings.eos}

"""Do the kernels train as the reference does? The same run eager and accelerated, step by step.

In float32 the two curves may differ by rounding alone: at most FP32_BOUND of the loss at any step.
In bfloat16 rounding is amplified from step to step, in any implementation. So the reference's own
spread is the yardstick: eager runs whose initial weights differ by one unit in the last place of
float32. The accelerated run may be as far from the eager one as any two eager runs are from each
other,
times the factors that the ops' own parity allows: 2 at the worst step, 1.5 in the rms of all steps.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..bench import chart
from ..bench.benchmark import ACCELERATED, EAGER
from ..openelm.model import OpenELM
from . import run
from .journal import FILE, curve
from .loop import first_model
from .parallel import World
from .recipe import Recipe, model_config, to_mapping

FP32_BOUND = 1e-4
WORST_FACTOR, RMS_FACTOR = 2.0, 1.5
# Eager runs from moved weights, besides the one from the weights themselves.
MOVED = {"fp32": 1, "bf16": 3}

Curve = Mapping[int, float]


def compare(
    recipe: Recipe,
    world: World,
    steps: int,
    results: dict[str, Any],
    say: Callable[[str], None],
    save: Callable[[], None],
) -> None:
    """Train a recipe for `steps`, eager and accelerated, in float32 and bfloat16, in one process.

    results: gets what is found, and save() is called whenever there is more of it.
    """
    keep = replace(
        recipe.keep,
        checkpoint_every=0,
        average=0,
        log_every=1,
        evaluate_every=steps,
        tensorboard=False,
    )
    recipe = replace(recipe, keep=keep)
    results |= {
        "complete": False,
        "steps": steps,
        "recipe": to_mapping(recipe),
        "precisions": {},
    }
    with TemporaryDirectory(prefix="elmkernels-") as folder:
        for precision, moved in MOVED.items():
            runs = _runs(recipe, precision, moved, Path(folder), world, steps, say)
            results["precisions"][precision] = {**judge(precision, runs), "runs": runs}
            save()
    results["complete"] = True
    save()


def _runs(
    recipe: Recipe,
    precision: str,
    moved: int,
    folder: Path,
    world: World,
    steps: int,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """{name of a run: its curve, evaluation and speed}."""
    todo = {EAGER: (False, None), ACCELERATED: (recipe.engine.kernels or True, None)}
    todo |= {f"{EAGER}, moved {i}": (False, i) for i in range(1, moved + 1)}
    found = {}
    for name, (kernels, seed) in todo.items():
        say(f"{precision}, {name}: {steps} steps")
        engine = replace(recipe.engine, precision=precision, kernels=kernels)
        variant = replace(recipe, engine=engine)
        if seed is not None:
            start = folder / f"weights-{seed}"
            if not start.exists():
                moved_model(first_model(recipe, model_config(recipe)), seed).save_pretrained(start)
            variant = replace(variant, initial=str(start))
        place = folder / f"{precision} {name}"
        done = run.train(variant, place, world, steps=steps, cache=folder / "data")
        found[name] = {
            "loss": list(curve(place / FILE).values()),
            "evaluation": done["evaluation"],
            "tokens_per_second": done["tokens_per_second"],
        }
    return found


def moved_model(model: OpenELM, seed: int) -> OpenELM:
    """The model with every weight one unit in the last place away, up or down by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            up = torch.rand(weight.shape, generator=generator) < 0.5
            towards = torch.where(up, torch.inf, -torch.inf)
            weight.copy_(torch.nextafter(weight, towards.to(weight)))
    return model


def judge(precision: str, runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The verdict on the runs of one precision, and the numbers that it rests on."""
    curves = {n: torch.tensor(found["loss"], dtype=torch.float64) for n, found in runs.items()}
    eager, accelerated = curves[EAGER], curves.pop(ACCELERATED)
    apart = (accelerated - eager).abs()
    pairs = [(a - b).abs() for a, b in combinations(curves.values(), 2)]
    worst, rms = float(apart.max()), _rms(apart)
    spread, rms_spread = max(float(p.max()) for p in pairs), max(map(_rms, pairs))
    relative = float((apart / eager.abs()).max())
    if precision == "fp32":
        ok = relative <= FP32_BOUND
        rule = f"|accelerated - eager| <= {FP32_BOUND:g} of the loss at every step"
    else:
        ok = worst <= WORST_FACTOR * spread and rms <= RMS_FACTOR * rms_spread
        rule = (
            f"|accelerated - eager| <= {WORST_FACTOR:g} (rms: {RMS_FACTOR:g}) times eager's spread"
        )
    return {
        "ok": ok,
        "rule": rule,
        "largest_difference": worst,
        "largest_relative_difference": relative,
        "rms_difference": rms,
        "largest_eager_spread": spread,
        "rms_eager_spread": rms_spread,
        "last_loss": {EAGER: float(eager[-1]), ACCELERATED: float(accelerated[-1])},
    }


def _rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def text(results: Mapping[str, Any]) -> str:
    """The verdicts as lines."""
    lines = []
    for precision, found in results["precisions"].items():
        last, speeds = found["last_loss"], found["runs"]
        lines += [
            f"{precision}: {'ok' if found['ok'] else 'FAILED'} ({found['rule']})",
            f"  last loss          eager {last[EAGER]:.6f}, accelerated {last[ACCELERATED]:.6f}",
            f"  accelerated - eager    at most {found['largest_difference']:.2e}, "
            f"rms {found['rms_difference']:.2e}",
            f"  eager's own spread at most {found['largest_eager_spread']:.2e}, "
            f"rms {found['rms_eager_spread']:.2e}",
            "  tokens/s           "
            + ", ".join(f"{n} {speeds[n]['tokens_per_second']:,.0f}" for n in (EAGER, ACCELERATED)),
        ]
    return "\n".join(lines)


def draw(results: Mapping[str, Any], path: Path) -> list[str]:
    """A PNG: the curves of each precision, and below them how far they are apart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, len(results["precisions"]), squeeze=False)
    for column, (precision, found) in enumerate(results["precisions"].items()):
        above, below = axes[0][column], axes[1][column]
        curves = {name: found["runs"][name]["loss"] for name in found["runs"]}
        for name in (EAGER, ACCELERATED):
            style = "-" if name == EAGER else "--"
            steps = range(1, len(curves[name]) + 1)
            above.plot(steps, curves[name], style, color=chart.COLORS[name], label=name)
        for name, losses in curves.items():
            if name == EAGER:
                continue
            gaps = [abs(a - b) for a, b in zip(losses, curves[EAGER], strict=True)]
            label = f"{name} - {EAGER}" if name == ACCELERATED else None
            color = chart.COLORS[ACCELERATED] if name == ACCELERATED else chart.COLORS[EAGER]
            below.semilogy(
                range(1, len(gaps) + 1),
                gaps,
                ".-",
                color=color,
                linewidth=0.8,
                markersize=3,
                label=label,
            )
        below.plot([], [], color=chart.COLORS[EAGER], label="eager, weights moved by 1 ulp")
        above.set_title(f"{precision}: {'ok' if found['ok'] else 'FAILED'}", fontsize=10)
        above.set_ylabel("training loss", fontsize=8)
        below.set_ylabel("|difference| of the loss", fontsize=8)
        below.set_xlabel("step", fontsize=8)
        for axis in (above, below):
            axis.legend(fontsize=8)
    return chart.write(figure, f"{results['steps']} steps, eager and accelerated", path)

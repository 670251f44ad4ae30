"""What `fanal guide` calls: one guided run on a named support, its distances, into a run folder with a page."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fanal.config import build_schedule
from fanal.denoiser import Counted, Denoiser, Model, evaluations
from fanal.errors import FanalError
from fanal.exact.named import content
from fanal.files import write_tensors
from fanal.loading import fingerprint, load
from fanal.metrics.estimates import rate
from fanal.runs import Progress, Run, cpu_threads, quiet
from fanal.sampling import Solver, trace
from fanal.schedules import plain_sigmas
from fanal.seeding import noise, run_seeds
from fanal.summary import as_json
from fanal.supports.forms import Scores, exact, guided
from fanal.supports.landing import FARTHEST, Capped, figures
from fanal.supports.processes import process
from fanal.supports.targets import TARGETS, Target, target

__all__ = ["GuideConfig", "guide", "scores_of"]

_DRAWN = 64  # paths that are kept


@dataclass(frozen=True)
class GuideConfig:
    """What a guided run depends on; written to `run.json`.

    Attributes:
        support: a key of `fanal.supports.TARGETS`, or a data set, whose training points are the support.
        label: class of a data set that is the condition; None: 0, or the support's own condition.
        form: a key of `fanal.supports.forms.FORMS`.
        scale: w; 0 is without guidance, 1 the plain conditional, below 0 leads away from the condition, where ends off
            the support are to be expected.
        window: closed range of sigma in which guidance acts; None: everywhere.
        process: a key of `fanal.supports.processes.PROCESSES`, or any solver.
        error: relative error δ >= 0 of both exact scores, `‖s̃ − s‖ = δ·‖s‖`, see `fanal.supports.perturbation`; 0 with
            a model.
        model: a conditional model whose predictions are used instead of exact ones; its class `label` is the condition.
        schedule: of the noise levels.
        steps: number of intervals.
        sigma_min, sigma_max: smallest positive and first noise level; the grid ends at 0.
        near: distance that still counts as on the support, in units of the support's size.
        count, seed, block, threads: as in `SampleConfig`.

    Raises:
        FanalError: a value is out of range, or two of them do not go together.
    """

    support: str = "circle"
    label: int | None = None
    form: str = "classifier-free"
    scale: float = 30.0
    window: tuple[float, float] | None = None
    process: str = "ddim"
    error: float = 0.0
    model: str | None = None
    schedule: str = "polynomial"
    steps: int = 20
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    near: float = 0.01
    count: int = 512
    seed: int = 0
    block: int = 128
    threads: int = 1

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise FanalError(f"scale must be a finite number, got {self.scale}")
        self.seeds()
        if self.block < 1 or self.steps < 1 or self.threads < 1:
            raise FanalError(
                f"block, steps and threads must be at least 1, got {self.block}, {self.steps} and {self.threads}"
            )
        if not 0 <= self.error < math.inf:
            raise FanalError(f"error must be a share of the score's norm, 0 or above, got {self.error}")
        if not 0 < self.near < math.inf:
            raise FanalError(f"near must be a positive number, got {self.near}")
        if self.model is not None and self.error:
            raise FanalError("a model has errors of its own: give --error for exact scores, or --model, not both")

    def seeds(self) -> range:
        """Return one seed per sample.

        Raises:
            FanalError: as `fanal.seeding.run_seeds`.
        """
        return run_seeds(self.seed, self.count)


def scores_of(model: str, goal: Target, label: int) -> Scores:
    """Return a trained model's two denoisers.

    Args:
        model: spec, as in `fanal.load`; it takes class labels and answers without one.
        goal: whose samples it draws.
        label: class that is the condition.

    Raises:
        FanalError: the model has another shape, or no such class.
    """
    told: Model = load(model, labels=label)
    if tuple(told.shape) != goal.shape:
        raise FanalError(f"{model} makes samples of shape {tuple(told.shape)}, {goal.name} has {goal.shape}")
    return Scores(told, load(model))


@dataclass(frozen=True, eq=False)
class _Guided:
    """Everything that a block needs."""

    config: GuideConfig
    goal: Target
    denoiser: Denoiser
    sigmas: Tensor
    solver: Solver
    dtype: torch.dtype


def _prepare(config: GuideConfig) -> _Guided:
    goal = target(config.support, config.label)
    if config.model is None:
        scores = exact(goal, config.error, config.seed)
        scores = Scores(Counted(scores.told), Counted(scores.free))
    else:
        scores = scores_of(config.model, goal, config.label or 0)
    denoiser = guided(config.form, goal, scores, config.scale, config.window)
    sigmas = build_schedule(config.schedule, config.steps, config.sigma_min, config.sigma_max)
    dtype = torch.float64 if config.model is None else torch.float32
    return _Guided(config, goal, denoiser, sigmas, process(config.process), dtype)


def _block(setup: _Guided, rows: range) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Run some samples: where they end, how far their states and predictions are on the way, the first ones' paths."""
    begin, config, goal = time.perf_counter(), setup.config, setup.goal
    seeds, before = config.seeds()[rows.start : rows.stop], evaluations(setup.denoiser)
    x = noise(goal.shape, seeds, float(setup.sigmas[0]), dtype=setup.dtype)
    keep = max(0, min(len(rows), _DRAWN - rows.start))
    paths, states, predictions = [x[:keep]], [], []
    with torch.no_grad():
        capped = Capped(setup.denoiser, FARTHEST * goal.size)
        for transition in trace(capped, x, setup.sigmas, setup.solver, seeds):
            states.append(goal.distances(transition.x)[0])
            predictions.append(goal.distances(transition.step.denoised)[0])
            x = transition.step.x_next
            paths.append(x[:keep])
    part, whole = goal.distances(x)
    tensors = {"x": x, "part": part, "whole": whole}
    tensors |= {"on the way": torch.stack([*states, part], 1), "predictions": torch.stack(predictions, 1)}
    tensors |= {"paths": torch.stack(paths, 1)} if keep else {}
    spent = evaluations(setup.denoiser) - before
    return tensors, {"seconds": time.perf_counter() - begin, "evaluations": spent}


def _course(values: Tensor) -> dict[str, list[float]]:
    """Median, a high quantile and the worst of (B, N) along the run."""
    return {
        "median": values.median(0).values.tolist(),
        "q99": torch.quantile(values, 0.99, 0).tolist(),
        "worst": values.amax(0).tolist(),
    }


def _results(setup: _Guided, whole: dict[str, Tensor]) -> dict[str, Any]:
    near, first = setup.config.near * setup.goal.size, setup.config.seeds()[0]
    far = [int(whole[name].argmax()) for name in ("part", "whole")]
    return {
        "about": setup.goal.about,
        "size": setup.goal.size,
        "near": near,
        "sigmas": plain_sigmas(setup.sigmas),
        "part": figures(whole["part"], near) | {"seed": first + far[0]},
        "whole": figures(whole["whole"], near) | {"seed": first + far[1]},
        "chosen": as_json(rate(whole["part"] <= near)),
        "course": {"states": _course(whole["on the way"]), "predictions": _course(whole["predictions"])},
    }


def guide(config: GuideConfig, out: str | Path, *, overwrite: bool = False, progress: Progress = quiet) -> Path:
    """Run guided sampling into a run folder: `run.json`, `guide.safetensors` and `report.html`.

    Args:
        config: what to run.
        out: the run folder.
        overwrite: replace a finished run.
        progress: wraps loops, given what they do.

    Raises:
        FanalError: the configuration or the place does not work.
    """
    setup = _prepare(config)
    decides = {} if config.model is None else {"model": fingerprint(config.model)}
    decides |= {"support": content("data", config.support)} if config.support not in TARGETS else {}
    head = dataclasses.asdict(config)
    with cpu_threads(config.threads), Run(out, "guide", head, identity=decides, overwrite=overwrite) as run:
        work = functools.partial(_block, setup)
        blocks = list(run.blocks(range(config.count), config.block, work, what="samples", progress=progress))
        names = blocks[0][0]
        whole = {name: torch.cat([tensors[name] for tensors, _ in blocks if name in tensors]) for name in names}
        curves = {f"outline.{k}.{int(own)}": curve for k, (curve, own) in enumerate(setup.goal.outline)}
        kept = {name: value for name, value in whole.items() if name not in ("on the way", "predictions")}
        write_tensors(run.path("guide.safetensors"), kept | curves)
        spent = sum(notes["evaluations"] for _, notes in blocks)
        seconds = sum(notes["seconds"] for _, notes in blocks)
        network = {"evaluations": spent, "per sample": spent / config.count}
        run.describe({"network": network, "seconds": seconds, "results": _results(setup, whole)})
        from fanal.report import write_report

        write_report(run.part)
        return run.finish()

"""Watch fresh samples with many detectors at once: one run, every risk, and what each detector cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fanal.denoiser import Counted, Denoiser, Model, evaluations, take
from fanal.errors import FanalError
from fanal.hallucination.detectors import Detector, begin
from fanal.sampling import Solver, trace
from fanal.schedules import check_sigmas
from fanal.seeding import noise

__all__ = ["Cost", "Observed", "observe", "observe_block"]


@dataclass(frozen=True)
class Cost:
    """What a detector asked of the network beyond the run.

    Attributes:
        evaluations: network evaluations per sample.
        products: backward passes per sample.
    """

    evaluations: float
    products: float


@dataclass(frozen=True, eq=False)
class Observed:
    """Samples and what every detector made of them.

    Attributes:
        x: (B, *shape), the samples; (0, *shape) where they were not kept.
        risks: name → (B,) float64.
        per_step: name → (N, B), the risk as it stood after each step.
        costs: name → what the detector asked for.
        evaluations: network evaluations per sample of the run itself.
        verdicts: (B,) labels, 0 for right; None without a verifier.
        judged: (M,) noise levels of the predictions that were judged on the way, decreasing.
        by_step: (M, B) their labels.
    """

    x: Float[Tensor, "b *d"]
    risks: dict[str, Float[Tensor, " b"]]
    per_step: dict[str, Float[Tensor, "n b"]]
    costs: dict[str, Cost]
    evaluations: float
    verdicts: Int[Tensor, " b"] | None
    judged: Float[Tensor, " m"]
    by_step: Int[Tensor, "m b"]

    @property
    def labels(self) -> Tensor:
        """(B,) the verdicts.

        Raises:
            FanalError: nothing knows.
        """
        if self.verdicts is None:
            raise FanalError("nothing said which samples are wrong: observe them with a verifier")
        return self.verdicts

    @property
    def wrong(self) -> Tensor:
        """(B,) which samples are wrong.

        Raises:
            FanalError: nothing knows.
        """
        return self.labels != 0


def observe_block(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    sigmas: Float[Tensor, " n"],
    solver: Solver,
    detectors: Mapping[str, Detector],
    seeds: Iterable[int],
    *,
    verify: Callable[[Tensor], Tensor] | None = None,
    judged: tuple[float, float] | None = None,
) -> Observed:
    """Sample one batch without gradients while every detector watches.

    Args:
        denoiser: D(x, sigma).
        x: the batch at `sigmas[0]`.
        sigmas: decreasing grid.
        solver: how an interval is crossed.
        detectors: by name.
        seeds: one per sample.
        verify: returns a label per sample, 0 for right.
        judged: closed range of sigma in which the denoised predictions are judged too.

    Raises:
        FanalError: as `trace`, or a window holds too few steps of the grid.
    """
    run, asked = Counted(denoiser), {name: Counted(denoiser) for name in detectors}
    eyes = {name: begin(detector, asked[name]) for name, detector in detectors.items()}
    levels, codes, end = [], [], x
    with torch.no_grad():
        for transition in trace(run, x, sigmas, solver, seeds):
            for eye in eyes.values():
                eye.see(transition)
            sigma, end = transition.span.sigma, transition.step.x_next
            if verify is not None and judged is not None and judged[0] <= float(sigma) <= judged[1]:
                levels.append(sigma)
                codes.append(_labels(verify, transition.step.denoised))
    none = torch.zeros(0, len(x), dtype=torch.int64)
    return Observed(
        end,
        {name: eye.risk().cpu() for name, eye in eyes.items()},
        {name: eye.per_step().cpu() for name, eye in eyes.items()},
        {name: Cost(count.evaluations / len(x), float(count.products)) for name, count in asked.items()},
        evaluations(run) / len(x),
        None if verify is None else _labels(verify, end),
        torch.stack(levels) if levels else torch.zeros(0, dtype=torch.float64),
        torch.stack(codes) if codes else none,
    )


def _labels(verify: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return verify(x).cpu().long()


def observe(
    model: Model,
    sigmas: Float[Tensor, " n"],
    solver: Solver,
    detectors: Mapping[str, Detector],
    seeds: range,
    *,
    block: int = 64,
    device: torch.device | str = "cpu",
    verify: Callable[[Tensor], Tensor] | None = None,
    judged: tuple[float, float] | None = None,
    keep: bool = True,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Observed:
    """Watch samples from fresh noise with every detector, block by block.

    Args:
        model: the denoiser, with its shape.
        sigmas: decreasing grid.
        solver: how an interval is crossed.
        detectors: by name.
        seeds: one per sample.
        block: samples run at a time.
        device: where the model is.
        verify: returns a label per sample, 0 for right.
        judged: closed range of sigma in which the denoised predictions are judged too.
        keep: keep the samples.
        progress: wraps the loop over blocks.

    Raises:
        FanalError: there are no seeds, or as `observe_block`.
    """
    if not len(seeds):
        raise FanalError("there are no seeds to observe")
    grid, found = check_sigmas(sigmas), []
    for start in progress(range(0, len(seeds), block)):
        some = seeds[start : start + block]
        x = noise(model.shape, some, float(grid[0]), device=device)
        own = take(model, torch.arange(start, start + len(some)))
        seen = observe_block(own, x, grid, solver, detectors, some, verify=verify, judged=judged)
        found.append((len(some), seen if keep else dataclasses.replace(seen, x=seen.x[:0])))
    return _join(found)


def _join(found: list[tuple[int, Observed]]) -> Observed:
    """Put blocks together; what they cost on average is weighted by their sizes."""
    parts, first = [seen for _, seen in found], found[0][1]
    total = sum(size for size, _ in found)

    def mean(figure: Callable[[Observed], float]) -> float:
        return math.fsum(size * figure(seen) for size, seen in found) / total

    return Observed(
        torch.cat([seen.x for seen in parts]),
        {name: torch.cat([seen.risks[name] for seen in parts]) for name in first.risks},
        {name: torch.cat([seen.per_step[name] for seen in parts], 1) for name in first.risks},
        {
            name: Cost(
                mean(lambda seen: seen.costs[name].evaluations),  # noqa: B023
                mean(lambda seen: seen.costs[name].products),  # noqa: B023
            )
            for name in first.costs
        },
        mean(lambda seen: seen.evaluations),
        None if first.verdicts is None else torch.cat([s.verdicts for s in parts if s.verdicts is not None]),
        first.judged,
        torch.cat([seen.by_step for seen in parts], 1),
    )

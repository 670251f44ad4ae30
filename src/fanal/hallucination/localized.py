"""Localized re-noising: only the region where the prediction wavers is drawn again, the rest is held in place.

Outside the region the state follows the finished sample, `x0 + sigma·n` with the noise n of the start, at every step
(replacement, as in RePaint: Lugmayr et al. 2022, arXiv 2201.09865, without its jumps back). At sigma = 0 that is x0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from fanal.denoiser import Counted, Denoiser, counters, evaluations, take
from fanal.errors import FanalError, is_number
from fanal.hallucination.detectors import Detector
from fanal.hallucination.repair import Outcome, rounds_of, tail_of, watch
from fanal.sampling import Solver, Span, Step
from fanal.seeding import noise

__all__ = ["Inside", "Localized", "region"]


@dataclass(frozen=True, eq=False)
class Inside:
    """Takes the steps of a solver inside a region; outside, the state is `known + sigma·fresh`.

    `Step.denoised` stays the raw prediction.

    Attributes:
        solver: what takes the steps.
        mask: which entries are drawn again.
        known: the samples that are held outside.
        fresh: unit noise of the start.
    """

    solver: Solver
    mask: Bool[Tensor, "b *d"]
    known: Float[Tensor, "b *d"]
    fresh: Float[Tensor, "b *d"]

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` inside the region, and follow the known samples outside."""
        step = self.solver.step(denoiser, x, span, memory)
        held = self.known + float(span.sigma_next) * self.fresh
        return dataclasses.replace(step, x_next=torch.where(self.mask, step.x_next, held))


def region(
    x: Float[Tensor, "b c h w"], denoised: Float[Tensor, "b c h w"], share: float, reach: int
) -> Bool[Tensor, "b c h w"]:
    """Return where a prediction departs from the image: above `share` of the largest departure, widened by `reach`.

    The departure is the mean square over channels and 3 x 3 pixels.
    """
    away = F.avg_pool2d((denoised - x).square().mean(1, keepdim=True), 3, 1, 1)
    far = (away >= share * away.flatten(1).amax(1)[:, None, None, None]).float()
    return (F.max_pool2d(far, 2 * reach + 1, 1, reach) > 0).expand_as(x)


@dataclass(frozen=True)
class Localized:
    """Re-noise flagged images only where the network's prediction departs from them, and keep the rest.

    The region is found by one more call: the prediction from the re-noised image. A sample leaves the loop when its
    risk is under the threshold; one that never gets there keeps the try with the lowest risk.

    Attributes:
        sigma: where it returns to: the first grid node at or below.
        rounds: how often at most.
        share: of the largest departure, from which a pixel belongs to the region.
        reach: by how many pixels the region is widened.
    """

    sigma: float = 4.0
    rounds: int = 3
    share: float = 0.2
    reach: int = 3

    def __post_init__(self) -> None:
        whole = isinstance(self.rounds, int) and 1 <= self.rounds < 4096 and isinstance(self.reach, int)
        if not whole or self.reach < 0 or not is_number(self.sigma) or not self.sigma > 0 or not 0 < self.share <= 1:
            raise FanalError(
                f"localized re-noising needs sigma > 0, rounds in [1, 4095], share in (0, 1] and reach >= 0, got "
                f"{self.sigma!r}, {self.rounds!r}, {self.share!r}, {self.reach!r}"
            )

    def repair(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        solver: Solver,
        detector: Detector,
        seeds: Sequence[int],
        first: Outcome,
        threshold: float,
    ) -> Outcome:
        """Re-noise a region of the samples whose risk exceeds the threshold, for a few rounds.

        Raises:
            FanalError: samples are no images, the grid has fewer than two nodes at or below `sigma`, or as `trace`.
        """
        if x.ndim != 4:
            raise FanalError(f"localized re-noising needs images (B, C, H, W), got shape {tuple(x.shape)}: try renoise")
        tail = tail_of(sigmas, self.sigma, detector)
        net = denoiser if counters(denoiser) else Counted(denoiser)

        def again(here: Tensor, rows: Tensor, keys: list[int], number: int) -> Outcome:
            fresh = noise(x.shape[1:], keys, round=number, stream="localized", dtype=x.dtype, device=x.device)
            start, own, before = here + float(tail[0]) * fresh, take(net, rows), evaluations(net)
            with torch.no_grad():
                mask = region(here, own(start, tail[0]), self.share, self.reach)
            asked = (evaluations(net) - before) / len(rows)
            found = watch(own, start, tail, Inside(solver, mask, here, fresh), detector, keys, round=number)
            return dataclasses.replace(found, evaluations=found.evaluations + asked)

        return rounds_of(first, threshold, self.rounds, seeds, again)

"""Detectors that have to be fitted: what is needed of labelled samples, and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import Denoiser
from fanal.hallucination import combination, probe
from fanal.hallucination.detectors import Detector
from fanal.hallucination.observation import observe_block
from fanal.sampling import Solver

__all__ = ["Fitting"]


@dataclass(frozen=True)
class Fitting:
    """A detector to be: a combination of `parts`, or without any a linear probe.

    Attributes:
        parts: by name, whose risks are combined.
        strength: inverse of the regularization, scikit-learn's `C`.
        sigmas: where a probe asks the network.
    """

    parts: Mapping[str, Detector]
    strength: float
    sigmas: tuple[float, ...] = ()

    @property
    def kind(self) -> str:
        """What it will be, one of `fanal.hallucination.detectors.FITTED`."""
        return "combined" if self.parts else "probe"

    def watch(
        self,
        denoiser: Denoiser,
        x: Float[Tensor, "b *d"],
        sigmas: Float[Tensor, " n"],
        solver: Solver,
        seeds: Sequence[int],
    ) -> dict[str, Tensor]:
        """Sample a batch, and return what a fit needs: `x`, `risk.NAME` of each part, and `evaluations`, each (B, …).

        Raises:
            FanalError: as `trace`, or a part's window holds too few steps.
        """
        seen = observe_block(denoiser, x, sigmas, solver, self.parts, seeds)
        spent = seen.evaluations + sum(cost.evaluations for cost in seen.costs.values())
        risks = {f"risk.{name}": risk for name, risk in seen.risks.items()}
        return {"x": seen.x, "evaluations": torch.full((len(x),), spent, dtype=torch.float64), **risks}

    def fit(
        self, denoiser: Denoiser, tensors: Mapping[str, Tensor], wrong: Tensor
    ) -> tuple[Detector, Float[Tensor, " b"]]:
        """Fit to labelled samples; returns the detector, and the risk of each sample by a fit to the others.

        Args:
            denoiser: bound for these samples.
            tensors: what `watch` returns; a probe needs `x` alone.
            wrong: (B,) labels; 0 or False is right.

        Raises:
            FanalError: there are too few samples of a kind, or the network is none that a probe can read.
        """
        if self.parts:
            risks = {name: tensors[f"risk.{name}"] for name in self.parts}
            found = combination.fit(self.parts, risks, wrong, strength=self.strength)
            return found.detector, found.risk
        own = probe.fit(denoiser, tensors["x"], wrong, sigmas=self.sigmas, strength=self.strength)
        return own.probe, own.risk

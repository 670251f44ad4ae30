"""Scores that are wrong by a known share, and denoisers of blurred laws: what a network might be instead of exact."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from fanal.denoiser import Denoiser, Wrapper, expand
from fanal.errors import FanalError

__all__ = ["Blurred", "Perturbed"]

_WAVES = 64


class Perturbed(Wrapper):
    """A score with relative error δ: `D̃ = D + δ·‖D − x‖·e(x, sigma)` with a unit vector e, so `‖s̃ − s‖ = δ·‖s‖`.

    The direction e is a fixed random field of the state, smooth in log sigma and on the scale `√(1 + sigma²)` per
    coordinate, on which the blurred data vary in any dimension: the error is a function, as a network's is, and no
    noise that steps would average out. Two seeds give two networks that err independently.

    Args:
        denoiser: D.
        delta: δ >= 0.
        seed: decides the field.

    Raises:
        FanalError: δ is negative or not finite.
    """

    def __init__(self, denoiser: Denoiser, delta: float, seed: int = 0) -> None:
        super().__init__(denoiser)
        if not (math.isfinite(delta) and delta >= 0):
            raise FanalError(f"the relative error of a score must be a finite number >= 0, got {delta!r}")
        self.delta, self.seed, size = delta, seed, math.prod(self.shape)
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        self.waves, self.pace = 2 * normal(size, _WAVES) / math.sqrt(size), normal(_WAVES)
        self.phase = 2 * math.pi * torch.rand(_WAVES, dtype=torch.float64, generator=generator)
        self.ways = normal(_WAVES, size)

    def field(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return e(x, sigma), unit vectors (B, d), float64."""
        level = sigma.double().to(x.device).reshape(-1, 1)
        flat = x.flatten(1).double() / (1 + level**2).sqrt()
        turn = flat @ self.waves.to(x.device) + level.log() * self.pace.to(x.device) + self.phase.to(x.device)
        return torch.nn.functional.normalize(turn.cos() @ self.ways.to(x.device), dim=1)

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """Return the wrong prediction."""
        denoised = self.denoiser(x, sigma)
        if self.delta == 0:
            return denoised
        length = (denoised - x).flatten(1).norm(dim=1)
        error = self.delta * length.double()[:, None] * self.field(x, sigma)
        return denoised + error.reshape(x.shape).to(x)


class Blurred(Wrapper):
    """The exact denoiser of a law that was blurred by noise of deviation τ: a weaker model of the same data.

    Its score is that of the law itself at `s = √(sigma² + τ²)`: `D_τ = x + (sigma/s)²·(D(x, s) − x)`.
    Autoguidance leads away from such a model (Karras et al. 2024, arXiv:2406.02507).

    Args:
        denoiser: D.
        blur: τ >= 0.
    """

    def __init__(self, denoiser: Denoiser, blur: float) -> None:
        super().__init__(denoiser)
        if not (math.isfinite(blur) and blur >= 0):
            raise FanalError(f"a blur must be a finite number >= 0, got {blur!r}")
        self.blur = blur

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """Return the blurred law's posterior mean."""
        wide = (sigma**2 + self.blur**2).sqrt()
        share = expand(cast(Tensor, sigma**2 / wide**2), x)
        return x + share.to(x) * (self.denoiser(x, wide) - x)

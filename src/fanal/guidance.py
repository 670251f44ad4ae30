"""Guidance: Denoiser→Denoiser, so that it composes with every solver and schedule."""

from __future__ import annotations

from torch import Tensor

from fanal.denoiser import Denoiser, Wrapper

__all__ = ["ClassifierFree"]


class ClassifierFree(Wrapper):
    """`D_w = D_u + w·(D_c − D_u)` (Ho & Salimans 2022): w = 0 unconditional, 1 conditional, above 1 guided.

    At w = 1 and w = 0 only the denoiser that matters is called, so those are exact and cost one call.

    Args:
        denoiser: the conditional denoiser D_c; its shape and range are passed through.
        unconditional: D_u.
        scale: w.
    """

    def __init__(self, denoiser: Denoiser, unconditional: Denoiser, scale: float) -> None:
        super().__init__(denoiser)
        self.unconditional, self.scale = unconditional, scale

    def parts(self) -> tuple[Denoiser, ...]:
        """Return both denoisers, so that calls of either are counted."""
        return (self.denoiser, self.unconditional)

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """Return the guided prediction."""
        if self.scale == 1:
            return self.denoiser(x, sigma)
        free = self.unconditional(x, sigma)
        return free if self.scale == 0 else free + self.scale * (self.denoiser(x, sigma) - free)

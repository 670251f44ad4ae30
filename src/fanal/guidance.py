"""Guidance: Denoiser→Denoiser, so that it composes with every solver and schedule."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fanal.denoiser import Conditional, Denoiser, Labelled, Wrapper, take

__all__ = ["ClassifierFree"]


class ClassifierFree(Wrapper):
    """`D_w = D_u + w·(D_c − D_u)` (Ho & Salimans 2022): w = 0 unconditional, 1 conditional, above 1 guided.

    At w = 1 and w = 0 only the denoiser that matters is called, so those are exact and cost one call. Where both are
    one network with different labels, it is called once, with both halves in one batch.

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

    def taking(self, rows: Tensor) -> Denoiser:
        """Return the guidance of these rows."""
        return ClassifierFree(take(self.denoiser, rows), take(self.unconditional, rows), self.scale)

    def _both(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return D_c and D_u."""
        with_label, without = self.denoiser, self.unconditional
        if isinstance(with_label, Labelled) and isinstance(without, Labelled):
            if with_label.denoiser is without.denoiser:
                labels = torch.cat([with_label.for_batch(x), without.for_batch(x)])
                levels = torch.cat([sigma, sigma]) if sigma.ndim else sigma
                both = cast(Conditional, with_label.denoiser)(torch.cat([x, x]), levels, labels)
                first, second = both.chunk(2)
                return first, second
        return with_label(x, sigma), without(x, sigma)

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """Return the guided prediction."""
        if self.scale == 1:
            return self.denoiser(x, sigma)
        if self.scale == 0:
            return self.unconditional(x, sigma)
        told, free = self._both(x, sigma)
        return free + self.scale * (told - free)

"""PNDM and PLMS: Adams–Bashforth for equal steps, started by a Runge–Kutta method instead of by lower orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fanal.adapters.predictions import Timesteps
from fanal.denoiser import Denoiser
from fanal.errors import FanalError
from fanal.sampling import Span, Step, finish
from fanal.solvers.arithmetic import Past, Row, check_choice, check_order, linear_step, staged
from fanal.solvers.coefficients import number
from fanal.solvers.multistep import constant_weights
from fanal.solvers.onestep import RK4_ROWS

__all__ = ["PNDM", "SPNDM"]

_HEUN: tuple[Row, ...] = ((1.0, (1.0,)), (1.0, (0.5, 0.5)))


@dataclass(frozen=True)
class PNDM:
    """Pseudo numerical methods (Liu et al. 2022, arXiv:2202.09778): in x-space, `IPNDM` with another start.

    - "rk4" (PNDM): the first `order − 1` steps are Runge–Kutta steps of four calls each;
    - "heun" (PLMS, and S-PNDM with order 2): the first step is Heun's, with two calls, then the order rises.

    The middle stages of "rk4" are at the middle of sigma, or, given the network's times, at the middle of time, as in
    diffusers.

    Attributes:
        order: number of slopes, 1 to 4.
        warmup: "rk4" or "heun".
        finish: cross into sigma = 0 with the denoised prediction; False: with the formula, as diffusers does.
        times: the discrete times of the network, for "rk4".
    """

    order: int = 4
    warmup: str = "rk4"
    finish: bool = True
    times: Timesteps | None = None

    def __post_init__(self) -> None:
        check_order("pndm", self.order, 4)
        check_choice("warmup of pndm", self.warmup, ("rk4", "heun"))
        if self.times is not None and not isinstance(self.times, Timesteps):
            raise FanalError(
                f"times of pndm is a fanal.adapters.predictions.Timesteps, given in Python, got {self.times!r}"
            )

    def _start(self, denoiser: Denoiser, x: Tensor, span: Span, past: Past) -> Step:
        """Cross `span` with the starting method, and remember the slope at its start."""
        rows = _HEUN if self.warmup == "heun" else RK4_ROWS
        if self.warmup == "rk4" and self.times is not None:
            rows = _with_middle(rows, self.times, span)
        x_next, denoised, values = staged(denoiser, x, span, rows, predict="noise", log=False)
        seen = past.with_newest(values[0], number(span.sigma))
        return Step(x_next, denoised, memory=seen.memory(self.order - 1))

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with one call; the first steps cost four (rk4) or two (heun)."""
        past = Past.recall(memory)
        if span.sigma_next == 0 and (self.finish or not memory):
            return finish(denoiser, x, span)
        wanted = self.order - 1 if self.warmup == "rk4" else min(1, self.order - 1)
        if len(past.values) < wanted:
            return self._start(denoiser, x, span, past)

        return linear_step(
            denoiser, x, span, memory, constant_weights, order=self.order, keep=self.order - 1, predict="noise"
        )


def _with_middle(rows: Sequence[Row], times: Timesteps, span: Span) -> tuple[Row, ...]:
    """The stages at one half moved to the middle of the network's time."""
    ends = times.time_of(torch.stack([span.sigma, span.sigma_next]))
    middle = times.sigma_of(ends.mean())
    share = float((middle - span.sigma) / (span.sigma_next - span.sigma))
    return tuple((share if c == 0.5 else c, weights) for c, weights in rows)


@dataclass(frozen=True)
class SPNDM:
    """S-PNDM: Heun's step, then `x' = x + (sigma' − sigma)·(3·d_n − d_{n−1})/2` ([GEO] eq. 36).

    `PNDM(order=2, warmup="heun")`; `IPNDM(order=2)` is the same after a first step by Euler.

    Attributes:
        finish: cross into sigma = 0 with the denoised prediction; False: with the formula.
    """

    finish: bool = True

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with one call; the first step costs two."""
        return PNDM(order=2, warmup="heun", finish=self.finish).step(denoiser, x, span, memory)

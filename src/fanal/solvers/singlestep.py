"""Solvers with stages inside the interval, in log sigma: DPM-Solver, DPM-Solver++ and RES."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fanal.denoiser import Denoiser
from fanal.errors import FanalError
from fanal.sampling import Span, Step, finish
from fanal.solvers.arithmetic import (
    PREDICT,
    Past,
    Row,
    advance,
    allowed,
    check_choice,
    check_lower,
    check_order,
    linear_step,
    staged,
    value_of,
)
from fanal.solvers.coefficients import Real, log_ratio, number, phi
from fanal.solvers.multistep import exact_weights, log_units

__all__ = ["DPM2", "DPMS", "RES", "DPMpp2S"]


def _h(span: Span) -> Real:
    return log_ratio(number(span.sigma), number(span.sigma_next))


def _two_stages(r: float, share: Real) -> list[Row]:
    """A stage at r, and the step with `v + share·(v_r − v)`."""
    return [(r, (1.0,)), (1.0, (1 - share, share))]


@dataclass(frozen=True)
class DPM2:
    """DPM-Solver-2: a stage at `sigma_m`, then the slope `d + (d_m − d)/(2r)` (Lu et al. 2022, arXiv:2206.00927).

    With a middle in log sigma, `sigma_m = sigma^(1−r)·sigma'^r`; r = 1/2 is k-diffusion's dpm_2 and diffusers' KDPM2.
    With one in sigma, `sigma_m = sigma + r·(sigma' − sigma)`, it is Karras' general second-order step with α = r:
    r = 1/2 is the midpoint method, r = 1 Heun's.

    Attributes:
        r: where the stage is, in (0, 1].
        middle: "log": at r of log sigma; "sigma": at r of sigma.
    """

    r: float = 0.5
    middle: str = "log"

    def __post_init__(self) -> None:
        check_r("dpm2", self.r)
        check_choice("middle of dpm2", self.middle, ("log", "sigma"))

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with two calls, or one into sigma = 0."""
        if span.sigma_next == 0:
            return finish(denoiser, x, span)
        rows = _two_stages(self.r, 1 / (2 * self.r))
        x_next, denoised, _ = staged(denoiser, x, span, rows, predict="noise", log=self.middle == "log")
        return Step(x_next, denoised)


@dataclass(frozen=True)
class DPMpp2S:
    """DPM-Solver++(2S): Euler's step with `D + (D_m − D)/(2r)`, a stage at sigma_m (Lu et al. 2022, arXiv:2211.01095).

    `sigma_m = sigma^(1−r)·sigma'^r`; with r = 1/2 the step uses the prediction at the middle alone.

    Attributes:
        r: where the stage is, as a share of log sigma, in (0, 1].
    """

    r: float = 0.5

    def __post_init__(self) -> None:
        check_r("dpmpp2s", self.r)

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with two calls, or one into sigma = 0."""
        if span.sigma_next == 0:
            return finish(denoiser, x, span)
        rows = _two_stages(self.r, 1 / (2 * self.r))
        x_next, denoised, _ = staged(denoiser, x, span, rows, predict="data", log=True)
        return Step(x_next, denoised)


def check_r(name: str, r: float) -> None:
    """Refuse a stage outside of the interval.

    Raises:
        FanalError: r is not in (0, 1].
    """
    if not 0 < r <= 1:
        raise FanalError(f"{name} needs r in (0, 1], got {r}")


@dataclass(frozen=True)
class DPMS:
    """Singlestep DPM-Solver of order 2 or 3 (2S, 3S), and DPM-Solver++ with `predict="data"`.

    With its own nodes, order 2 has a stage at half of log sigma, order 3 at thirds, and nothing is kept between steps
    (Lu et al. 2022, arXiv:2206.00927, alg. 1–2). On the nodes of the grid, blocks of `order` intervals share the state
    at the block's start: the step within a block goes from there, with all values of the block (diffusers' singlestep
    scheduler).

    Attributes:
        order: 1 to 3.
        variant: "midpoint": differences with the newest stage alone; "taylor": the polynomial through all.
        nodes: "own" or "grid".
        lower_final: own nodes: lower the order on the last steps; grid: end a full last block with a first-order step.
            "always", "never", or N, on grids of fewer than N intervals.
        predict: "noise" (DPM-Solver) or "data" (DPM-Solver++).
        calls: own nodes: how many the whole run makes; the last steps have lower orders so that it does. With order 3
            on a logSNR grid of `calls//3 + 1` intervals this is DPM-Solver-fast (alg. 3 there, k-diffusion's dpm_fast).
            0: as lower_final says.
    """

    order: int = 3
    variant: str = "midpoint"
    nodes: str = "own"
    lower_final: str | int = "never"
    predict: str = "noise"
    calls: int = 0

    def __post_init__(self) -> None:
        check_order("dpms", self.order, 3)
        check_choice("variant of dpms", self.variant, ("midpoint", "taylor"))
        check_choice("nodes of dpms", self.nodes, ("own", "grid"))
        check_choice("predict of dpms", self.predict, PREDICT)
        check_lower(self.lower_final)
        if not isinstance(self.calls, int) or self.calls < 0 or (self.calls and self.nodes == "grid"):
            raise FanalError(
                f"dpms takes calls >= 0, and only on its own nodes, got {self.calls!r}: on the grid's, leave it out"
            )

    def _own_order(self, span: Span) -> int:
        """The order of a step on own nodes; with a number of calls, what the later steps cannot save comes off it."""
        if not self.calls:
            return allowed(self.order, self.lower_final, span.n, span.n - span.i)
        if not span.n <= self.calls <= self.order * span.n:
            raise FanalError(
                f"{span.n} steps of order 1 to {self.order} make {span.n} to {self.order * span.n} calls, not "
                f"{self.calls}: take {-(-self.calls // self.order)} to {self.calls} steps"
            )
        later = (span.n - 1 - span.i) * (self.order - 1)
        return self.order - min(max(self.order * span.n - self.calls - later, 0), self.order - 1)

    def _last(self, nodes: Sequence[Real], z: Real) -> Sequence[Real]:
        """Weights of the values at `nodes` (0 first, the newest last) for the whole step."""
        if len(nodes) == 1:
            return (1.0,)
        if self.variant == "taylor":
            return exact_weights(nodes, z)
        share = 0.5 if len(nodes) == 2 else phi(2, z) / phi(1, z)
        share = share / nodes[-1]
        return (1 - share, *([0.0] * (len(nodes) - 2)), share)

    def _rows(self, order: int, h: Real) -> list[Row]:
        z = -h if self.predict == "data" else h
        if order == 1:
            return [(1.0, (1.0,))]
        if order == 2:
            return [(1 / 2, (1.0,)), (1.0, self._last((0.0, 1 / 2), z))]
        far = 2 * z / 3
        inner = 2 * phi(2, far) / phi(1, far)
        return [(1 / 3, (1.0,)), (2 / 3, (1 - inner, inner)), (1.0, self._last((0.0, 1 / 3, 2 / 3), z))]

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with `order` calls on own nodes, one call on the grid's, or one into sigma = 0."""
        if span.sigma_next == 0:
            return finish(denoiser, x, span)
        if self.nodes == "grid":
            return self._on_grid(denoiser, x, span, memory)
        rows = self._rows(self._own_order(span), _h(span))
        x_next, denoised, _ = staged(denoiser, x, span, rows, predict=self.predict, log=True)
        return Step(x_next, denoised)

    def _on_grid(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...]) -> Step:
        sigma, sigma_next = number(span.sigma), number(span.sigma_next)
        denoised = denoiser(x, span.sigma)
        value = value_of(x, denoised, sigma, self.predict)
        place = span.i % self.order + 1
        full = span.i == span.n - 1 and span.n % self.order == 0
        if place == 1 or not memory or (full and allowed(2, self.lower_final, span.n, 1) == 1):
            start, block = x, Past((value,), (sigma,))
        else:
            start, block = memory[0], Past.recall(memory[1:]).with_newest(value, sigma)
        first = block.sigmas[-1]
        nodes, h = log_units(block.sigmas[::-1], sigma_next)
        weights = self._last(nodes, -h if self.predict == "data" else h)
        x_next = advance(start, block.values[::-1], weights, first, sigma_next, self.predict)
        return Step(x_next, denoised, memory=(start, *block.memory(self.order)))


@dataclass(frozen=True)
class RES:
    """Refined exponential solver: exact φ-weights for D in log sigma (Zhang, Song & Chen 2023, arXiv:2308.02157).

    Multistep, one call: the polynomial through the last predictions, integrated exactly; orders 2 and 3 are what
    DPM-Solver++ 2M and 3M approximate. Singlestep: exponential Runge–Kutta of order 2 (c_2 = 1/2) or 3 (c_2 = 1/2,
    c_3 = 1) that meets the stiff order conditions (Hochbruck & Ostermann 2005, eq. 5.8).

    Attributes:
        order: multistep: number of predictions, 1 to 4; singlestep: 1 to 3, its number of calls.
        form: "multistep" or "singlestep".
        lower_final: multistep: lower the order on the last steps: "always", "never", or N, on grids of fewer than N
            intervals.
    """

    order: int = 2
    form: str = "multistep"
    lower_final: str | int = "always"

    def __post_init__(self) -> None:
        check_choice("form of res", self.form, ("multistep", "singlestep"))
        check_order(f"res, {self.form},", self.order, 4 if self.form == "multistep" else 3)
        check_lower(self.lower_final)

    def _weights(self, sigmas: Sequence[Real], sigma_next: Real) -> Sequence[Real]:
        nodes, h = log_units(sigmas, sigma_next)
        return exact_weights(nodes, -h)

    def _rows(self, z: Real) -> list[Row]:
        share = phi(2, z) / phi(1, z)
        if self.order == 1:
            return [(1.0, (1.0,))]
        if self.order == 2:
            return _two_stages(1 / 2, 2 * share)
        # γ from 2(γ·c_2 + c_3) = 3(γ·c_2² + c_3²) at c_2 = 1/2, c_3 = 1
        gamma = 4.0
        inner = (gamma / 2 * phi(2, z / 2) + 2 * phi(2, z)) / phi(1, z)
        second, third = (part * share / (gamma / 2 + 1) for part in (gamma, 1.0))
        return [(1 / 2, (1.0,)), (1.0, (1 - inner, inner)), (1.0, (1 - second - third, second, third))]

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with one call (multistep) or `order` calls, and one into sigma = 0."""
        if span.sigma_next == 0:
            return finish(denoiser, x, span)
        if self.form == "multistep":
            order = allowed(self.order, self.lower_final, span.n, span.n - span.i)
            return linear_step(
                denoiser, x, span, memory, self._weights, order=order, keep=self.order - 1, predict="data"
            )
        x_next, denoised, _ = staged(denoiser, x, span, self._rows(-_h(span)), predict="data", log=True)
        return Step(x_next, denoised)

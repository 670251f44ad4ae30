"""The tensor operations that solvers share, few and fused: values, Euler's step, weighted means, the past in `memory`.

A value is what a solver takes to be smooth over the step: the denoised prediction D (`predict="data"`) or the slope d
(`predict="noise"`). Whatever the method, it moves by Euler's step with some mean value ([REG] prop. 1):

    data:   x' = (sigma'/sigma)·x + (1 − sigma'/sigma)·D̄
    noise:  x' = x + (sigma' − sigma)·d̄

Coefficients are Python floats (or 0-d float64 tensors that carry a gradient to sigma), so the arithmetic has the dtype
and device of x and waits for neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fanal.denoiser import Denoiser
from fanal.errors import FanalError, unknown_name
from fanal.sampling import Span, Step, toward
from fanal.solvers.coefficients import Real, between, number, tensor_of

__all__ = [
    "PREDICT",
    "Past",
    "Row",
    "advance",
    "allowed",
    "check_choice",
    "check_lower",
    "check_order",
    "gathered",
    "linear_step",
    "spread",
    "staged",
    "total",
    "value_of",
]

PREDICT = ("data", "noise")
"""What is interpolated: the denoised prediction D, or the slope d."""

Row = tuple[float, Sequence[Real]]
"""A stage: where it is, as a share of the interval, and the weights of the values before it that lead there."""

Weigh = Callable[[Sequence[Real], Real], Sequence[Real]]
"""(sigmas of the values, newest first; sigma') → their weights."""


def check_choice(field: str, value: str, known: Sequence[str]) -> None:
    """Refuse a word that is not one of a field's.

    Raises:
        FanalError: it is unknown.
    """
    if value not in known:
        raise unknown_name(field, str(value), known)


def check_order(name: str, order: int, highest: int) -> None:
    """Refuse an order that a method does not have.

    Raises:
        FanalError: it is no whole number in range.
    """
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= highest:
        raise FanalError(f"{name} has orders 1 to {highest}, got {order!r}")


def check_lower(lower_final: str | int) -> None:
    """Refuse a rule for the last steps that is neither "always", "never" nor a number of intervals.

    Raises:
        FanalError: it is none of them.
    """
    whole = isinstance(lower_final, int) and not isinstance(lower_final, bool) and lower_final > 0
    if lower_final not in ("always", "never") and not whole:
        raise FanalError(f'lower_final is "always", "never" or a number of intervals >= 1, got {lower_final!r}')


def allowed(order: int, lower_final: str | int, intervals: int, left: int) -> int:
    """Return the order that may be used on an interval: at most the number of intervals left, where it is lowered.

    Args:
        order: of the method.
        lower_final: "always"; "never"; or N, which lowers only on grids of fewer than N intervals.
        intervals: of the grid; one that ends at 0 counts.
        left: how many of them are left, with this one.
    """
    lower = intervals < lower_final if isinstance(lower_final, int) else lower_final == "always"
    return max(1, min(order, left)) if lower else order


def value_of(x: Tensor, denoised: Tensor, sigma: Real, predict: str) -> Tensor:
    """Return the value at a point: D, or the slope `(x − D)/sigma`."""
    return denoised if predict == "data" else (x - denoised) / sigma


def total(values: Sequence[Tensor], weights: Sequence[Real]) -> Tensor:
    """Return `Σ_k q_k·v_k`; not all weights are 0."""
    terms = [(v, w) for v, w in zip(values, weights, strict=True) if not (isinstance(w, float) and w == 0)]
    (value, weight), *rest = terms
    if len(rest) == 1 and isinstance(weight, float) and isinstance(rest[0][1], float):
        if abs(weight + rest[0][1] - 1) < 1e-14 * (1 + abs(weight)):
            return torch.lerp(rest[0][0], value, weight)  # one fused operation
    result = value if isinstance(weight, float) and weight == 1 else value * weight
    for value, weight in rest:
        result = torch.add(result, value, alpha=weight) if isinstance(weight, float) else result + weight * value
    return result


def advance(
    x: Tensor, values: Sequence[Tensor], weights: Sequence[Real], sigma: Real, sigma_next: Real, predict: str
) -> Tensor:
    """Return Euler's step with a weighted mean of values: of D, or of slopes."""
    if predict == "data":
        return toward(x, total(values, weights), sigma, sigma_next)
    length = sigma_next - sigma
    return total((x, *values), (1.0, *(length * weight for weight in weights)))


@dataclass(frozen=True, slots=True, eq=False)
class Past:
    """Values and where they were taken, newest first; kept in `memory` as tensors whose axis 0 is the batch.

    A noise level is the same for all samples, and is kept as (B,) float64 on the CPU, whatever the device of x: it
    decides coefficients, and to read it must not wait for a device.
    """

    values: tuple[Tensor, ...] = ()
    sigmas: tuple[Real, ...] = ()

    @classmethod
    def recall(cls, memory: tuple[Tensor, ...]) -> Past:
        """Read what `memory` of the previous step holds."""
        return cls(memory[::2], tuple(map(gathered, memory[1::2])))

    def with_newest(self, value: Tensor, sigma: Real) -> Past:
        """Return the past with one more value."""
        return Past((value, *self.values), (sigma, *self.sigmas))

    def memory(self, count: int) -> tuple[Tensor, ...]:
        """Return the newest `count` values as memory for the next step."""
        pairs = zip(self.values[:count], self.sigmas[:count], strict=True)
        return tuple(part for value, sigma in pairs for part in (value, spread(sigma, len(value))))


def gathered(levels: Tensor) -> Real:
    """Return the one noise level that `spread` wrote down; NaN for an empty batch, where it decides nothing."""
    return number(levels[0]) if len(levels) else math.nan


def spread(sigma: Real, count: int) -> Tensor:
    """Return a noise level as (B,) float64 on the CPU, without copying it B times."""
    return tensor_of(sigma).expand(count)


def linear_step(
    denoiser: Denoiser,
    x: Tensor,
    span: Span,
    memory: tuple[Tensor, ...],
    weigh: Weigh,
    *,
    order: int,
    keep: int,
    predict: str,
) -> Step:
    """Take one step of a linear multistep method: Euler's step with a weighted mean of the newest values.

    Args:
        denoiser: D(x, sigma), called once.
        x: the state at the start of the interval.
        span: the interval.
        memory: what the previous step returned.
        weigh: gives the weights for some noise levels, newest first, and sigma'.
        order: how many values may be used here; fewer where the run has not seen so many.
        keep: how many values the next step may want.
        predict: "data" or "noise".
    """
    sigma, sigma_next = number(span.sigma), number(span.sigma_next)
    denoised = denoiser(x, span.sigma)
    past = Past.recall(memory).with_newest(value_of(x, denoised, sigma, predict), sigma)
    count = min(order, len(past.values))
    if count == 1:
        x_next = toward(x, denoised, sigma, sigma_next)
    else:
        weights = weigh(past.sigmas[:count], sigma_next)
        x_next = advance(x, past.values[:count], weights, sigma, sigma_next, predict)
    return Step(x_next, denoised, memory=past.memory(keep))


def staged(
    denoiser: Denoiser, x: Tensor, span: Span, rows: Sequence[Row], *, predict: str, log: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Take one step of a Runge–Kutta method, written as Euler steps from the start with means of the stages' values.

    Args:
        denoiser: D(x, sigma), called once per row.
        x: the state at the start of the interval.
        span: the interval, which ends above 0.
        rows: one for each further stage, and the last for the end of the interval; weights sum to 1.
        predict: "data" or "noise".
        log: shares of the interval are of log sigma, not of sigma.

    Returns:
        x at the end, D at the start, and the value of every stage.
    """
    sigma, sigma_next = number(span.sigma), number(span.sigma_next)
    denoised = denoiser(x, span.sigma)
    values = [value_of(x, denoised, sigma, predict)]
    for share, weights in rows[:-1]:
        level = sigma_next if share == 1 else between(sigma, sigma_next, share, log=log)
        y = advance(x, values[: len(weights)], weights, sigma, level, predict)
        values.append(value_of(y, denoiser(y, tensor_of(level)), level, predict))
    return advance(x, values, rows[-1][1], sigma, sigma_next, predict), denoised, values

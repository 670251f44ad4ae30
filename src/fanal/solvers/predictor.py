"""UniPC: a multistep predictor, corrected for free once the next step has asked the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fanal.denoiser import Denoiser
from fanal.sampling import Span, Step, finish
from fanal.solvers.arithmetic import (
    PREDICT,
    Past,
    advance,
    allowed,
    check_choice,
    check_lower,
    check_order,
    gathered,
    spread,
    total,
    value_of,
)
from fanal.solvers.coefficients import Real, number, phi, plain
from fanal.solvers.multistep import exact_weights, log_units

__all__ = ["UniPC"]


@dataclass(frozen=True)
class UniPC:
    """Unified predictor–corrector, one call per step (Zhao et al. 2023, arXiv:2302.04867).

    The prediction is an exponential Adams–Bashforth step in log sigma. The network's answer there serves twice: it
    corrects the step that led there (an Adams–Moulton step, which knows its end), and it starts the next one. So a
    state of the trajectory is the prediction, and its correction is part of the next step, as in diffusers; the last
    step is not corrected. The correction is added to the state: what a wrapper has done to it in between stays.

    With three or more values the weights are the exact integral of the polynomial through them, and the variants
    agree. They differ in the predictor from two values and the corrector from one: bh1 takes half the difference times
    1/φ_1(z), bh2 half, vary the exact φ_2/φ_1.

    Attributes:
        order: number of values of the predictor, 1 to 3; the corrector has one more.
        variant: "bh1", "bh2" or "vary".
        lower_final: lower the order on the last steps: "always", "never", or N, on grids of fewer than N intervals.
        predict: "data" or "noise".
    """

    order: int = 2
    variant: str = "bh2"
    lower_final: str | int = "always"
    predict: str = "data"

    def __post_init__(self) -> None:
        check_order("unipc", self.order, 3)
        check_choice("variant of unipc", self.variant, ("bh1", "bh2", "vary"))
        check_choice("predict of unipc", self.predict, PREDICT)
        check_lower(self.lower_final)

    def _weights(self, nodes: Sequence[Real], h: Real) -> Sequence[Real]:
        """Weights of the values at `nodes`, the first of which is the start of the interval."""
        z = -h if self.predict == "data" else h
        if len(nodes) != 2 or self.variant == "vary":
            return exact_weights(nodes, z)
        share = 0.5 / phi(1, z) if self.variant == "bh1" else 0.5
        other = share / nodes[1]
        return 1 - other, other

    def _corrected(self, x: Tensor, value: Tensor, sigma: Real, past: Past, order: int) -> Tensor:
        """Add to the predicted state what the value there says about the step that led to it."""
        sigmas, values = past.sigmas[:order], past.values[:order]
        nodes, h = log_units(sigmas, sigma)
        before = self._weights(nodes, h) if order > 1 else (1.0,)
        # The new value is at s = 1, beside the old ones.
        after = self._weights((nodes[0], 1.0, *nodes[1:]), h)
        change = (after[0] - before[0], after[1], *(a - b for a, b in zip(after[2:], before[1:], strict=True)))
        length = 1 - sigma / sigmas[0] if self.predict == "data" else sigma - sigmas[0]
        return total((x, values[0], value, *values[1:]), (1.0, *(length * weight for weight in change)))

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with one call: correct the last step, then predict."""
        if span.sigma_next == 0:
            return finish(denoiser, x, span)
        denoised = denoiser(x, span.sigma)
        sigma, sigma_next = number(span.sigma), number(span.sigma_next)
        value, state, past = value_of(x, denoised, sigma, self.predict), x, Past.recall(memory[1:])
        left = span.n - span.i
        # A wrapper may have led somewhere else than predicted, e.g. up in sigma; then there is nothing to correct.
        if memory and plain(gathered(memory[0])) == plain(sigma):
            order = min(allowed(self.order, self.lower_final, span.n, left + 1), len(past.values))
            state = self._corrected(x, value, sigma, past, order)
        past = past.with_newest(value, sigma)
        order = min(allowed(self.order, self.lower_final, span.n, left), len(past.values))
        weights = self._weights(*log_units(past.sigmas[:order], sigma_next)) if order > 1 else (1.0,)
        x_next = advance(state, past.values[:order], weights, sigma, sigma_next, self.predict)
        return Step(x_next, denoised, memory=(spread(sigma_next, len(x)), *past.memory(self.order)))

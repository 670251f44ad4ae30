"""Guidance: Denoiser→Denoiser, so that it composes with every solver and schedule.

Each adds something to the prediction D: a difference of two denoisers (classifier-free guidance, autoguidance), or
`scale·sigma²·∇ log h(x)` for an h that says how well x fits (a classifier, a reward, a measurement).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import Conditional, Denoiser, Labelled, Wrapper, expand, take
from fanal.errors import FanalError

__all__ = ["Classifier", "ClassifierFree", "Inverse", "Reward"]

Window = tuple[float, float]


def _check_window(window: Window | None) -> Window | None:
    if window is not None and not (len(window) == 2 and 0 <= window[0] <= window[1]):
        raise FanalError(f"a window of guidance is (low, high) in sigma with 0 <= low <= high, got {window!r}")
    return window


def _rows_of(scale: float | Tensor, rows: Tensor) -> float | Tensor:
    """The scales of some samples, where there is one per sample."""
    return scale[rows.to(scale.device)] if isinstance(scale, Tensor) and scale.ndim else scale


def _per_sample(scale: float | Tensor, x: Tensor) -> Tensor | None:
    """One scale per sample with the trailing axes of x; None: one number for all.

    Raises:
        FanalError: there is one scale per sample, for another batch size.
    """
    if not isinstance(scale, Tensor) or scale.ndim == 0:
        return None
    if len(scale) != len(x):
        raise FanalError(f"{len(scale)} scales of guidance are bound, for a batch of {len(x)}")
    return expand(scale.to(x), x)


def _inside(sigma: Tensor, window: Window | None) -> Tensor:
    """Which noise levels lie in the window, of the shape of sigma."""
    return torch.ones_like(sigma, dtype=torch.bool) if window is None else (sigma >= window[0]) & (sigma <= window[1])


class ClassifierFree(Wrapper):
    """`D_w = D_u + w·(D_c − D_u)` (Ho & Salimans 2022): w = 0 unconditional, 1 conditional, above 1 guided.

    At w = 1 and w = 0, and outside the window, only the denoiser that matters is called, so those are exact and cost
    one call. Where both are one network with different labels, it is called once, with both halves in one batch.

    With a weaker version of the same model in place of D_u it is autoguidance (Karras et al. 2024,
    arXiv:2406.02507); a negative scale leads away from the condition.

    Args:
        denoiser: the conditional denoiser D_c; its shape and range are passed through.
        unconditional: D_u.
        scale: w, one number or (B,), one per sample.
        window: closed range of sigma in which it acts, D_c outside it (Kynkäänniemi et al. 2024, arXiv:2404.07724);
            None: everywhere.

    Raises:
        FanalError: the window is none.
    """

    def __init__(
        self, denoiser: Denoiser, unconditional: Denoiser, scale: float | Tensor, window: Window | None = None
    ) -> None:
        super().__init__(denoiser)
        self.unconditional, self.scale, self.window = unconditional, scale, _check_window(window)

    def parts(self) -> tuple[Denoiser, ...]:
        """Return both denoisers, so that calls of either are counted."""
        return (self.denoiser, self.unconditional)

    def taking(self, rows: Tensor) -> Denoiser:
        """Return the guidance of these rows."""
        parts = take(self.denoiser, rows), take(self.unconditional, rows)
        return ClassifierFree(*parts, _rows_of(self.scale, rows), self.window)

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
        """Return the guided prediction.

        Raises:
            FanalError: there is one scale per sample, for another batch size.
        """
        acts = _inside(sigma, self.window)
        if not bool(acts.any()):
            return self.denoiser(x, sigma)
        scale = _per_sample(self.scale, x)
        if scale is None:
            scale = float(self.scale)
            if scale == 1:
                return self.denoiser(x, sigma)
            if scale == 0 and bool(acts.all()):
                return self.unconditional(x, sigma)
        told, free = self._both(x, sigma)
        guided = free + scale * (told - free)
        return guided if bool(acts.all()) else torch.where(expand(acts.to(x.device), x), guided, told)


def _leaf(x: Tensor) -> Tensor:
    """x as what a gradient is taken in.

    Raises:
        FanalError: the guided prediction is itself being differentiated.
    """
    try:
        if not (x.requires_grad and torch.is_grad_enabled()):
            return x.detach().requires_grad_()
    except RuntimeError:  # in forward mode
        pass
    raise FanalError(
        "guidance by a gradient cannot be differentiated itself: take a solver that needs no derivative, such as heun "
        "instead of taylor2, and rods with product=difference"
    )


class _Pushing(Wrapper, ABC):
    """`D + scale·push` in a window of sigma, D outside it: what all guidance by derivatives is."""

    def __init__(self, denoiser: Denoiser, scale: float | Tensor, window: Window | None) -> None:
        super().__init__(denoiser)
        self.scale, self.window = scale, _check_window(window)

    def taking(self, rows: Tensor) -> Denoiser:
        """Return the guidance of these rows."""
        other = copy.copy(self)
        other.denoiser, other.scale = take(self.denoiser, rows), _rows_of(self.scale, rows)
        return cast(Denoiser, other)

    @abstractmethod
    def _pushed(self, x: Tensor, sigma: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """The prediction at a leaf x and what is added to it at scale 1; `level` is sigma², 0 outside the window."""

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """Return the guided prediction; where it does not act, the denoiser's own, at one call.

        Raises:
            FanalError: the gradient does not reach x, values do not have the right shape, there is one scale per
                sample, for another batch size, or the guided prediction is itself being differentiated.
        """
        acts, scale = _inside(sigma, self.window), _per_sample(self.scale, x)
        if (scale is None and self.scale == 0) or not bool(acts.any()):
            return self.denoiser(x, sigma)
        level = expand(torch.where(acts, sigma**2, 0.0).to(x), x)  # outside it sigma may be infinite
        denoised, push = self._pushed(_leaf(x), sigma, level)
        return denoised.detach() + (self.scale if scale is None else scale) * push


class _Ascending(_Pushing):
    """`D + scale·sigma²·∇ log h(x, sigma)`, one backward pass beside the denoiser's call."""

    @abstractmethod
    def _value(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Float[Tensor, " b"]]:
        """The prediction and log h, with a graph to x."""

    def _pushed(self, x: Tensor, sigma: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            denoised, value = self._value(x, sigma)
            if value.shape != (len(x),):
                raise FanalError(f"guidance needs one number per sample, got shape {tuple(value.shape)}")
            if not value.requires_grad:
                raise FanalError("guidance needs a value that can be differentiated in x")
            (gradient,) = torch.autograd.grad(value.sum(), x)
        return denoised, level * gradient


class Classifier(_Ascending):
    """`D + w·sigma²·∇_x log p(c | x, sigma)` (Dhariwal & Nichol 2021); with the exact classifier, w = 1 is D_c.

    Args:
        denoiser: the unconditional denoiser.
        log_probability: (x, sigma) → log p(c | x; sigma), (B,), differentiable in x.
        scale: w, one number or (B,), one per sample.
        window: closed range of sigma in which it acts; None: everywhere.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        log_probability: Callable[[Tensor, Tensor], Tensor],
        scale: float | Tensor = 1.0,
        window: Window | None = None,
    ) -> None:
        super().__init__(denoiser, scale, window)
        self.log_probability = log_probability

    def _value(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            denoised = self.denoiser(x, sigma)
        return denoised, self.log_probability(x, sigma)


class Reward(_Ascending):
    """`D + w·sigma²·∇_x r(D(x, sigma))`: towards samples whose prediction a reward likes, or an energy dislikes less.

    The gradient goes through the denoiser (Chung et al. 2023, arXiv:2209.14687, have a measurement's likelihood for r).
    Exact where r is linear: `E exp(r)` is then `exp(r(D))` up to a factor that does not depend on x for Gaussian data.

    Args:
        denoiser: what to guide.
        reward: denoised (B, *shape) → (B,), in nats, differentiable.
        scale: w, one number or (B,), one per sample.
        window: closed range of sigma in which it acts; None: everywhere.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        reward: Callable[[Tensor], Tensor],
        scale: float | Tensor = 1.0,
        window: Window | None = None,
    ) -> None:
        super().__init__(denoiser, scale, window)
        self.reward = reward

    def _value(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        denoised = self.denoiser(x, sigma)
        return denoised, self.reward(denoised)


class Inverse(_Pushing):
    """The posterior mean given a linear measurement `y = A x0 + s·n`, its covariance taken from the denoiser.

    `D + w·C Aᵀ (A C Aᵀ + s² I)⁻¹ (y − A D)` with `C = sigma²·∂D/∂x`, the covariance of x0 given x (Boys et al. 2023,
    arXiv:2310.06721; Rozet et al. 2024, arXiv:2405.13712): at w = 1 exact for Gaussian data. The system is solved by
    conjugate gradients, one Jacobian product each, and one more turns the solution into the step.

    Args:
        denoiser: of the data, without the measurement.
        operator: A, from (B, *shape) to (B, m), linear and differentiable.
        measured: y, (m,) for all samples.
        noise: s, standard deviation of the measurement's noise, above 0.
        iterations: of conjugate gradients, at most.
        scale: w, one number or (B,), one per sample.
        window: closed range of sigma in which it acts; None: everywhere.

    Raises:
        FanalError: the noise is not positive, or the window is none.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        operator: Callable[[Tensor], Tensor],
        measured: Float[Tensor, " m"],
        noise: float,
        iterations: int = 10,
        scale: float | Tensor = 1.0,
        window: Window | None = None,
    ) -> None:
        super().__init__(denoiser, scale, window)
        if not noise > 0:
            raise FanalError(f"the noise of a measurement must be positive, got {noise}")
        self.operator, self.measured, self.noise, self.iterations = operator, measured, noise, iterations

    def _pushed(self, x: Tensor, sigma: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            denoised = self.denoiser(x, sigma)
            seen = self.operator(denoised)
        if seen.shape != (len(x), *self.measured.shape) or self.measured.ndim != 1:
            raise FanalError(
                f"a measurement (m,) needs an operator from (B, *shape) to (B, m), got {tuple(self.measured.shape)} "
                f"and {tuple(seen.shape)} for a batch of {len(x)}"
            )
        if not seen.requires_grad:
            raise FanalError("guidance by a measurement needs an operator and a denoiser that can be differentiated")

        def spread(v: Tensor) -> Tensor:  # C Aᵀ v; the Jacobian of a denoiser is symmetric
            (pulled,) = torch.autograd.grad(seen, x, v, retain_graph=True)
            return level * pulled

        with torch.no_grad():
            residual = self.measured.to(seen) - seen
            solved = self._solve(lambda v: self.operator(spread(v)) + self.noise**2 * v, residual)
            return denoised, spread(solved)

    def _solve(self, system: Callable[[Tensor], Tensor], goal: Tensor) -> Tensor:
        """Conjugate gradients for a batch of systems."""
        out, left = torch.zeros_like(goal), goal.clone()
        way, size = left.clone(), (left**2).sum(1, keepdim=True)
        first = size.clone()
        for _ in range(self.iterations):
            if bool((size <= 1e-20 * first.clamp_min(1e-300)).all()):
                break
            moved = system(way)
            bend = (way * moved).sum(1, keepdim=True)
            # A network's Jacobian is no exact covariance: where it bends the other way there is no minimum to go to.
            step = torch.where(bend > 0, size / bend.clamp_min(torch.finfo(goal.dtype).tiny), 0.0)
            out, left = out + step * way, left - step * moved
            new = (left**2).sum(1, keepdim=True)
            way, size = left + new / size.clamp_min(torch.finfo(goal.dtype).tiny) * way, new
        return out

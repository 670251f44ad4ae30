"""Linear processes `dz = f(t)·z dt + g(t) dw`: from f and g to s and sigma and back, and a Denoiser from any network.

All of them are one process up to scale ([GEO] prop. 7, [REG] lemma 4): with `x = z/s(t)` and `sigma = sigma(t)` a
network that was trained in z-space becomes a `Denoiser`, and every solver of fanal applies. Nothing else knows t.

    z = s(t)·(x0 + sigma(t)·n)                                             [REG] eq. 2
    f = d ln s/dt                      g = s·sqrt(d(sigma²)/dt)            [GEO] eq. 21
    s = s(t_min)·exp ∫f dt             sigma² = sigma(t_min)² + ∫(g/s)² dt [GEO] eq. 20
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fanal.adapters.predictions import PREDICTIONS, denoised_of
from fanal.denoiser import expand
from fanal.errors import FanalError, unknown_name
from fanal.sde.integrals import antiderivative, slope_in_time

__all__ = ["LinearProcess", "ProcessDenoiser", "checked", "linear_process"]

TimeFunction = Callable[[Tensor], Tensor]
"""A function of t: float64 in, float64 of the same shape out, by operations of torch."""

_NODES = 257  # where a new process is looked at
_NUDGES = (1e-30, 1e-12)  # of the range of t: how far inside a slope is taken that does not exist at the end
_CLOSE, _ITERATIONS = 5e-16, 300  # of a search for a time
_SMALLEST = 0.002  # the sigma_min of a denoiser whose process starts at 0


@dataclass(frozen=True, eq=False)
class LinearProcess:
    """A linear process on `[t_min, t_max]`; make one with `linear_process`, or take a named one.

    Attributes:
        s: scale of the data, positive; a function of t (a number or a tensor; float64 out), as the next three.
        sigma: noise level, increasing.
        f: drift coefficient, `d ln s/dt`.
        g: diffusion coefficient, `s·sqrt(d(sigma²)/dt)`.
        t_min: first time.
        t_max: last time.
        inverse: `sigma → t` in closed form; None: `t_of_sigma` searches for it.
    """

    s: TimeFunction
    sigma: TimeFunction
    f: TimeFunction
    g: TimeFunction
    t_min: float
    t_max: float
    inverse: TimeFunction | None = None

    @property
    def sigma_min(self) -> float:
        """Noise level at t_min."""
        return float(self.sigma(_time(self.t_min)))

    @property
    def sigma_max(self) -> float:
        """Noise level at t_max."""
        return float(self.sigma(_time(self.t_max)))

    def t_of_sigma(self, sigma: Tensor | float) -> Float[Tensor, "*b"]:
        """Return the time at which the noise level is sigma, float64.

        Raises:
            FanalError: a noise level is outside of `[sigma_min, sigma_max]`.
        """
        level = _time(sigma)
        low, high = self.sigma_min, self.sigma_max
        slack = 2e-7 * high  # a float32 sigma may round beyond the end
        if not bool(((level >= low - slack) & (level <= high + slack)).all()):
            raise FanalError(
                f"this process has noise levels from {low:.6g} to {high:.6g}, got {float(level.min()):.6g} to "
                f"{float(level.max()):.6g}: choose another range of sigma, or a larger t_max"
            )
        level = level.clamp(low, high)
        if self.inverse is not None:
            return self.inverse(level).clamp(self.t_min, self.t_max)
        from scipy.optimize import elementwise

        def beyond(t: Any, target: Any) -> Any:
            return self.sigma(torch.as_tensor(t).clamp(self.t_min, self.t_max)).numpy() - target

        close = {"xatol": _CLOSE * (self.t_max - self.t_min), "xrtol": _CLOSE, "fatol": 0.0, "frtol": 0.0}
        ends = (np.float64(self.t_min), np.float64(self.t_max))
        found = elementwise.find_root(beyond, ends, args=(level.numpy(),), tolerances=close, maxiter=_ITERATIONS)
        if not np.all(found.success):
            raise FanalError(f"no time with sigma from {float(level.min()):.6g} to {float(level.max()):.6g} was found")
        return torch.as_tensor(np.asarray(found.x), dtype=torch.float64).reshape(level.shape)

    def perturb(
        self, x0: Float[Tensor, "b *d"], t: Tensor | float, noise: Float[Tensor, "b *d"]
    ) -> Float[Tensor, "b *d"]:
        """Return `z = s·(x0 + sigma·noise)`, whose law given x0 is N(s·x0, s²·sigma²) for standard normal noise."""
        return _like(self.s(_time(t)), x0) * (x0 + _like(self.sigma(_time(t)), x0) * noise)

    def to_x(self, z: Float[Tensor, "b *d"], t: Tensor | float) -> Float[Tensor, "b *d"]:
        """Return `x = z/s`, where the noise level is `sigma(t)` ([REG] lemma 4)."""
        return z / _like(self.s(_time(t)), z)

    def from_x(self, x: Float[Tensor, "b *d"], t: Tensor | float) -> Float[Tensor, "b *d"]:
        """Return `z = s·x`, the inverse of `to_x`."""
        return _like(self.s(_time(t)), x) * x

    def kernel(self, start: Tensor | float, end: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return `scale, std` of the transition: `z_end = scale·z_start + std·n`, `n ~ N(0, I)`.

            scale = s_end/s_start        std = s_end·sqrt(sigma_end² − sigma_start²)

        Raises:
            FanalError: it goes back in time.
        """
        a, b = _time(start), _time(end)
        if not bool((b >= a).all()):
            raise FanalError("a transition goes forward in time: end must not lie before start")
        low, high = self.sigma(a), self.sigma(b)
        return self.s(b) / self.s(a), self.s(b) * ((high - low) * (high + low)).clamp_min(0).sqrt()

    def denoiser(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        prediction: str,
        shape: tuple[int, ...],
        sigma_min: float | None = None,
    ) -> ProcessDenoiser:
        """Make a Denoiser of a network that was trained on this process; see `ProcessDenoiser`."""
        return ProcessDenoiser(self, network, prediction, shape, sigma_min)


class ProcessDenoiser:
    """`D(x, sigma)` from a network in z-space: it is fed `z = s·x` and t, and its answer is converted.

    | prediction | the network answers | D |
    | --- | --- | --- |
    | `sample` | E[x0 given z] | the answer |
    | `epsilon` | E[n given z] | `x − sigma·answer` |
    | `score` | `∇_z log p_t(z)` | `x + s·sigma²·answer` ([REG] eq. 6) |
    | `velocity` | dz/dt of the probability flow | `x − 2·s·sigma²·(answer − f·z)/g²` ([REG] eq. 10) |
    | `v_prediction` | `s·n − s·sigma·x0` | see `fanal.adapters.predictions`; variance-preserving processes only |
    | `flow_prediction` | `n − x0` | see there; `flow` only |

    Args:
        process: what the network was trained on.
        network: a function of z (B, *shape) and t (B,), in the dtype and on the device of z.
        prediction: what it answers.
        shape: shape of one sample.
        sigma_min: smallest noise level to tell; None: that of the process, or 0.002 if that is 0.

    Raises:
        FanalError: the prediction is unknown or does not belong to the process.
    """

    def __init__(
        self,
        process: LinearProcess,
        network: Callable[[Tensor, Tensor], Tensor],
        prediction: str,
        shape: tuple[int, ...],
        sigma_min: float | None = None,
    ) -> None:
        known = (*PREDICTIONS, "velocity")
        if prediction not in known:
            raise unknown_name("prediction", prediction, known)
        t = torch.linspace(process.t_min, process.t_max, 9, dtype=torch.float64)
        s, sigma = process.s(t), process.sigma(t)
        preserved = {"v_prediction": s**2 * (1 + sigma**2), "flow_prediction": s * (1 + sigma)}.get(prediction)
        if preserved is not None and not torch.allclose(preserved, torch.ones_like(t), rtol=0, atol=1e-6):
            kind = "variance-preserving process" if prediction == "v_prediction" else "process with s = 1/(1 + sigma)"
            raise FanalError(
                f"{prediction} belongs to a {kind}, which this one is not: take epsilon, sample or velocity"
            )
        self.process, self.network, self.prediction, self.shape = process, network, prediction, tuple(shape)
        self.sigma_min = (process.sigma_min or _SMALLEST) if sigma_min is None else float(sigma_min)
        self.sigma_max = process.sigma_max

    def __call__(self, x: Float[Tensor, "b *d"], sigma: Tensor, /) -> Float[Tensor, "b *d"]:
        """Return D(x, sigma), with the shape and dtype of x.

        Raises:
            FanalError: sigma is outside of the process's noise levels.
        """
        process, t = self.process, self.process.t_of_sigma(sigma)
        z = process.from_x(x, t)
        output = self.network(z, t.to(x.dtype).to(x.device).expand(len(x))).to(x.dtype)
        if self.prediction == "velocity":
            gain = process.g(t) ** 2 / (2 * process.s(t))
            score = (_like(process.f(t), z) * z - output) / _like(gain, z)
            return denoised_of(score, x, sigma, "score")
        if self.prediction == "score":
            output = _like(process.s(t), x) * output
        return denoised_of(output, x, sigma, self.prediction)


def linear_process(
    *,
    s: TimeFunction | None = None,
    sigma: TimeFunction | None = None,
    f: TimeFunction | None = None,
    g: TimeFunction | None = None,
    t_min: float = 0.0,
    t_max: float = 1.0,
    s_min: float | None = None,
    sigma_min: float | None = None,
) -> LinearProcess:
    """Make a linear process from `s` and `sigma`, or from `f` and `g`; the other two follow.

    Slopes are taken by automatic differentiation, integrals by Gauss–Legendre rules on intervals that are halved until
    they agree to 1e-12. Where a slope does not exist at an end (`sqrt(t)` at 0), it is taken up to 1e-12 of the range
    inside.

    Args:
        s: scale of the data, positive.
        sigma: noise level, increasing from at least 0.
        f: drift coefficient.
        g: diffusion coefficient, at least 0.
        t_min: first time.
        t_max: last time.
        s_min: s at t_min, with f and g; None: 1.
        sigma_min: sigma at t_min, with f and g; None: 0.

    Raises:
        FanalError: another combination of functions, or values that no such process has (the message names t).

    Source: [GEO] eqs. 20 and 21; [REG] sec. 2.1.
    """
    if not -math.inf < t_min < t_max < math.inf:
        raise FanalError(f"need finite t_min < t_max, got {t_min} and {t_max}")
    if s is not None and sigma is not None and f is None and g is None:
        if s_min is not None or sigma_min is not None:
            raise FanalError("s_min and sigma_min go with f and g; s and sigma say themselves where they start")
        return checked(*_with_slopes(s, sigma, t_min, t_max), t_min, t_max)
    if f is not None and g is not None and s is None and sigma is None:
        start = (1.0 if s_min is None else s_min, 0.0 if sigma_min is None else sigma_min)
        s, sigma = _with_integrals(f, g, t_min, t_max, *start)
        return checked(s, sigma, f, g, t_min, t_max)
    given = [name for name, value in (("s", s), ("sigma", sigma), ("f", f), ("g", g)) if value is not None]
    raise FanalError(f"give s and sigma, or f and g, got {' and '.join(given) or 'nothing'}")


def _with_slopes(
    s: TimeFunction, sigma: TimeFunction, t_min: float, t_max: float
) -> tuple[TimeFunction, TimeFunction, TimeFunction, TimeFunction]:
    """Complete s and sigma by f and g."""

    def slope_of(function: TimeFunction, t: Tensor) -> Tensor:
        slope = slope_in_time(function, t)
        for nudge in _NUDGES:
            bad = ~torch.isfinite(slope)
            if not bool(bad.any()):
                break
            reach = nudge * (t_max - t_min)
            slope = torch.where(bad, slope_in_time(function, t.clamp(t_min + reach, t_max - reach)), slope)
        return slope

    def f(t: Tensor) -> Tensor:
        return slope_of(lambda u: _value(s, u).log(), t)

    def g(t: Tensor) -> Tensor:
        return _value(s, t) * slope_of(lambda u: _value(sigma, u) ** 2, t).sqrt()

    return s, sigma, f, g


def _with_integrals(
    f: TimeFunction, g: TimeFunction, t_min: float, t_max: float, s_min: float, sigma_min: float
) -> tuple[TimeFunction, TimeFunction]:
    """Return s and sigma of f and g."""
    if not 0 < s_min < math.inf or not 0 <= sigma_min < math.inf:
        raise FanalError(f"s_min must be positive and sigma_min at least 0, got {s_min} and {sigma_min}")
    log_scale = antiderivative(lambda t: _value(f, t), t_min, t_max)

    def s(t: Tensor) -> Tensor:
        return s_min * log_scale(t).exp()

    variance = antiderivative(lambda t: (_value(g, t) / s(t)) ** 2, t_min, t_max)
    return s, lambda t: (sigma_min**2 + variance(t)).sqrt()


def checked(
    s: TimeFunction,
    sigma: TimeFunction,
    f: TimeFunction,
    g: TimeFunction,
    t_min: float,
    t_max: float,
    inverse: TimeFunction | None = None,
) -> LinearProcess:
    """Make a process of four functions: look at them on a grid, let them take numbers, refuse times out of range.

    Args:
        s: scale of the data.
        sigma: noise level.
        f: drift coefficient.
        g: diffusion coefficient; that these belong to s and sigma is not checked.
        t_min: first time.
        t_max: last time.
        inverse: `sigma → t`, if there is a closed form.

    Raises:
        FanalError: the functions have values that no such process has; the message names t.
    """
    t = torch.linspace(t_min, t_max, _NODES, dtype=torch.float64)
    with torch.no_grad():
        values = {name: _value(own, t) for name, own in (("s", s), ("sigma", sigma), ("f", f), ("g", g))}
    good = {name: torch.isfinite(value) for name, value in values.items()}
    good["s"] &= values["s"] > 0
    good["sigma"] &= values["sigma"] >= 0
    good["sigma"][1:] &= values["sigma"].diff() > 0
    good["g"] &= values["g"] >= 0
    rules = {"s": "positive", "sigma": "at least 0 and increasing", "f": "finite", "g": "at least 0"}
    for name, fine in good.items():
        if not bool(fine.all()):
            i = int((~fine).nonzero()[0])
            raise FanalError(
                f"{name}(t) must be {rules[name]} from t_min to t_max, got {float(values[name][i]):.6g} at t = "
                f"{float(t[i]):.6g}"
            )

    def of(function: TimeFunction) -> TimeFunction:
        def at(t: Tensor | float) -> Tensor:
            time = _time(t)
            if not bool(((time >= t_min) & (time <= t_max)).all()):
                low, high = float(time.min()), float(time.max())
                raise FanalError(f"this process runs from t = {t_min:.6g} to {t_max:.6g}, got {low:.6g} to {high:.6g}")
            return _value(function, time)

        return at

    return LinearProcess(of(s), of(sigma), of(f), of(g), float(t_min), float(t_max), inverse)


def _time(t: Tensor | float) -> Tensor:
    """A time or noise level in float64 on the CPU."""
    return torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64).to("cpu", torch.float64)


def _value(function: TimeFunction, t: Tensor) -> Tensor:
    """The function's value in float64 with the shape of t, also where it forgets that and returns a constant."""
    value = torch.as_tensor(function(t), dtype=torch.float64)
    if value.shape != t.shape and value.ndim:
        raise FanalError(f"a function of t must return the shape of t: got {tuple(value.shape)} for {tuple(t.shape)}")
    return value.expand(t.shape)


def _like(value: Tensor, x: Tensor) -> Tensor:
    """A value of t, 0-d or (B,), in the dtype and with the axes of x."""
    return value.to(x.dtype) if value.ndim == 0 else expand(value.to(x.dtype).to(x.device), x)

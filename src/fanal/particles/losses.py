"""The losses of score matching in the paper's time, sample by sample, and the floor that none of them goes below."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import Denoiser, expand
from fanal.errors import FanalError
from fanal.exact import Mixture
from fanal.particles.reverse import sigma_of

__all__ = ["Losses", "floor", "mean_floor", "posterior_variance"]

_NODES = 4001  # of the trapezoidal rule over x, which is exact to rounding for smooth, decaying functions
_REACH = 12.0  # standard deviations beyond the outermost means
_TIMES = 64  # Gauss–Legendre nodes over log t


@dataclass(frozen=True, eq=False)
class Losses:
    """Squared errors of one batch, each (B,); their means are the losses.

    Attributes:
        score: of the score ([PDE] eq. 4.26).
        foot: of the predicted mean to the true one, weighted c² (eq. 4.28); the same, up to rounding.
        total: of the predicted mean to x0 itself, weighted c² (eq. 4.30).
        noise: of the predicted noise, weighted 1/(1 − e^{−2t}) (eq. 4.33); the same as `total`.
        plain: of the predicted noise, not weighted (eq. 4.34).
    """

    score: Float[Tensor, " b"]
    foot: Float[Tensor, " b"]
    total: Float[Tensor, " b"]
    noise: Float[Tensor, " b"]
    plain: Float[Tensor, " b"]

    @classmethod
    def of(
        cls, denoiser: Denoiser, exact: Mixture, x0: Float[Tensor, "b *d"], times: Float[Tensor, " b"], normal: Tensor
    ) -> Losses:
        """Return a denoiser's squared errors on clean samples, at times and noise that are given.

        With `z = e^{−t}·x0 + sqrt(1 − e^{−2t})·n` and `c = e^{−t}/(1 − e^{−2t})`.

        Args:
            denoiser: what is judged, in x-space.
            exact: the law that x0 comes from.
            x0: (B, *shape).
            times: (B,), positive.
            normal: n, (B, *shape), standard normal.

        Raises:
            FanalError: a time is not positive.
        """
        if not bool((times > 0).all()):
            raise FanalError("losses need times above 0")
        t = expand(times.double(), x0)
        sigma = torch.expm1(2 * times.double()).sqrt()
        shrink, variance = (-t).exp(), -torch.expm1(-2 * t)
        z = shrink * x0 + variance.sqrt() * normal
        x = x0 + expand(sigma, x0) * normal
        with torch.no_grad():
            guess, mean = denoiser(x, sigma), exact(x, sigma)
        score, truth = (shrink * guess - z) / variance, exact.score(x, sigma) / shrink
        predicted = (z - shrink * guess) / variance.sqrt()
        weight = (shrink / variance).flatten() ** 2
        plain = _squares(predicted - normal)
        return cls(
            _squares(score - truth),
            weight * _squares(guess - mean),
            weight * _squares(guess - x0),
            plain / variance.flatten(),
            plain,
        )


def _squares(x: Tensor) -> Tensor:
    return x.flatten(1).square().sum(1)


def posterior_variance(mixture: Mixture, x: Float[Tensor, "b *d"], sigma: float) -> Float[Tensor, " b"]:
    """Return the trace of the covariance of x0 given x at a noise level, in closed form.

    Of components with posterior weights w, means m and variances v: `Σ w (d·v + |m|²) − |Σ w m|²`.

    Raises:
        FanalError: the mixture's components are not isotropic.
    """
    if mixture.std is None:
        raise FanalError("the posterior variance in closed form needs isotropic components: give the mixture std=")
    flat, level = x.flatten(1).double(), torch.tensor(sigma, dtype=torch.float64)
    weights, spread = mixture.weights(x, level), mixture.std**2
    keep = spread / (spread + level**2)
    means = mixture.means + keep[:, None] * (flat[:, None] - mixture.means)
    center = torch.einsum("bk,bkd->bd", weights, means)
    within = flat.shape[1] * (weights * (keep * level**2)).sum(1)
    return within + (weights * _distances(means, center)).sum(1)


def _distances(means: Tensor, center: Tensor) -> Tensor:
    return (means - center[:, None]).square().sum(2)


def floor(mixture: Mixture, time: float) -> float:
    """Return `E[c²·Var(X_0 | X_t)]`, what the total loss keeps at a time however good the denoiser ([PDE] eq. 4.29).

    The paper prints the variance of the conditional mean in its place. For data in one dimension; the expectation is a
    trapezoidal rule, exact to rounding. It equals `1/(1 − e^{−2t}) − J` with J the Fisher information of X_t, so it
    grows as `1/(2t)` towards t = 0, and the total loss over (0, T) is infinite for any data with a density.

    Raises:
        FanalError: the data are not one-dimensional, or the time is not positive.
    """
    if mixture.means.shape[1] != 1 or not time > 0:
        raise FanalError(f"the floor is for data in one dimension and times above 0, got time {time}")
    sigma = sigma_of(time)
    width = _REACH * math.hypot(float(torch.as_tensor(mixture.std).max()), sigma) if mixture.std is not None else 0.0
    low, high = float(mixture.means.min()) - width, float(mixture.means.max()) + width
    x = torch.linspace(low, high, _NODES, dtype=torch.float64)[:, None].reshape(-1, *mixture.shape)
    level = torch.tensor(sigma, dtype=torch.float64)
    density = mixture.log_density(x, level).exp()
    mean = float((density * posterior_variance(mixture, x, sigma)).sum() * (high - low) / (_NODES - 1))
    return mean * (math.exp(-time) / -math.expm1(-2 * time)) ** 2


def mean_floor(mixture: Mixture, early: float, end: float) -> float:
    """Return the floor's mean over times uniform in (early, end), by Gauss–Legendre's rule in log t.

    Raises:
        FanalError: not `0 < early < end`, or as `floor`.
    """
    if not 0 < early < end:
        raise FanalError(f"need 0 < early < end, got {early} and {end}")
    import numpy as np

    nodes, shares = np.polynomial.legendre.leggauss(_TIMES)
    reach = math.log(end / early) / 2
    times = early * np.exp(reach * (1 + nodes))
    return sum(w * reach * t * floor(mixture, float(t)) for t, w in zip(times, shares, strict=True)) / (end - early)

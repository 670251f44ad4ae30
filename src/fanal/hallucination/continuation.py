"""Sampling seen as a continuation method: −log p at a falling noise level, one cautious step at each ([RODS] 3, A.1).

With `f_t = −log p_t` and ∇f_t = (x − D(x, t))/t², Euler's step from t to t' is a step of gradient descent on f_t with
length `h = t(t − t')`, and to first order in h the proximal step

    prox(x) = argmin_y f_t(y) + ‖y − x‖²/2h          [RODS] theorem 2

The paper writes the ODE without the factor t, so its step length is t − t'; here it is that of x-space.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import Denoiser, expand
from fanal.errors import FanalError, is_number
from fanal.exact import Mixture
from fanal.exact.gaussian import accumulator, flat
from fanal.hallucination.regions import norms
from fanal.sampling import Span, Step, finish

__all__ = ["Descent", "Proximal", "continuation", "modes", "offset", "proximal", "relaxed", "step_length"]

Objective = Callable[[Tensor], Tensor]


def _spread(law: Mixture) -> float:
    """The one std of all components, which theorem 1 asks for."""
    if law.std is None or not bool((law.std == law.std[0]).all()) or not float(law.std[0]) > 0:
        raise FanalError(
            "theorem 1 holds for a mixture whose components share one std above 0: Mixture(means, weights, std=0.3)"
        )
    return float(law.std[0])


def relaxed(law: Mixture, x: Float[Tensor, "b *d"], sigma: Tensor | float) -> Float[Tensor, " b"]:
    """Return theorem 1's objective: −log p_0 and a term that smooths it.

    `f_t(x) = −log p_0(x) − log Σ_k w̃_k(x)·exp(‖x − m_k‖²·t²/(2s²(s² + t²)))`, with the posteriors w̃ of the components
    given x at t = 0 and their std s ([RODS] theorem 1). In any dimension `−log p_t = f_t + offset`; at t = 0 the second
    term is 0.

    Args:
        law: the mixture; its components share one std.
        x: points.
        sigma: t, at least 0.

    Raises:
        FanalError: the components differ in std.
    """
    s2 = _spread(law) ** 2
    points, zero = flat(x, torch.zeros(()), law.shape)
    level = torch.as_tensor(sigma, dtype=points.dtype).to(points.device).reshape(-1, 1)
    squares = ((points[:, None] - law.means.to(points)) ** 2).sum(2)
    pull = squares * level**2 / (2 * s2 * (s2 + level**2))
    # w̃·exp(pull) in logarithms: apart, the one underflows where the other overflows
    log_weights = torch.log_softmax(law._log_joint(points, zero), 1)
    return -law.log_density(x, torch.zeros(())) - torch.logsumexp(log_weights + pull, 1)


def offset(law: Mixture, sigma: float) -> float:
    """Return `−log p_t − f_t = (d/2)·log((s² + t²)/s²)`, a constant in x.

    The paper's proof has −½·log of the inverse, which is the case d = 1.

    Raises:
        FanalError: the components differ in std.
    """
    s2 = _spread(law) ** 2
    return law.means.shape[1] / 2 * math.log1p(sigma**2 / s2)


def step_length(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Return `h = sigma·(sigma − sigma')`: with it, gradient descent on −log p is Euler's step."""
    return sigma * (sigma - sigma_next)


def proximal(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    sigma: Tensor,
    length: Tensor | float,
    *,
    tolerance: float = 1e-10,
    most: int = 1000,
) -> Float[Tensor, "b *d"]:
    """Return `prox(x) = argmin_y −log p(y; sigma) + ‖y − x‖²/2h`, the solution near x.

    Where the gradient vanishes, `y = (x + a·D(y))/(1 + a)` with a = h/sigma² ([RODS] eq. 14 in terms of D); that map
    is iterated from x. It contracts where a/(1 + a) times the largest eigenvalue of D's Jacobian is below 1.

    Args:
        denoiser: D(x, sigma).
        x: where the step starts.
        sigma: noise level, above 0.
        length: h.
        tolerance: largest change of a sample in the last iteration, relative to the norm of the sample.
        most: iterations after which it is given up.

    Raises:
        FanalError: the iteration does not settle.
    """
    level = expand(sigma.to(x.device, accumulator(x)), x)
    share = torch.as_tensor(length, dtype=accumulator(x)).to(x.device)
    share = (share.reshape(-1, *[1] * (x.ndim - 1)) if share.ndim else share) / level**2
    y = x
    for _ in range(most):
        after = ((x + share * denoiser(y, sigma)) / (1 + share)).to(x.dtype)
        change, y = norms((after - y).detach()), after
        if bool((change <= tolerance * (1 + norms(y.detach()))).all()):
            return y
    raise FanalError(
        f"the proximal step at sigma = {float(sigma.max()):.3g} did not settle in {most} iterations: take more steps "
        "over the grid, so that each is shorter"
    )


@dataclass(frozen=True)
class Descent:
    """Algorithm 1 by its gradient: `x' = x − h·∇f`, ∇f = (x − D)/sigma² and h = sigma(sigma − sigma'); it is Euler."""

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` by one step of gradient descent on −log p at its noise level."""
        denoised = denoiser(x, span.sigma)
        gradient = (x - denoised) / span.sigma**2
        return Step(x - step_length(span.sigma, span.sigma_next) * gradient, denoised)


@dataclass(frozen=True)
class Proximal:
    """Algorithm 1 by its subproblems: each interval is a proximal step, `y = x − h·∇f(y)`; Euler to first order.

    Attributes:
        tolerance: as in `proximal`.
    """

    tolerance: float = 1e-10

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` by a proximal step, or into sigma = 0 as every method does."""
        if span.sigma_next == 0:
            return finish(denoiser, x, span)
        denoised = denoiser(x, span.sigma)
        length = step_length(span.sigma, span.sigma_next)
        return Step(proximal(denoiser, x, span.sigma, length, tolerance=self.tolerance), denoised)


def _minimized(objective: Objective, x: np.ndarray) -> np.ndarray:
    from scipy.optimize import minimize

    def both(point: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = torch.from_numpy(point).requires_grad_()
        value = objective(leaf[None])[0]
        (gradient,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), gradient.numpy()

    return minimize(both, x, jac=True, method="BFGS", options={"gtol": 1e-9}).x


def continuation(
    objective: Callable[[Tensor, float], Tensor],
    x: Float[Tensor, "b d"],
    strength: float,
    *,
    decay: float = 0.5,
    least: float = 1e-3,
) -> Float[Tensor, "n b d"]:
    """Return the path of the continuation method: minimize, weaken, and minimize again from there ([RODS] alg. 3).

    `x_{k+1} = argmin_y F(y, λ_k)` from x_k by BFGS (scipy), `λ_{k+1} = decay·λ_k` while λ is at least `least`, and a
    last minimization at λ = 0. With `F(y, λ) = f(y) + λ·R(y)` it is the paper's algorithm; with `F(y, λ) = −log p_λ(y)`
    it is diffusion's family of objectives, each minimized and not only descended on for a step.

    Args:
        objective: (points (B, d), λ) → (B,), differentiable in the points.
        x: initial guesses.
        strength: λ at first.
        decay: what it is multiplied with, above 0 and below 1.
        least: where it ends.

    Raises:
        FanalError: a number is out of range.
    """
    numbers = all(map(is_number, (strength, decay, least)))
    if not numbers or not 0 < decay < 1 or not 0 < least <= strength:
        raise FanalError(
            f"continuation needs 0 < decay < 1 and 0 < least <= strength, got {decay!r}, {least!r} and {strength!r}"
        )
    levels = [strength * decay**k for k in range(math.floor(math.log(least / strength) / math.log(decay) + 1e-9) + 1)]
    path = [x.cpu().double()]
    for level in [*levels, 0.0]:
        ends = [_minimized(lambda y, level=level: objective(y, level), point) for point in path[-1].numpy()]
        path.append(torch.from_numpy(np.stack(ends)))
    return torch.stack(path)


def modes(law: Mixture, sigma: float) -> Float[Tensor, "m d"]:
    """Return the modes of p_t: where the ascents of log p_t from all means and their midpoints end, each once.

    A mode that no such ascent reaches is not found; with components of one std that takes three or more of them in
    two or more dimensions.

    Args:
        law: a mixture.
        sigma: t, at least 0.
    """
    level, count = torch.tensor(float(sigma), dtype=torch.float64), len(law.means)
    pairs = torch.combinations(torch.arange(count), 2)
    starts = torch.cat([law.means, law.means[pairs].mean(1)]) if count > 1 else law.means

    def objective(y: Tensor) -> Tensor:
        return -law.log_density(y.reshape(-1, *law.shape), level)

    found: list[Tensor] = []
    scale = float((law.means - law.means.mean(0)).norm(dim=1).max()) + 1.0
    for start in starts:
        # a nudge, so that an ascent from a saddle, as a midpoint may be, leaves it
        nudge = 1e-4 * scale * torch.randn(start.shape, generator=torch.Generator().manual_seed(0)).double()
        end = torch.from_numpy(_minimized(objective, (start + nudge).numpy()))
        if all(float((end - other).norm()) > 1e-4 * scale for other in found):
            found.append(end)
    return torch.stack(found)

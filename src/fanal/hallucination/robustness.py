"""How good the index is: against the exact maximizations that it stands for, and against the Hessian's eigenvalues.

[RODS] A.2 wants `max ‖∇‖v(x + δ)‖ − ∇‖v(x)‖‖` over ‖δ‖ = r, which to first order is r·|λ|, λ the eigenvalue of the
Hessian of ‖v‖ that is largest by absolute value. Eq. 8 replaces the maximizer by that of ‖v(x + δ)‖, and B.4 that one
by a gradient step. Each replacement can be undone here, at a price of hundreds of products per point: this is for
judging the index, not for sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import Denoiser
from fanal.errors import FanalError
from fanal.exact.gaussian import accumulator
from fanal.hallucination.perturbation import READINGS, Search, Slope, bend, differentiate
from fanal.hallucination.regions import Region, norms, unit
from fanal.solvers.arithmetic import check_choice

__all__ = ["Bounds", "bounds", "hessian_product", "largest_eigenvalue"]

_SPHERE = Region("sphere")


def hessian_product(
    denoiser: Denoiser, x: Float[Tensor, "b *d"], sigma: Tensor, direction: Float[Tensor, "b *d"]
) -> Float[Tensor, "b *d"]:
    """Return the Hessian of `‖x − D(x, sigma)‖` times a direction, by differentiating twice.

    Args:
        denoiser: D(x, sigma), twice differentiable.
        x: the points.
        sigma: their noise level, 0-d.
        direction: what the Hessian is applied to.

    Raises:
        FanalError: the denoiser cannot be differentiated twice.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        size = (leaf.to(accumulator(x)) - denoiser(leaf, sigma)).flatten(1).norm(dim=1)
        try:
            (gradient,) = torch.autograd.grad(size.sum(), leaf, create_graph=True)
            along = (gradient * direction.detach().to(x.dtype)).sum()
            (product,) = torch.autograd.grad(along, leaf, materialize_grads=True)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise FanalError(
                f"the denoiser cannot be differentiated twice ({str(error).splitlines()[0][:200]}); fused attention "
                "kernels, for example, cannot"
            ) from error
    return product.detach()


def largest_eigenvalue(
    denoiser: Denoiser, x: Float[Tensor, "b *d"], sigma: Tensor, *, tolerance: float = 1e-3
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b *d"]]:
    """Return the eigenvalue of the Hessian of ‖x − D‖ that is largest by absolute value, and its unit vector.

    By Lanczos iteration on Hessian–vector products (`scipy.sparse.linalg.eigsh`), sample by sample; in up to 3
    dimensions from the whole matrix.

    Args:
        denoiser: D(x, sigma), twice differentiable.
        x: the points.
        sigma: their noise level, 0-d.
        tolerance: relative accuracy of the eigenvalue.

    Raises:
        FanalError: the denoiser cannot be differentiated twice, or the iteration does not converge.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    values, vectors, d = [], [], x[0].numel()
    for b in range(len(x)):
        point = x[b : b + 1]

        def product(v: np.ndarray, point: Tensor = point) -> np.ndarray:
            direction = torch.from_numpy(np.asarray(v, dtype=np.float64)).reshape(point.shape).to(point)
            return hessian_product(denoiser, point, sigma, direction).flatten().cpu().double().numpy()

        if d <= 3:
            found, axes = np.linalg.eigh(np.stack([product(row) for row in np.eye(d)]))
            best = np.abs(found).argmax()
            value, vector = found[best], axes[:, best]
        else:
            start = np.random.default_rng(b).standard_normal(d)
            operator = LinearOperator((d, d), matvec=product, dtype=np.float64)  # pyright: ignore[reportCallIssue]
            try:
                (value,), axes = eigsh(operator, k=1, which="LM", v0=start, tol=tolerance)  # pyright: ignore[reportArgumentType]
            except ArpackNoConvergence as error:
                raise FanalError(f"the largest eigenvalue of sample {b} did not converge: raise tolerance") from error
            vector = axes[:, 0]
        values.append(float(value))
        vectors.append(torch.from_numpy(vector.copy()).reshape(x.shape[1:]))
    return torch.tensor(values, dtype=torch.float64), torch.stack(vectors).to(x)


@dataclass(frozen=True, eq=False)
class Bounds:
    """The index of some points beside what it stands for, all in the same units; each (B,), float64.

    Attributes:
        index: as `rods.index` measures it, by one gradient step for δ.
        maximized: the same along the δ that makes ‖v(x + δ)‖ largest, by many steps from many starts ([RODS] eq. 8).
        turned: the largest turn of the gradient over all δ (A.2).
        linear: r·|λ|, its value to first order.
        gained: what one gradient step gains in ‖v‖, as a share of what the best δ gains.
    """

    index: Float[Tensor, " b"]
    maximized: Float[Tensor, " b"]
    turned: Float[Tensor, " b"]
    linear: Float[Tensor, " b"]
    gained: Float[Tensor, " b"]


def _best(
    starts: list[Tensor],
    gradient: Callable[[Tensor], Tensor],
    value: Callable[[Tensor], Tensor],
    size: Tensor,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """The best perturbation of each sample that ascents from some starts meet, and its value."""
    best, top = starts[0], value(starts[0])
    for start in starts:
        delta = start
        for k in range(steps + 1):
            if k:  # steps that shrink settle where the full ones of a guard would swing
                delta = _SPHERE.project(delta + 2 * size / (k + 1) * unit(gradient(delta)), size)
            now = value(delta)
            better = now > top
            top = torch.where(better, now, top)
            best = torch.where(better.reshape(norms(best).shape), delta, best)
    return best, top


def bounds(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    sigma: Tensor | float,
    *,
    v: str = "residual",
    rho: float = 0.1,
    rho_units: str = "shell",
    steps: int = 20,
    starts: int = 4,
) -> Bounds:
    """Measure the index of each point, and what it stands for.

    Both maximizations are ascents on the sphere from `starts` random directions, from the gradient and from both ends
    of the Hessian's first axis, and keep the best δ met: they are lower bounds of the maxima, which a dense search in
    two dimensions confirms. What the turn of the gradient climbs is `H(x + δ)·u(∇‖v(x + δ)‖ − ∇‖v(x)‖)`, H the Hessian.

    Args:
        denoiser: D(x, sigma), twice differentiable.
        x: the points.
        sigma: their noise level, one for all, above 0.
        v: what the index is of: "score", "direction" or "residual".
        rho: radius, in `rho_units`.
        rho_units: "absolute", "sigma" or "shell".
        steps: of each ascent.
        starts: random directions beside the four that are known.

    Raises:
        FanalError: an argument is none of these, or the denoiser cannot be differentiated twice.
    """
    check_choice("v of rods", v, tuple(READINGS))
    search, level = Search(rho, rho_units, 1, "backward"), torch.as_tensor(sigma, dtype=torch.float64)
    if level.ndim or not bool(level > 0):
        raise FanalError(f"the index needs one sigma > 0, got {sigma}")
    size, here = search.size(x, level), differentiate(denoiser, x, level)
    one, _ = search.cas(denoiser, x, level, here)
    value, axis = largest_eigenvalue(denoiser, x, level)

    def slope(delta: Tensor) -> Slope:
        return differentiate(denoiser, x + delta.to(x.dtype), level)

    def length(delta: Tensor) -> Tensor:
        with torch.no_grad():
            y = x + delta.to(x.dtype)
            return norms(y.to(accumulator(x)) - denoiser(y, level)).flatten()

    def turn(delta: Tensor) -> Tensor:
        return bend(here, slope(delta), level, v)

    def climb(delta: Tensor) -> Tensor:
        return slope(delta).gradient

    def twist(delta: Tensor) -> Tensor:
        away = slope(delta).gradient - here.gradient
        return hessian_product(denoiser, x + delta.to(x.dtype), level, away).to(size.dtype)

    generator = torch.Generator().manual_seed(0)
    known = [one.to(size.dtype), size * axis.to(size.dtype), -size * axis.to(size.dtype)]
    drawn = [size * unit(torch.randn(x.shape, generator=generator).to(size)) for _ in range(starts)]
    along, most = _best([*known, *drawn], climb, length, size, steps)
    _, turned = _best([*known, along, *drawn], twist, turn, size, steps)
    base = norms(here.residual).flatten()
    scale = level ** READINGS[v]
    parts = (
        turn(known[0]),
        turn(along),
        turned,
        size.flatten().cpu() * value.abs() / scale,
        (length(known[0]) - base) / (most - base),
    )
    return Bounds(*(part.cpu().double().expand(len(x)) for part in parts))

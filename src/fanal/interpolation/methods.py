"""Points between noise tensors. Arithmetic is in float64; the result has the dtype of the ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError, unknown_name

__all__ = ["METHODS", "angle", "check_weight", "coefficients", "in_distribution", "linear", "n_linear", "slerp"]

_PARALLEL = 1e-7  # below this sine the ends are parallel as far as float64 can tell from their sum and difference


def check_weight(weight: float | Tensor) -> Tensor:
    """Return the weight of the second end as a float64 tensor.

    Raises:
        FanalError: a weight is not a number in [0, 1].
    """
    found = torch.as_tensor(weight, dtype=torch.float64)
    if not bool(((found >= 0) & (found <= 1)).all()):
        raise FanalError(f"the weight of an interpolation must lie in [0, 1], got {weight}")
    return found


def _linear(weight: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    return 1 - weight, weight


def _in_distribution(weight: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.hypot(1 - weight, weight)
    return (1 - weight) / norm, weight / norm


def _slerp(weight: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    sine = torch.sin(psi)
    flat = sine < _PARALLEL
    if bool((flat & (psi > 1)).any()):
        raise FanalError("slerp has no path between opposite ends (angle π): try in_distribution, or other seeds")
    safe = torch.where(flat, 1.0, sine)
    first = torch.where(flat, 1 - weight, torch.sin((1 - weight) * psi) / safe)
    return first, torch.where(flat, weight, torch.sin(weight * psi) / safe)


_RULES: Mapping[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "linear": _linear,
    "slerp": _slerp,
    "in_distribution": _in_distribution,
}


def coefficients(method: str, weight: float | Tensor, psi: float | Tensor = math.pi / 2) -> tuple[Tensor, Tensor]:
    """Return what the two ends are multiplied with.

    Args:
        method: a key of `METHODS`.
        weight: of the second end, in [0, 1].
        psi: angle between the ends in [0, π]; slerp alone depends on it.

    Raises:
        FanalError: the method is unknown, a weight or an angle is out of range, or slerp is asked for opposite ends.
    """
    if method not in _RULES:
        raise unknown_name("interpolation", method, _RULES)
    angles = torch.as_tensor(psi, dtype=torch.float64)
    if not bool(((angles >= 0) & (angles <= math.pi)).all()):
        raise FanalError(f"the angle between two ends lies in [0, π], got {psi}")
    return _RULES[method](check_weight(weight), angles)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, keepdim=True)


def angle(a: Float[Tensor, "b *d"], b: Float[Tensor, "b *d"]) -> Float[Tensor, " b"]:
    """Return the angle ψ between two batches of tensors, sample by sample, in [0, π] ([GEO] eq. 51).

    `ψ = 2·atan2(‖u − v‖, ‖u + v‖)` with the unit vectors u and v (Kahan 2006): accurate near 0 and π, where the
    arccosine is not.

    Raises:
        FanalError: the shapes differ, or an end is zero or not finite.
    """
    _check_ends([a, b])
    u, v = a.flatten(1).double(), b.flatten(1).double()
    lengths = _norm(u), _norm(v)
    if any(bool((~torch.isfinite(length) | (length == 0)).any()) for length in lengths):
        raise FanalError("there is no angle between these ends: one is zero or not finite")
    u, v = u / lengths[0], v / lengths[1]
    return 2 * torch.atan2(_norm(u - v), _norm(u + v)).squeeze(1)


def _check_ends(ends: Sequence[Tensor]) -> None:
    """Refuse ends that do not fit each other: broadcasting would hide the mistake."""
    if not ends or not all(isinstance(end, Tensor) and end.is_floating_point() and end.ndim >= 2 for end in ends):
        raise FanalError("the ends of an interpolation are floating-point batches of shape (B, *shape)")
    kinds = {(tuple(end.shape), end.dtype) for end in ends}
    if len(kinds) > 1:
        raise FanalError(f"the ends must have the same shape and dtype, got {sorted(map(str, kinds))}")


def _spread(weight: Tensor, x: Tensor) -> Tensor:
    """Give one weight for all samples, or one per sample, the trailing axes of x."""
    if weight.ndim and weight.shape != (len(x),):
        raise FanalError(f"one weight, or one per sample: got shape {tuple(weight.shape)} for a batch of {len(x)}")
    return weight.to(x.device).reshape(-1, *[1] * (x.ndim - 1)) if weight.ndim else weight


def _between(method: str, a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    _check_ends([a, b])
    known = check_weight(weight)
    psi = angle(a, b) if method == "slerp" else math.pi / 2
    first, second = coefficients(method, known.to(a.device) if known.ndim else known, psi)
    return (_spread(first, a) * a.double() + _spread(second, b) * b.double()).to(a.dtype)


def linear(a: Float[Tensor, "b *d"], b: Float[Tensor, "b *d"], weight: float | Tensor) -> Float[Tensor, "b *d"]:
    """Return `(1 − α)·a + α·b` ([GEO] eq. 50): halfway between independent ends it has half their variance.

    Args:
        a: first end, the result at α = 0.
        b: second end, the result at α = 1.
        weight: α in [0, 1]; one number, or one per sample.

    Raises:
        FanalError: the ends do not fit each other, or a weight is out of range.
    """
    return _between("linear", a, b, weight)


def slerp(a: Float[Tensor, "b *d"], b: Float[Tensor, "b *d"], weight: float | Tensor) -> Float[Tensor, "b *d"]:
    """Return `(sin((1 − α)ψ)·a + sin(αψ)·b)/sin ψ`, with ψ the angle between the ends ([GEO] eq. 51).

    Of ends of one length it keeps the length. Parallel ends are joined by the straight line, its limit.

    Args:
        a: first end, the result at α = 0.
        b: second end, the result at α = 1.
        weight: α in [0, 1]; one number, or one per sample.

    Raises:
        FanalError: as `linear`, or an end is zero, or the ends are opposite.
    """
    return _between("slerp", a, b, weight)


def in_distribution(
    a: Float[Tensor, "b *d"], b: Float[Tensor, "b *d"], weight: float | Tensor
) -> Float[Tensor, "b *d"]:
    """Return `√(1 − λ²)·a + λ·b` with `λ = α/√(α² + (1 − α)²)`: the variance of the ends, in every dimension.

    [GEO] eqs. 52–53, where λ is printed with 1 − α² in place of (1 − α)².

    Args:
        a: first end, the result at α = 0.
        b: second end, the result at α = 1.
        weight: α in [0, 1]; one number, or one per sample.

    Raises:
        FanalError: as `linear`.
    """
    return _between("in_distribution", a, b, weight)


def n_linear(ends: Sequence[Tensor], weights: Sequence[float] | Tensor) -> Tensor:
    """Return `Σ w_k x_k / √(Σ w_k²)`: a point between any number of independent ends, with their variance.

    Of two ends with weights (1 − α, α) it is `in_distribution`.

    Args:
        ends: K batches of shape (B, *shape).
        weights: (K,), finite, not all zero; their scale does not matter.

    Raises:
        FanalError: the ends do not fit each other, or the weights do not fit the ends.
    """
    _check_ends(ends)
    w = torch.as_tensor(weights, dtype=torch.float64, device=ends[0].device)
    if w.shape != (len(ends),) or not bool(torch.isfinite(w).all()) or not bool((w != 0).any()):
        raise FanalError(f"n_linear needs {len(ends)} finite weights, one per end and not all zero, got {weights}")
    w = w / w.abs().max()  # first, so that neither the squares nor a single weight lose anything
    w = w / torch.linalg.vector_norm(w)
    total = torch.zeros_like(ends[0], dtype=torch.float64)
    for weight, end in zip(w.unbind(), ends, strict=True):
        total += weight * end.double()
    return total.to(ends[0].dtype)


METHODS: Mapping[str, Callable[[Tensor, Tensor, float | Tensor], Tensor]] = {
    "linear": linear,
    "slerp": slerp,
    "in_distribution": in_distribution,
}
"""Interpolations between two ends, by name."""

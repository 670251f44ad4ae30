"""The reverse diffusion of particles in the time of the Ornstein–Uhlenbeck process ([PDE] sec. 4.1 to 4.3).

`z_t = e^{−t}·x0 + sqrt(1 − e^{−2t})·n` is `x/sqrt(1 + sigma²)` in x-space, with `sigma = sqrt(e^{2t} − 1)`. The mean of
x0 given z at t, which the paper calls the foot of the characteristics, is the denoiser: `D(e^t z, sigma)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import Denoiser
from fanal.errors import FanalError, unknown_name

__all__ = ["FORMS", "Bridge", "bridge", "brownian_bridge", "drift", "foot", "posterior", "sigma_of", "time_of"]


def sigma_of(time: float) -> float:
    """Return the noise level in x-space of a time, `sqrt(e^{2t} − 1)`."""
    return math.sqrt(math.expm1(2 * time))


def time_of(sigma: float | Tensor) -> float:
    """Return the time of a noise level, `log(1 + sigma²)/2`."""
    return math.log1p(float(sigma) ** 2) / 2


def foot(denoiser: Denoiser, z: Float[Tensor, "b *d"], time: float) -> Float[Tensor, "b *d"]:
    """Return `E[X_0 | X_t = z] = D(e^t z, sigma_of(t))` ([PDE] eq. 4.2).

    Raises:
        FanalError: the time is not positive.
    """
    if not 0 < time < math.inf:
        raise FanalError(f"the reverse diffusion lives at times above 0, got {time}")
    return denoiser(math.exp(time) * z, torch.tensor(sigma_of(time), dtype=torch.float64))


def _as_printed(z: Tensor, mean: Tensor, t: float) -> Tensor:
    return z + 2 * (math.exp(-t) * mean - z) / -math.expm1(-2 * t)


def _as_tanh(z: Tensor, mean: Tensor, t: float) -> Tensor:
    return (mean / math.cosh(t) - z) / math.tanh(t)


def _as_csch(z: Tensor, mean: Tensor, t: float) -> Tensor:
    return -math.tanh(t / 2) * z + (mean - z) / math.sinh(t)


FORMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "foot": _as_printed,
    "tanh": _as_tanh,
    "csch": _as_csch,
}
"""The drift of the explicit reverse SDE by name, of state, foot and time: [PDE] eq. 4.6, 4.10 and 4.11."""


def drift(denoiser: Denoiser, z: Float[Tensor, "b *d"], time: float, form: str = "foot") -> Float[Tensor, "b *d"]:
    """Return the drift of the reverse SDE `dz = drift ds + √2 dB` at `t = T − s`.

    ```text
    foot    z + 2·(e^{−t} x̄ − z)/(1 − e^{−2t})       eq. 4.6
    tanh    (x̄/cosh t − z)/tanh t                     eq. 4.10
    csch    −tanh(t/2)·z + (x̄ − z)/sinh t             eq. 4.11
    ```

    The three are one function; near t = 0 the last one loses the fewest digits.

    Args:
        denoiser: D(x, sigma), in x-space.
        z: states.
        time: t, positive.
        form: one of `FORMS`.

    Raises:
        FanalError: the form is unknown or the time is not positive.
    """
    if form not in FORMS:
        raise unknown_name("form of the reverse drift", form, FORMS)
    return FORMS[form](z, foot(denoiser, z, time), time)


@dataclass(frozen=True)
class Bridge:
    """A step whose mean of x0 is held fixed: `z' = keep·z + pull·x̄ + std·n`."""

    keep: float
    pull: float
    std: float

    def after(self, first: Bridge) -> Bridge:
        """Return the one step that does what `first` and then this one do, towards the same point."""
        spread = math.hypot(self.keep * first.std, self.std)
        return Bridge(self.keep * first.keep, self.keep * first.pull + self.pull, spread)


def _check_times(time: float, end: float) -> None:
    if not 0 <= end < time < math.inf:
        raise FanalError(f"a reverse step runs from a time down to one of at least 0, got {time} and {end}")


def bridge(time: float, end: float) -> Bridge:
    """Return the exact reverse step from one time to an earlier one, with x̄ constant ([PDE] eq. 4.21; 4.12 from T).

    With `h = time − end`: `keep = sinh(end)/sinh(time)`, `pull = sinh(h)/sinh(time)`,
    `std = sqrt(2·sinh(end)·sinh(h)/sinh(time))`.

    Raises:
        FanalError: not `0 <= end < time`.
    """
    _check_times(time, end)
    whole, near, far = math.sinh(time), math.sinh(end), math.sinh(time - end)
    return Bridge(near / whole, far / whole, math.sqrt(2 * near * far / whole))


def posterior(time: float, end: float) -> Bridge:
    """Return the law of the forward process at `end`, given where it is at `time` and where it began.

    [PDE] eq. 4.23, 4.24 and prop. A.1, and the posterior of DDPM (Ho et al. 2020, arXiv:2006.11239, eq. 7). It is
    `bridge`, by Bayes' formula instead of an integrating factor.

    Raises:
        FanalError: not `0 <= end < time`.
    """
    _check_times(time, end)
    h, noise = time - end, -math.expm1(-2 * time)
    before, added = -math.expm1(-2 * end), -math.expm1(-2 * h)
    pull = math.exp(-end) * added / noise
    return Bridge(math.exp(-h) * before / noise, pull, math.sqrt(before * added / noise))


def brownian_bridge(time: float, end: float) -> Bridge:
    """Return what `bridge` becomes for small times: `z + (1 − end/time)·(x̄ − z)`, variance `2·end·(time − end)/time`.

    [PDE] eq. 4.9, whose printed mean has `t/T` where `s/T` belongs: with it the path would begin at x̄.

    Raises:
        FanalError: not `0 <= end < time`.
    """
    _check_times(time, end)
    share = end / time
    return Bridge(share, 1 - share, math.sqrt(2 * share * (time - end)))

"""How far a student ends from its teacher, with standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError
from fanal.metrics.estimates import Estimate

__all__ = ["Error", "error_of"]


@dataclass(frozen=True)
class Error:
    """Root mean square distance per entry between a student's and its teacher's end points, over held-out samples.

    Attributes:
        median: over samples: the typical miss.
        rms: over samples: the few that end in another mode dominate it.
    """

    median: Estimate
    rms: Estimate


def error_of(errors: Float[Tensor, " b"]) -> Error:
    """Return median and root mean square of errors, with standard errors.

    That of the median is half the distance of the order statistics `n/2 ± sqrt(n)/2`; that of the root mean square
    follows from the mean of the squares, `se(e²)/(2·rms)`.

    Raises:
        FanalError: fewer than three samples.
    """
    n, ordered = len(errors), errors.double().sort().values
    if n < 3:
        raise FanalError(f"an error estimate needs at least three samples, got {n}")
    low, high = math.floor(n / 2 - math.sqrt(n) / 2), math.ceil(n / 2 + math.sqrt(n) / 2)
    half = float(ordered[min(high, n - 1)] - ordered[max(low, 0)]) / 2
    squares = ordered.square()
    rms = float(squares.mean().sqrt())
    return Error(
        Estimate(float(ordered.quantile(0.5)), half, n),
        Estimate(rms, float(squares.std()) / math.sqrt(n) / (2 * max(rms, 1e-300)), n),
    )

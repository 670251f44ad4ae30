"""Figures with their standard errors: rates, means, detection, diversity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from fanal.errors import FanalError

__all__ = ["Estimate", "auc", "jackknife", "mean", "paired_rate", "rate", "spread", "std_ratio"]


_FAR = 4  # powers of ten from 1 beyond which a figure is written with one


@dataclass(frozen=True)
class Estimate:
    """A figure, its standard error, and the number of samples behind it."""

    value: float
    se: float
    n: int

    def percent(self) -> str:
        """Return the figure as a percentage, e.g. `21.9 ± 1.3 %`."""
        return self._text(100, 1) + ("" if math.isnan(self.value) else " %")

    def plain(self, digits: int = 2) -> str:
        """Return the figure as it is, e.g. `0.81 ± 0.02`."""
        return self._text(1, digits)

    def rounded(self, scale: float = 1.0) -> str:
        """Return the figure with as many digits as its error bears, e.g. `0.856 ± 0.012`, `1.00052 ± 0.00004`.

        The error has two digits where it begins with 1 or 2, else one. Where it is below a millionth of the figure, six
        digits stand alone; where there is none, four.

        Args:
            scale: factor, e.g. 100 for a percentage.
        """
        value, se = scale * self.value, abs(scale) * self.se
        if math.isnan(value):
            return "–"
        if not se > 1e-6 * abs(value):
            return f"{value:.{6 if se > 0 else 4}g}"
        lead = math.floor(math.log10(se))
        last = lead - (se < 2.95 * 10.0**lead)  # place of the last digit, as a power of ten
        top = max(math.floor(math.log10(max(abs(value), se))), last)
        if not -_FAR <= top <= _FAR:
            return f"({value / 10.0**top:.{top - last}f} ± {se / 10.0**top:.{top - last}f})e{top}"
        return f"{round(value, -last):.{max(-last, 0)}f} ± {round(se, -last):.{max(-last, 0)}f}"

    def _text(self, scale: float, digits: int) -> str:
        if math.isnan(self.value):
            return "–"
        error = "" if math.isnan(self.se) else f" ± {scale * self.se:.{digits}f}"
        return f"{scale * self.value:.{digits}f}{error}"


def rate(hits: Tensor) -> Estimate:
    """Return the share of true entries with its standard error.

    `p = k/n`, `se = sqrt(q(1 − q)/(n + 4))` with `q = (k + 2)/(n + 4)` (Agresti & Coull 1998), so that 0 of n does
    not read as certainty. An empty input gives NaN with n = 0.
    """
    n, k = hits.numel(), int(hits.sum())
    if n == 0:
        return Estimate(math.nan, math.nan, 0)
    q = (k + 2) / (n + 4)
    return Estimate(k / n, math.sqrt(q * (1 - q) / (n + 4)), n)


def paired_rate(before: Tensor, after: Tensor) -> Estimate:
    """Return the difference of two rates over the same samples, `mean(after − before)`, with its standard error.

    Raises:
        FanalError: the two do not have the same length.
    """
    if before.shape != after.shape:
        raise FanalError(f"paired figures need the same samples, got {len(before)} and {len(after)}")
    return mean(after.double() - before.double())


def mean(values: Tensor) -> Estimate:
    """Return the mean with standard error `std/sqrt(n)`; NaN error for fewer than two values."""
    n = values.numel()
    if n == 0:
        return Estimate(math.nan, math.nan, 0)
    data = values.double()
    return Estimate(float(data.mean()), float(data.std() / math.sqrt(n)) if n > 1 else math.nan, n)


def jackknife(without: Float[Tensor, " n"]) -> float:
    """Return the jackknife's standard error from a figure's values with each sample left out.

    `sqrt((n − 1)/n·Σ(θ_i − mean θ)²)`.
    """
    n = len(without)
    return math.sqrt((n - 1) / n * float((without.double() - without.double().mean()).square().sum()))


def auc(risk: Float[Tensor, " b"], wrong: Tensor) -> Estimate:
    """Return the area under the ROC curve of `risk` against `wrong`, with DeLong's standard error.

    The probability that a wrong sample has a higher risk than a right one, ties counting half (DeLong, DeLong &
    Clarke-Pearson 1988). NaN where one of the two kinds is missing; with one sample of a kind, or with
    perfect separation, its error is NaN.
    """
    data, mask = risk.double().numpy(), wrong.bool().numpy()
    high, low = data[mask], data[~mask]
    if not len(high) or not len(low):
        return Estimate(math.nan, math.nan, len(data))
    ranks = stats.rankdata(np.concatenate([high, low]))
    over = (ranks[: len(high)] - stats.rankdata(high)) / len(low)  # share of right samples below each wrong one
    under = 1 - (ranks[len(high) :] - stats.rankdata(low)) / len(high)
    if min(len(high), len(low)) < 2:
        return Estimate(float(over.mean()), math.nan, len(data))
    variance = sum(np.var(part, ddof=1) / len(part) for part in (over, under))
    error = math.sqrt(variance) if variance > 0 else math.nan  # perfect separation says nothing about its error
    return Estimate(float(over.mean()), error, len(data))


def std_ratio(values: Tensor, real: Tensor) -> Estimate:
    """Return the standard deviation of a figure relative to that of real data: below 1, variety was lost.

    Its standard error is `ratio·sqrt((k − 1)/4n + (k_real − 1)/4n_real)`, k the kurtosis. NaN where the real figure
    does not vary.
    """
    sides = [side.double() - side.double().mean() for side in (values, real)]
    deviations = [float(side.square().mean().sqrt()) for side in sides]
    if not all(deviations):
        return Estimate(0.0 if deviations[1] else math.nan, math.nan, len(values))
    parts = [
        (float((side / std).pow(4).mean()) - 1) / (4 * len(side)) for side, std in zip(sides, deviations, strict=True)
    ]
    ratio = deviations[0] / deviations[1]
    return Estimate(ratio, ratio * math.sqrt(max(sum(parts), 0.0)), len(values))


def spread(x: Float[Tensor, "b *d"], real: Float[Tensor, "n *d"]) -> Estimate:
    """Return the total variance of `x` relative to that of real data: below 1, diversity was lost.

    `Σ_j Var(x_j) / Σ_j Var(real_j)`; the standard error is the jackknife's over the samples of x.

    Raises:
        FanalError: fewer than three samples.
    """
    if len(x) < 3:
        raise FanalError(f"diversity needs at least three samples, got {len(x)}")
    flat, n = x.flatten(1).double(), len(x)
    scale = float(real.flatten(1).double().var(0).sum())
    off = ((flat - flat.mean(0)) ** 2).sum(1)
    total = float(off.sum())
    without = (total - off * n / (n - 1)) / (n - 2)  # variance with one sample left out
    return Estimate(total / (n - 1) / scale, jackknife(without) / scale, n)

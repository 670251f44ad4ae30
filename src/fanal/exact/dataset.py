"""The closed-form denoiser of a finite data set: attention over its points."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fanal.denoiser import Denoiser
from fanal.errors import FanalError
from fanal.exact.derivatives import Denoise, Density
from fanal.exact.gaussian import accumulator, flat, level_of
from fanal.exact.streaming import BLOCK, Points, Query, Rows, Sums, closest, moments, stream

__all__ = ["Dataset", "Posterior"]

_SAFETY = 8.0  # rounding errors of a product of d terms cancel: this much smaller than their bound, and still safe
_GATHER = 2**22  # entries of the (B, K, d) differences held at a time, five times: 170 MB in float64


@dataclass(frozen=True, eq=False)
class Posterior:
    """What a data set says about some states.

    Attributes:
        denoised: (B, *shape), as the denoiser returns it.
        log_density: (B,), as `Dataset.log_density`.
        entropy: (B,), as `Dataset.entropy`.
    """

    denoised: Float[Tensor, "b *d"]
    log_density: Float[Tensor, " b"]
    entropy: Float[Tensor, " b"]


class Dataset(Denoiser):
    """`D(x, sigma) = Σ_i w_i y_i`, `w = softmax(−‖x − y_i‖²/2sigma²)`: what a network trained on the points aims for.

    The minimizer of the denoising loss on a finite set ([REG] eq. 9, with distances in x-space; [PDE] prop. 4.4, whose
    kernel variance is misprinted). One pass over the points in blocks, two matrix products; memory beyond the data does
    not grow with N.

    The products run in the dtype of x. In float32 a logit is off by about `6e-8·‖x‖‖y‖/sigma²`; where that could change
    the answer by more than `tolerance`, the nearest `rerank` points are weighed again by direct float64 differences,
    and where others could matter as well, the whole pass is done in float64. On mps there is no float64.

    Args:
        points: (N, *shape): a tensor, or an array or `Rows` of one that may be mapped from a file; uint8 images become
            `y/127.5 − 1`.
        labels: class of each point, (N,); `D(x, sigma, labels)` then weighs the points of a class only. `classes`
            stands for all.
        classes: how many there are, where the points may lack some; None: as many as the largest label says.
        sigma_min: smallest noise level it is used at.
        sigma_max: largest noise level it is used at.
        tolerance: wanted relative error of the result.
        rerank: number of nearest points kept for the second weighing.
        block: points read at a time, at most; fewer where they are large.

    Raises:
        FanalError: there is no point, one is not finite, or the labels do not fit.
    """

    def __init__(
        self,
        points: Tensor | np.ndarray | Rows,
        labels: Tensor | None = None,
        *,
        classes: int | None = None,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        tolerance: float = 1e-5,
        rerank: int = 64,
        block: int = BLOCK,
    ) -> None:
        self.points = Points(points, labels, block)
        self.shape = self.points.shape
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.tolerance, self.rerank = tolerance, min(rerank, self.points.count)
        known = self.points.labels
        least = 0 if known is None else int(known.max()) + 1
        if classes is not None and (known is None or classes < least):
            raise FanalError(f"points with labels of {least} classes cannot be of {classes!r}")
        self.classes = least if classes is None else classes
        self.counts = None if known is None else torch.bincount(known, minlength=self.classes)

    def __len__(self) -> int:
        """Return the number of points."""
        return self.points.count

    def _query(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Query:
        """Check what is asked, and flatten it.

        Raises:
            FanalError: a shape does not fit, sigma is not positive, or a label is none of the classes, or of an empty
                one.
        """
        wide, level = flat(x, sigma, self.shape)
        if not bool((level > 0).all()):
            raise FanalError(f"the denoiser of a data set needs sigma > 0, got {sigma}")
        narrow = wide.to(x.dtype) if x.dtype in (torch.float32, torch.float64) else wide.float()
        wanted = None if labels is None else self._wanted(torch.as_tensor(labels).cpu(), len(x))
        return Query(narrow, level.expand(len(x), 1), wanted)

    def _wanted(self, labels: Tensor, count: int) -> Tensor:
        """The class of each sample, (B,); −1: all."""
        if self.counts is None:
            raise FanalError("these points have no classes: leave the labels out")
        fits = labels.shape in ((), (1,), (count,)) and not labels.is_floating_point() and labels.dtype != torch.bool
        if not fits or bool(((labels < 0) | (labels > self.classes)).any()):
            raise FanalError(
                f"labels are whole numbers in [0, {self.classes}], one, or one for each of {count} samples, got "
                f"{labels.tolist()!s:.60}"
            )
        wanted = labels.to(torch.int64).expand(count).clone()
        wanted[wanted == self.classes] = -1
        empty = wanted[(wanted >= 0) & (self.counts[wanted] == 0)]
        if len(empty):
            raise FanalError(f"class {int(empty[0])} has no point among these {len(self)}: take more, as with --points")
        return wanted

    def _noise(self, query: Query) -> Tensor:
        """What rounding may do to a logit, (B,)."""
        size = query.x.norm(dim=1).to(query.level.dtype)
        return torch.finfo(query.x.dtype).eps / 2 / _SAFETY * size * self.points.radius / query.level[:, 0] ** 2

    def _sums(self, query: Query, keep: int = 0, entropy: bool = False) -> Sums:
        """The posterior, exact to the tolerance: in the query's dtype, again for the nearest points, or in float64."""
        if torch.is_grad_enabled() and (query.x.requires_grad or query.level.requires_grad):
            raise FanalError(
                "of a data set only the denoiser and log_density have gradients: detach x, or use torch.no_grad()"
            )
        wide, noise = accumulator(query.x), self._noise(query)
        rough = (noise > self.tolerance) & (query.x.dtype != wide)
        wanted = max(keep, self.rerank if bool(rough.any()) else 0)
        found = stream(self.points, query, wanted, entropy)
        rows = rough.nonzero().flatten()
        if not len(rows):
            return found
        found.mean = found.mean.to(wide)
        # Points whose logit is this much below the largest weigh nothing together, even if rounding favored the others.
        fall = found.top[rows, :1] - found.top[rows] - 2 * _SAFETY * noise[rows, None]
        need = (fall < math.log(len(self) / self.tolerance)).sum(1)
        sure = (need < wanted) | torch.tensor(wanted >= len(self))
        far = rows[~sure]
        for few, part in self._groups(need[sure].clamp(keep, wanted), rows[sure]):
            found.put(part, self._head(query.take(part), found.index[part, :few]))
        if len(far):
            found.put(far, stream(self.points, query.take(far).to(wide), wanted, entropy))
        return found

    def _groups(self, need: Tensor, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Samples that need about as many points, in parts whose differences fit into memory."""
        size = 1 << (need - 1).clamp_min(0).double().log2().floor().add(1).clamp_min(0).long()  # the next power of two
        for few in size.unique().tolist():
            some = rows[size == few]
            for part in some.split(max(1, _GATHER // (few * self.points.dim))):
                yield few, part

    def _head(self, query: Query, index: Tensor) -> Sums:
        """The posterior over a few points per sample, by direct differences."""
        wide = accumulator(query.x)
        near = self.points.rows(index, query.x.device, wide)
        squares = (query.x.to(wide)[:, None] - near).square().sum(2)
        logits = -squares / (2 * query.level**2)
        if self.points.labels is not None and query.labels is not None:
            own = query.labels[:, None]
            logits = logits.masked_fill(
                ((self.points.labels[index.cpu()] != own) & (own >= 0)).to(logits.device), -math.inf
            )
        log_weights = logits.log_softmax(1)
        weights = log_weights.exp()
        entropy = -(weights * log_weights.nan_to_num(neginf=0.0)).sum(1)
        top, order = logits.sort(1, descending=True)
        return Sums(
            logits.logsumexp(1), torch.einsum("bk,bkd->bd", weights, near), entropy, top, index.gather(1, order)
        )

    def __call__(
        self, x: Float[Tensor, "b *d"], sigma: Tensor, labels: Int[Tensor, " b"] | None = None, /
    ) -> Float[Tensor, "b *d"]:
        """Return the posterior mean of the points given x; gradients reach x and sigma.

        A first derivative costs two more passes; a second one holds all B·N weights.

        Raises:
            FanalError: a shape does not fit, sigma is not positive, or a label is none of the classes.
        """
        return Denoise.apply(x, level_of(sigma), self, labels)  # pyright: ignore[reportReturnType]

    def _dense(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """All logits, (B, N), and all points at once, in plain operations: differentiable again and again."""
        wide, level = flat(x, sigma, self.shape)
        y = self.points.block(slice(0, len(self)), wide.dtype, x.device)
        logits = (wide @ y.T - self.points.half.to(y) - wide.square().sum(1, keepdim=True) / 2) / level**2
        own = self._query(x.detach(), sigma.detach(), labels).labels
        if own is not None and self.points.labels is not None:
            other = (self.points.labels != own[:, None]) & (own[:, None] >= 0)
            logits = logits.masked_fill(other.to(logits.device), -math.inf)
        return logits, y

    def log_density(
        self, x: Float[Tensor, "b *d"], sigma: Tensor | float, labels: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, " b"]:
        """Return the log density in nats of the points blurred with sigma: a kernel density estimate, any bandwidth.

        `log Σ_i N(x; y_i, sigma²I)/N`, over the points of a class where labels are given; float64 (float32 on mps).
        Gradients reach x and sigma: `∇log p = (D − x)/sigma²`.

        Raises:
            FanalError: as the denoiser.
        """
        return Density.apply(x, level_of(sigma), self, labels)  # pyright: ignore[reportReturnType]

    def _density(self, query: Query, log_sum: Tensor) -> Tensor:
        """Log density from the sum over the points."""
        volume = self.points.dim / 2 * torch.log(2 * math.pi * query.level[:, 0] ** 2)
        number = torch.full((len(log_sum),), float(len(self)), dtype=torch.float64)
        if query.labels is not None and self.counts is not None:
            number = torch.where(query.labels >= 0, self.counts[query.labels].double(), number)
        return log_sum - number.log().to(log_sum.dtype).to(log_sum.device) - volume

    def posterior(
        self, x: Float[Tensor, "b *d"], sigma: Tensor | float, labels: Int[Tensor, " b"] | None = None
    ) -> Posterior:
        """Return prediction, log density and entropy together, by the one pass that each of them would take.

        Raises:
            FanalError: as the denoiser.
        """
        query = self._query(x, sigma, labels)
        found = self._sums(query, entropy=True)
        denoised = found.mean.to(x.dtype).reshape(x.shape)
        return Posterior(denoised, self._density(query, found.log_sum), found.entropy)

    def entropy(
        self, x: Float[Tensor, "b *d"], sigma: Tensor | float, labels: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, " b"]:
        """Return the entropy `−Σ w log w` of the posterior in nats, from log N (all points alike) down to 0.

        [REG] sec. 4.4, where it marks the stages of a run. With labels, over the points of a class.

        Raises:
            FanalError: as the denoiser.
        """
        return self._sums(self._query(x, sigma, labels), entropy=True).entropy

    def entropy_rate(self, x: Float[Tensor, "b *d"], sigma: Tensor | float) -> Float[Tensor, " b"]:
        """Return `dH/dsigma` along the exact trajectory `dx/dsigma = (x − D)/sigma` through x, in nats.

        `−Cov_w(dl/dsigma, l)` with `dl_i/dsigma = ⟨y_i − x, x − D⟩/sigma³ − 2 l_i/sigma`.

        Raises:
            FanalError: as the denoiser.
        """
        query = self._query(x, sigma)
        found, level = self._sums(query), query.level[:, 0]
        residual = query.x.to(found.log_sum.dtype) - found.mean.to(found.log_sum.dtype)
        m = moments(self.points, query, self._exact_sum(query, found), residual)
        return -(m["al"] - m["a"] * m["l"]) / level**3 + 2 / level * (m["ll"] - m["l"] ** 2)

    def _exact_sum(self, query: Query, found: Sums) -> Tensor:
        """`log_sum` as the float64 pass of `moments` would find it, to its own rounding."""
        if query.x.dtype == accumulator(query.x):
            return found.log_sum
        return stream(self.points, query.to(accumulator(query.x))).log_sum

    def top(
        self, x: Float[Tensor, "b *d"], sigma: Tensor | float, k: int, labels: Int[Tensor, " b"] | None = None
    ) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
        """Return the k largest posterior weights of each sample and their points, decreasing.

        With labels, of the points of a class; where it has fewer than k, the rest weigh 0.

        Raises:
            FanalError: k is not positive, or as the denoiser.
        """
        found = self._sums(self._query(x, sigma, labels), _check_k(k))
        k = min(k, len(self))
        return (found.top[:, :k] - found.log_sum[:, None]).exp(), found.index[:, :k]

    def weights(self, x: Float[Tensor, "b *d"], sigma: Tensor | float) -> Float[Tensor, "b n"]:
        """Return all posterior weights, (B, N) float64 (float32 on mps); for small N, see `top` for large.

        Raises:
            FanalError: as the denoiser.
        """
        query = self._query(x, sigma).to(accumulator(x))
        parts = []
        for rows in self.points.spans():
            y = self.points.block(rows, query.x.dtype, query.x.device)
            squares = torch.cdist(query.x, y, compute_mode="donot_use_mm_for_euclid_dist") ** 2
            parts.append(-squares / (2 * query.level**2))
        return torch.softmax(torch.cat(parts, 1), 1)

    def nearest(self, x: Float[Tensor, "b *d"], k: int = 1) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
        """Return distance and index of the k nearest points, nearest first; equal ones in any order.

        Candidates are measured by direct differences: for float32 queries all those that rounding could have put among
        the k nearest, up to `rerank` more.

        Raises:
            FanalError: k is not positive, or x has another shape.
        """
        query = self._query(x.detach(), 1.0)
        if not len(x):
            nothing = torch.empty(0, min(_check_k(k), len(self)), device=x.device)
            return nothing.to(query.x.dtype), nothing.long()
        top, index = closest(self.points, query, min(_check_k(k) + self.rerank, len(self)))
        k = min(k, len(self))
        near = top >= top[:, k - 1 : k] - (2 * _SAFETY * self._noise(query))[:, None]
        part = self._head_in_parts(query, index[:, : int(near.sum(1).max())])
        return (-2 * part.top[:, :k]).clamp_min(0).sqrt(), part.index[:, :k]

    def _head_in_parts(self, query: Query, index: Tensor) -> Sums:
        size = max(1, _GATHER // (index.shape[1] * self.points.dim))
        parts = [self._head(query.take(rows), index[rows]) for rows in torch.arange(len(index)).split(size)]
        names = ("log_sum", "mean", "entropy", "top", "index")
        return Sums(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _check_k(k: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise FanalError(f"k is a whole number of points >= 1, got {k!r}")
    return k

"""One pass over N points, block by block: posterior weights, their moments, the nearest points, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fanal.errors import FanalError
from fanal.exact.gaussian import accumulator

__all__ = ["BLOCK", "Points", "Query", "Rows", "Sums", "closest", "moments", "stream"]

BLOCK = 1024
"""Points per block by default: the products run at full speed from about 512 on, and a block's logits stay small."""

_ENTRIES = 2**24  # numbers of a block, 128 MiB in float64: of images of 256×256×3 a block holds 85


class Rows:
    """Some rows of an array that are read when they are asked for; the array may be mapped from a file.

    Args:
        values: (M, *shape).
        index: (N,), the rows; in the array's order they are read from its start to its end.
    """

    def __init__(self, values: np.ndarray, index: np.ndarray) -> None:
        self.values, self.index = values, index
        self.shape, self.dtype, self.ndim = (len(index), *values.shape[1:]), values.dtype, values.ndim

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.index)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Read some of them."""
        return np.asarray(self.values[self.index[rows]])


class Points:
    """N points of one shape, in memory or mapped from a file, read block by block.

    Floating-point points are taken as they are; uint8 ones are images and become `y/127.5 − 1`. Nothing is copied.

    Args:
        points: (N, *shape), a tensor, an array such as `numpy.load(FILE, mmap_mode="r")`, or `Rows` of one.
        labels: class of each point, (N,), from 0; None: no classes.
        block: points read at a time, at most; fewer where they are large.

    Raises:
        FanalError: there is no point, a point is not finite, the labels do not fit, or `block` is not positive.
    """

    def __init__(self, points: Tensor | np.ndarray | Rows, labels: Tensor | None = None, block: int = BLOCK) -> None:
        if not isinstance(points, (Tensor, np.ndarray, Rows)) or points.ndim < 2 or len(points) == 0:
            raise FanalError(f"points must be a tensor or array (N, *shape), N >= 1, got {_kind(points)}")
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise FanalError(f"block is a whole number of points >= 1, got {block!r}")
        self.source = points.detach() if isinstance(points, Tensor) else points
        self.shape = tuple(int(n) for n in points.shape[1:])
        self.count, self.dim = len(points), math.prod(self.shape)
        self.size = min(block, max(1, _ENTRIES // max(self.dim, 1)))
        first = points[:1] if isinstance(points, Tensor) else torch.from_numpy(np.array(points[:1]))
        self.bytes = first.dtype == torch.uint8
        if not self.bytes and not first.is_floating_point():
            raise FanalError(f"points must be floating-point numbers, or uint8 images, got {first.dtype}")
        self.half = torch.empty(self.count, dtype=torch.float64)  # ‖y‖²/2
        for rows in self.spans():  # into one tensor: many small ones between large blocks would break up the heap
            self.half[rows] = self.block(rows, torch.float64).square().sum(1) / 2
        if not bool(torch.isfinite(self.half).all()):
            bad = int((~torch.isfinite(self.half)).nonzero()[0])
            raise FanalError(f"point {bad} of {self.count} is not finite: leave it out")
        self.radius = float((2 * self.half.max()).sqrt())
        self.labels = None if labels is None else _check_labels(labels, self.count)

    def spans(self) -> Iterator[slice]:
        """Yield the blocks' places."""
        for start in range(0, self.count, self.size):
            yield slice(start, min(start + self.size, self.count))

    def block(
        self, rows: slice | np.ndarray | Tensor, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return some points, (n, d)."""
        return self._numbers(self._read(rows), dtype, device)

    def _read(self, rows: slice | np.ndarray | Tensor) -> Tensor:
        """Some points as they are stored, (n, d)."""
        if isinstance(self.source, Tensor):
            part = self.source[rows]
        else:
            index = rows.numpy() if isinstance(rows, Tensor) else rows
            part = torch.from_numpy(np.array(self.source[index]))  # a copy: a mapped file cannot be written to
        return part.reshape(len(part), self.dim)

    def _numbers(self, part: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        part = part.to(device, dtype)
        return part.div_(127.5).sub_(1) if self.bytes else part  # bytes were copied by their conversion

    def rows(self, index: Int[Tensor, "b k"], device: torch.device | str, dtype: torch.dtype) -> Float[Tensor, "b k d"]:
        """Return the points of an index table."""
        flat = index.flatten().cpu()
        order = flat.argsort()  # a mapped file is read from its start to its end
        part = self._read(flat[order])
        part = part[order.argsort().to(part.device)]  # as they were asked for, while they are small
        return self._numbers(part, dtype, device).reshape(*index.shape, self.dim)


def _kind(value: object) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"shape {tuple(shape)}"


def _check_labels(labels: Tensor, count: int) -> Tensor:
    values = torch.as_tensor(labels)
    if values.shape != (count,) or values.is_floating_point() or int(values.min()) < 0:
        raise FanalError(f"labels must be {count} whole numbers >= 0, one per point, got {_kind(labels)}")
    return values.to("cpu", torch.int64)


@dataclass(frozen=True, eq=False)
class Query:
    """Where the posterior is asked for.

    Attributes:
        x: (B, d); its dtype is that of the products.
        level: sigma, (B, 1), in the accumulating dtype.
        labels: (B,) class whose points count for each sample; −1: all.
    """

    x: Tensor
    level: Tensor
    labels: Tensor | None = None

    def take(self, rows: Tensor) -> Query:
        """Return some of its samples."""
        return Query(self.x[rows], self.level[rows], None if self.labels is None else self.labels[rows.cpu()])

    def to(self, dtype: torch.dtype) -> Query:
        """Return it in another dtype."""
        return Query(self.x.to(dtype), self.level, self.labels)


@dataclass(eq=False)
class Sums:
    """What a pass found, with the logits `l_i = −‖x − y_i‖²/2sigma²` and weights `w = softmax(l)`.

    Attributes:
        log_sum: (B,) `log Σ exp l`, accumulating dtype.
        mean: (B, d) `Σ w y`.
        entropy: (B,) `−Σ w log w` in nats.
        top: (B, K) largest logits, decreasing; absent where no points were kept.
        index: (B, K) their points.
    """

    log_sum: Tensor
    mean: Tensor
    entropy: Tensor
    top: Tensor
    index: Tensor

    def put(self, rows: Tensor, part: Sums) -> None:
        """Overwrite some samples with what a more exact pass found."""
        for name in ("log_sum", "mean", "entropy", "top", "index"):
            mine, its = getattr(self, name), getattr(part, name)
            if name in ("top", "index"):  # the more exact pass may have kept fewer
                mine[rows, : its.shape[1]] = its.to(mine.dtype)
            else:
                mine[rows] = its.to(mine.dtype)


def _logits(points: Points, query: Query, rows: slice, out: Tensor) -> tuple[Tensor, Tensor]:
    """`l + ‖x‖²/2sigma²` for one block, (B, n), written into `out`, and the block itself."""
    y = points.block(rows, query.x.dtype, query.x.device)
    half = points.half[rows].to(y)
    raw = torch.addmm(half, query.x, y.T, beta=-1, out=out[: len(query.x) * len(y)].view(len(query.x), len(y)))
    raw /= (query.level**2).to(raw.dtype)
    if points.labels is not None and query.labels is not None:
        wanted = query.labels[:, None].cpu()
        raw.masked_fill_(((points.labels[rows] != wanted) & (wanted >= 0)).to(raw.device), -math.inf)
    return raw, y


def stream(points: Points, query: Query, keep: int = 0, entropy: bool = False) -> Sums:
    """Return the posterior over the points by one pass with a running maximum.

    Two matrix products of B·N·d each; beyond the data it holds B·d numbers and one block's B logits each.

    Args:
        points: the data.
        query: where.
        keep: number of nearest points to return.
        entropy: whether to sum the entropy too.
    """
    x, wide = query.x, accumulator(query.x)
    count = len(x)
    high = x.new_full((count, 1), -math.inf)
    total, spread = (torch.zeros(count, dtype=wide, device=x.device) for _ in range(2))
    mean = torch.zeros_like(x)
    top = x.new_full((count, 0), -math.inf)
    index = torch.zeros(count, 0, dtype=torch.int64, device=x.device)
    space = x.new_empty(count * min(points.size, points.count))
    for rows in points.spans():
        raw, y = _logits(points, query, rows, space)
        if keep:
            top, index = _merge(top, index, raw, rows.start, keep)
        peak = torch.maximum(high, raw.amax(1, keepdim=True))
        fall = torch.where(high.isneginf(), 0, high - peak)[:, 0].to(wide)  # of sums so far, none at the first block
        scale = torch.where(high.isneginf()[:, 0], 0, fall.exp())
        raw -= torch.where(peak.isneginf(), 0, peak)
        if entropy:  # Σ e^l l, with l counted from the new peak
            spread = scale * (spread + fall * total)
            spread += torch.special.xlogy(raw.exp(), raw.exp()).sum(1, dtype=wide)
        raw.exp_()
        total = total * scale + raw.sum(1, dtype=wide)
        mean.mul_(scale[:, None].to(mean.dtype)).addmm_(raw, y)
        high = peak
    size = (x.to(wide) ** 2).sum(1) / 2 / (query.level[:, 0] ** 2).to(wide)
    top = top.to(wide) - size[:, None]
    return Sums(
        total.log() + high[:, 0].to(wide) - size,
        mean / total[:, None].to(mean.dtype),
        (total.log() - spread / total).clamp_min(0),
        top,
        index,
    )


def closest(points: Points, query: Query, keep: int) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
    """Return `l + ‖x‖²/2sigma²` of the `keep` nearest points of each sample, and these, by one matrix product.

    Args:
        points: the data.
        query: where; all points count.
        keep: number of points, at most N.
    """
    count = len(query.x)
    top = query.x.new_full((count, 0), -math.inf)
    index = torch.zeros(count, 0, dtype=torch.int64, device=query.x.device)
    space = query.x.new_empty(count * min(points.size, points.count))
    for rows in points.spans():
        raw, _ = _logits(points, query, rows, space)
        top, index = _merge(top, index, raw, rows.start, keep)
    return top, index


def _merge(top: Tensor, index: Tensor, raw: Tensor, start: int, keep: int) -> tuple[Tensor, Tensor]:
    """The largest `keep` logits of those so far and of a block, which has few that are larger after the first ones."""
    value, place = raw, torch.arange(start, start + raw.shape[1], device=raw.device).expand_as(raw)
    if top.shape[1] == keep:
        row, column = (raw > top[:, -1:]).nonzero(as_tuple=True)
        if not len(row):
            return top, index
        counts = torch.bincount(row, minlength=len(raw))
        slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        value = raw.new_full((len(raw), int(counts.max())), -math.inf)
        place = torch.zeros_like(value, dtype=torch.int64)
        value[row, slot], place[row, slot] = raw[row, column], column + start
    both, where = torch.cat([top, value], 1), torch.cat([index, place], 1)
    top, order = both.topk(min(keep, both.shape[1]), dim=1)
    return top, where.gather(1, order)


def moments(points: Points, query: Query, log_sum: Tensor, vector: Tensor) -> dict[str, Tensor]:
    """Return posterior moments of `a = ⟨y, vector⟩`, `l` and y, in float64 (float32 on mps), by one more pass.

    Args:
        points: the data.
        query: where.
        log_sum: (B,) as `stream` found it.
        vector: (B, d).

    Returns:
        `ay` and `ly` (B, d), `a`, `l`, `al` and `ll` (B,): posterior means of these products, where l is counted from
        `log_sum` so that nothing cancels.
    """
    wide = accumulator(query.x)
    asked, vector = query.to(wide), vector.to(wide)
    size = (asked.x**2).sum(1) / 2 / query.level[:, 0] ** 2
    space = asked.x.new_empty(len(asked.x) * min(points.size, points.count))
    found = {name: torch.zeros_like(asked.x) for name in ("ay", "ly")}
    found |= {name: torch.zeros_like(size) for name in ("a", "l", "al", "ll")}
    for rows in points.spans():
        raw, y = _logits(points, asked, rows, space)
        logits = raw - (log_sum + size)[:, None]
        weights = logits.exp()
        logits = torch.where(weights > 0, logits, 0)
        a = vector @ y.T
        weighted = weights * a
        found["ay"] += weighted @ y
        found["ly"] += (weights * logits) @ y
        found["a"] += weighted.sum(1)
        found["l"] += (weights * logits).sum(1)
        found["al"] += (weighted * logits).sum(1)
        found["ll"] += (weights * logits**2).sum(1)
    return found

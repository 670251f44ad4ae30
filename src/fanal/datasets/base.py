"""What a data set is to fanal: samples, optional class labels, and where possible a rule that knows a bad one."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from fanal.errors import FanalError, unknown_name

__all__ = [
    "BLOCK",
    "Array",
    "Data",
    "Dataset",
    "Whole",
    "blocks",
    "check_count",
    "check_samples",
    "check_shape",
    "check_split",
    "to_images",
]

Array = NDArray[np.floating[Any]]
Whole = NDArray[np.integer[Any]]
BLOCK = 512  # samples that share one random stream; changing it changes every synthetic data set


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """Samples of a data set.

    Attributes:
        x: float32 of shape (N, *shape); images lie in [-1, 1].
        labels: indices into the set's `classes`, shape (N,), or None where there are no classes.
    """

    x: Tensor
    labels: Tensor | None = None


@runtime_checkable
class Dataset(Protocol):
    """Samples with what is known about them; `verify` and its kin exist where `verdicts` is not empty."""

    @property
    def name(self) -> str:
        """The spec that `fanal.datasets.get` knows it by."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample: (2,) for points, (C, H, W) for images."""
        ...

    @property
    def verdicts(self) -> tuple[str, ...]:
        """What `verify` can say, "ok" first; empty where there is no verifier."""
        ...

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the entries of `measure` that tell how varied right samples are; empty without a verifier."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the class labels; empty where there are none."""
        ...

    @property
    def broken_kinds(self) -> Mapping[str, tuple[str, ...]]:
        """Kinds of deliberately broken samples, each with the verdicts that count as right for it."""
        ...

    def data(self, split: str = "train", count: int | None = None, seed: int = 0) -> Data:
        """Return `count` samples of "train" or "held out"; a smaller count is a prefix of a larger one.

        Raises:
            FanalError: the split is unknown, or `count` is not positive or more than a finite set has.
        """
        ...

    def verify(self, x: Float[Tensor, "n *d"]) -> Int64[Tensor, " n"]:
        """Return one index into `verdicts` per sample; no sample's verdict depends on the others.

        Raises:
            FanalError: the set has no verifier, or x has the wrong shape or dtype, or is not finite.
        """
        ...

    def measure(self, x: Float[Tensor, "n *d"]) -> dict[str, Tensor]:
        """Return what the verifier sees, by name, one number of shape (N,) per sample.

        Raises:
            FanalError: as in `verify`.
        """
        ...

    def broken(self, kind: str, count: int, seed: int = 0) -> Tensor:
        """Return `count` samples with a known fault, drawn by the code that draws the real ones.

        Raises:
            FanalError: the kind is unknown or the count is not positive.
        """
        ...


def check_shape(source: Dataset, shape: Sequence[int], model: str) -> None:
    """Refuse a data set whose samples have another shape than a model's.

    Args:
        source: the data set.
        shape: of the model's samples.
        model: its name, for the message.

    Raises:
        FanalError: the shapes differ; the message says how a folder is read at the model's size.
    """
    if tuple(source.shape) == tuple(shape):
        return
    hint, (channels, *sides) = "", (*shape, 0)[:3]
    if source.name.startswith("folder:") and len(shape) == 3 and source.shape[0] == channels and sides[0] == sides[1]:
        hint = f"; read the folder at its size with {source.name.split(',size=')[0]},size={sides[0]}"
    raise FanalError(
        f"{source.name} has samples of shape {tuple(source.shape)}, and {model} makes {tuple(shape)}{hint}"
    )


def check_split(split: str) -> str:
    """Return "train" or "held out"; "held_out" means the latter.

    Raises:
        FanalError: another split.
    """
    known = {"train": "train", "held out": "held out", "held_out": "held out"}
    if split not in known:
        raise unknown_name("split", split, ("train", "held_out"))
    return known[split]


def check_count(count: int, limit: int | None = None, what: str = "samples") -> int:
    """Return `count` if it is a positive whole number, and at most `limit` where one is given.

    Raises:
        FanalError: it is not.
    """
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
        raise FanalError(f"the number of {what} must be a whole number >= 1, got {count!r}")
    if limit is not None and count > limit:
        raise FanalError(f"asked for {count} {what}, but there are only {limit}; ask for at most {limit}")
    return int(count)


def check_samples(x: Tensor, shape: tuple[int, ...], name: str) -> Array:
    """Return x as a float64 array of shape (N, *shape).

    Raises:
        FanalError: x is not a floating-point tensor of that shape, or holds NaN or infinity.
    """
    if not isinstance(x, Tensor):
        raise FanalError(f"{name} is verified on a torch tensor of shape (N, {_list(shape)}), got {type(x).__name__}")
    if x.ndim != len(shape) + 1 or tuple(x.shape[1:]) != shape:
        raise FanalError(f"{name} is verified on shape (N, {_list(shape)}), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise FanalError(f"{name} is verified on floating-point samples, got {x.dtype}; images lie in [-1, 1]")
    bad = (~torch.isfinite(x)).flatten(1).any(1)
    if bad.any():
        raise FanalError(f"sample {int(bad.nonzero()[0])} of {len(x)} holds NaN or infinity; verify finite samples")
    return x.detach().to("cpu", torch.float64).numpy()


def blocks(count: int, seed: int, stream: str) -> Iterator[tuple[np.random.Generator, int]]:
    """Yield one generator per block of `BLOCK` samples, with how many of the block to keep.

    The generator is a counter-based one (Philox) keyed with (seed, stream, block), so that a sample depends on its
    index alone: always draw the whole block, then cut.

    Raises:
        FanalError: the seed is not a whole number in [0, 2^64).
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise FanalError(f"the seed must be a whole number in [0, 2^64), got {seed!r}")
    for i, start in enumerate(range(0, count, BLOCK)):
        key = np.array([seed, (zlib.crc32(stream.encode()) << 32) | i], dtype=np.uint64)
        yield np.random.Generator(np.random.Philox(key=key)), min(BLOCK, count - start)


def to_images(gray: Array) -> Tensor:
    """Map gray values in [0, 1] of shape (N, H, W) to float32 images in [-1, 1] of shape (N, 1, H, W)."""
    return torch.from_numpy((2.0 * gray - 1.0).astype(np.float32)[:, None])


def _list(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))

"""Samples to compare: of run folders, images in folders and zips, and data sets; read block by block."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from io import BufferedIOBase
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fanal.datasets import DATASETS, Dataset, get
from fanal.datasets.base import check_count
from fanal.datasets.decoding import Unusable, bombs_raise, decode, header
from fanal.datasets.sources import Source as Files
from fanal.datasets.sources import source as files_of
from fanal.errors import FanalError, unknown_name
from fanal.files import read_json

__all__ = ["Drawn", "Images", "Kept", "Samples", "open_samples"]

T = TypeVar("T")


@runtime_checkable
class Samples(Protocol):
    """Samples that can be read in any pieces, always the same."""

    @property
    def about(self) -> dict[str, str | int]:
        """What they are, for the record."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the samples, where they have any; else empty."""
        ...

    @property
    def identity(self) -> str:
        """Changes when the samples do."""
        ...

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def read(self, start: int, stop: int) -> Tensor:
        """Return samples `start` to `stop`: bytes, or floats in [-1, 1]."""
        ...


@dataclass(frozen=True, eq=False)
class Drawn:
    """Samples of a data set."""

    dataset: Dataset
    split: str
    count: int | None

    @cached_property
    def _x(self) -> Tensor:
        return self.dataset.data(self.split, self.count).x

    @property
    def about(self) -> dict[str, str | int]:
        """The data set and its split."""
        return {"source": self.dataset.name, "split": self.split, "n": len(self)}

    names: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """Hash of the samples."""
        return hashlib.sha256(self._x.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._x)

    def read(self, start: int, stop: int) -> Tensor:
        """Return samples."""
        return self._x[start:stop]


@dataclass(frozen=True, eq=False)
class Kept:
    """One tensor of a safetensors file: that of a run folder, or another."""

    path: Path
    tensor: str
    count: int
    names: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path, tensor: str | None, count: int | None) -> Kept:
        """Find the tensor: the given one, else `image`, else `x`.

        Raises:
            FanalError: the file cannot be read or has no such tensor, or it is no batch of samples.
        """
        with _tensors(path) as file:
            known = sorted(file.keys())
            name = tensor or ("image" if "image" in known else "x")
            if name not in known:
                name = _first_repair(path, name)
            if name not in known:
                raise unknown_name(f"tensor of {path}", tensor or name, known)
            shape = file.get_slice(name).get_shape()
            kind = file.get_slice(name).get_dtype()
        if len(shape) < 2 or not shape[0] or kind not in ("U8", "F16", "BF16", "F32", "F64"):
            raise FanalError(f"{name} of {path} holds no samples: it has shape {tuple(shape)} and type {kind}")
        total = int(shape[0])
        return cls(path, name, total if count is None else check_count(count, total))

    @property
    def about(self) -> dict[str, str | int]:
        """The file and the tensor."""
        return {"source": str(self.path), "tensor": self.tensor, "n": self.count}

    @property
    def identity(self) -> str:
        """Hash of the file."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.count

    def read(self, start: int, stop: int) -> Tensor:
        """Return samples.

        Raises:
            FanalError: the file is damaged.
        """
        with _tensors(self.path) as file:
            return file.get_slice(self.tensor)[start : min(stop, self.count)]


def _tensors(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise FanalError(f"cannot read {path}: not a whole safetensors file ({error})") from error


def _first_repair(path: Path, name: str) -> str:
    """In a run with --guard, the samples after the first repair NAME are `x`, and `x.NAME` means the same."""
    record = path.with_name("run.json")
    guards = read_json(record).get("config", {}).get("guard") if record.is_file() else None
    first = guards[0] if isinstance(guards, list) and guards and isinstance(guards[0], str) else ""
    return "x" if first and name == f"x.{first.partition(':')[0]}" else name


def _natural(name: str) -> list[tuple[int, str]]:
    """Order 2.png before 10.png."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


@dataclass(frozen=True, eq=False)
class Images:
    """The images of a folder (and its subfolders) or of a zip file, in the order of their names, as bytes.

    Each is cut to its middle square. With `size` it is resized (Lanczos); else all squares must have one size.
    """

    files: Files
    path: Path
    order: tuple[str, ...]
    shape: tuple[int, ...]

    @classmethod
    def open(cls, path: Path, size: int | None, count: int | None) -> Images:
        """List the images and read their headers.

        Raises:
            FanalError: there are no images, one cannot be read, or they differ in size and no size is given.
        """
        files = files_of(path)
        order = sorted(files.names, key=_natural)
        order = order[: len(order) if count is None else check_count(count, len(order), "images")]
        heads = [_look(files, path, name, header) for name in order]
        other = next((i for i, head in enumerate(heads) if head.side != heads[0].side), None)
        if other is not None and size is None:
            raise FanalError(
                f"the images of {path} differ in size ({order[0]}: {heads[0].side}, {order[other]}: "
                f"{heads[other].side}); --size N resizes them"
            )
        side = heads[0].side if size is None else size
        return cls(files, path, tuple(order), (1 if all(head.gray for head in heads) else 3, side, side))

    @property
    def about(self) -> dict[str, str | int]:
        """The folder or the zip."""
        return {"source": str(self.path), "size": self.shape[-1], "n": len(self)}

    @property
    def names(self) -> tuple[str, ...]:
        """File names without folders and suffixes."""
        return tuple(PurePosixPath(name).stem for name in self.order)

    @property
    def identity(self) -> str:
        """Hash of the names, sizes and times of the files."""
        places = [self.path / name for name in self.order] if self.path.is_dir() else [self.path]
        stats = [place.stat() for place in places]
        text = "\n".join([*self.order, *(f"{s.st_size} {s.st_mtime_ns}" for s in stats)])
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.order)

    def read(self, start: int, stop: int) -> Tensor:
        """Return images as bytes.

        Raises:
            FanalError: one cannot be read.
        """

        def pixels(stream: BufferedIOBase) -> np.ndarray:
            return decode(stream, self.shape, np.dtype(np.uint8))

        return torch.from_numpy(
            np.stack([_look(self.files, self.path, name, pixels) for name in self.order[start:stop]])
        )


def _look(files: Files, path: Path, name: str, read: Callable[[BufferedIOBase], T]) -> T:
    """Return what `read` makes of an image."""
    try:
        with bombs_raise(), files.open(name) as stream:
            return read(stream)
    except Unusable as error:
        raise FanalError(f"{path / name} {error}; remove or replace it") from error


def open_samples(
    spec: str, *, tensor: str | None = None, split: str = "held out", count: int | None = None, size: int | None = None
) -> Samples:
    """Open samples: a data set, a run folder, a `.safetensors` file, or images in a folder or a `.zip`.

    Args:
        spec: name of a data set (as in `fanal.datasets.get`), or a path; `./NAME` is always a path.
        tensor: which tensor of a run; None: `image` (bytes) where there is one, else `x`.
        split: which part of a data set.
        count: how many samples, from the first; None: all (of a data set that is drawn: what it gives by itself).
        size: side of the square that images are resized to.

    Raises:
        FanalError: there is nothing of that kind there, an option does not fit it, or it cannot be read.
    """
    path = Path(spec).expanduser()
    drawn = spec in DATASETS or spec.startswith("folder:")
    run = path / "samples.safetensors"
    kept = not drawn and (path.suffix == ".safetensors" or run.is_file())
    if tensor is not None and not kept:
        raise FanalError(f"--tensor is for run folders and .safetensors files, and {spec} is neither")
    if size is not None and (drawn or kept):
        raise FanalError(
            f"--size is for folders and zips of images, and {spec} is none; folder:DIR,size=N is a data set"
        )
    if size is not None and not 1 <= size <= 4096:
        raise FanalError(f"the size of images must be in [1, 4096], got {size}")
    if drawn:
        return Drawn(get(spec), split, count)
    if kept:
        return Kept.open(run if run.is_file() else path, tensor, count)
    if path.is_dir() or (path.suffix.lower() == ".zip" and path.is_file()):
        return Images.open(path, size, count)
    if path.exists() or "/" in spec:
        raise FanalError(f"{spec} is no run folder, no .safetensors file and no folder or .zip of images")
    raise unknown_name("samples", spec, [*DATASETS, "folder:DIR", "a run folder", "a folder or .zip of images"])

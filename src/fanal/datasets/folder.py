"""folder:PATH: the images in a folder or a zip file, cropped to squares of one size."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fanal.datasets.base import Data, check_count, check_split
from fanal.datasets.decoding import Header, Unusable, bombs_raise, decode, header
from fanal.datasets.levels import Levels
from fanal.datasets.partition import Unjudged, partition
from fanal.datasets.sources import Source, json_labels, source
from fanal.errors import FanalError, unknown_name
from fanal.runs import Progress, quiet

__all__ = ["Bad", "Folder"]

_MAX_SIZE = 4096
_NAMED = 20  # unusable images that an error names
_BLOCK = 256  # images read between two signs of progress
_WORKERS = min(8, os.cpu_count() or 1)
_SHARE = 0.8  # of the machine's memory that images may take
_OPTION = re.compile(r",(size|bad)=([^,=]*)\Z")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Bad:
    """An image that cannot be used.

    Attributes:
        name: its name in the folder or zip file.
        reason: why, as the end of a sentence.
    """

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Folder(Unjudged):
    """Images of a folder or zip file, center-cropped to a square and resized; build it with `open`.

    A `dataset.json` of the form `{"labels": [["NAME", CLASS], …]}` gives the classes; without one, images in subfolders
    have the subfolder's name as their class. A fixed fifth of each class is held out, whatever the seed; the seed only
    orders the images of a split.

    Attributes:
        name: the spec.
        shape: (1, size, size) if all images are gray, else (3, size, size).
        classes: sorted names of the classes; empty if there are none.
        files: the names of the images, sorted.
        labels: the class of each image.
        skipped: unusable images that were left out; empty unless the spec says `bad=skip`.
    """

    name: str
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]
    skipped: tuple[Bad, ...]
    _source: Source = field(repr=False)
    _dtype: np.dtype[Any] = field(repr=False)
    _values: NDArray[Any] | None = field(repr=False, default=None)

    @classmethod
    def open(cls, spec: str, *, side: Callable[[int], int] | None = None, progress: Progress = quiet) -> Folder:
        """List the images of `folder:PATH`, `folder:PATH,size=N` or `folder:PATH,bad=skip` and read their headers.

        The pixels are read when they are needed, or all at once by `load`; with `bad=skip`, or to name each unusable
        image once there is one, at once.

        Args:
            spec: what to read; PATH is a folder or a zip file.
            side: picks the size where the spec has none, given the smallest side of all images; without it, the size
                is the smaller side of the first image.
            progress: wraps loops over blocks of images.

        Raises:
            FanalError: the spec has an unknown option or a size that is not a whole number in [1, 4096]; there is no
                such folder or zip file, or it is damaged or has no images; images lie both in the folder itself and
                in subfolders; labels are missing; or images are unusable and the spec does not say to skip them.
        """
        path, options = _parse(spec)
        if (path / "run.json").is_file():
            raise FanalError(f"{path} is a run folder of fanal, no folder of images: name the images it was made from")
        images = source(path)
        heads = list(_each(images, images.names, _header, progress, "reading headers"))
        good = [(name, head) for name, head in zip(images.names, heads, strict=True) if isinstance(head, Header)]
        size = _size(spec, options, [head.side for _, head in good], side)
        if side is not None:
            spec = ",".join([f"folder:{path}", f"size={size}", *(["bad=skip"] if "bad" in options else [])])
        channels = 1 if all(head.gray for _, head in good) else 3
        deep = any(head.deep for _, head in good)
        classes, labels = _classes(images, path)
        every = tuple(labels.get(name, 0) for name in images.names)
        dtype = np.dtype(np.uint16 if deep else np.uint8)
        found = cls(spec, (channels, size, size), classes, images.names, every, (), images, dtype)
        if len(good) < len(heads) or options.get("bad") == "skip":
            return found.load(progress)
        return found

    def load(self, progress: Progress = quiet) -> Folder:
        """Return the same images with their pixels in memory, one byte per value (two for images of 16 bits).

        Raises:
            FanalError: images are unusable and the spec does not say `bad=skip`, or they do not fit into memory.
        """
        if self._values is not None:
            return self
        values, bad = self._decode(self.files, progress)
        if not bad:
            return dataclasses.replace(self, _values=values)
        if _parse(self.name)[1].get("bad") != "skip" or len(bad) == len(self.files):
            raise _refusal(bad, len(self.files), self.name)
        left_out = {each.name for each in bad}
        keep = np.array([name not in left_out for name in self.files])
        return dataclasses.replace(
            self,
            files=tuple(name for name in self.files if name not in left_out),
            labels=tuple(np.array(self.labels)[keep].tolist()),
            skipped=tuple(bad),
            _values=values[keep],
        )

    def levels(self, split: str = "train", count: int | None = None, seed: int = 0) -> Levels:
        """Return `count` images (all of the split by default) as their levels, with their classes.

        Raises:
            FanalError: as in `data`.
        """
        labels = np.array(self.labels, dtype=np.int64)
        index = partition(labels, check_split(split), seed)
        if len(index) == 0:
            raise FanalError(f"{self.name} has too few images ({len(self.files)}) for a {split} split")
        index = index[: len(index) if count is None else check_count(count, len(index), f"images ({split})")]
        if self._values is None:
            values, bad = self._decode([self.files[i] for i in index], quiet)
            if bad:
                raise _refusal(bad, len(index), self.name)
        else:
            values = self._values[index]
        return Levels(values, torch.from_numpy(labels[index]) if self.classes else None)

    def data(self, split: str = "train", count: int | None = None, seed: int = 0) -> Data:
        """Return `count` images (all of the split by default), with their classes where there are any.

        Raises:
            FanalError: the split is unknown or empty, `count` is not positive or more than the split has, or an image
                cannot be read.
        """
        return self.levels(split, count, seed).data()

    def names(self, split: str, seed: int = 0) -> list[str]:
        """Return the names of the images of a split, in the order of `levels`.

        Raises:
            FanalError: the split is unknown.
        """
        return [self.files[i] for i in partition(np.array(self.labels, dtype=np.int64), check_split(split), seed)]

    def digest(self) -> str:
        """Return a hash of all bytes of the images as they are stored, of their names, and of the labels.

        Raises:
            FanalError: a file cannot be read.
        """
        return self._source.digest()

    def count(self, split: str) -> int:
        """Return the number of images of a split."""
        return len(partition(np.array(self.labels, dtype=np.int64), check_split(split), 0))

    def _decode(self, names: Sequence[str], progress: Progress) -> tuple[NDArray[Any], list[Bad]]:
        """Read images; the rows of unusable ones are empty."""
        _check_memory(len(names) * int(np.prod(self.shape)) * self._dtype.itemsize, len(names), self.name)
        values = np.zeros((len(names), *self.shape), dtype=self._dtype)

        def one(images: Source, name: str) -> NDArray[Any]:
            with images.open(name) as stream:
                return decode(stream, self.shape, self._dtype)

        bad = []
        for i, found in enumerate(_each(self._source, names, one, progress, "reading images")):
            if isinstance(found, Bad):
                bad.append(found)
            else:
                values[i] = found
        return values, bad


def _header(images: Source, name: str) -> Header:
    with images.open(name) as stream:
        return header(stream)


def _each(
    images: Source, names: Sequence[str], read: Callable[[Source, str], _T], progress: Progress, what: str
) -> Iterator[_T | Bad]:
    """Yield what `read` makes of each image, or what is wrong with it; several are read at once."""

    def one(name: str) -> _T | Bad:
        try:
            return read(images, name)
        except Unusable as error:
            return Bad(name, str(error))

    with bombs_raise(), ThreadPoolExecutor(_WORKERS) as pool:
        for start in progress(range(0, len(names), _BLOCK), what):
            yield from pool.map(one, names[start : start + _BLOCK])


def _refusal(bad: Sequence[Bad], total: int, name: str) -> FanalError:
    lines = [f"{len(bad)} of {total} images of {name} cannot be used:"]
    lines += [f"  {each.name} {each.reason}" for each in bad[:_NAMED]]
    if len(bad) > _NAMED:
        lines.append(f"  and {len(bad) - _NAMED} more")
    hint = "remove or replace them, or leave them out: fanal train --skip-bad, or the spec folder:PATH,bad=skip"
    return FanalError("\n".join([*lines, hint]))


def _parse(spec: str) -> tuple[Path, dict[str, str]]:
    """Split "folder:PATH,size=N,bad=skip"; PATH may hold commas and equals signs."""
    text, options = spec.removeprefix("folder:"), {}
    while (match := _OPTION.search(text)) is not None:
        if match[1] in options:
            raise FanalError(f"{spec!r} says {match[1]} twice")
        options[match[1]] = match[2]
        text = text[: match.start()]
    if not options.get("size", "1").isdecimal():
        raise FanalError(f"the size in {spec!r} must be a whole number of pixels, e.g. folder:DIR,size=64")
    if options.get("bad", "skip") != "skip":
        raise unknown_name("way to treat bad images", options["bad"], ["skip"])
    path = Path(text).expanduser()
    if not text or not path.exists():
        raise FanalError(
            f"{spec!r} names no folder and no zip file: give an existing one, e.g. folder:images or "
            "folder:images.zip,size=64"
        )
    return path, options


def _size(spec: str, options: dict[str, str], sides: Sequence[int], pick: Callable[[int], int] | None) -> int:
    if "size" in options:
        size = int(options["size"])
    elif not sides:
        size = 1  # of no use: every image is bad
    else:
        size = sides[0] if pick is None else pick(min(sides))
    if not 1 <= size <= _MAX_SIZE:
        raise FanalError(
            f"the size of the images of {spec!r} would be {size}: give one in [1, {_MAX_SIZE}], e.g. size=64"
        )
    return size


def _classes(images: Source, path: Path) -> tuple[tuple[str, ...], dict[str, int]]:
    """The classes, and the class of each image: from dataset.json, else from the subfolders."""
    content = images.label_file
    if content is not None:
        return json_labels(content, images.names, str(path))
    tops = {name: name.partition("/")[0] if "/" in name else "" for name in images.names}
    classes = sorted(set(tops.values()))
    if classes == [""]:
        return (), {}
    if "" in classes:
        raise FanalError(
            f"{path} has images both in itself and in subfolders: subfolders are classes, so move the loose images "
            "into one"
        )
    return tuple(classes), {name: classes.index(top) for name, top in tops.items()}


def _check_memory(size: int, count: int, name: str) -> None:
    """Refuse to fill the machine's memory, where its size is known."""
    if not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > _SHARE * memory:
        raise FanalError(
            f"the {count} images of {name} take {size / 2**30:.1f} GiB, and this machine has "
            f"{memory / 2**30:.1f} GiB of memory: choose a smaller size"
        )

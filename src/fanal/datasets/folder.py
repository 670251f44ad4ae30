"""folder:DIR: the images in a folder, cropped to squares of one size."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fanal.datasets.base import Data, check_count, check_split
from fanal.datasets.partition import Unjudged, partition
from fanal.errors import FanalError

__all__ = ["Folder"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_MAX_SIZE = 4096
_DEEP = {"I", "I;16", "I;16B", "I;16L"}  # 16 bits per pixel, which Pillow may keep in 32
_GREY = {"1", "L", "LA"} | _DEEP


@dataclass(frozen=True, eq=False)
class Folder(Unjudged):
    """Images of a folder (png, jpg, webp, bmp), center-cropped to a square and resized; build it with `open`.

    Images in subfolders have the subfolder's name as their class. A fixed fifth of each class is held out, whatever
    the seed; the seed only orders the images of a split.

    Attributes:
        name: the spec.
        shape: (1, size, size) if all images are gray, else (3, size, size).
        classes: sorted names of the subfolders; empty if the images lie in the folder itself.
        files: the images, sorted.
        labels: the class of each image.
    """

    name: str
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]

    @classmethod
    def open(cls, spec: str) -> Folder:
        """List the images that "folder:DIR" or "folder:DIR,size=N" names and read their headers.

        Without a size, that of the first image (its shorter side) is used.

        Raises:
            FanalError: there is no such folder, it holds no images or mixes levels, an image cannot be read, or the
                size is not a whole number in [1, 4096].
        """
        path, size = _parse(spec)
        files = _list(path)
        below = {f.relative_to(path).parts[0] for f in files if f.parent != path}
        if below and any(f.parent == path for f in files):
            raise FanalError(f"{path} has images both in itself and in subfolders: subfolders are classes, so move "
                             "the loose images into one")  # fmt: skip
        classes = tuple(sorted(below))
        labels = tuple(classes.index(f.relative_to(path).parts[0]) if classes else 0 for f in files)
        headers = [_header(f) for f in files]
        side = size if size is not None else min(headers[0][1])
        _check_size(side, spec)
        channels = 1 if all(mode in _GREY for mode, _ in headers) else 3
        return cls(spec, (channels, side, side), classes, tuple(files), labels)

    def data(self, split: str = "train", count: int | None = None, seed: int = 0) -> Data:
        """Return `count` images (all of the split by default), with their classes where there are any.

        Raises:
            FanalError: the split is unknown or empty, `count` is not positive or more than the split has, or an image
                cannot be read.
        """
        labels = np.array(self.labels, dtype=np.int64)
        index = partition(labels, check_split(split), seed)
        if len(index) == 0:
            raise FanalError(f"{self.name} has too few images ({len(self.files)}) for a {split} split")
        index = index[: len(index) if count is None else check_count(count, len(index), f"images ({split})")]
        x = np.stack([_read(self.files[i], self.shape) for i in index])
        return Data(torch.from_numpy(x), torch.from_numpy(labels[index]) if self.classes else None)


def _parse(spec: str) -> tuple[Path, int | None]:
    text, comma, option = spec.removeprefix("folder:").rpartition(",size=")
    if not comma:
        text, size = option, None
    elif option.isdecimal():
        size = int(option)
        _check_size(size, spec)
    else:
        raise FanalError(f"the size in {spec!r} must be a whole number of pixels, e.g. folder:DIR,size=64")
    path = Path(text).expanduser()
    if not text or not path.is_dir():
        raise FanalError(f"{spec!r} names no folder: give an existing one, e.g. folder:images or folder:images,size=64")
    return path, size


def _check_size(size: int, spec: str) -> None:
    if not 1 <= size <= _MAX_SIZE:
        raise FanalError(
            f"the size of the images of {spec!r} would be {size}: give one in [1, {_MAX_SIZE}], e.g. size=64"
        )


def _list(path: Path) -> list[Path]:
    try:
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in _SUFFIXES and f.is_file())
    except OSError as error:
        raise FanalError(f"cannot list {path}: {error}") from error
    if not files:
        raise FanalError(f"no images in {path}: looked for {', '.join(sorted(_SUFFIXES))} in it and its subfolders")
    return files


def _open(file: Path) -> Image.Image:
    """Open an image, refusing decompression bombs, which Pillow only warns of up to twice its limit."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(file)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise FanalError(f"{file} is too large ({error}); scale it down first") from error
    except Exception as error:  # Pillow's decoders raise whatever their parsers meet
        raise FanalError(f"cannot read the image {file}: {error}; remove or replace it") from error


def _header(file: Path) -> tuple[str, tuple[int, int]]:
    with _open(file) as image:
        return image.mode, image.size


def _read(file: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    with _open(file) as image:
        try:
            picture = ImageOps.exif_transpose(image)
            deep = picture.mode in _DEEP
            if deep:
                picture, white = picture.convert("I").convert("F"), 65535.0
            else:
                picture, white = picture.convert("L" if shape[0] == 1 else "RGB"), 255.0
            # Crop before resizing: a resize with a box lets in what lies around the box.
            (w, h), side = picture.size, min(picture.size)
            left, top = (w - side) // 2, (h - side) // 2
            picture = picture.crop((left, top, left + side, top + side))
            picture = picture.resize((shape[2], shape[1]), Image.Resampling.LANCZOS)
        except Exception as error:  # Pillow's decoders raise whatever their parsers meet
            raise FanalError(f"cannot read the image {file}: {error}; remove or replace it") from error
    values = np.asarray(picture, dtype=np.float32) / white
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    return np.clip(2.0 * np.broadcast_to(values, shape) - 1.0, -1.0, 1.0).astype(np.float32)

"""Where samples come from: run folders, images in folders and zips, and data sets; read block by block."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fanal.datasets import DATASETS, Dataset, get
from fanal.datasets.base import check_count
from fanal.errors import FanalError, unknown_name
from fanal.files import read_json

__all__ = ["Drawn", "Images", "Kept", "Source", "open_source"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_GRAY = {"1", "L", "LA", "I", "I;16", "I;16B", "I;16L"}
_MEMBER_BYTES = 2**28  # one picture of a zip, unpacked
_MEMBERS = 2**21
_ORIENTATION = 0x0112  # Exif: 5 to 8 lie on their side

T = TypeVar("T")


@runtime_checkable
class Source(Protocol):
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
    """The images of a folder (and its subfolders) or of a zip file, in the order of their names.

    All become bytes of one size: with `size`, the middle square, resized (Lanczos); else they must have one size.
    """

    path: Path
    files: tuple[str, ...]
    channels: int
    size: int | None
    identity: str

    @classmethod
    def open(cls, path: Path, size: int | None, count: int | None) -> Images:
        """List the images and read their headers.

        Raises:
            FanalError: there are no images, one cannot be read, or they differ in size and no size is given.
        """
        files, identity = _list(path)
        if not files:
            raise FanalError(f"no images in {path}: looked for {', '.join(sorted(_SUFFIXES))}")
        files = files[: len(files) if count is None else check_count(count, len(files), "images")]
        headers = _each(path, files, _header)
        first = headers[0][1]
        other = next((i for i, (_, shape) in enumerate(headers) if shape != first), None)
        if other is not None and size is None:
            raise FanalError(
                f"the images of {path} differ in size ({files[0]}: {first}, {files[other]}: {headers[other][1]}); "
                "--size N crops and resizes them"
            )
        channels = 1 if all(mode in _GRAY for mode, _ in headers) else 3
        return cls(path, tuple(files), channels, size, identity)

    @property
    def about(self) -> dict[str, str | int]:
        """The folder or the zip."""
        return {"source": str(self.path), "n": len(self)} | ({"size": self.size} if self.size else {})

    @property
    def names(self) -> tuple[str, ...]:
        """File names without folders and suffixes."""
        return tuple(Path(name).stem for name in self.files)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def read(self, start: int, stop: int) -> Tensor:
        """Return images as bytes.

        Raises:
            FanalError: one cannot be read.
        """
        parts = _each(self.path, self.files[start:stop], lambda image: _pixels(image, self.channels, self.size))
        return torch.from_numpy(np.stack(parts))


def _list(path: Path) -> tuple[list[str], str]:
    """Names of the images, and a hash that changes when they do."""
    try:
        if path.is_dir():
            found = [f for f in path.rglob("*") if f.suffix.lower() in _SUFFIXES and f.is_file()]
            stats = {str(f.relative_to(path)): f.stat() for f in found}
            marks = {name: f"{s.st_size} {s.st_mtime_ns}" for name, s in stats.items()}
        else:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
            if len(members) > _MEMBERS:
                raise FanalError(f"{path} holds {len(members)} files, more than {_MEMBERS}")
            hidden = re.compile(r"(^|/)[._]")
            marks = {
                m.filename: f"{m.file_size} {m.CRC}"
                for m in members
                if Path(m.filename).suffix.lower() in _SUFFIXES and not hidden.search(m.filename)
            }
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise FanalError(f"cannot read {path}: {error}") from error
    names = sorted(marks, key=_natural)
    text = "\n".join(f"{name} {marks[name]}" for name in names)
    return names, hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _each(path: Path, names: list[str] | tuple[str, ...], look: Callable[[Image.Image], T]) -> list[T]:
    """Open images one by one, and return what `look` sees in each."""
    archive = None if path.is_dir() else zipfile.ZipFile(path)
    found = []
    try:
        for name in names:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow only warns up to twice it
                    with Image.open(path / name if archive is None else _member(archive, name)) as image:
                        found.append(look(image))
            except FanalError:
                raise
            except Exception as error:  # Pillow's decoders and zipfile raise whatever their parsers meet
                raise FanalError(f"cannot read the image {path / name}: {error}; remove or replace it") from error
    finally:
        if archive is not None:
            archive.close()
    return found


def _header(image: Image.Image) -> tuple[str, tuple[int, int]]:
    """Mode, width and height, as they will be when the image stands upright."""
    turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return image.mode, (image.height, image.width) if turned else image.size


def _member(archive: zipfile.ZipFile, name: str) -> BinaryIO:
    size = archive.getinfo(name).file_size
    if size > _MEMBER_BYTES:
        raise FanalError(f"{name} of {archive.filename} takes {size} bytes, at most {_MEMBER_BYTES}")
    with archive.open(name) as entry:
        return cast(BinaryIO, io.BytesIO(entry.read(_MEMBER_BYTES)))


def _pixels(image: Image.Image, channels: int, size: int | None) -> np.ndarray:
    picture = ImageOps.exif_transpose(image)
    if picture.mode.startswith("I"):  # 16 bits per pixel, which Pillow may keep in 32
        deep = np.asarray(picture.convert("I"), dtype=np.float64) / 257
        picture = Image.fromarray(deep.round().clip(0, 255).astype(np.uint8))
    picture = picture.convert("L" if channels == 1 else "RGB")
    if size is not None:
        (w, h), side = picture.size, min(picture.size)
        left, top = (w - side) // 2, (h - side) // 2
        picture = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    values = np.asarray(picture)
    return values[None] if channels == 1 else np.ascontiguousarray(values.transpose(2, 0, 1))


def open_source(
    spec: str, *, tensor: str | None = None, split: str = "held out", count: int | None = None, size: int | None = None
) -> Source:
    """Open samples: a data set, a run folder, a `.safetensors` file, or images in a folder or a `.zip`.

    Args:
        spec: name of a data set (as in `fanal.datasets.get`), or a path; `./NAME` is always a path.
        tensor: which tensor of a run; None: `image` (bytes) where there is one, else `x`.
        split: which part of a data set.
        count: how many samples, from the first; None: all (of a data set that is drawn: what it gives by itself).
        size: side of the square that images are cropped and resized to.

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

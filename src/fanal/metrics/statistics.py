"""Statistics of a set's features: what a distance needs, in memory and in files."""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from fanal.errors import FanalError, reason
from fanal.files import read_tensors, write_tensors

__all__ = ["MOST_FEATURES", "Statistics", "check_features", "read_statistics", "write_statistics"]

MOST_FEATURES = 8192
"""Longest feature vector whose covariance is computed or read."""

_FORMAT = "fanal-statistics-1"
_FILE_BYTES = 2**33
_HEADER_BYTES = 10_000


def check_features(features: Tensor, what: str = "features", least: int = 2) -> Tensor:
    """Return features as float64 on their device.

    Raises:
        FanalError: they are not a finite table (N, D), or have fewer than `least` rows.
    """
    if features.ndim != 2 or not features.shape[1]:
        raise FanalError(f"{what} are a table of shape (N, D), one row per sample, got {tuple(features.shape)}")
    if len(features) < least:
        raise FanalError(f"at least {least} samples are needed, got {len(features)}")
    result = features.detach().cpu().double()  # on the CPU first: not every device has float64
    wrong = ~torch.isfinite(result).all(1)
    if bool(wrong.any()):
        raise FanalError(f"{what} of sample {int(wrong.nonzero()[0])} hold NaN or infinity")
    return result


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance of a set's features, and where they come from.

    Attributes:
        mean: (D,), float64.
        cov: (D, D), float64, with N − 1 in the denominator.
        n: number of samples; None where a file does not say.
        extractor: name of what made the features; "" where it is not known.
        sha256: hash of the extractor's weights; "" where it has none.
        features: (N, D), where they were kept; all distances but the Fréchet distance need them.
    """

    mean: Float64[Tensor, " d"]
    cov: Float64[Tensor, "d d"]
    n: int | None
    extractor: str = ""
    sha256: str = ""
    features: Float[Tensor, "n d"] | None = None

    @classmethod
    def of(
        cls, features: Float[Tensor, "n d"], extractor: str = "", sha256: str = "", *, keep: bool = True
    ) -> Statistics:
        """Compute the statistics of features.

        Args:
            features: one row per sample.
            extractor: name of what made them.
            sha256: hash of its weights.
            keep: keep the features too.

        Raises:
            FanalError: fewer than two samples, more than `MOST_FEATURES` features, or a value that is not finite.
        """
        _check_width(features.shape[-1])
        data = check_features(features).cpu()
        mean = data.mean(0)
        centered = data - mean
        cov = centered.T @ centered / (len(data) - 1)
        return cls(mean, (cov + cov.T) / 2, len(data), extractor, sha256, features.detach().cpu() if keep else None)

    def label(self) -> str:
        """Return the name of the extractor with the start of its hash."""
        if not self.extractor:
            return "an unknown extractor"
        return f"{self.extractor} (sha256 {self.sha256[:12]})" if self.sha256 else self.extractor

    def check_same(self, other: Statistics) -> None:
        """Make sure that two sets of statistics can be compared.

        Raises:
            FanalError: they were made by different extractors or have different lengths.
        """
        known = self.extractor and other.extractor
        if known and (self.extractor, self.sha256) != (other.extractor, other.sha256):
            raise FanalError(
                f"statistics of different extractors cannot be compared: {self.label()} and {other.label()}; extract "
                "both sets with the same one"
            )
        if len(self.mean) != len(other.mean):
            raise FanalError(
                f"features of different lengths cannot be compared: {len(self.mean)} and {len(other.mean)}; extract "
                "both sets with the same extractor"
            )


def _check_width(width: int) -> None:
    if width > MOST_FEATURES:
        raise FanalError(
            f"{width} features per sample are too many for a covariance (at most {MOST_FEATURES}): use an extractor "
            "(--features own), or smaller images (--size)"
        )


def write_statistics(path: str | Path, statistics: Statistics) -> None:
    """Write statistics as safetensors: `mean`, `cov`, and `features` where they were kept.

    Raises:
        FanalError: the place cannot be written.
    """
    tensors = {"mean": statistics.mean, "cov": statistics.cov}
    if statistics.features is not None:
        tensors["features"] = statistics.features.float()
    about = {"n": statistics.n, "extractor": statistics.extractor, "sha256": statistics.sha256}
    write_tensors(Path(path), tensors, {"format": _FORMAT, "statistics": json.dumps(about)})


def read_statistics(path: str | Path) -> Statistics:
    """Read statistics: a file of `write_statistics`, or a published `.npz` with `mu` and `sigma` (EDM, clean-fid).

    An `.npz` says neither which network made it nor from how many images. Nothing in it is unpickled, and its sizes
    are checked before anything is allocated.

    Raises:
        FanalError: the file is missing, damaged, hostile, or holds other things.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
    except OSError as error:
        raise FanalError(f"cannot read {file}: {reason(error)}") from error
    if size > _FILE_BYTES:
        raise FanalError(f"{file} has {size} bytes, more than statistics take (at most {_FILE_BYTES})")
    found = _read_npz(file) if file.suffix == ".npz" else _read_safetensors(file)
    try:
        _check_moments(found)
    except FanalError as error:
        raise FanalError(f"{file} holds no usable statistics: {error}") from error
    return found


def _read_safetensors(path: Path) -> Statistics:
    tensors, header = read_tensors(path)
    try:
        about = json.loads(header["statistics"]) if header.get("format") == _FORMAT else None
    except (KeyError, ValueError):
        about = None
    if not isinstance(about, dict) or not {"mean", "cov"} <= tensors.keys() <= {"mean", "cov", "features"}:
        raise FanalError(f"{path} is not a file of statistics: fanal eval --write-stats FILE writes one")
    n, names = about.get("n"), (about.get("extractor"), about.get("sha256"))
    sound = n is None or (type(n) is int and n >= 2)
    if not sound or not all(isinstance(name, str) and len(name) <= 500 for name in names):
        raise FanalError(f"{path} does not say properly what its statistics are of: write it again")
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise FanalError(f"{path} is not a file of statistics: its tensors are no floating-point numbers")
    extractor, sha256 = cast(tuple[str, str], names)
    mean, cov = tensors["mean"].double(), tensors["cov"].double()
    return Statistics(mean, cov, n, extractor, sha256, tensors.get("features"))


def _check_moments(found: Statistics) -> None:
    d = found.mean.numel()
    if found.mean.ndim != 1 or not d or found.cov.shape != (d, d):
        raise FanalError(f"shapes {tuple(found.mean.shape)} and {tuple(found.cov.shape)} are no mean and covariance")
    _check_width(d)
    if not bool(torch.isfinite(found.mean).all()) or not bool(torch.isfinite(found.cov).all()):
        raise FanalError("NaN or infinity in the mean or the covariance")
    scale = float(found.cov.diagonal().abs().max())
    if float((found.cov - found.cov.T).abs().max()) > 1e-3 * scale or float(found.cov.diagonal().min()) < 0:
        raise FanalError("the covariance is not symmetric, or has negative variances")
    if found.features is not None:
        if found.features.ndim != 2 or found.features.shape != (found.n, d):
            raise FanalError(f"features of shape {tuple(found.features.shape)} do not fit n = {found.n} and D = {d}")
        check_features(found.features)


def _read_npz(path: Path) -> Statistics:
    try:
        with zipfile.ZipFile(path) as archive:
            mean, cov = (_read_npy(archive, name) for name in ("mu", "sigma"))
    except KeyError as error:
        raise FanalError(f"{path} holds no statistics: expected the arrays mu and sigma ({error})") from error
    except FanalError as error:
        raise FanalError(f"cannot read {path}: {reason(error)}") from error
    except Exception as error:  # zipfile and numpy's header parser raise whatever they meet
        raise FanalError(f"cannot read {path}: {reason(error)}") from error
    return Statistics(torch.from_numpy(mean), torch.from_numpy(cov), None)


def _read_npy(archive: zipfile.ZipFile, name: str) -> NDArray[np.float64]:
    """Read one plain array of a zip, refusing object arrays and sizes that are not what they claim."""
    with archive.open(f"{name}.npy") as entry:
        file = cast(BinaryIO, entry)
        version = npy.read_magic(file)
        reader = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if reader is None:
            raise FanalError(f"{name} has the unknown format {version}")
        shape, fortran, dtype = reader(file, max_header_size=_HEADER_BYTES)
        if dtype not in (np.float32, np.float64) or len(shape) > 2 or any(side > MOST_FEATURES for side in shape):
            raise FanalError(f"{name} must hold at most {MOST_FEATURES} (squared) floats, got {shape} of {dtype}")
        count = math.prod(shape)
        raw = file.read(count * dtype.itemsize + 1)
    if len(raw) != count * dtype.itemsize:
        raise FanalError(f"{name} announces {shape}, but has another length")
    return np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C").astype(np.float64, order="C")

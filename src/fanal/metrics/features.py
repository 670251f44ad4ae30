"""What turns images into feature vectors: the package's own network, a TorchScript file, or nothing at all."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from fanal.errors import FanalError, reason, unknown_name
from fanal.hub import fetch
from fanal.metrics.network import SIDE, load_network

__all__ = [
    "INCEPTION",
    "Extractor",
    "OwnFeatures",
    "Pixels",
    "TorchScript",
    "as_bytes",
    "extractor",
    "gray_images",
    "is_image",
]

INCEPTION = "FANAL_INCEPTION"
"""Environment variable with the path that plain `inception` means."""

_SCRIPT_BYTES = 2**31
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's "L"


@runtime_checkable
class Extractor(Protocol):
    """Maps samples to feature vectors; `name` and `sha256` say which one it is, so that nobody mixes two."""

    @property
    def name(self) -> str:
        """What made the features."""
        ...

    @property
    def sha256(self) -> str:
        """Hash of the weights; empty where there are none."""
        ...

    def __call__(self, x: Tensor, /) -> Tensor:
        """Return features of shape (N, F) on the CPU."""
        ...


def is_image(shape: tuple[int, ...]) -> bool:
    """Whether a sample's shape is that of an image: (1 or 3, H, W)."""
    return len(shape) == 3 and shape[0] in (1, 3)


def as_bytes(x: Tensor) -> UInt8[Tensor, "n c h w"]:
    """Return images as bytes: the levels that a picture file would hold.

    `round(127.5·(x + 1))`, cut to [0, 255]. Bytes stay as they are. Samples and real images take the same way, so that
    rounding makes no difference between them.

    Args:
        x: images (N, 1 or 3, H, W), bytes or floats in [-1, 1].

    Raises:
        FanalError: they are no images, or not finite.
    """
    if not is_image(tuple(x.shape[1:])) or x.ndim != 4:
        raise FanalError(f"expected images of shape (N, 1 or 3, H, W), got {tuple(x.shape)}; try --features pixels")
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        raise FanalError(f"images are bytes, or floats in [-1, 1], got {x.dtype}")
    wrong = ~torch.isfinite(x).flatten(1).all(1)
    if bool(wrong.any()):
        raise FanalError(f"image {int(wrong.nonzero()[0])} of {len(x)} holds NaN or infinity")
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def gray_images(x: Tensor, side: int = SIDE) -> Float[Tensor, "n 1 side side"]:
    """Return images in [-1, 1], gray, squeezed or stretched to `side` x `side` pixels (bilinear, antialiased).

    Raises:
        FanalError: as `as_bytes`.
    """
    images = as_bytes(x).float() / 127.5 - 1
    if images.shape[1] == 3:
        images = (images * images.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
    if images.shape[2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)


class Pixels:
    """The samples themselves: points as they are, images as bytes mapped to [-1, 1]."""

    name, sha256 = "pixels", ""

    def __call__(self, x: Tensor, /) -> Tensor:
        """Return one row per sample."""
        if x.ndim < 2:
            raise FanalError(f"expected samples of shape (N, ...), got {tuple(x.shape)}")
        image = x.dtype == torch.uint8 or is_image(tuple(x.shape[1:]))
        return (as_bytes(x).float() / 127.5 - 1 if image else x.float()).flatten(1).cpu()


class OwnFeatures:
    """The package's own network: any image, made gray and 32 x 32 pixels large, becomes 64 features.

    Its figures compare samples with one another. They are not the published FID, and the network knows best what it
    was trained on: drawn hands and shapes, and digits.

    Args:
        device: where the network runs.
    """

    name = "fanal-features32"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        net, self.sha256 = load_network()
        self.net, self.device = net.to(device), device

    @torch.no_grad()
    def __call__(self, x: Tensor, /) -> Tensor:
        """Return 64 features per image."""
        return self.net(gray_images(x).to(self.device)).cpu()


def _local(path: str) -> Path:
    """The file itself, or that of `hub:ORG/REPO/FILE`, fetched once into the hub's cache."""
    if not path.startswith("hub:"):
        return Path(path).expanduser()
    parts = path.removeprefix("hub:").split("/", 2)
    if len(parts) < 3 or not parts[2]:
        raise FanalError(f"expected hub:ORG/REPO/FILE, got {path}")
    return fetch("/".join(parts[:2]), parts[2])


def _sha256(path: Path) -> str:
    try:
        if path.stat().st_size > _SCRIPT_BYTES:
            raise FanalError(f"{path} is larger than {_SCRIPT_BYTES} bytes: not a feature network")
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FanalError(f"cannot read {path}: {reason(error)}") from error


class TorchScript:
    """A network in a TorchScript file. **Such a file brings its own code, and loading and calling it runs that code.**

    The network gets bytes (N, 3, H, W), gray images repeated, and returns (N, F). `inception` expects the published
    Inception-V3 (NVIDIA's `inception-2015-12-05.pt`), which resizes by itself and takes `return_features=True`.

    Args:
        path: the file, or `hub:ORG/REPO/FILE`.
        name: `inception` or `torchscript`.
        device: where the network runs.

    Raises:
        FanalError: the file cannot be read, or is no TorchScript of that kind.
    """

    def __init__(self, path: str | Path, name: str = "torchscript", device: torch.device | str = "cpu") -> None:
        self.path = _local(str(path))
        self.name, self.sha256, self.device = name, _sha256(self.path), device
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch calls its own format deprecated
                self.module = torch.jit.load(str(self.path), map_location=device).eval()
            arguments = [a.name for a in cast(Any, self.module.forward).schema.arguments]
        except Exception as error:  # the loader raises whatever it meets
            reason = (str(error).strip().splitlines() or [""])[0]
            raise FanalError(f"{self.path} is no TorchScript file: {type(error).__name__}: {reason}") from error
        self.options = {"return_features": True} if name == "inception" else {}
        if self.options and "return_features" not in arguments:
            raise FanalError(
                f"{self.path} is not the published Inception: it takes ({', '.join(arguments[1:])}), not "
                "return_features; another network is --features torchscript:PATH"
            )

    @torch.no_grad()
    def __call__(self, x: Tensor, /) -> Tensor:
        """Return the network's features.

        Raises:
            FanalError: the network fails, or does not return one row of finite numbers per image.
        """
        images = as_bytes(x)
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        try:
            found = self.module(images.contiguous().to(self.device), **self.options)
        except Exception as error:  # whatever the file's code does
            reason = (str(error).strip().splitlines() or [""])[-1]
            raise FanalError(
                f"{self.path} failed on images of shape {tuple(images.shape)}: {type(error).__name__}: {reason}"
            ) from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(x):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise FanalError(f"{self.path} must return features of shape (N, F), got {shape} for {len(x)} images")
        if not bool(torch.isfinite(found).all()):
            raise FanalError(f"{self.path} returned NaN or infinity")
        return found.float().cpu()


def extractor(spec: str, device: torch.device | str = "cpu") -> Extractor:
    """Return the extractor of a spec.

    Args:
        spec: `own`, `pixels`, `inception` (the path in FANAL_INCEPTION), `inception:PATH` or `torchscript:PATH`; a
            path may be `hub:ORG/REPO/FILE`.
        device: where it runs.

    Raises:
        FanalError: there is no such extractor, or its file does not work.
    """
    kind, colon, path = spec.partition(":")
    if spec == "own":
        return OwnFeatures(device)
    if spec == "pixels":
        return Pixels()
    if spec == "inception":
        path = os.environ.get(INCEPTION, "")
        if not path:
            raise FanalError(f"inception needs its file: --features inception:PATH, or the path in ${INCEPTION}")
        return TorchScript(path, "inception", device)
    if colon and path and kind in ("inception", "torchscript"):
        return TorchScript(path, kind, device)
    raise unknown_name("features", spec, ("own", "pixels", "inception:PATH", "torchscript:PATH"))

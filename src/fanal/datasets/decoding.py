"""One image file: what its header says, and its pixels as a square of one size."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["SUFFIXES", "Header", "Unusable", "bombs_raise", "decode", "header"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # Pillow's other readers are not let near the files; some run programs
_DEEP = {"I", "I;16", "I;16B", "I;16L"}  # 16 bits per pixel, which Pillow may keep in 32
_GRAY = {"1", "L", "LA"} | _DEEP
_COLOR = {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}


class Unusable(Exception):
    """An image that cannot be used; says why, as the end of a sentence that starts with its name."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the first bytes of an image file say.

    Attributes:
        side: the smaller of width and height.
        gray: whether it has no color.
        deep: whether it has 16 bits per value.
    """

    side: int
    gray: bool
    deep: bool


@contextmanager
def bombs_raise() -> Iterator[None]:
    """Silence Pillow's warning about very large images: `header` and `decode` refuse them; for the whole process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


@contextmanager
def _opened(stream: io.BufferedIOBase) -> Iterator[Image.Image]:
    try:
        with Image.open(cast(IO[bytes], stream), formats=_FORMATS) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise Unusable(
                    f"is too large ({image.width}x{image.height}, at most {limit} pixels): scale it down first"
                )
            if image.mode not in _GRAY | _COLOR:
                raise Unusable(f"has the color mode {image.mode}: save it as RGB or gray")
            yield image
    except Unusable:
        raise
    except Image.DecompressionBombError as error:
        raise Unusable(f"is too large ({error}): scale it down first") from error
    except UnidentifiedImageError as error:
        raise Unusable("is no png, jpg, webp or bmp image, or only the beginning of one") from error
    except Exception as error:  # Pillow's decoders raise whatever their parsers meet
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Unusable(f"is damaged or cut short ({reason:.120})") from error


def header(stream: io.BufferedIOBase) -> Header:
    """Read an image's header.

    Raises:
        Unusable: it is no image of a known format, too large, or of a mode without a meaning in gray or RGB.
    """
    with _opened(stream) as image:
        return Header(min(image.size), image.mode in _GRAY, image.mode in _DEEP)


def decode(stream: io.BufferedIOBase, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Read an image upright, cut out its central square and resize it.

    Args:
        stream: the file.
        shape: (1 or 3, side, side).
        dtype: uint8 or uint16; an image of 8 bits fills the range of the latter.

    Raises:
        Unusable: as for `header`, or the pixels are damaged.
    """
    with _opened(stream) as image:
        picture = ImageOps.exif_transpose(image)
        deep = picture.mode in _DEEP
        if deep:
            picture = picture.convert("I").convert("F")
        else:
            picture = picture.convert("L" if shape[0] == 1 else "RGB")
        # Crop before resizing: a resize with a box lets in what lies around the box.
        (w, h), side = picture.size, min(picture.size)
        left, top = (w - side) // 2, (h - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
        values = np.asarray(picture.resize((shape[2], shape[1]), Image.Resampling.LANCZOS))
    if deep:
        values = np.rint(np.clip(values, 0, 65535) / (1 if dtype == np.uint16 else 257))
    elif dtype == np.uint16:
        values = values.astype(np.uint16) * 257
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    return np.broadcast_to(values, shape).astype(dtype)

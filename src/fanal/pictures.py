"""Pictures of samples: grids with framed images, strips over a run, and scatter plots of points."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from fanal.errors import FanalError

__all__ = ["COLORS", "beside", "data_uri", "from_bytes", "grid", "shown", "single", "strip", "to_bytes"]

COLORS = {"good": "#2e9e5b", "bad": "#d1495b", "flag": "#f0a202", "plain": "#8899a6"}
"""One meaning per color, in every picture: verified good, verified bad, flagged, neither."""

_BACK = "#ffffff"


def to_bytes(x: Float[Tensor, "*d"]) -> Tensor:
    """Return images in [−1, 1] as uint8 on the CPU: `round(127.5·(x + 1))`, clipped."""
    return ((x.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_bytes(image: Tensor) -> Float[Tensor, "*d"]:
    """Return uint8 images as float32 in [−1, 1]."""
    return image.float() / 127.5 - 1


def shown(samples: Mapping[str, Tensor], name: str) -> Tensor:
    """Return what a picture of the samples `name` shows: their decoded images where there are some, else themselves.

    Args:
        samples: tensors of a run by name: `x`, `before`, `x.redo`, and for latents `image`, `image.before`, ….
        name: the samples' name.
    """
    image = {"x": "image", "before": "image.before"}.get(name, name.replace("x.", "image.", 1))
    return from_bytes(samples[image]) if image in samples else samples[name]


def _to_image(x: Float[Tensor, "c h w"], scale: int) -> Image.Image:
    levels = to_bytes(x).numpy()
    pixels = levels[0] if len(levels) == 1 else np.moveaxis(levels[:3], 0, -1)
    image = Image.fromarray(pixels).convert("RGB")
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _scatter(x: Float[Tensor, "b 2"], frames: Sequence[str | None], side: int) -> Image.Image:
    points = x.detach().cpu().double()
    reach = max(float(points.abs().max()) * 1.05, 1e-9)
    image = Image.new("RGB", (side, side), _BACK)
    draw = ImageDraw.Draw(image)
    order = sorted(range(len(points)), key=lambda b: frames[b] is not None)  # framed points on top
    for b in order:
        u, v = ((points[b] / reach + 1) / 2 * (side - 1)).tolist()
        r = 3 if frames[b] else 2
        draw.ellipse((u - r, side - 1 - v - r, u + r, side - 1 - v + r), fill=frames[b] or COLORS["plain"])
    return image


def _as_images(x: Tensor) -> Tensor:
    """View any sample as an image: vectors become one row of pixels, extra axes are folded into the height."""
    if x.ndim == 4 and x.shape[1] in (1, 3):
        return x
    return x.reshape(len(x), 1, -1, x.shape[-1])


def grid(
    x: Float[Tensor, "b *d"],
    *,
    columns: int | None = None,
    frames: Sequence[str | None] | None = None,
    scale: int | None = None,
) -> Image.Image:
    """Draw a batch: images in a grid, each with an optional frame; points of the plane as a scatter plot.

    Args:
        x: images (B, 1 or 3, H, W) in [−1, 1], points (B, 2), or anything else, drawn as pixels.
        columns: images per row; None: about square.
        frames: a color or None per sample.
        scale: pixels per pixel; None: so that an image is at least 64 wide.

    Raises:
        FanalError: the batch is empty, or frames do not match it.
    """
    if not len(x):
        raise FanalError("there is nothing to draw: the batch is empty")
    colors: Sequence[str | None] = [None] * len(x) if frames is None else frames
    if len(colors) != len(x):
        raise FanalError(f"one frame per sample: got {len(colors)} for {len(x)}")
    if x.shape[1:] == (2,):
        return _scatter(x, colors, 512)
    images = _as_images(x)
    scale = scale or max(1, math.ceil(64 / images.shape[-1]))
    tiles = [_to_image(image, scale) for image in images]
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    rows, pad = math.ceil(len(tiles) / columns), 4
    wide, high = tiles[0].width + 2 * pad, tiles[0].height + 2 * pad
    sheet = Image.new("RGB", (columns * wide, rows * high), _BACK)
    draw = ImageDraw.Draw(sheet)
    for i, tile in enumerate(tiles):
        left, top = (i % columns) * wide, (i // columns) * high
        if colors[i]:
            draw.rectangle((left, top, left + wide - 1, top + high - 1), fill=colors[i])
        sheet.paste(tile, (left + pad, top + pad))
    return sheet


def single(x: Float[Tensor, "b *d"], index: int) -> Image.Image:
    """Draw one sample of a batch as it is, without a margin; of points, all of them with this one marked.

    Args:
        x: as in `grid`.
        index: which of them.
    """
    if x.shape[1:] == (2,):
        return _scatter(x, [COLORS["flag"] if b == index else None for b in range(len(x))], 512)
    return _to_image(_as_images(x[index : index + 1])[0], 1)


def beside(images: Sequence[Image.Image], gap: int = 16) -> Image.Image:
    """Draw pictures in a row, a gap between them."""
    wide = sum(image.width for image in images) + gap * (len(images) - 1)
    sheet, left = Image.new("RGB", (wide, max(image.height for image in images)), _BACK), 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + gap
    return sheet


def strip(steps: Float[Tensor, "n *d"], *, most: int = 12) -> Image.Image:
    """Draw one sample's states along a run, left to right, at most `most` of them, evenly spread, with both ends.

    Raises:
        FanalError: there is no state.
    """
    keep = torch.linspace(0, len(steps) - 1, min(most, len(steps))).round().long()
    chosen = steps[keep]
    if chosen.shape[1:] == (2,):
        return _scatter(chosen, [COLORS["plain"]] * (len(chosen) - 1) + [COLORS["flag"]], 256)
    return grid(chosen, columns=len(chosen))


def data_uri(image: Image.Image) -> str:
    """Return the picture as a `data:` URI, for a page that opens offline."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

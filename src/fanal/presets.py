"""A recipe for images that come without one: network, batch and length by size, number and device."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fanal.datasets import Folder
from fanal.errors import FanalError
from fanal.nets import SongUNetConfig, UNetConfig
from fanal.nets.preconditioning import NetConfig
from fanal.objectives import LogNormal
from fanal.recipes import Recipe, change
from fanal.runs import Progress, quiet
from fanal.training import previous

__all__ = ["SIDES", "own_images", "preset", "preset_side"]

SIDES = (8, 128)
"""Smallest and largest side of images that there is a preset for."""

_USUAL = (8, 16, 32, 64)
_LARGEST_UNASKED = {"cuda": 64, "cpu": 32}
# Views of each image, at most. On 100 digits the held-out loss of the small network is least after about 600 with
# augmentation and 300 without; on 1,438 digits, seen 130 times, augmentation only slows it down.
_VIEWS = {"cpu": 600, "cuda": 2000}
_SHORTEST = 800  # iterations
_AUGMENTED = 150  # views from which on images are augmented
_AUGMENT = 0.12  # as for CIFAR-10 in Karras et al. 2022

# Up to which side: factor, widths, embedding, batch, iterations. One core takes minutes to an hour and a half.
_SMALL = {
    8: (1, (32, 64), 32, 64, 3000),
    16: (1, (32, 48, 64), 32, 32, 6000),
    32: (2, (32, 64, 96), 64, 32, 8000),
    64: (2, (32, 64, 96, 128), 64, 16, 8000),
    128: (4, (32, 64, 128, 128), 64, 16, 10_000),
}
# Up to which side: channels, multipliers, batch, iterations.
_LARGE = {
    16: (64, (1, 2), 256, 30_000),
    32: (128, (1, 2, 2), 128, 50_000),
    64: (128, (1, 2, 2, 2), 64, 100_000),
    128: (96, (1, 2, 2, 2, 2), 32, 150_000),
}


def preset_side(smallest: int, device: str | torch.device = "cpu") -> int:
    """Return the size to which images are brought if nobody says which.

    It is that of the smallest image if a network can have it, else the next smaller of 8, 16, 32 and 64; at most 32
    on a CPU and 64 on a GPU.

    Args:
        smallest: the smallest side of all images.
        device: where to train.
    """
    limit = _LARGEST_UNASKED["cuda" if torch.device(device).type == "cuda" else "cpu"]
    if smallest <= limit and _fits(smallest):
        return smallest
    return max(side for side in _USUAL if side <= max(min(smallest, limit), _USUAL[0]))


def own_images(
    path: str | Path,
    out: str | Path | None = None,
    *,
    size: int | None = None,
    skip_bad: bool = False,
    conditional: bool | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = quiet,
) -> tuple[Recipe, Folder]:
    """Read a folder or zip file of images, and find the recipe to train on them.

    It is the one that `out` was begun or finished with, if that was for these images at this size; else `preset`.

    Args:
        path: the folder or zip file.
        out: where the model is to be written; None for a fresh start.
        size: side of the images; None for that of the earlier training, or `preset_side`.
        skip_bad: whether unusable images are left out; otherwise they are an error.
        conditional: whether the model gets the classes; None for where there are two or more.
        device: where to train.
        progress: wraps loops over blocks of images.

    Returns:
        The recipe, and the images, in memory.

    Raises:
        FanalError: images are unusable, or as in `Folder.open` and `preset`.
    """
    before = None if out is None else previous(out)
    source = f"folder:{Path(path).expanduser()}"
    skip = ",bad=skip" if skip_bad else ""
    if before is not None and size is None:
        same = re.fullmatch(rf"{re.escape(source)},size=(\d+)(,bad=skip)?", before.data)
        size = int(same[1]) if same else None
    spec = f"{source}{skip}" if size is None else f"{source},size={size}{skip}"
    dataset = Folder.open(spec, side=lambda smallest: preset_side(smallest, device), progress=progress).load(progress)
    if before is not None and before.data == dataset.name:
        return before, dataset
    return preset(dataset, device, conditional), dataset


def _fits(side: int) -> bool:
    return SIDES[0] <= side <= SIDES[1] and side % (4 if side <= 32 else 8) == 0


def preset(dataset: Folder, device: str | torch.device = "cpu", conditional: bool | None = None) -> Recipe:
    """Return a recipe for a folder of images.

    On a GPU the network is a `SongUNet` with dropout in bf16, elsewhere a small `UNet`. A small set gets fewer
    iterations, and is augmented.

    Args:
        dataset: the images.
        device: where to train.
        conditional: whether the model gets the classes; None for where there are two or more.

    Raises:
        FanalError: no preset has images of this size.
    """
    side, large = dataset.shape[1], torch.device(device).type == "cuda"
    if not _fits(side):
        raise FanalError(
            f"there are presets for images of {SIDES[0]} to {SIDES[1]} pixels, multiples of 4 up to 32 and of 8 above, "
            f"got {side}: choose another --size, or write a recipe"
        )
    net, batch, iterations = _large(side) if large else _small(side)
    images = dataset.count("train")
    iterations = min(iterations, max(_SHORTEST, _VIEWS["cuda" if large else "cpu"] * images // batch))
    told = len(dataset.classes) > 1 if conditional is None else conditional
    recipe = Recipe(
        dataset.name,
        net,
        iterations,
        batch,
        learning_rate=2e-4 if large else 1.5e-3,
        warmup=min(500, iterations // 10) if large else 0,
        ema=0.9995 if large else 0.999,
        noise_levels=LogNormal(-0.8, 1.2),
        conditional=told,
        label_dropout=0.1 if told else 0.0,
        held_out_count=min(256, dataset.count("held out")),
        threads=min(8, torch.get_num_threads()),
        precision="bf16" if large else "float32",
    )
    return change(recipe, {"augment": _AUGMENT}) if iterations * batch > _AUGMENTED * images else recipe


def _levels(side: int, factor: int, most: int) -> int:
    """How often, plus one, the sides halve: at most `most`."""
    return next(n for n in range(most, 0, -1) if side % (factor * 2 ** (n - 1)) == 0)


def _small(side: int) -> tuple[NetConfig, int, int]:
    factor, widths, embedding, batch, iterations = _SMALL[min(limit for limit in _SMALL if side <= limit)]
    net = UNetConfig(widths[: _levels(side, factor, len(widths))], factor, embedding=embedding)
    return net, batch, iterations


def _large(side: int) -> tuple[NetConfig, int, int]:
    channels, multipliers, batch, iterations = _LARGE[min(limit for limit in _LARGE if side <= limit)]
    levels = _levels(side, 1, len(multipliers))
    attend = [side >> level for level in range(levels) if side >> level <= 16][:1]
    net = SongUNetConfig(channels, multipliers[:levels], num_blocks=2, attn_resolutions=tuple(attend))
    return net, batch, iterations

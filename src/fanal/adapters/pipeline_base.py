"""What a kind of pipeline must tell: the shape of a sample, its conditions, and how its network is called.

A family works on a live pipeline object, with that pipeline's own `encode_prompt`, so that encodings are the same.
Encoded prompts are tables: row p for prompt p, the last row for no condition (the negative prompt).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fanal.errors import FanalError

__all__ = [
    "Condition",
    "Family",
    "Prompted",
    "Silent",
    "Table",
    "decoded",
    "multiple",
    "pair",
    "same_channels",
    "vae_factor",
]

Table = dict[str, Tensor]
"""Encoded prompts by what they are, e.g. `text` and `pooled`; axis 0 counts prompts."""


@dataclass(frozen=True, eq=False)
class Condition:
    """What one call of a network is told, one row per sample.

    Attributes:
        labels: (B,) class labels; None for networks without classes.
        rows: encoded prompts by name, each (B, …).
        guidance: the guidance scale that a distilled network takes as an input.
        size: height and width in pixels.
    """

    labels: Tensor | None
    rows: Table
    guidance: float
    size: tuple[int, int]


@runtime_checkable
class Family(Protocol):
    """A kind of pipeline."""

    @property
    def network(self) -> str:
        """Name of the component that denoises."""
        ...

    @property
    def text(self) -> bool:
        """Whether conditions are prompts."""
        ...

    @property
    def guidance(self) -> float:
        """Default of the guidance scale that a distilled network takes as an input, that of the pipeline's call."""
        ...

    def size(self, pipeline: Any) -> tuple[int, int]:
        """Return the default height and width in pixels."""
        ...

    def shape(self, pipeline: Any, size: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape of one sample at this height and width."""
        ...

    def classes(self, pipeline: Any) -> tuple[int, bool]:
        """Return the number of classes, and whether the label after the last one means no condition."""
        ...

    def encode(self, pipeline: Any, prompt: str, negative: str | None, tokens: int | None) -> tuple[Table, Table]:
        """Return the encoded prompt and the encoded negative prompt, each with a batch axis of 1."""
        ...

    def settings(self, pipeline: Any, shape: tuple[int, ...], steps: int) -> dict[str, Any]:
        """Return what the pipeline gives to `set_timesteps` beside the number of steps."""
        ...

    def predict(self, pipeline: Any, z: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Return the network's output, shaped like z or with twice its channels (a learned variance)."""
        ...

    def pack(self, z: Tensor) -> Tensor:
        """Return z in the form that the pipeline takes as `latents=`."""
        ...


def pair(side: Any) -> tuple[int, int]:
    """Return height and width of a side length, or of a pair of them.

    Raises:
        FanalError: the network does not say how large its samples are.
    """
    if side is None:
        raise FanalError("the network does not say its sample_size: give size=(height, width)")
    high, wide = side if isinstance(side, list | tuple) else (side, side)
    return int(high), int(wide)


def multiple(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Return height and width in units of `factor`.

    Raises:
        FanalError: they are no multiples of it.
    """
    if size[0] < factor or size[1] < factor or size[0] % factor or size[1] % factor:
        raise FanalError(f"height and width must be multiples of {factor}, got {size[0]} x {size[1]}")
    return size[0] // factor, size[1] // factor


def same_channels(config: Any) -> int:
    """Return the channels of a sample.

    Raises:
        FanalError: the network takes more than a sample (a mask, an image): its inputs and outputs do not match.
    """
    into, out = config.in_channels, config.out_channels or config.in_channels
    if out not in (into, 2 * into):
        raise FanalError(f"the network takes {into} channels and answers {out}: only plain denoisers are read")
    return int(into)


@dataclass(frozen=True)
class Silent:
    """What families without prompts share."""

    network: str = "unet"
    text: bool = False
    guidance: float = 1.0

    def encode(self, pipeline: Any, prompt: str, negative: str | None, tokens: int | None) -> tuple[Table, Table]:
        """Refuse prompts."""
        raise FanalError(f"{type(pipeline).__name__} takes no prompts")

    def settings(self, pipeline: Any, shape: tuple[int, ...], steps: int) -> dict[str, Any]:
        """Give nothing more."""
        return {}

    def pack(self, z: Tensor) -> Tensor:
        """Return z."""
        return z


def vae_factor(pipeline: Any) -> int:
    """Return the pixels per latent, along one side."""
    return 2 ** (len(pipeline.vae.config.block_out_channels) - 1)


@dataclass(frozen=True)
class Prompted:
    """What families with prompts share."""

    network: str = "unet"
    text: bool = True
    guidance: float = 1.0

    def classes(self, pipeline: Any) -> tuple[int, bool]:
        """Return no classes: the prompts that are bound are the labels, and the negative one follows them."""
        return 0, True

    def settings(self, pipeline: Any, shape: tuple[int, ...], steps: int) -> dict[str, Any]:
        """Give nothing more."""
        return {}

    def pack(self, z: Tensor) -> Tensor:
        """Return z."""
        return z


def decoded(vae: Any, x: Tensor) -> Tensor:
    """Decode latents as the pipelines do: `x·std/scaling + mean`, or `x/scaling + shift`.

    Args:
        vae: the pipeline's; a half-precision one that asks for it is in single precision meanwhile.
        x: clean latents, (B, C, h, w).

    Returns:
        Pictures, (B, 3, H, W), float32.
    """
    config = vae.config
    half = vae.dtype == torch.float16 and config.force_upcast
    if half:
        vae.to(torch.float32)
    try:
        mean, std = config.get("latents_mean"), config.get("latents_std")
        z = x / config.scaling_factor
        if mean is not None and std is not None:
            z = z * torch.tensor(std).to(z).view(1, -1, 1, 1) + torch.tensor(mean).to(z).view(1, -1, 1, 1)
        else:
            z = z + (config.get("shift_factor") or 0.0)
        return vae.decode(z.to(vae.dtype), return_dict=False)[0].float()
    finally:
        if half:
            vae.to(torch.float16)

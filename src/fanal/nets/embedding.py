"""How a network sees the noise level and the class label."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["Conditioning"]

_LOWEST, _HIGHEST = (
    0.25,
    8.0,
)  # cycles per unit of c_noise = ln(sigma)/4: smooth in ln(sigma), yet it tells levels apart


class Conditioning(nn.Module):
    """Turns the noise level, and a class label where there are classes, into one embedding vector.

    The level enters as `[cos(2π f c), sin(2π f c)]` with fixed frequencies f, geometric from 0.25 to 8, followed by
    two linear layers; a learned vector per class is added in between. Class number `classes` is the null class,
    which stands for "no label" (Ho & Salimans 2022, arXiv:2207.12598, algorithm 1).

    Args:
        width: length of the embedding, even.
        classes: number of classes; 0 for a network without labels.
        augment_dim: length of the vector that describes an augmentation; 0 for none. It is added like the class,
            without a bias, so that zeros are an image as it is.
    """

    frequencies: Tensor

    def __init__(self, width: int, classes: int, augment_dim: int = 0) -> None:
        super().__init__()
        self.classes = classes
        frequencies = 2 * math.pi * torch.logspace(math.log2(_LOWEST), math.log2(_HIGHEST), width // 2, base=2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.augment = nn.Linear(augment_dim, width, bias=False) if augment_dim else None

    def forward(
        self,
        c_noise: Float[Tensor, " b"],
        labels: Int[Tensor, " b"] | None,
        augment: Float[Tensor, "b a"] | None = None,
    ) -> Float[Tensor, "b width"]:
        """Embed; labels None on a network with classes is the null class, augment None is an image as it is."""
        angle = c_noise[:, None] * self.frequencies
        h = self.first(torch.cat([angle.cos(), angle.sin()], dim=1))
        if self.label is not None:
            index = torch.full_like(c_noise, self.classes, dtype=torch.long) if labels is None else labels
            h = h + self.label(index)
        if self.augment is not None and augment is not None:
            h = h + self.augment(augment)
        return nn.functional.silu(self.second(nn.functional.silu(h)))

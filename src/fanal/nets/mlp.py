"""A multilayer perceptron with Fourier features, for data of a few dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fanal.errors import FanalError
from fanal.nets.embedding import Conditioning

__all__ = ["MLP", "MLPConfig"]


@dataclass(frozen=True)
class MLPConfig:
    """Size of an `MLP`.

    Args:
        width: hidden units per layer.
        depth: number of hidden layers.
        frequencies: the k in the features `sin(kx), cos(kx)` of the scaled input (unit variance); may be empty.
            Without them a small network blurs data whose detail is much finer than its extent.
        embedding: length of the embedding of noise level and label, even.

    Raises:
        FanalError: a size is out of range.
    """

    width: int = 128
    depth: int = 3
    frequencies: tuple[float, ...] = (1.0, 2.0, 4.0, 7.0)
    embedding: int = 32

    def __post_init__(self) -> None:
        for name, low, high in (("width", 1, 4096), ("depth", 1, 32), ("embedding", 2, 4096)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise FanalError(f"MLP {name} must be a whole number from {low} to {high}, got {value!r}")
        if self.embedding % 2:
            raise FanalError(f"MLP embedding must be even, got {self.embedding}")
        if len(self.frequencies) > 64 or not all(
            isinstance(k, (int, float)) and not isinstance(k, bool) and 0 < k <= 1e6 for k in self.frequencies
        ):
            raise FanalError(f"MLP frequencies must be at most 64 numbers in (0, 1e6], got {self.frequencies!r:.80}")


class MLP(nn.Module):
    """`F(x, c_noise, labels)`: x and its Fourier features through SiLU layers, each told the noise level.

    Args:
        config: sizes.
        shape: shape of one sample; it is flattened.
        classes: number of classes, 0 for none.
    """

    def __init__(self, config: MLPConfig, shape: tuple[int, ...], classes: int = 0) -> None:
        super().__init__()
        self.config = config
        size = math.prod(shape)
        inputs = size * (1 + 2 * len(config.frequencies))
        self.conditioning = Conditioning(config.embedding, classes)
        widths = [inputs, *[config.width] * config.depth]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.shifts = nn.ModuleList(nn.Linear(config.embedding, config.width, bias=False) for _ in self.layers)
        self.out = nn.Linear(config.width, size)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, x: Float[Tensor, "b *d"], c_noise: Float[Tensor, " b"], labels: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b *d"]:
        """Return F, with the shape of x."""
        flat = x.reshape(len(x), -1)
        waves = [wave for k in self.config.frequencies for wave in ((k * flat).sin(), (k * flat).cos())]
        h = torch.cat([flat, *waves], dim=1)
        embedding = self.conditioning(c_noise, labels)
        for layer, shift in zip(self.layers, self.shifts, strict=True):
            h = nn.functional.silu(layer(h) + shift(embedding))
        return self.out(h).reshape(x.shape)

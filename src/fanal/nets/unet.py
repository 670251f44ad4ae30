"""A small U-Net for images, made for training and sampling on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fanal.errors import FanalError
from fanal.nets.embedding import Conditioning

__all__ = ["UNet", "UNetConfig"]

_GROUP = 8  # channels per group of a GroupNorm


@dataclass(frozen=True)
class UNetConfig:
    """Size of a `UNet`; the default is the 32x32 network of about 360,000 parameters.

    Args:
        widths: channels per level, multiples of 8; each level halves the image of the one before.
        factor: space-to-depth factor in front of the first level (1 = none); 2 quarters the cost of a 32x32 image.
        blocks: residual blocks per level, on the way down and again on the way up.
        attention: number of lowest levels that attend over pixels, after every residual block.
        heads: attention heads.
        embedding: length of the embedding of noise level and label, even.
        dropout: share of activations dropped in each residual block while training.
        augment_dim: length of the vector that describes an augmentation; 0 for none.

    Raises:
        FanalError: a size is out of range.
    """

    widths: tuple[int, ...] = (16, 48, 64)
    factor: int = 2
    blocks: int = 1
    attention: int = 1
    heads: int = 1
    embedding: int = 32
    dropout: float = 0.0
    augment_dim: int = 0

    def __post_init__(self) -> None:
        sizes = (("factor", 1, 16), ("blocks", 1, 8), ("attention", 0, 8), ("heads", 1, 64), ("embedding", 2, 4096))
        for name, low, high in (*sizes, ("augment_dim", 0, 1024)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise FanalError(f"U-Net {name} must be a whole number from {low} to {high}, got {value!r}")
        if not 1 <= len(self.widths) <= 8 or not all(
            type(w) is int and 0 < w <= 2048 and w % _GROUP == 0 for w in self.widths
        ):
            raise FanalError(f"U-Net widths must be 1 to 8 multiples of {_GROUP} up to 2048, got {self.widths!r:.80}")
        if self.embedding % 2:
            raise FanalError(f"U-Net embedding must be even, got {self.embedding}")
        if self.attention > len(self.widths) or any(
            w % self.heads for w in self.widths[len(self.widths) - self.attention :]
        ):
            raise FanalError(
                f"U-Net attention={self.attention}, heads={self.heads} do not fit the widths {self.widths}: "
                "attend on at most all levels, with heads that divide their widths"
            )
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise FanalError(f"U-Net dropout must be in [0, 1), got {self.dropout!r}")

    @property
    def downsampling(self) -> int:
        """What the height and width of an image must be divisible by."""
        return self.factor * 2 ** (len(self.widths) - 1)


def _zeros(layer: nn.Conv2d) -> nn.Conv2d:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class _Residual(nn.Module):
    """GroupNorm, SiLU, convolution, twice, with the embedding as scale and shift in between; starts as identity."""

    def __init__(self, before: int, after: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(before // _GROUP, before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * after)
        self.norm2 = nn.GroupNorm(after // _GROUP, after)
        self.dropout = dropout
        self.conv2 = _zeros(nn.Conv2d(after, after, 3, padding=1))
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm2(h), scale + 1))
        if self.dropout:
            h = F.dropout(h, self.dropout, self.training)
        return self.skip(x) + self.conv2(h)


class _Attention(nn.Module):
    """Self-attention over pixels; starts as identity.

    Written out, because the fused kernels have no second derivatives and no forward mode, which the Fokker-Planck
    residuals and implicit score matching need.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(width // _GROUP, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = _zeros(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, height * width)
        q, k, v = qkv.unbind(1)
        weights = torch.softmax(q.transpose(-1, -2) @ k * (c // self.heads) ** -0.5, dim=-1)
        return x + self.out((v @ weights.transpose(-1, -2)).reshape(b, c, height, width))


class _Stage(nn.Module):
    """A residual block, followed by attention where asked for."""

    def __init__(self, before: int, after: int, config: UNetConfig, attend: bool) -> None:
        super().__init__()
        self.residual = _Residual(before, after, config.embedding, config.dropout)
        self.attention = _Attention(after, config.heads) if attend else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.residual(x, embedding))


class UNet(nn.Module):
    """`F(x, c_noise, labels)` for images: residual blocks with skips across a U of resolutions.

    Args:
        config: sizes.
        shape: `(channels, height, width)` of one sample; other heights and widths that are divisible by
            `config.downsampling` work too.
        classes: number of classes, 0 for none.

    Raises:
        FanalError: the shape is not that of an image this U-Net can halve.

    Reference: Ronneberger et al. 2015, arXiv:1505.04597; Ho et al. 2020, arXiv:2006.11239, appendix B.
    """

    def __init__(self, config: UNetConfig, shape: tuple[int, ...], classes: int = 0) -> None:
        super().__init__()
        if len(shape) != 3 or shape[1] % config.downsampling or shape[2] % config.downsampling:
            raise FanalError(
                f"this U-Net needs (channels, height, width) with sides divisible by {config.downsampling}, "
                f"got shape {tuple(shape)}: use fewer levels, a smaller factor, or an MLP"
            )
        self.config = config
        channels, levels = shape[0] * config.factor**2, len(config.widths)
        attends = [level >= levels - config.attention for level in range(levels)]
        self.conditioning = Conditioning(config.embedding, classes, config.augment_dim)
        self.first = nn.Conv2d(channels, config.widths[0], 3, padding=1)
        width, skips = config.widths[0], []
        self.down = nn.ModuleList()
        for after, attend in zip(config.widths, attends, strict=True):
            for _ in range(config.blocks):
                self.down.append(_Stage(width, after, config, attend))
                skips.append(after)
                width = after
        self.up = nn.ModuleList()
        for after, attend in zip(config.widths[::-1], attends[::-1], strict=True):
            for _ in range(config.blocks):
                self.up.append(_Stage(width + skips.pop(), after, config, attend))
                width = after
        self.norm = nn.GroupNorm(width // _GROUP, width)
        self.out = _zeros(nn.Conv2d(width, channels, 3, padding=1))

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        c_noise: Float[Tensor, " b"],
        labels: Int[Tensor, " b"] | None = None,
        augment: Float[Tensor, "b a"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Return F, with the shape of x."""
        factor, blocks = self.config.factor, self.config.blocks
        embedding = self.conditioning(c_noise, labels, augment)
        h = F.pixel_unshuffle(x, factor) if factor > 1 else x
        h = self.first(h)
        skips = []
        for i, stage in enumerate(self.down):
            h = F.avg_pool2d(h, 2) if i and i % blocks == 0 else h
            h = stage(h, embedding)
            skips.append(h)
        for i, stage in enumerate(self.up):
            h = F.interpolate(h, scale_factor=2.0, mode="nearest") if i and i % blocks == 0 else h
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding)
        h = self.out(F.silu(self.norm(h)))
        return F.pixel_shuffle(h, factor) if factor > 1 else h

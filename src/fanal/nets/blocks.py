"""The layers that the U-Nets of EDM checkpoints are made of; attribute names are the checkpoints' key names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fanal.errors import FanalError

__all__ = [
    "Block",
    "Convolution",
    "Embedding",
    "Fourier",
    "check_sizes",
    "group_norm",
    "one_hot",
    "positional",
    "quiet",
    "run_decoder",
    "side_of",
]

_WHOLE = {
    "model_channels": (4, 1024),
    "channel_mult_emb": (1, 16),
    "channel_mult_noise": (1, 16),
    "num_blocks": (1, 16),
    "augment_dim": (0, 1024),
}


def check_sizes(config: Any, parts: bool = False) -> None:
    """Refuse sizes that no U-Net of a published checkpoint has, before anything is built.

    Args:
        config: a `SongUNetConfig` or a `DhariwalUNetConfig`.
        parts: whether multipliers of the channels may be fractions.

    Raises:
        FanalError: a size is out of range.
    """
    kind = type(config).__name__
    for name, (low, high) in _WHOLE.items():
        value = getattr(config, name, low)
        if type(value) is not int or not low <= value <= high:
            raise FanalError(f"{kind} {name} must be a whole number from {low} to {high}, got {value!r:.80}")
    if config.model_channels % 4:
        raise FanalError(f"{kind} model_channels must be a multiple of 4, got {config.model_channels}")
    for name, longest, high in (("channel_mult", 8, 64), ("attn_resolutions", 16, 2**16)):
        values = getattr(config, name)
        least = 1 if name == "channel_mult" else 0
        whole = all(type(n) is int and 1 <= n <= high for n in values)
        if name == "channel_mult" and parts:
            base = config.model_channels
            whole = all(type(n) in (int, float) and 0 < n <= high and not base * n % 4 for n in values)
        if not least <= len(values) <= longest or not whole:
            raise FanalError(f"{kind} {name} must be at most {longest} whole numbers up to {high}, got {values!r:.80}")
    for name in ("dropout", "label_dropout"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise FanalError(f"{kind} {name} must be in [0, 1), got {value!r:.80}")


def one_hot(labels: Tensor | None, classes: int, like: Float[Tensor, "b *d"]) -> Float[Tensor, "b classes"]:
    """Return one row per sample with a 1 at its label; zeros for None and for the null class, number `classes`."""
    if labels is None:
        return like.new_zeros(len(like), classes)
    return (labels[:, None] == torch.arange(classes, device=labels.device)).to(like.dtype)


def positional(c_noise: Float[Tensor, " b"], width: int, endpoint: bool) -> Float[Tensor, "b width"]:
    """Return `[cos(c·f), sin(c·f)]` with `width/2` frequencies f, geometric from 1 down to 1/10,000.

    Args:
        c_noise: one number per sample.
        width: length of the embedding, even.
        endpoint: whether the last frequency is 1/10,000 itself (DDPM++) or the one before it (ADM).

    Reference: Vaswani et al. 2017, arXiv:1706.03762, section 3.5; Ho et al. 2020, arXiv:2006.11239.
    """
    half = width // 2
    steps = torch.arange(half, device=c_noise.device, dtype=c_noise.dtype) / max(1, half - int(endpoint))
    angle = torch.outer(c_noise, (1 / 10_000) ** steps)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Fourier(nn.Module):
    """`[cos(2π·c·f), sin(2π·c·f)]` with fixed random frequencies f ~ N(0, 16²), kept in the buffer `freqs`.

    Args:
        width: length of the embedding, even.

    Reference: Song et al. 2021, arXiv:2011.13456, appendix C.2 (NCSN++).
    """

    freqs: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(width // 2))

    def forward(self, c_noise: Float[Tensor, " b"]) -> Float[Tensor, "b width"]:
        """Embed."""
        angle = torch.outer(c_noise, 2 * math.pi * self.freqs)
        return torch.cat([angle.cos(), angle.sin()], dim=1)


def group_norm(channels: int, eps: float, least: int = 4) -> nn.GroupNorm:
    """Return a GroupNorm of at most 32 groups with at least `least` channels each.

    Raises:
        FanalError: the groups cannot have the same size.
    """
    groups = min(32, channels // least)
    if not groups or channels % groups:
        raise FanalError(
            f"{channels} channels cannot be split into {groups} equal groups: use multiples of 32 channels"
        )
    return nn.GroupNorm(groups, channels, eps=eps)


class Convolution(nn.Module):
    """A convolution that can halve or double the image, by a small fixed filter.

    Args:
        before: channels of the input.
        after: channels of the output.
        kernel: width of the kernel, odd; 0 for resampling alone.
        resample: -1 halves the image, 1 doubles it, 0 leaves it.
        taps: the filter along one axis; it is normalized, and its outer product with itself is applied.
        fused: convolve before halving rather than after it, with one padding for both.

    Reference: Song et al. 2021, arXiv:2011.13456, appendix H.1 (finite impulse response resampling).
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        before: int,
        after: int,
        kernel: int,
        resample: int = 0,
        taps: Sequence[int | float] = (1, 1),
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.before, self.after, self.resample, self.fused = before, after, resample, fused
        if kernel:
            plain = nn.Conv2d(before, after, kernel)
            self.weight, self.bias = plain.weight, plain.bias
        else:
            self.weight, self.bias = None, None
        line = torch.tensor(taps, dtype=torch.float32)
        square = (torch.outer(line, line) / line.sum() ** 2)[None, None]
        self.register_buffer("resample_filter", square if resample else None)

    def _halve(self, x: Tensor, padding: int) -> Tensor:
        taps = self._taps(x)
        return F.conv2d(x, taps, groups=x.shape[1], stride=2, padding=padding)

    def _taps(self, x: Tensor) -> Tensor:
        assert self.resample_filter is not None
        return self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b after h2 w2"]:
        """Resample and convolve."""
        reach = 0 if self.resample_filter is None else (self.resample_filter.shape[-1] - 1) // 2
        same = 0 if self.weight is None else self.weight.shape[-1] // 2
        if self.resample < 0 and self.fused and self.weight is not None:
            x = F.conv2d(x, self.weight, padding=same + reach)
            x = self._halve(x, 0)
            return x if self.bias is None else x + self.bias.reshape(1, -1, 1, 1)
        if self.resample < 0:
            x = self._halve(x, reach)
        elif self.resample > 0:
            x = F.conv_transpose2d(x, 4 * self._taps(x), groups=x.shape[1], stride=2, padding=reach)
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=same)


class Block(nn.Module):
    """A residual block told the noise level, with attention over pixels where asked for.

    Args:
        before: channels of the input.
        after: channels of the output.
        embedding: length of the embedding.
        resample: -1 halves the image, 1 doubles it, 0 leaves it.
        heads: attention heads; 0 for no attention.
        dropout: share of activations dropped while training.
        taps: the resampling filter along one axis.
        eps: epsilon of the normalizations.
        adm: the block of ADM, where the sum is not rescaled. Otherwise that of DDPM++ and NCSN++: it is divided by
            √2.
        scale_shift: whether the embedding scales and shifts; otherwise it is added.
        group: least channels per group of a normalization.

    Reference: Dhariwal & Nichol 2021, arXiv:2105.05233, section 3; Song et al. 2021, arXiv:2011.13456, appendix H.
    """

    def __init__(
        self,
        before: int,
        after: int,
        embedding: int,
        resample: int = 0,
        *,
        heads: int = 0,
        dropout: float = 0.0,
        taps: Sequence[int | float] = (1, 1),
        eps: float = 1e-5,
        adm: bool = True,
        scale_shift: bool = True,
        group: int = 4,
    ) -> None:
        super().__init__()
        if heads and after % heads:
            raise FanalError(f"{heads} attention heads do not divide {after} channels")
        self.before, self.after, self.heads, self.dropout = before, after, heads, dropout
        self.adm, self.scale_shift = adm, scale_shift
        self.norm0 = group_norm(before, eps, group)
        self.conv0 = Convolution(before, after, 3, resample, taps)
        self.affine = nn.Linear(embedding, after * (2 if scale_shift else 1))
        self.norm1 = group_norm(after, eps, group)
        self.conv1 = quiet(Convolution(after, after, 3))
        self.skip = None
        if before != after or resample:
            self.skip = Convolution(before, after, 0 if adm and before == after else 1, resample, taps)
        if heads:
            self.norm2 = group_norm(after, eps, group)
            self.qkv = Convolution(after, 3 * after, 1)
            self.proj = quiet(Convolution(after, after, 1))

    def forward(self, x: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"]) -> Float[Tensor, "b after h2 w2"]:
        """Return the block's output."""
        scale = 1.0 if self.adm else math.sqrt(0.5)
        h = self.conv0(F.silu(self.norm0(x)))
        told = self.affine(embedding)[:, :, None, None]
        if self.scale_shift:
            gain, shift = told.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), gain + 1))
        else:
            h = F.silu(self.norm1(h + told))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        h = (h + (x if self.skip is None else self.skip(x))) * scale
        return (h + self._attend(h)) * scale if self.heads else h

    def _attend(self, x: Tensor) -> Tensor:
        """Self-attention over pixels, written out: the fused kernels have no second derivatives."""
        b, c, height, width = x.shape
        q, k, v = self.qkv(self.norm2(x)).reshape(b * self.heads, c // self.heads, 3, -1).unbind(2)
        weights = torch.softmax(q.transpose(1, 2) @ (k / math.sqrt(k.shape[1])), dim=2)
        return self.proj((v @ weights.transpose(1, 2)).reshape(b, c, height, width))


def quiet(layer: Convolution) -> Convolution:
    """Set a layer's weights to zero, so that what it adds is nothing at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def run_decoder(block: Block, x: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
    """Run a block on the way up; where it expects more channels than x has, the next skip joins."""
    if x.shape[1] != block.before:
        x = torch.cat([x, skips.pop()], dim=1)
    return block(x, embedding)


def side_of(shape: tuple[int, ...], levels: int) -> int:
    """Return the width of a square image, which must halve exactly once per level below the first.

    Raises:
        FanalError: the shape is not that of such an image.
    """
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] % 2 ** (levels - 1):
        raise FanalError(
            f"this U-Net needs (channels, side, side) with a side divisible by {2 ** (levels - 1)}, got {tuple(shape)}"
        )
    return shape[1]


class Embedding(nn.Module):
    """What the U-Nets share: labels with dropout while training."""

    classes: int
    label_dropout: float

    def labels_of(self, labels: Tensor | None, like: Tensor) -> Tensor:
        """Return one row per sample with a 1 at its label; zeros where there is none or it is dropped."""
        rows = one_hot(labels, self.classes, like)
        if self.training and self.label_dropout:
            rows = rows * (torch.rand(len(rows), 1, device=rows.device) >= self.label_dropout).to(rows.dtype)
        return rows

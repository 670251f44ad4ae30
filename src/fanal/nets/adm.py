"""The U-Net of ADM (`DhariwalUNet`), for EDM, guided-diffusion and consistency-models checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fanal.errors import FanalError
from fanal.nets.blocks import (
    Block,
    Convolution,
    Embedding,
    check_sizes,
    group_norm,
    positional,
    quiet,
    run_decoder,
    side_of,
)

__all__ = ["DhariwalUNet", "DhariwalUNetConfig"]


@dataclass(frozen=True)
class DhariwalUNetConfig:
    """Size of a `DhariwalUNet`; the default is that of ImageNet 64x64.

    Args:
        model_channels: channels of the first level before its multiplier, a multiple of 4.
        channel_mult: multiplier of the channels, per level; fractions are allowed.
        channel_mult_emb: length of the embedding, in `model_channels`.
        num_blocks: residual blocks per level.
        attn_resolutions: the widths of image at which blocks attend.
        dropout: share of activations dropped while training.
        label_dropout: share of labels dropped while training.
        augment_dim: length of the vector that describes an augmentation; 0 for none.
        heads: attention heads; 0: one per `head_channels`.
        head_channels: channels per attention head.
        group_channels: least channels per group of a normalization, which has at most 32 groups.
        scale_shift: whether the embedding scales and shifts in each block; otherwise it is added.
        learned_variance: whether the output has twice the channels, the second half for a variance.
        null_label: whether a network with classes may be asked without a label.

    Raises:
        FanalError: a size is out of range.
    """

    model_channels: int = 192
    channel_mult: tuple[int | float, ...] = (1, 2, 3, 4)
    channel_mult_emb: int = 4
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (32, 16, 8)
    dropout: float = 0.1
    label_dropout: float = 0.0
    augment_dim: int = 0
    heads: int = 0
    head_channels: int = 64
    group_channels: int = 4
    scale_shift: bool = True
    learned_variance: bool = False
    null_label: bool = True

    def __post_init__(self) -> None:
        check_sizes(self, parts=True)
        for name, low in (("heads", 0), ("head_channels", 1), ("group_channels", 1)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= 1024:
                raise FanalError(
                    f"DhariwalUNetConfig {name} must be a whole number from {low} to 1024, got {value!r:.80}"
                )
        for name in ("scale_shift", "learned_variance", "null_label"):
            if type(getattr(self, name)) is not bool:
                raise FanalError(f"DhariwalUNetConfig {name} must be true or false, got {getattr(self, name)!r:.80}")


class DhariwalUNet(Embedding):
    """`F(x, c_noise, labels)` of ADM, with the key names of EDM's reimplementation.

    Args:
        config: sizes.
        shape: `(channels, side, side)` of one sample.
        classes: number of classes, 0 for none.
        outputs: channels of the output; None for those of the input, or twice as many with a learned variance.

    Raises:
        FanalError: the shape is not that of an image this U-Net can halve.

    Reference: Dhariwal & Nichol 2021, arXiv:2105.05233, section 3; Karras et al. 2022, arXiv:2206.00364, table 7.
    """

    def __init__(
        self, config: DhariwalUNetConfig, shape: tuple[int, ...], classes: int = 0, outputs: int | None = None
    ) -> None:
        super().__init__()
        side, mults = side_of(shape, len(config.channel_mult)), config.channel_mult
        self.config, self.classes, self.label_dropout = config, classes, config.label_dropout
        base = config.model_channels
        embedding = base * config.channel_mult_emb
        self.map_augment = nn.Linear(config.augment_dim, base, bias=False) if config.augment_dim else None
        self.map_layer0 = nn.Linear(base, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.map_label = nn.Linear(classes, embedding, bias=False) if classes else None
        self._shared: dict[str, Any] = {
            "embedding": embedding,
            "dropout": config.dropout,
            "scale_shift": config.scale_shift,
            "group": config.group_channels,
        }
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        levels = [int(base * mult) for mult in mults]
        width = levels[0]
        widths = [width]
        for level, after in enumerate(levels):
            res = side >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Convolution(shape[0], width, 3)
            else:
                self.enc[f"{res}x{res}_down"] = Block(width, width, resample=-1, **self._shared)
                widths.append(width)
            for i in range(config.num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = self._block(width, after, res)
                width = after
                widths.append(width)
        for level in reversed(range(len(mults))):
            res = side >> level
            if level == len(mults) - 1:
                self.dec[f"{res}x{res}_in0"] = Block(width, width, heads=self._heads(width), **self._shared)
                self.dec[f"{res}x{res}_in1"] = Block(width, width, **self._shared)
            else:
                self.dec[f"{res}x{res}_up"] = Block(width, width, resample=1, **self._shared)
            for i in range(config.num_blocks + 1):
                self.dec[f"{res}x{res}_block{i}"] = self._block(width + widths.pop(), levels[level], res)
                width = levels[level]
        self.out_norm = group_norm(width, 1e-5, config.group_channels)
        if outputs is None:
            outputs = shape[0] * (2 if config.learned_variance else 1)
        self.out_conv = quiet(Convolution(width, outputs, 3))

    def _heads(self, width: int) -> int:
        return self.config.heads or width // self.config.head_channels

    def _block(self, before: int, after: int, res: int) -> Block:
        heads = self._heads(after) if res in self.config.attn_resolutions else 0
        return Block(before, after, heads=heads, **self._shared)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        c_noise: Float[Tensor, " b"],
        labels: Int[Tensor, " b"] | None = None,
        augment: Float[Tensor, "b a"] | None = None,
    ) -> Float[Tensor, "b o h w"]:
        """Return F; labels None is no label, augment None is an image as it is."""
        h = positional(c_noise, self.config.model_channels, endpoint=False)
        if self.map_augment is not None and augment is not None:
            h = h + self.map_augment(augment)
        h = self.map_layer1(F.silu(self.map_layer0(h)))
        if self.map_label is not None:
            h = h + self.map_label(self.labels_of(labels, h))
        embedding, skips, h = F.silu(h), [], x
        for layer in self.enc.values():
            h = layer(h, embedding) if isinstance(layer, Block) else layer(h)
            skips.append(h)
        for layer in self.dec.values():
            h = run_decoder(cast(Block, layer), h, skips, embedding)
        return self.out_conv(F.silu(self.out_norm(h)))

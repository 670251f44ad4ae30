"""The U-Net of EDM checkpoints in its forms DDPM++ and NCSN++ (`SongUNet`), with its key names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fanal.errors import FanalError
from fanal.nets.blocks import (
    Block,
    Convolution,
    Embedding,
    Fourier,
    check_sizes,
    group_norm,
    positional,
    quiet,
    run_decoder,
    side_of,
)

__all__ = ["SongUNet", "SongUNetConfig"]


@dataclass(frozen=True)
class SongUNetConfig:
    """Size and variant of a `SongUNet`; the default is DDPM++, for CIFAR-10 with `channel_mult=(2, 2, 2)`.

    NCSN++ has `embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=(1, 3, 3, 1)`.

    Args:
        model_channels: channels of the first level before its multiplier, a multiple of 4.
        channel_mult: multiplier of the channels, per level.
        channel_mult_emb: length of the embedding, in `model_channels`.
        num_blocks: residual blocks per level.
        attn_resolutions: the widths of image at which blocks attend.
        dropout: share of activations dropped while training.
        label_dropout: share of labels dropped while training.
        embedding_type: `positional` or `fourier`.
        channel_mult_noise: length of the embedding of the noise level, in `model_channels`.
        encoder_type: `standard`, `skip` or `residual`: how the input image reaches the lower levels.
        decoder_type: `standard` or `skip`: whether each level adds to the output image.
        resample_filter: taps of the filter that halves and doubles images.
        augment_dim: length of the vector that describes an augmentation; 0 for none.

    Raises:
        FanalError: a size or variant that does not exist.
    """

    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.1
    label_dropout: float = 0.0
    embedding_type: str = "positional"
    channel_mult_noise: int = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: tuple[float, ...] = (1, 1)
    augment_dim: int = 0

    def __post_init__(self) -> None:
        check_sizes(self)
        known = {
            "embedding_type": ("positional", "fourier"),
            "encoder_type": ("standard", "skip", "residual"),
            "decoder_type": ("standard", "skip"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise FanalError(f"SongUNet {name} must be one of {', '.join(values)}, got {getattr(self, name)!r:.80}")
        taps = self.resample_filter
        numbers = all(type(t) in (int, float) and 0 < t <= 1e6 for t in taps)
        if not numbers or len(taps) % 2 or not 2 <= len(taps) <= 16:
            raise FanalError(
                f"SongUNet resample_filter must be 2 to 16 positive taps, even in number, got {taps!r:.80}"
            )


class SongUNet(Embedding):
    """`F(x, c_noise, labels)` of DDPM++ and NCSN++, as EDM reimplemented them.

    Args:
        config: sizes and variants.
        shape: `(channels, side, side)` of one sample.
        classes: number of classes, 0 for none.
        outputs: channels of the output; None for those of the input.

    Raises:
        FanalError: the shape is not that of an image this U-Net can halve.

    Reference: Song et al. 2021, arXiv:2011.13456, appendix H; Karras et al. 2022, arXiv:2206.00364, appendix F.1 and
    table 7.
    """

    def __init__(
        self, config: SongUNetConfig, shape: tuple[int, ...], classes: int = 0, outputs: int | None = None
    ) -> None:
        super().__init__()
        side, channels = side_of(shape, len(config.channel_mult)), shape[0]
        self.config, self.classes, self.label_dropout = config, classes, config.label_dropout
        embedding = config.model_channels * config.channel_mult_emb
        self.noise_width = config.model_channels * config.channel_mult_noise
        self.map_noise = Fourier(self.noise_width) if config.embedding_type == "fourier" else nn.Identity()
        self.map_label = nn.Linear(classes, self.noise_width) if classes else None
        self.map_augment = nn.Linear(config.augment_dim, self.noise_width, bias=False) if config.augment_dim else None
        self.map_layer0 = nn.Linear(self.noise_width, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self._shared: dict[str, Any] = {
            "embedding": embedding,
            "dropout": config.dropout,
            "taps": config.resample_filter,
            "eps": 1e-6,
            "adm": False,
            "scale_shift": False,
        }
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        widths = self._encoder(side, channels)
        self._decoder(side, channels if outputs is None else outputs, widths)

    def _encoder(self, side: int, channels: int) -> list[int]:
        """Fill `enc`; return the channels of each skip."""
        config, taps = self.config, self.config.resample_filter
        width, aux = config.model_channels, channels
        widths = [width]
        for level, mult in enumerate(config.channel_mult):
            name = f"{side >> level}x{side >> level}"
            if level == 0:
                self.enc[f"{name}_conv"] = Convolution(channels, width, 3)
            else:
                self.enc[f"{name}_down"] = Block(width, width, resample=-1, **self._shared)
                widths.append(width)
            if level and config.encoder_type == "skip":
                self.enc[f"{name}_aux_down"] = Convolution(aux, aux, 0, -1, taps)
                self.enc[f"{name}_aux_skip"] = Convolution(aux, width, 1)
            if level and config.encoder_type == "residual":
                self.enc[f"{name}_aux_residual"] = Convolution(aux, width, 3, -1, taps, fused=True)
                aux = width
            for i in range(config.num_blocks):
                after = config.model_channels * mult
                heads = int(side >> level in config.attn_resolutions)
                self.enc[f"{name}_block{i}"] = Block(width, after, heads=heads, **self._shared)
                width = after
                widths.append(width)
        return widths

    def _decoder(self, side: int, outputs: int, widths: list[int]) -> None:
        """Fill `dec`."""
        config, width, last = self.config, widths[-1], len(self.config.channel_mult) - 1
        for level in reversed(range(last + 1)):
            name = f"{side >> level}x{side >> level}"
            if level == last:
                self.dec[f"{name}_in0"] = Block(width, width, heads=1, **self._shared)
                self.dec[f"{name}_in1"] = Block(width, width, **self._shared)
            else:
                self.dec[f"{name}_up"] = Block(width, width, resample=1, **self._shared)
            after = config.model_channels * config.channel_mult[level]
            for i in range(config.num_blocks + 1):
                heads = int(i == config.num_blocks and side >> level in config.attn_resolutions)
                self.dec[f"{name}_block{i}"] = Block(width + widths.pop(), after, heads=heads, **self._shared)
                width = after
            if config.decoder_type == "skip" or level == 0:
                if config.decoder_type == "skip" and level < last:
                    self.dec[f"{name}_aux_up"] = Convolution(outputs, outputs, 0, 1, config.resample_filter)
                self.dec[f"{name}_aux_norm"] = group_norm(width, 1e-6)
                self.dec[f"{name}_aux_conv"] = quiet(Convolution(width, outputs, 3))

    def _embed(self, c_noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        if self.config.embedding_type == "fourier":
            waves = self.map_noise(c_noise)
        else:
            waves = positional(c_noise, self.noise_width, endpoint=True)
        cosines, sines = waves.chunk(2, dim=1)
        h = torch.cat([sines, cosines], dim=1)  # the order of DDPM
        if self.map_label is not None:
            h = h + self.map_label(self.labels_of(labels, h) * math.sqrt(self.classes))
        if self.map_augment is not None and augment is not None:
            h = h + self.map_augment(augment)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(h))))

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        c_noise: Float[Tensor, " b"],
        labels: Int[Tensor, " b"] | None = None,
        augment: Float[Tensor, "b a"] | None = None,
    ) -> Float[Tensor, "b o h w"]:
        """Return F; labels None is no label, augment None is an image as it is."""
        embedding = self._embed(c_noise, labels, augment)
        h, skips = self._down(x, embedding)
        return self._up(h, skips, embedding)

    def _down(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        h, aux, skips = x, x, []
        for name, layer in self.enc.items():
            if name.endswith("aux_down"):
                aux = layer(aux)
            elif name.endswith("aux_skip"):
                h = skips[-1] = h + layer(aux)
            elif name.endswith("aux_residual"):
                h = skips[-1] = aux = (h + layer(aux)) * math.sqrt(0.5)
            else:
                h = layer(h, embedding) if isinstance(layer, Block) else layer(h)
                skips.append(h)
        return h, skips

    def _up(self, h: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        image, normed = None, h
        for name, layer in self.dec.items():
            if name.endswith("aux_up"):
                image = layer(image)
            elif name.endswith("aux_norm"):
                normed = layer(h)
            elif name.endswith("aux_conv"):
                part = layer(F.silu(normed))
                image = part if image is None else image + part
            else:
                h = run_decoder(cast(Block, layer), h, skips, embedding)
        assert image is not None
        return image

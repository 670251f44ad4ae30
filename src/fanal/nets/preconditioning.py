"""From a network F to a denoiser D: the preconditioning of Karras et al. 2022."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fanal.denoiser import expand
from fanal.errors import FanalError
from fanal.nets.mlp import MLP, MLPConfig
from fanal.nets.unet import UNet, UNetConfig

__all__ = ["NetConfig", "Preconditioned", "coefficients"]

NetConfig = MLPConfig | UNetConfig

_MOST_VALUES, _MOST_CLASSES = 2**28, 2**16


def coefficients(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `c_skip, c_out, c_in, c_noise` at sigma.

        c_skip = sd² / (sigma² + sd²)          c_out = sigma·sd / sqrt(sigma² + sd²)
        c_in = 1 / sqrt(sigma² + sd²)          c_noise = ln(sigma) / 4

    With them F sees inputs of unit variance and is asked for outputs of unit variance, and its errors are
    amplified least (Karras et al. 2022, arXiv:2206.00364, table 1 and appendix B.6).

    Args:
        sigma: noise level, any shape; at 0 D is the identity and c_noise is that of the smallest normal number.
        sigma_data: standard deviation of the data, sd.
    """
    total = sigma**2 + sigma_data**2
    c_noise = sigma.clamp_min(torch.finfo(sigma.dtype).tiny).log() / 4
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), total.rsqrt(), c_noise


class Preconditioned(nn.Module):
    """A trained or trainable denoiser `D(x, sigma) = c_skip·x + c_out·F(c_in·x, c_noise)`.

    Args:
        config: which network F is, and its size.
        shape: shape of one sample.
        sigma_data: standard deviation of the data.
        sigma_min: smallest noise level the model is made for; not enforced.
        sigma_max: largest noise level the model is made for; not enforced.
        classes: number of classes; 0 for an unconditional model.

    Raises:
        FanalError: a shape, range or number of classes that no network can have.
    """

    def __init__(
        self,
        config: NetConfig,
        shape: tuple[int, ...],
        *,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        classes: int = 0,
    ) -> None:
        super().__init__()
        _check(shape, sigma_data, sigma_min, sigma_max, classes)
        self.config = config
        self.shape = tuple(shape)
        self.sigma_data, self.sigma_min, self.sigma_max = float(sigma_data), float(sigma_min), float(sigma_max)
        self.classes = classes
        make = MLP if isinstance(config, MLPConfig) else UNet
        self.net = make(config, self.shape, classes)  # pyright: ignore[reportArgumentType]

    def forward(
        self, x: Float[Tensor, "b *d"], sigma: Tensor, labels: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b *d"]:
        """Return D(x, sigma), in the dtype of x; F runs in the dtype of its weights.

        Args:
            x: noisy samples.
            sigma: noise level, 0-d or one per sample (B,); any floating dtype, on any device.
            labels: one class per sample; None, or the number of classes, means no label.

        Raises:
            FanalError: labels do not fit the model, or sigma does not fit the batch.
        """
        if sigma.ndim > 1 or (sigma.ndim == 1 and len(sigma) != len(x)):
            raise FanalError(f"sigma must be 0-d or have shape ({len(x)},), got {tuple(sigma.shape)}")
        labels = self._labels(labels, x)
        # The dtype first: a float64 tensor cannot move to every device.
        level = sigma.to(x.dtype).to(x.device).expand(len(x))
        c_skip, c_out, c_in, c_noise = coefficients(level, self.sigma_data)
        dtype = next(self.net.parameters()).dtype
        raw = self.net((expand(c_in, x) * x).to(dtype), c_noise.to(dtype), labels).to(x.dtype)
        return expand(c_skip, x) * x + expand(c_out, x) * raw

    def _labels(self, labels: Tensor | None, x: Tensor) -> Tensor | None:
        if labels is None:
            return None
        if not self.classes:
            raise FanalError("this model was trained without classes, got labels: leave them out")
        if labels.shape != (len(x),) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise FanalError(
                f"labels must be {len(x)} whole numbers, one per sample, got {labels.dtype} {tuple(labels.shape)}"
            )
        # Looked at on the CPU only: elsewhere it would wait for the device at every call.
        if (
            labels.device.type == "cpu"
            and len(labels)
            and not 0 <= int(labels.min()) <= int(labels.max()) <= self.classes
        ):
            raise FanalError(
                f"labels must be in [0, {self.classes}), or {self.classes} for no label, "
                f"got {int(labels.min())} to {int(labels.max())}"
            )
        return labels.to(device=x.device, dtype=torch.long)


def _check(shape: tuple[int, ...], sigma_data: float, sigma_min: float, sigma_max: float, classes: int) -> None:
    if not shape or any(type(n) is not int or n < 1 for n in shape) or math.prod(shape) > _MOST_VALUES:
        raise FanalError(
            f"the shape of a sample must be positive whole numbers, at most 2^28 values, got {shape!r:.80}"
        )
    if not 0 < sigma_data < math.inf:
        raise FanalError(f"sigma_data must be a positive number, got {sigma_data}")
    if not 0 <= sigma_min < sigma_max < math.inf:
        raise FanalError(f"noise levels must satisfy 0 <= sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    if type(classes) is not int or not 0 <= classes <= _MOST_CLASSES:
        raise FanalError(f"classes must be a whole number from 0 to {_MOST_CLASSES}, got {classes!r}")

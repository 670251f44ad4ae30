"""From a network F to a denoiser D: the preconditioning of Karras et al. 2022, and those of other checkpoints."""

from __future__ import annotations

import math
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fanal.denoiser import expand
from fanal.errors import FanalError, unknown_name
from fanal.nets.adm import DhariwalUNet, DhariwalUNetConfig
from fanal.nets.edm import SongUNet, SongUNetConfig
from fanal.nets.mlp import MLP, MLPConfig
from fanal.nets.unet import UNet, UNetConfig

__all__ = [
    "PRECONDITIONINGS",
    "NetConfig",
    "Preconditioned",
    "boundary",
    "coefficients",
    "ddpm_levels",
    "ddpm_time",
    "iddpm_levels",
    "vp_level",
    "vp_time",
]

NetConfig = MLPConfig | UNetConfig | SongUNetConfig | DhariwalUNetConfig

_BETA_D, _BETA_MIN, _STEPS = 19.9, 0.1, 1000
_C_1, _C_2 = 0.001, 0.008
_BETAS = (1e-4, 0.02)  # of the linear schedule, at the first and the last time
PRECONDITIONINGS = ("edm", "vp", "ve", "iddpm", "edm1000", "consistency", "ddpm_linear", "ddpm_cosine")
"""Names of the ways from F to D; the first four are those of Karras et al. 2022, arXiv:2206.00364, table 1."""

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


def boundary(sigma: Tensor, sigma_data: float, sigma_min: float) -> tuple[Tensor, Tensor]:
    """Return `c_skip, c_out` of a consistency function, which is the identity at sigma_min.

        c_skip = sd² / ((sigma − sigma_min)² + sd²)     c_out = (sigma − sigma_min)·sd / sqrt(sigma² + sd²)

    Args:
        sigma: noise level, any shape.
        sigma_data: standard deviation of the data, sd.
        sigma_min: where the trajectories end.

    Reference: Song et al. 2023, arXiv:2303.01469, appendix C.
    """
    above = sigma - sigma_min
    c_out = above * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    return sigma_data**2 / (above**2 + sigma_data**2), c_out


def vp_level(time: float) -> float:
    """Return `sigma(t) = sqrt(exp(9.95·t² + 0.1·t) − 1)` of the variance-preserving process (Song et al. 2021).

    Reference: Karras et al. 2022, arXiv:2206.00364, table 1, with beta_d = 19.9 and beta_min = 0.1.
    """
    return math.sqrt(math.expm1(0.5 * _BETA_D * time**2 + _BETA_MIN * time))


def vp_time(sigma: Tensor) -> Tensor:
    """Return the time t with `vp_level(t) = sigma`: `(sqrt(0.1² + 2·19.9·ln(1 + sigma²)) − 0.1) / 19.9`."""
    return ((_BETA_MIN**2 + 2 * _BETA_D * (1 + sigma**2).log()).sqrt() - _BETA_MIN) / _BETA_D


def iddpm_levels() -> Float[Tensor, " 1001"]:
    """Return the noise levels u_0 > … > u_1000 = 0 of improved DDPM, as float32.

        u_{j-1} = sqrt((u_j² + 1) / max(ᾱ_{j-1}/ᾱ_j, 0.001) − 1),   ᾱ_j = sin²(π/2 · j / (1000·(0.008 + 1)))

    Reference: Nichol & Dhariwal 2021, arXiv:2102.09672; Karras et al. 2022, arXiv:2206.00364, table 1 and C.3.
    """
    alpha = [math.sin(0.5 * math.pi * j / _STEPS / (_C_2 + 1)) ** 2 for j in range(_STEPS + 1)]
    u = [0.0] * (_STEPS + 1)
    for j in range(_STEPS, 0, -1):
        u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(alpha[j - 1] / alpha[j], _C_1) - 1)
    return torch.tensor(u, dtype=torch.float32)


def ddpm_levels(schedule: str) -> Float[Tensor, " 1000"]:
    """Return the noise levels `sqrt((1 − ᾱ_t)/ᾱ_t)` of the times 0 … 999 of a DDPM, increasing, as float32.

    Args:
        schedule: `linear`: beta from 1e-4 to 0.02 and `ᾱ_t = Π (1 − beta)`; `cosine`: those of `iddpm_levels`.

    Raises:
        FanalError: the schedule is unknown.

    Reference: Ho et al. 2020, arXiv:2006.11239, section 4; Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17.
    """
    with torch.device("cpu"):  # also while a network is made without memory for its weights
        if schedule == "cosine":
            return iddpm_levels()[:-1].flip(0)
        if schedule != "linear":
            raise unknown_name("noise schedule", schedule, ("cosine", "linear"))
        log_alpha = torch.linspace(*_BETAS, _STEPS, dtype=torch.float64).neg().log1p().cumsum(0)
        return torch.expm1(-log_alpha).sqrt().float()


def ddpm_time(sigma: Float[Tensor, " b"], levels: Float[Tensor, " t"]) -> Float[Tensor, " b"]:
    """Return the fractional index of a noise level in a table of them, linear in log sigma between two entries.

    Levels outside of the table get its ends, where the network was trained last.

    Args:
        sigma: noise levels.
        levels: increasing.
    """
    levels = levels.to(sigma.device, sigma.dtype)
    inside = sigma.clamp(levels[0], levels[-1])
    above = torch.searchsorted(levels, inside.detach().contiguous()).clamp(1, len(levels) - 1)
    low, high = levels[above - 1].log(), levels[above].log()
    return above - 1 + (inside.log() - low) / (high - low)


def _network(config: NetConfig, shape: tuple[int, ...], classes: int, outputs: int | None) -> nn.Module:
    """Build the network of a configuration; `outputs` are its output channels where they are not the input's."""
    if isinstance(config, SongUNetConfig):
        return SongUNet(config, shape, classes, outputs)
    if isinstance(config, DhariwalUNetConfig):
        return DhariwalUNet(config, shape, classes, outputs)
    if outputs is not None:
        kind = type(config).__name__.removesuffix("Config")
        raise FanalError(f"the iddpm preconditioning needs a SongUNet or DhariwalUNet, got {kind}")
    return MLP(config, shape, classes) if isinstance(config, MLPConfig) else UNet(config, shape, classes)


class Preconditioned(nn.Module):
    """A trained or trainable denoiser `D(x, sigma) = c_skip·x + c_out·F(c_in·x, c_noise)`.

    | preconditioning | c_skip | c_out | c_in | c_noise |
    | --- | --- | --- | --- | --- |
    | `edm` | see `coefficients` | | | `ln(sigma)/4` |
    | `vp` | 1 | −sigma | `1/sqrt(sigma² + 1)` | 999·t with t from `vp_time` |
    | `ve` | 1 | sigma | 1 | `ln(sigma/2)` |
    | `iddpm` | 1 | −sigma | `1/sqrt(sigma² + 1)` | 999 − the index of the nearest of `iddpm_levels` |
    | `ddpm_linear`, `ddpm_cosine` | 1 | −sigma | `1/sqrt(sigma² + 1)` | `ddpm_time` in `ddpm_levels` |
    | `edm1000` | as `edm` | | | `250·ln(sigma)` |
    | `consistency` | see `boundary` | | as `edm` | `250·ln(sigma)` |

    The F of `iddpm` has twice the channels, and a `DhariwalUNet` with a learned variance too; the second half is not
    used. With `consistency` D is no posterior mean: it maps x to the end of its trajectory, and it is the identity at
    sigma_min.

    Args:
        config: which network F is, and its size.
        shape: shape of one sample.
        sigma_data: standard deviation of the data, sd; only `edm`, `edm1000` and `consistency` use it.
        sigma_min: smallest noise level the model is made for; not enforced, but part of `consistency`.
        sigma_max: largest noise level the model is made for; not enforced.
        classes: number of classes; 0 for an unconditional model.
        preconditioning: one of `PRECONDITIONINGS`.

    Raises:
        FanalError: a shape, range, number of classes or preconditioning that no network can have.

    Reference: Karras et al. 2022, arXiv:2206.00364, table 1; Song et al. 2023, arXiv:2303.01469, appendix C
    (`consistency`).
    """

    u: Tensor | None

    def __init__(
        self,
        config: NetConfig,
        shape: tuple[int, ...],
        *,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        classes: int = 0,
        preconditioning: str = "edm",
    ) -> None:
        super().__init__()
        _check(shape, sigma_data, sigma_min, sigma_max, classes)
        if preconditioning not in PRECONDITIONINGS:
            raise unknown_name("preconditioning", str(preconditioning), PRECONDITIONINGS)
        self.config = config
        self.shape = tuple(shape)
        self.sigma_data, self.sigma_min, self.sigma_max = float(sigma_data), float(sigma_min), float(sigma_max)
        self.classes, self.preconditioning = classes, preconditioning
        iddpm = preconditioning == "iddpm"
        self.register_buffer("u", iddpm_levels() if iddpm else None)
        kind, _, schedule = preconditioning.partition("_")
        # Not a buffer: it belongs to the name, and a change of the weights' dtype must not round it.
        self.levels = ddpm_levels(schedule) if kind == "ddpm" else None
        self.null_label = not isinstance(config, DhariwalUNetConfig) or config.null_label
        self.net = _network(config, self.shape, classes, 2 * shape[0] if iddpm else None)

    def forward(
        self,
        x: Float[Tensor, "b *d"],
        sigma: Tensor,
        labels: Int[Tensor, " b"] | None = None,
        augment: Float[Tensor, "b a"] | None = None,
    ) -> Float[Tensor, "b *d"]:
        """Return D(x, sigma), in the dtype of x; F runs in the dtype of its weights.

        Args:
            x: noisy samples.
            sigma: noise level, 0-d or one per sample (B,); any floating dtype, on any device.
            labels: one class per sample; None, or the number of classes, means no label, where a model knows that.
            augment: labels of how the samples were augmented, for a network that takes them; None means not at all.

        Raises:
            FanalError: labels do not fit the model, or sigma does not fit the batch.
        """
        if sigma.ndim > 1 or (sigma.ndim == 1 and len(sigma) != len(x)):
            raise FanalError(f"sigma must be 0-d or have shape ({len(x)},), got {tuple(sigma.shape)}")
        labels = self._labels(labels, x)
        # The dtype first: a float64 tensor cannot move to every device.
        level = sigma.to(x.dtype).to(x.device).expand(len(x))
        c_skip, c_out, c_in, c_noise = self._coefficients(level)
        dtype = next(self.net.parameters()).dtype
        inputs = ((expand(c_in, x) * x).to(dtype), c_noise.to(dtype), labels)
        raw = (self.net(*inputs) if augment is None else self.net(*inputs, augment.to(dtype))).to(x.dtype)
        raw = raw[:, : self.shape[0]]  # a learned variance is left out
        return expand(c_skip, x) * x + expand(c_out, x) * raw

    def _coefficients(self, level: Float[Tensor, " b"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return `c_skip, c_out, c_in, c_noise`, each of shape (B,)."""
        kind = self.preconditioning
        if kind in ("edm", "edm1000", "consistency"):
            c_skip, c_out, c_in, c_noise = coefficients(level, self.sigma_data)
            if kind == "consistency":
                c_skip, c_out = boundary(level, self.sigma_data, self.sigma_min)
            return c_skip, c_out, c_in, c_noise if kind == "edm" else _STEPS * c_noise
        one = torch.ones_like(level)
        if kind == "ve":
            return one, level, one, (0.5 * level).clamp_min(torch.finfo(level.dtype).tiny).log()
        scale = (level**2 + 1).rsqrt()
        if kind == "vp":
            return one, -level, scale, (_STEPS - 1) * vp_time(level)
        if self.levels is not None:
            return one, -level, scale, ddpm_time(level, self.levels)
        nearest = (level[:, None] - cast(Tensor, self.u).to(level.dtype)).abs().argmin(dim=1)
        return one, -level, scale, _STEPS - 1 - nearest.to(level.dtype)

    def _labels(self, labels: Tensor | None, x: Tensor) -> Tensor | None:
        most = self.classes - (0 if self.null_label else 1)
        if labels is None:
            if self.classes and not self.null_label:
                raise FanalError(
                    f"this model was trained with a label for each sample: give one (--label), from 0 to {most}"
                )
            return None
        if not self.classes:
            raise FanalError("this model was trained without classes, got labels: leave them out")
        if labels.shape != (len(x),) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise FanalError(
                f"labels must be {len(x)} whole numbers, one per sample, got {labels.dtype} {tuple(labels.shape)}"
            )
        # Looked at on the CPU only: elsewhere it would wait for the device at every call.
        if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= most:
            none = f"or {self.classes} for no label" if self.null_label else "no label is not known, so no guidance"
            raise FanalError(
                f"labels must be in [0, {self.classes}), {none}, got {int(labels.min())} to {int(labels.max())}"
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

"""Dynamic thresholding: pull predictions back into [−1, 1] where guidance has driven them out."""

from __future__ import annotations

import torch
from torch import Tensor

from fanal.denoiser import Denoiser, Wrapper
from fanal.errors import FanalError

__all__ = ["DynamicThreshold"]


class DynamicThreshold(Wrapper):
    """`D ← clip(D, −s, s)/s`, s the larger of 1 and a quantile of |D|, per sample.

    It is for pixels in [−1, 1] under strong guidance (Saharia et al. 2022, arXiv:2205.11487, sec. 2.3). On other data
    it changes the distribution, however many steps are taken, so no solver applies it by itself; some programs' do.

    Args:
        denoiser: what to wrap.
        ratio: the quantile, with linear interpolation between values.
        ceiling: upper bound of s; 1 clips to [−1, 1] and never rescales; None: no bound.

    Raises:
        FanalError: ratio is not in (0, 1], or ceiling is below 1.
    """

    def __init__(self, denoiser: Denoiser, ratio: float = 0.995, ceiling: float | None = None) -> None:
        super().__init__(denoiser)
        if not 0 < ratio <= 1 or (ceiling is not None and not ceiling >= 1):
            raise FanalError(f"thresholding needs ratio in (0, 1] and ceiling >= 1, got {ratio} and {ceiling}")
        self.ratio, self.ceiling = ratio, ceiling

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """Return the thresholded prediction."""
        denoised = self.denoiser(x, sigma)
        flat = denoised.flatten(1)
        wide = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
        s = torch.quantile(wide.abs(), self.ratio, dim=1, keepdim=True).clamp(1.0, self.ceiling)
        return (wide.clamp(-s, s) / s).to(denoised.dtype).reshape(denoised.shape)

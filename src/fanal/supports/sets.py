"""Sets without a law of their own: what distances are measured from, where no denoiser is needed."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError

__all__ = ["Polytope"]


class Polytope:
    """A polytope `A x <= b`; a set to measure distances from.

    Args:
        normals: A, (m, d), one outward normal per face.
        offsets: b, (m,).

    Raises:
        FanalError: the sizes do not fit, a normal is zero, or the set is empty.
    """

    def __init__(self, normals: Float[Tensor, "m d"], offsets: Float[Tensor, " m"]) -> None:
        if normals.ndim != 2 or offsets.shape != (len(normals),):
            raise FanalError(f"a polytope needs normals (m, d) and offsets (m,), got {normals.shape}, {offsets.shape}")
        size = normals.double().norm(dim=1)
        if not bool((size > 0).all()) or not bool((size.isfinite() & offsets.isfinite()).all()):
            raise FanalError("a face of a polytope needs a finite offset and a finite normal that is not zero")
        self.normals, self.offsets = normals.double() / size[:, None], offsets.double() / size
        self.shape = (normals.shape[1],)
        self.project(torch.zeros(1, normals.shape[1], dtype=torch.float64))  # empty sets are told at once

    def project(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Return the nearest point, by least distance programming (Lawson & Hanson 1974, ch. 23).

        Raises:
            FanalError: the set is empty.
        """
        from scipy.optimize import nnls

        out, faces = x.detach().cpu().double().clone(), self.normals.numpy()
        for b, gap in enumerate((out @ self.normals.T - self.offsets).numpy()):
            if (gap <= 0).all():
                continue
            # least ‖z‖ with −A z >= A x − b, in units of the farthest face, as the last residual is 1/(1 + ‖z‖²)
            unit = gap.max()
            system = np.vstack([-faces.T, gap[None] / unit])
            goal = np.zeros(len(system))
            goal[-1] = 1
            weights, _ = nnls(system, goal, maxiter=50 * len(faces))
            left = system @ weights - goal
            if abs(left[-1]) < 1e-12:
                raise FanalError("the polytope is empty: its faces contradict each other")
            out[b] += torch.from_numpy(-unit * left[:-1] / left[-1])
        return out.to(x)

    def distance(self, x: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
        """Return the signed distance, float64: negative inside, to the nearest face."""
        wide = x.double()
        outside = (wide - self.project(wide)).norm(dim=1)
        gap = wide @ self.normals.to(wide).T - self.offsets.to(wide)
        return torch.where(outside > 0, outside, gap.amax(1))

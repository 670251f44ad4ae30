"""Sets without a law of their own: what distances are measured from, where no denoiser is needed."""

from __future__ import annotations

import math

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
        self._check()

    def _check(self) -> None:
        """Refuse an empty set, by the smallest t with a point in `A x <= b + t`."""
        from scipy.optimize import linprog

        faces, size = self.normals.numpy(), float(self.offsets.abs().max().clamp_min(1e-300))
        system = np.hstack([faces, -np.ones((len(faces), 1))])
        bounds = [(None, None)] * faces.shape[1] + [(-1, None)]  # a set without bounds has points of any depth
        found = linprog(np.eye(len(bounds))[-1], system, self.offsets.numpy() / size, bounds=bounds)
        if found.status != 0:
            raise FanalError(f"scipy's linprog cannot tell whether the polytope is empty: {found.message}")
        if found.fun > 1e-7:  # linprog's own tolerance
            raise FanalError(
                f"the polytope is empty: its faces contradict each other by {found.fun * size:.3g}; every offset must "
                "grow by that much"
            )

    def project(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Return the nearest point, by least distance programming (Lawson & Hanson 1974, ch. 23).

        Raises:
            FanalError: faces meet at an angle below 10^-12 or so.
        """
        out, faces = x.detach().cpu().double().clone(), self.normals.numpy()
        for _ in range(2):  # what rounding left of a long way is a short way
            for b, gap in enumerate((out @ self.normals.T - self.offsets).numpy()):
                if gap.max() > 0:
                    out[b] += torch.from_numpy(_least(faces, gap))
        return out.to(x)

    def distance(self, x: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
        """Return the signed distance, float64: negative inside, to the nearest face."""
        wide = x.double()
        outside = (wide - self.project(wide)).norm(dim=1)
        gap = wide @ self.normals.to(wide).T - self.offsets.to(wide)
        return torch.where(outside > 0, outside, gap.amax(1))


def _least(faces: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """The shortest z with `A z <= −gap`, by nonnegative least squares with one more row than z has entries.

    In units of `unit` the last residual is `−1/(1 + ‖z‖²)`: units are enlarged until z is short and it has its digits.
    """
    from scipy.optimize import nnls

    unit = gap.max()
    for _ in range(6):
        system = np.vstack([-faces.T, gap[None] / unit])
        goal = np.zeros(len(system))
        goal[-1] = 1
        weights, _ = nnls(system, goal, maxiter=50 * len(faces))
        left = system @ weights - goal
        share = -left[-1]
        if share > 1e-3:
            return unit * left[:-1] / share
        unit /= math.sqrt(max(share, 1e-12))
    raise FanalError("faces of the polytope meet at too small an angle: the nearest point is lost in rounding")

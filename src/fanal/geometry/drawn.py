"""What is drawn of a run's first trajectories: pictures along them, rebuilt ones, nearest points and their weights."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fanal.denoiser import Denoiser, Latent, network_of, take
from fanal.exact import Dataset
from fanal.exact.reference import labels_of
from fanal.geometry import nulls, subspace
from fanal.geometry.diagnosis import NEIGHBORS, Diagnosis
from fanal.geometry.measures import COMPONENTS
from fanal.metrics.features import is_image
from fanal.pictures import to_bytes
from fanal.preparation import Setup
from fanal.trajectory import Trajectory

__all__ = ["PICTURED", "REBUILT", "drawn_tensors", "shown_steps"]

PICTURED = 6
"""Trajectories of which pictures are kept."""

REBUILT = 3
"""Dimensions in which they are rebuilt, at most ([REG] fig. 4a)."""

_STEPS = 24


def shown_steps(count: int) -> Int[Tensor, " m"]:
    """Return the steps, of so many, at which pictures are kept."""
    return torch.linspace(0, count - 1, min(count, _STEPS)).round().long()


def _is_picture(setup: Setup) -> bool:
    return isinstance(network_of(setup.network), Latent) or is_image(tuple(setup.network.shape))


def _images(setup: Setup, x: Float[Tensor, "m b *d"]) -> Tensor:
    """Samples as images, (B, M, H, W, C)."""
    network, rows = network_of(setup.network), x.flatten(0, 1)
    rows = network.decode(rows) if isinstance(network, Latent) else rows
    return to_bytes(rows).unflatten(0, x.shape[:2]).movedim(2, -1).transpose(0, 1).contiguous()


def _strips(
    setup: Setup, run: Trajectory, forward: Tensor | None, found: Diagnosis | None, steps: Tensor, few: int
) -> dict[str, Tensor]:
    """Predictions and states as images, and those of the forward process."""
    # seen at one contrast: pictures as they are, noise within [−1, 1]
    noisy = 1 if isinstance(network_of(setup.network), Latent) else 4
    scale = (1 + noisy * run.sigmas[steps] ** 2).rsqrt().reshape(-1, *[1] * (run.x.ndim - 1)).to(run.x)
    strips = {"strip": run.denoised[steps, :few], "strip_x": scale * run.x[steps, :few]}
    if forward is not None:
        strips["strip_forward"] = scale * forward[steps, :few].to(run.x)
    if found is not None:
        strips["strip_exact x"] = scale * found.exact.x[steps, :few]
        strips["strip_D*(model x)"] = torch.stack([found.optimal[i].denoised[:few] for i in steps.tolist()])
        strips["strip_D(exact x)"] = found.learned[steps, :few]
        strips["strip_D*(exact x)"] = found.exact.denoised[steps, :few]
    return {name: _images(setup, x) for name, x in strips.items()}


def _rebuilt(setup: Setup, model: Denoiser, run: Trajectory, steps: Tensor, few: int) -> dict[str, Tensor]:
    """The model's predictions at states rebuilt in few dimensions, and how far they are from the run's own, per √d.

    Predictions, since states so near to each other look the same ([REG] fig. 4). `rebuilt_error` is (B, K, M); pictures
    are strips, and of points the first two coordinates are kept, (B, 1 + K, M, 2), the run's own first.
    """
    states = subspace.reconstruct(run.x[:, :few], REBUILT)[:, steps]
    own, part, levels = run.denoised[steps, :few], take(model, torch.arange(few)), run.sigmas[steps]
    with torch.no_grad():
        again = torch.stack(
            [torch.stack([part(x, sigma) for x, sigma in zip(path, levels, strict=True)]) for path in states]
        )
    off = (again - own).flatten(3).cpu().double().norm(dim=3) / math.sqrt(run.x[0, 0].numel())
    kept = {"rebuilt_error": off.permute(2, 0, 1).contiguous()}
    if _is_picture(setup):
        return kept | {f"strip_{k + 1}-D": _images(setup, path) for k, path in enumerate(again)}
    if run.x[0, 0].numel() < 2:
        return kept
    both = torch.cat([own[None], again]).flatten(3)[..., :2].cpu()  # (1 + K, M, B, 2)
    return kept | {"rebuilt": both.permute(2, 0, 1, 3).contiguous()}


def _neighbors(exact: Dataset, found: Diagnosis, few: int) -> dict[str, Tensor]:
    """The training points nearest to both ends of the drawn runs as images (B, 2, K, H, W, C)."""
    if not is_image(exact.shape):
        return {}
    index = found.index[:few]
    points = exact.points.rows(index.flatten(1), "cpu", torch.float32)
    return {"neighbors": to_bytes(points.reshape(*index.shape, *exact.shape)).movedim(3, -1).contiguous()}


def _point_weights(exact: Dataset, run: Trajectory, labels: Tensor | None, few: int) -> dict[str, Tensor]:
    """Posterior weights of the K points that have the largest ones over each of the first runs: [REG] fig. 9(e).

    `point_weights` (B, N, K) follows each of these points along the run, the one with the largest weight first, and
    `point_index` (B, K) says which they are; −1 where a class has no more.
    """
    own = None if labels is None else labels[:few]
    levels = list(zip(run.x[:-1, :few], run.sigmas[:-1], strict=True))
    found = [exact.top(x, sigma, NEIGHBORS, own) for x, sigma in levels]
    weight, index = (torch.stack([each[k] for each in found], 1).cpu() for k in (0, 1))  # (B, N, K), decreasing
    # what is not among the largest at any level is not among the largest of all
    chosen = torch.stack([_heaviest(*pair, weight.shape[2]) for pair in zip(weight, index, strict=True)])
    points = exact.points.rows(chosen.clamp_min(0), "cpu", torch.float64)
    best = exact.points.rows(index[:, :, 0], "cpu", torch.float64)  # (B, N, d)
    rows = []
    for i, (x, sigma) in enumerate(levels):
        # by what each point is farther than the best one: (y − z)·(2x − y − z)
        top, here = best[:, i, None], x.flatten(1).cpu().double()[:, None]
        farther = ((top - points) * (2 * here - top - points)).sum(2)
        rows.append(weight[:, i, :1] * (-farther / (2 * float(sigma) ** 2)).exp().clamp_max(1) * (chosen >= 0))
    return {"point_weights": torch.stack(rows, 1), "point_index": chosen}


def _heaviest(weight: Tensor, index: Tensor, count: int) -> Tensor:
    """The points with the largest weights of all levels, each once, filled up with −1."""
    order = weight.flatten().argsort(descending=True, stable=True)
    order = order[weight.flatten()[order] > 0]
    found = list(dict.fromkeys(index.flatten()[order].tolist()))[:count]
    return torch.tensor([*found, *[-1] * (count - len(found))])


def drawn_tensors(
    setup: Setup,
    model: Denoiser,
    run: Trajectory,
    exact: Dataset | None,
    found: Diagnosis | None,
    drawn: range,
    images: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return what is kept of the trajectories of a block that are drawn, each tensor's first axis theirs.

    Args:
        setup: the run.
        model: with the block's conditions.
        run: the block's trajectories.
        exact: of the data, where the model is put beside them.
        found: what it does there.
        drawn: which of the run's trajectories are drawn, the block's first ones.
        images: that the block's runs begin at with noise added, whose forward process is shown in place of the ends'.
    """
    if not len(drawn):
        return {}
    seeds = setup.config.seeds()[drawn.start : drawn.stop]
    # from the ends of the drawn runs, projected as they are: what noise alone looks like
    forward = nulls.forward_paths(run.x[-1, : len(drawn)].cpu(), run.sigmas, seeds)
    projection = subspace.project(forward, COMPONENTS)
    kept = {"forward": projection.coordinates[:, :, :3], "forward.explained": projection.explained}
    few = max(0, min(len(drawn), PICTURED - drawn.start))
    if not few:
        return kept
    steps = shown_steps(len(run.denoised))
    kept |= _rebuilt(setup, model, run, steps, few)
    if images is not None:  # along the noise that the runs begin with
        forward = images.to(run.x) + (run.sigmas / run.sigmas[0]).to(run.x).reshape(-1, *[1] * (run.x.ndim - 1)) * (
            run.x[0] - images.to(run.x)
        )
    shown = None if found is None and images is None else forward
    kept |= _strips(setup, run, shown, found, steps, few) if _is_picture(setup) else {}
    if exact is not None and found is not None:
        kept |= _neighbors(exact, found, few)
        kept |= _point_weights(exact, run, labels_of(exact, model, run.x.shape[1]), few)
    return kept

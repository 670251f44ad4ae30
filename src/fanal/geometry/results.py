"""What a geometry run tells: bands, numbers, shapes, regularity, likelihood, as JSON and as tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fanal.errors import FanalError
from fanal.exact import Dataset
from fanal.geometry import alignment, combination, frames, nulls, regularity, stages
from fanal.geometry.arrival import Arrival
from fanal.geometry.blocks import Gathering
from fanal.geometry.diagnosis import outliers
from fanal.geometry.drawn import shown_steps
from fanal.geometry.groups import Rival, group_names, split
from fanal.geometry.measures import COMPONENTS
from fanal.geometry.streaming import Band
from fanal.metrics.estimates import Estimate, mean
from fanal.preparation import Setup
from fanal.schedules import plain_sigmas
from fanal.summary import as_json

__all__ = ["results_of"]

_PICTURED = ("strip", "rebuilt", "neighbors", "point_weights", "point_index")
_ROUNDING = 1e-4  # of the predictions' size: score deviations below this are none
_RISES = {"met": "assumption met", "state": "state rises", "prediction": "prediction rises"}


def _shape(curve: Tensor, sigmas: Tensor, d: int, window: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Curvature and torsion of the drawn trajectories, times sigma √d; their alignment, and how alike they are."""
    turned, common, left = alignment.align(curve)
    size = (common - common.mean(0)).norm()
    frenet = frames.frenet(curve, window)
    # Per unit of length a run bends most in its last, tiny steps; as sigma falls by a factor of e it moves by sigma √d.
    unit = sigmas * math.sqrt(d)
    curvature, torsion = frenet.curvature * unit, frenet.torsion * unit
    kept = regularity.kept_levels(curve, sigmas, d)
    borders = stages.by_curvature(curvature[:, :kept].T, sigmas[:kept])
    tensors = {"aligned": turned, "length": frenet.length, "curvature": curvature, "torsion": torsion}
    whole, bends = _rebuilt(curve, frenet)
    across = torch.linalg.matrix_norm(turned[:, :, 1:] - common[:, 1:]) / torch.linalg.matrix_norm(common[:, 1:])
    results = {
        "procrustes residual / size": mean(left / size),
        "procrustes residual across / size across": mean(across),
        "fit error / length": mean(frenet.error.mean(1) / frenet.length[:, -1]),
        "rebuilt residual / size": mean(whole),
        "rebuilt residual / size across": mean(bends),
        "kept to sigma": Estimate(float(sigmas[kept - 1]), 0.0, len(curve)),
        "curved from sigma": mean(borders.first[~borders.first.isnan()]),
        "curved to sigma": mean(borders.last[~borders.last.isnan()]),
    }
    return tensors, {name: as_json(value) for name, value in results.items()}


def _rebuilt(curve: Tensor, frenet: frames.Frenet) -> tuple[Tensor, Tensor]:
    """How far each curve is from the one that its curvature and torsion determine, after the best shift and rotation.

    Over its size, most of which is its chord, and over the size of what is off the chord, (B,) each.
    """
    left, sizes = [], []
    for own, length, bend, twist in zip(curve, frenet.length, frenet.curvature, frenet.torsion, strict=True):
        again = frames.rebuild(length, bend, twist)
        centered = own.double() - own.double().mean(0)
        _, off = alignment.procrustes((again - again.mean(0))[None], centered, fixed=0, mirrors=False)
        left.append(off[0])
        sizes.append(torch.stack([centered.norm(), centered[:, 1:].norm()]))
    size = torch.stack(sizes)
    return torch.stack(left) / size[:, 0], torch.stack(left) / size[:, 1]


def _regularity(found: Gathering, curve: Tensor, setup: Setup, rivals: Sequence[Rival], window: int) -> dict[str, Any]:
    """How alike trajectories are within and between groups, and how alike they would be by chance."""
    sigmas, d = setup.sigmas, math.prod(setup.network.shape)
    own = split(group_names(setup.config.model, setup, len(curve)), curve)
    groups = {name: regularity.shapes(part, sigmas, d, window) for name, part in own.items()}
    for rival in rivals:
        if rival.curve is not None:
            parts = split(rival.groups, rival.curve)
            groups |= {name: regularity.shapes(part, sigmas, rival.d, window) for name, part in parts.items()}
    tables = regularity.table(groups)
    smooth, forward = regularity.smooth_null(curve, sigmas, d), found.stack("forward")
    chance: dict[str, dict[str, Any]] = {}
    for name, null in (("smooth", smooth), ("forward", forward)):
        pairs = regularity.apart(regularity.shapes(null, sigmas, d, window))
        chance[name] = {key: as_json(value) for key, value in pairs.items()}
    explained, law = found.stack("forward.explained").cumsum(1), None
    if len(sigmas) > COMPONENTS + 1:
        law = nulls.bridge_shares(sigmas, COMPONENTS).cumsum(0)
    for k in range(COMPONENTS):
        chance["forward"][f"explained by {k + 1}"] = as_json(mean(explained[:, k]))
        if law is not None:
            chance["forward"][f"explained by {k + 1}, in many dimensions"] = float(law[k])
    out: dict[str, Any] = {"names": list(groups), "nulls": chance, "se": {}}
    for key, table in tables.items():
        cells = [[as_json(cell) for cell in row] for row in table]
        out[key] = [[cell["value"] for cell in row] for row in cells]
        out["se"][key] = [[cell["se"] for cell in row] for row in cells]
    return out


def _weights(setup: Setup) -> dict[str, Any]:
    """Shares of all predictions in the last state above 0, which a step into 0 replaces by its prediction."""
    sigmas = setup.sigmas[setup.sigmas > 0]
    try:
        # over the whole grid: some solvers lower their order on the last steps
        found = combination.shares_of(setup.solver, setup.sigmas, setup.config.solver)
    except FanalError as error:
        return {"refused": str(error)}
    last, made = found.table[len(sigmas) - 1], found.steps < len(sigmas) - 1
    prediction, steps = last[1:][made], found.steps[made]
    return {
        "sigmas": plain_sigmas(found.sigmas[made]),
        "prediction": prediction.tolist(),
        "between": [False, *(steps.diff() == 0).tolist()],
        "start": float(last[0]),
        "at": float(sigmas[-1]),
        "sum": float(last.sum()),
        "negative": float(-last.clamp_max(0).sum()),
        "least": float(last.min()),
        "affine": found.affine(),
        "convex": found.convex(),
        "noise": found.noise,
    }


def _mean(band: Band | None) -> dict[str, Any]:
    """The mean of a number with its standard error."""
    if band is None:
        return as_json(Estimate(math.nan, math.nan, 0))
    return as_json(Estimate(float(band.mean), float(band.se) if band.count > 1 else math.nan, band.count))


def _likelihood(bands: dict[str, Band], numbers: dict[str, Band | None]) -> dict[str, Any]:
    """Shares of steps at which likelihood rises, and at which it is proved to."""
    out: dict[str, Any] = {key: _mean(numbers[name]) for key, name in _RISES.items()}
    out["steps"] = bands["assumption met"].mean.tolist()
    return out | {f"{key} steps": bands[name].mean.tolist() for key, name in _RISES.items() if key != "met"}


def _flagged(bands: dict[str, Band], sigmas: Tensor, d: int) -> list[dict[str, float]]:
    floor = _ROUNDING * float(bands["denoised magnitude"].mean.max()) / math.sqrt(d)
    found = outliers(sigmas[:-1], bands["score deviation"].mean, floor=floor)
    return [dataclasses.asdict(each) for each in found]


def _shell(exact: Dataset, sigmas: Tensor) -> Band:
    """`sqrt(‖y‖² + sigma²d)` over the points: where the forward process concentrates ([GEO] prop. 2)."""
    squares = 2 * exact.points.half
    return Band.of((squares[None] + (sigmas**2 * exact.points.dim)[:, None]).sqrt())


def results_of(
    setup: Setup,
    exact: Dataset | None,
    arrival: Arrival | None,
    found: Gathering,
    rivals: Sequence[Rival],
    window: int,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return every figure of a run as JSON, and the tensors behind its pictures.

    Args:
        setup: the run.
        exact: of the data, where the model stands beside them.
        arrival: their features, where states and predictions were compared with them.
        found: what was measured.
        rivals: what it is compared with.
        window: points on each side that curvature and torsion are fitted to.
    """
    bands, d = found.bands, math.prod(setup.network.shape)
    numbers, curve = found.numbers, found.stack("curve")
    drawn, shape = _shape(curve, setup.sigmas, d, window)
    results: dict[str, Any] = {"sigmas": plain_sigmas(setup.sigmas), "d": d, "window": window}
    if exact is not None:
        results["likelihood"], results["flagged"] = _likelihood(bands, numbers), _flagged(bands, setup.sigmas, d)
        bands = {name: band for name, band in bands.items() if name not in _RISES.values()}
        numbers = {name: band for name, band in numbers.items() if name not in _RISES.values()}
        bands["forward magnitude"] = _shell(exact, setup.sigmas)
    if arrival is not None:
        features = {name: found.stack(name) for name in ("features.x", "features.denoised", "features.data")}
        results["frechet"] = arrival.results(features, setup.sigmas)
    results |= {
        "weights": _weights(setup),
        "groups": group_names(setup.config.model, setup, len(curve)),
        "regularity": _regularity(found, curve, setup, rivals, window),
        "numbers": {name: _mean(band) for name, band in numbers.items()},
        "shape": shape,
        "bands": {
            name: {part: getattr(band, part).tolist() for part in ("mean", "std", "se", "low", "high")}
            for name, band in bands.items()
        },
    }
    pictures = [name for name in found.parts[0] if name.startswith(_PICTURED)]
    drawn |= {name: found.stack(name) for name in (*pictures, "forward")}
    drawn["strip_sigmas"] = setup.sigmas[shown_steps(len(setup.sigmas) - 1)]
    return results, drawn

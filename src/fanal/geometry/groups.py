"""What a geometry run is compared with: other models over the same grid, or finished runs; each class by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fanal.errors import FanalError
from fanal.files import read_json, read_tensors, sha256_of
from fanal.generation import identity
from fanal.preparation import SampleConfig, Setup, prepare

__all__ = ["Rival", "group_names", "rival_of", "split"]


@dataclass(eq=False)
class Rival:
    """Trajectories to compare with.

    Attributes:
        name: as it was asked for.
        content: hash of the model, or of the run's tensors.
        d: dimension of its samples.
        groups: name of the group of each of its trajectories, (B,).
        setup: how to run the model; None: the run is finished.
        curve: (B, N+1, 3), projected trajectories, as soon as they are there.
    """

    name: str
    content: str
    d: int
    groups: list[str]
    setup: Setup | None = None
    curve: Tensor | None = None


def group_names(name: str, setup: Setup, count: int) -> list[str]:
    """Return the group of each trajectory: the model, and its class where the run goes through all of them in turn."""
    classes = getattr(setup.network, "classes", 0)
    if setup.config.label != "each" or classes < 1:
        return [name] * count
    known = setup.class_names or tuple(str(c) for c in range(classes))
    return [f"{name} {known[b % classes]}" for b in range(count)]


def _finished(place: Path, setup: Setup) -> Rival:
    """A finished run's trajectories."""
    record, (tensors, _) = read_json(place / "run.json"), read_tensors(place / "geometry.safetensors")
    results, curve = record.get("results", {}), tensors.get("aligned")
    sigmas = torch.tensor(results.get("sigmas", []), dtype=torch.float64)
    if sigmas.shape != setup.sigmas.shape or not torch.allclose(sigmas, setup.sigmas, rtol=1e-5):
        raise FanalError(
            f"{place} has {max(len(sigmas) - 1, 0)} steps over other levels: curves are compared level by level, so "
            "run both with the same --steps, --schedule, --sigma-min and --sigma-max"
        )
    groups = results.get("groups")
    if curve is None or curve.ndim != 3 or not isinstance(groups, list) or len(groups) != len(curve):
        raise FanalError(f"{place} does not say whose its drawn trajectories are: measure it again with this version")
    model = str(record["config"]["model"])
    groups = [f"{place}{str(own).removeprefix(model)}" for own in groups]
    return Rival(str(place), sha256_of(place / "geometry.safetensors"), int(results["d"]), groups, curve=curve)


def rival_of(text: str, config: SampleConfig, setup: Setup) -> Rival:
    """Return what a run is to be compared with.

    Args:
        text: a model's spec, or a run folder of `fanal geometry`.
        config: of the run, with as many samples as are compared.
        setup: of the run, whose grid counts.

    Raises:
        FanalError: there is no such model, a condition of the run does not fit it, or a finished run has other levels.
    """
    place = Path(text)
    if (place / "geometry.safetensors").is_file() and read_json(place / "run.json").get("command") == "geometry":
        return _finished(place, setup)
    try:
        other, _ = prepare(dataclasses.replace(config, model=text, noise=None))
    except FanalError as error:
        if config.label is None and config.prompt is None:
            raise
        raise FanalError(
            f"{error}: models are compared under the run's own conditions; measure {text} without them into a run "
            "folder, and give that folder in its place"
        ) from error
    other = dataclasses.replace(other, sigmas=setup.sigmas)
    size = int(torch.Size(other.network.shape).numel())
    content = identity(other.config, other.network)["model"]
    return Rival(text, content, size, group_names(text, other, config.count), other)


def split(names: list[str], curve: Tensor) -> Mapping[str, Tensor]:
    """Return curves by group, in the order in which groups first come."""
    order = list(dict.fromkeys(names))
    return {name: curve[[b for b, own in enumerate(names) if own == name]] for name in order}

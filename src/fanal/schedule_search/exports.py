"""Searched schedules as other programs take them, beside a schedule file.

A grid goes anywhere; weights, and grids that begin at infinity, only where the program has a place for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fanal.errors import FanalError, unknown_name
from fanal.files import write_json, write_tensors

if TYPE_CHECKING:
    from fanal.schedule_files import Entry, Schedules

__all__ = ["EXPORTS", "check_exports", "export", "export_path"]

_ENDS = (
    "These grids end at the last sigma, above 0: N + 1 values are N steps. Do not append 0, which adds a call, and do "
    "not replace the last value by 0."
)


def _plain(sigmas: Tensor) -> str:
    """Decimals with commas, without an exponent, which some readers of text do not know, exact to float64."""
    return ", ".join(f"{value:.20f}".rstrip("0").rstrip(".") for value in sigmas.tolist())


def _is_far(entry: Entry) -> bool:
    """Whether a grid begins at infinity, as those of flow matching do."""
    return math.isinf(entry.sigmas[0])


def _flow(sigmas: Tensor) -> Tensor:
    """Times of flow matching, `sigma/(1 + sigma)`: 1 at infinity."""
    return 1 / (1 + 1 / sigmas)


def _diffusers(entry: Entry, source: str) -> dict[str, Any]:
    sigmas = entry.sigmas.tolist()
    if entry.weights is not None:
        return {"scheduler": {"_class_name": "FanalScheduler", "solver": source, "sigmas": sigmas}}
    own = {"_class_name": "FanalScheduler", "solver": entry.solver, "sigmas": sigmas}
    plain = {} if _is_far(entry) else {"sigmas": sigmas}
    return {**plain, "flow_sigmas": _flow(entry.sigmas).tolist(), "scheduler": own}


_DIFFUSERS = (
    f"{_ENDS} sigmas: for EulerDiscreteScheduler, scheduler.set_timesteps(sigmas=...) or pipe(sigmas=...). "
    "flow_sigmas: s/(1 + s), for flow matching without shift; with a shift pass f/(shift − (shift − 1)·f); leave "
    "out the last value, since the scheduler appends its own end. "
    "scheduler: FanalScheduler(solver, sigmas, scheduler=pipe.scheduler) of fanal.adapters.scheduler takes the place "
    "of any other scheduler and runs this very solver; a solver that is a schedule file has searched weights, without "
    "which the grid is poor."
)


def _comfyui(entry: Entry, source: str) -> Any:
    if entry.weights is None:
        return _plain(_flow(entry.sigmas) if _is_far(entry) else entry.sigmas)
    sigmas = {"file": source, "steps": entry.asked}
    return {"FanalSamplerFromFile": {"file": source}, "FanalSigmasFromFile": sigmas}


_COMFYUI = (
    f"{_ENDS} Each text goes into a node that takes sigmas as numbers with commas and gives SIGMAS; one that begins at "
    "1 has the times of a flow model. Grids with weights of their own come as the inputs of fanal's nodes, which read "
    "the schedule file."
)


_EDM = f"{_ENDS} Each list is t_steps of an EDM sampler, in the place of its own with the appended 0."


def _writer(consumer: str, note: str, form: Callable[[Entry, str], Any]) -> Callable[[Path, Schedules, str], None]:
    """What writes a JSON export: a consumer's name, a note, and each grid in its form."""

    def write(path: Path, schedules: Schedules, source: str) -> None:
        grids = {str(k): form(entry, source) for k, entry in schedules.entries.items()}
        solvers = {str(k): entry.solver for k, entry in schedules.entries.items()}
        write_json(path, {"for": consumer, "note": note, "solvers": solvers, "schedules": grids})

    return write


def _write_kdiffusion(path: Path, schedules: Schedules, source: str) -> None:
    grids = {f"sigmas.{k}": entry.sigmas for k, entry in schedules.entries.items()}
    solvers = {f"solver.{k}": entry.solver for k, entry in schedules.entries.items()}
    write_tensors(path, grids, {"for": "k-diffusion", "note": _ENDS, **solvers})


EXPORTS: dict[str, tuple[str, Callable[[Path, Schedules, str], None]]] = {
    "diffusers": (".diffusers.json", _writer("diffusers", _DIFFUSERS, _diffusers)),
    "comfyui": (".comfyui.json", _writer("comfyui", _COMFYUI, _comfyui)),
    "kdiffusion": (".kdiffusion.safetensors", _write_kdiffusion),
    "edm": (".edm.json", _writer("edm", _EDM, lambda entry, source: entry.sigmas.tolist())),
}
"""Name of the other program → how its file ends, and what writes it beside a schedule file of some name."""

_WEIGHTS = ("diffusers", "comfyui")  # programs in which a solver of fanal runs


def check_exports(consumers: Iterable[str]) -> None:
    """Refuse programs that know no weights.

    Raises:
        FanalError: one of them does not.
    """
    for consumer in consumers:
        if consumer not in _WEIGHTS:
            raise FanalError(
                f"these grids belong to weights that {consumer} does not have, and are worse without them: search with "
                f"--method fit to export a grid, or export to {' or '.join(_WEIGHTS)}, where fanal's solver runs"
            )


def export_path(path: str | Path, consumer: str) -> Path:
    """Return where the export of a schedule file goes: `FILE.json` becomes `FILE.comfyui.json` and so on.

    Raises:
        FanalError: the consumer is unknown.
    """
    if consumer not in EXPORTS:
        raise unknown_name("export", consumer, EXPORTS)
    return Path(path).with_name(Path(path).stem + EXPORTS[consumer][0])


def export(path: str | Path, schedules: Schedules, consumer: str) -> Path:
    """Write the grids beside a schedule file, as another program takes them; returns where.

    Args:
        path: the schedule file.
        schedules: its content.
        consumer: `diffusers`, `comfyui`, `kdiffusion` (a safetensors file of float64 tensors) or `edm`.

    Raises:
        FanalError: the consumer is unknown, the place cannot be written, or the consumer has no place for the grids'
            weights or their start at infinity.
    """
    where = export_path(path, consumer)
    if any(entry.weights is not None for entry in schedules.entries.values()):
        check_exports([consumer])
    if consumer not in _WEIGHTS and any(map(_is_far, schedules.entries.values())):
        raise FanalError(f"these grids begin at infinite sigma, as a flow model does, and {consumer} has no such state")
    EXPORTS[consumer][1](where, schedules, Path(path).name)
    return where

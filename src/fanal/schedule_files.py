"""Schedules as files: one JSON format, and exports for other programs.

A file holds the grids of one search, by number of steps, with the calls each costs, the solver they were searched for,
its weights where they were searched too, the settings of the search, and the error on held-out samples. It may come
from anywhere: it is parsed, checked and bounded, and nothing in it is run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError, is_number
from fanal.files import read_json, write_json
from fanal.gits import Search
from fanal.metrics.estimates import Estimate
from fanal.preparation import SampleConfig
from fanal.sampling import Solver
from fanal.schedule_search import BySteps, Error, Weighted, calls_of
from fanal.schedule_search.exports import EXPORTS as EXPORTS
from fanal.schedule_search.exports import check_exports as check_exports
from fanal.schedule_search.exports import export as export
from fanal.schedule_search.exports import export_path as export_path
from fanal.schedule_search.weights import Rows, rows_of
from fanal.schedules import check_sigmas
from fanal.schedules.files import holds_many
from fanal.solvers import AFS

__all__ = [
    "EXPORTS",
    "Entry",
    "Schedules",
    "check_exports",
    "completed",
    "entries_of",
    "export",
    "export_path",
    "read_schedules",
    "write_schedules",
]

FORMAT = "fanal-schedules-1"

_MOST_GRIDS, _MOST_NODES, _LONGEST = 64, 1001, 2000


@dataclass(frozen=True, eq=False)
class Entry:
    """One grid of a file.

    Attributes:
        sigmas: (N + 1,), decreasing; a searched grid ends at sigma_min, not at 0, and may begin at infinity.
        solver: the solver it was searched for, as on the command line.
        calls: network calls that the solver makes on it.
        weights: the solver's weights, where they were searched too.
        error: on held-out samples; None where it was not measured.
        start: name of the grid that the fit began from; empty where there was none.
    """

    sigmas: Float[Tensor, " n"]
    solver: str
    calls: int
    weights: Rows | None = None
    error: Error | None = None
    start: str = ""

    @property
    def steps(self) -> int:
        """Number of intervals."""
        return len(self.sigmas) - 1

    @property
    def asked(self) -> int:
        """Number of steps that a search was asked for: without the free one of an analytical first step."""
        return self.steps - _is_free(self.solver)


@dataclass(frozen=True, eq=False)
class Schedules:
    """What a schedule file holds.

    Attributes:
        model: spec of the model they were searched for.
        entries: the grids, by number of intervals.
        search: settings and costs of the search, as plain JSON values.
    """

    model: str
    entries: Mapping[int, Entry]
    search: Mapping[str, Any] = field(default_factory=dict)

    def entry(self, steps: int) -> Entry:
        """Return the grid that was asked for with so many steps, a free first one not counted, or else the one with so
        many intervals. A file with a single grid gives that one, whatever is asked.

        Raises:
            FanalError: there are several, and none has so many.
        """
        if len(self.entries) == 1:
            return next(iter(self.entries.values()))
        by_asked = {entry.asked: entry for entry in self.entries.values()}
        found = by_asked.get(steps, self.entries.get(steps))
        if found is None:
            known = ", ".join(map(str, sorted(by_asked)))
            raise FanalError(f"the schedule file has grids of {known} steps, not of {steps}: pass --steps with one")
        return found

    def grid(self, steps: int, sigma_min: float = 0.0, sigma_max: float = math.inf) -> Float[Tensor, " n"]:
        """Return the sigmas of an entry, for a model that was made for sigma_min to sigma_max.

        Raises:
            FanalError: as `entry`, or the grid leaves the model's range.
        """
        sigmas = self.entry(steps).sigmas
        low, high = float(sigmas[sigmas > 0].min()), float(sigmas.max())
        if low < sigma_min * (1 - 1e-6) or high > sigma_max * (1 + 1e-6):
            raise FanalError(
                f"the schedule was searched on {self.model} and runs from sigma {high:.6g} to {low:.6g}, outside "
                f"{sigma_max:.6g} to {sigma_min:.6g}: search one for this model"
            )
        return sigmas

    def build_solver(self, build: Callable[[str], Solver]) -> Solver:
        """Return the solver of the grids, with the searched weights: one for each number of steps.

        Args:
            build: makes a solver of its text.

        Raises:
            FanalError: a text names no solver.
        """
        made = {
            k: build(entry.solver) if entry.weights is None else _weighted(entry.weights, entry.solver)
            for k, entry in self.entries.items()
        }
        first = next(iter(made.values()))
        return first if all(solver == first for solver in made.values()) else BySteps(tuple(made.items()))


def _is_free(solver: str) -> bool:
    """Whether a solver's text puts the analytical first step, which costs no call, before its own."""
    return solver.partition(":")[0] == "afs"


def _weighted(weights: Rows, solver: str) -> Solver:
    return AFS(Weighted(weights)) if _is_free(solver) else Weighted(weights)


def completed(schedule: str | None, solver: str | None, steps: int | None) -> tuple[str, int]:
    """Return solver and number of steps of a run; what was not given comes from its schedule file, if it has one.

    A file of `fanal schedule` has its own solver, weights included, and of its grids the one with the most steps is
    taken. With any other schedule they are those of `SampleConfig`.

    Args:
        schedule: as on the command line.
        solver: as on the command line; None: not given.
        steps: None: not given.

    Raises:
        FanalError: the schedule is a file that cannot be read.
    """
    own = SampleConfig.solver, SampleConfig.steps
    if schedule is not None and schedule.endswith(".json") and holds_many(schedule):
        own = schedule, max(entry.asked for entry in read_schedules(schedule).entries.values())
    return solver or own[0], own[1] if steps is None else steps


def entries_of(found: Search, solver: str) -> dict[int, Entry]:
    """Return what a search found as entries of a file.

    Args:
        found: the search; with `afs` its grids have an interval more, and the solver is written `afs:solver=…`.
        solver: the student's solver, as on the command line.
    """
    return {
        len(sigmas) - 1: Entry(
            sigmas,
            f"afs:solver={solver}" if found.afs else solver,
            calls_of(found.solver_for(k), len(sigmas) - 1, far=math.isinf(sigmas[0])),
            found.weights.get(k),
            found.error.get(k),
            found.picks.get(k, ""),
        )
        for k, sigmas in found.schedules.items()
    }


def write_schedules(path: str | Path, schedules: Schedules) -> None:
    """Write a schedule file, atomically.

    Raises:
        FanalError: the place cannot be written.
    """
    rows = [
        {
            "steps": entry.steps,
            "solver": entry.solver,
            "calls": entry.calls,
            "sigmas": entry.sigmas.tolist(),
            "weights": entry.weights,
            "start": entry.start,
            "error": None if entry.error is None else dataclasses.asdict(entry.error),
        }
        for entry in schedules.entries.values()
    ]
    head = {"format": FORMAT, "model": schedules.model, "search": dict(schedules.search)}
    write_json(Path(path), {**head, "schedules": rows})


def _estimate(value: Any) -> Estimate:
    if not isinstance(value, dict) or not is_number(value.get("value")) or not isinstance(value.get("n"), int):
        raise FanalError(f"an error must hold value, se and n, got {value!r:.60}")
    se = value.get("se")
    return Estimate(float(value["value"]), float(se) if is_number(se) else math.nan, value["n"])  # pyright: ignore


def _word(value: dict[str, Any], name: str) -> str:
    word = value.get(name, "")
    if not isinstance(word, str) or len(word) > _LONGEST:
        raise FanalError(f"{name} must be a text")
    if name == "solver" and (not word or ".json" in word):
        raise FanalError(f"solver must name one, and no other schedule file, got {word!r:.60}")
    return word


def _entry(value: Any) -> Entry:
    """Read one grid.

    Raises:
        FanalError: it is none.
    """
    if not isinstance(value, dict):
        raise FanalError(f"each schedule must be an object, got {type(value).__name__}")
    numbers = value.get("sigmas")
    if not isinstance(numbers, list) or not 2 <= len(numbers) <= _MOST_NODES:
        raise FanalError(f"sigmas must be a list of 2 to {_MOST_NODES} numbers")
    if not all(is_number(v) or (v == math.inf and i == 0) for i, v in enumerate(numbers)):
        raise FanalError("sigmas must be finite numbers, of which the first may be Infinity")
    sigmas = check_sigmas([float(v) for v in numbers])
    if float(sigmas[0]) < float(sigmas[-1]):
        raise FanalError("sigmas must decrease")
    steps, calls, weights = value.get("steps"), value.get("calls"), value.get("weights")
    if steps != len(sigmas) - 1 or not isinstance(calls, int) or not 0 < calls <= 100 * len(sigmas):
        raise FanalError(
            f"{len(sigmas)} sigmas make {len(sigmas) - 1} steps, the entry says {steps!r:.20}, {calls!r:.20} calls"
        )
    if weights is not None:
        if not isinstance(weights, list) or len(weights) != steps or not all(isinstance(row, list) for row in weights):
            raise FanalError(f"weights must be one list for each of the {steps} steps")
        weights = rows_of(weights)
    error = value.get("error")
    if error is not None:
        if not isinstance(error, dict):
            raise FanalError("error must hold median and rms")
        error = Error(_estimate(error.get("median")), _estimate(error.get("rms")))
    return Entry(sigmas, _word(value, "solver"), calls, weights, error, _word(value, "start"))


def read_schedules(path: str | Path) -> Schedules:
    """Read a schedule file.

    Raises:
        FanalError: it is missing, too large, or not what `write_schedules` writes; the message says where.
    """
    value = read_json(Path(path))
    if value.get("format") != FORMAT:
        raise FanalError(f"{path} is no schedule file of fanal (format {value.get('format')!r:.40}, not {FORMAT!r})")
    rows, model = value.get("schedules"), value.get("model")
    if not isinstance(rows, list) or not 1 <= len(rows) <= _MOST_GRIDS:
        raise FanalError(f"{path}: schedules must be a list of 1 to {_MOST_GRIDS} grids")
    if not isinstance(model, str) or len(model) > _LONGEST:
        raise FanalError(f"{path}: model must be a text")
    try:
        entries = [_entry(row) for row in rows]
    except FanalError as error:
        raise FanalError(f"{path}: {error}") from None
    if len({entry.steps for entry in entries}) < len(entries):
        raise FanalError(f"{path}: two grids have the same number of steps")
    search = value.get("search")
    kept = {entry.steps: entry for entry in entries}
    return Schedules(model, kept, search if isinstance(search, dict) else {})

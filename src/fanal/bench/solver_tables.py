"""The figures, tables and plots of `fanal bench solvers`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fanal.bench.plans import Found
from fanal.bench.plots import Line, Panel
from fanal.bench.quality import short
from fanal.bench.schedule_tables import markdown
from fanal.metrics.estimates import mean
from fanal.schedule_search import error_of
from fanal.summary import as_json

__all__ = ["panels", "results_of", "slopes", "tables"]

_BEST = 6  # rows of the table of the best pairs
_MEASURES = ("median", "rms")

Cells = Mapping[str, Mapping[str, Any]]
"""`SOLVER|SCHEDULE|BUDGET` → figures."""


def _merged(every: list[Cells], measures: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Figures over several problems: each the mean of theirs, with the standard error over them."""
    out: dict[str, dict[str, Any]] = {}
    for cell in every[0] if every else ():
        own = [cells[cell] for cells in every if cell in cells and "failed" not in cells[cell]]
        if len(own) == len(every):
            out[cell] = {"calls": own[0]["calls"], "steps": own[0]["steps"]}
            for measure in measures:
                values = torch.tensor([o[measure]["value"] for o in own], dtype=torch.float64)
                out[cell][measure] = as_json(mean(values)) if len(own) > 1 else own[0][measure]
    return out


def slopes(cells: Cells) -> dict[str, float]:
    """Return how fast the median error falls: `−d log error / d log calls` between the two largest budgets.

    Args:
        cells: figures by `SOLVER|SCHEDULE|BUDGET`.

    Returns:
        The slope by `SOLVER|SCHEDULE`; pairs with fewer than two budgets are left out.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for cell, own in cells.items():
        if "median" in own:
            points.setdefault(cell.rpartition("|")[0], []).append((own["calls"], own["median"]["value"]))
    out = {}
    for name, found in points.items():
        if len(found) > 1:
            (n, e), (m, f) = sorted(found)[-2:]
            out[name] = math.log(e / f) / math.log(m / n) if min(e, f) > 0 and m > n else math.nan
    return {name: slope for name, slope in out.items() if slope == slope}


def results_of(found: Sequence[Found]) -> dict[str, Any]:
    """Return the figures of a run, as plain JSON values, by problem and over all mixtures."""
    own: dict[str, dict[str, Any]] = {}
    for errors, notes in found:
        cells = {}
        for cell, about in notes["cells"].items():
            measured = dataclasses.asdict(error_of(errors[cell])) if cell in errors else {}
            cells[cell] = {**about, **measured}
        own[notes["problem"]] = {"cells": cells, "quality": notes["quality"], "wall": notes["wall"]}
    mixtures = [p for name, p in own.items() if name.startswith("mixture")]
    groups = {name: p for name, p in own.items() if not name.startswith("mixture")}
    if mixtures:
        merged = _merged([p["cells"] for p in mixtures], _MEASURES)
        quality = _merged([p["quality"] for p in mixtures], ("kid",))
        groups = {f"{len(mixtures)} mixtures": {"cells": merged, "quality": quality}, **groups}
    for group in groups.values():
        group["slopes"] = slopes(group["cells"])
    return {"problems": own, "groups": groups}


def _split(cells: Iterable[str], part: int) -> list[str]:
    """The different solvers (0), schedules (1) or budgets (2), in the order of the run."""
    return list(dict.fromkeys(cell.rsplit("|", 2)[part] for cell in cells))


def _spent(own: Mapping[str, Any] | None, budget: str, text: str) -> str:
    """A table's entry, with the calls in brackets where they are not the budget."""
    if own is None:
        return "–"
    return text if own.get("calls") == float(budget) else f"{text} [{own['calls']:.0f}]"


def _entry(own: Mapping[str, Any] | None, budget: str) -> str:
    if own is None or "failed" in own:
        return "–" if own is None else "not finite"
    return _spent(own, budget, f"{short(own['median'])} / {own['rms']['value']:.3g}")


def _grids(title: str, group: Mapping[str, Any]) -> str:
    cells, text = group["cells"], ""
    budgets = sorted(_split(cells, 2), key=int)
    for schedule in _split(cells, 1):
        rows = []
        for solver in _split(cells, 0):
            slope = group["slopes"].get(f"{solver}|{schedule}")
            values = [_entry(cells.get(f"{solver}|{schedule}|{budget}"), budget) for budget in budgets]
            rows.append([solver, *values, "–" if slope is None else f"{slope:.1f}"])
        head = ["solver", *(f"{budget} calls" for budget in budgets), "slope"]
        text += f"\n{title}, {schedule}: median error ± standard error / RMS\n\n" + markdown(head, rows)
    return text


def _best(title: str, group: Mapping[str, Any]) -> str:
    cells = {cell: own for cell, own in group["cells"].items() if "median" in own}
    rows = []
    for budget in sorted(_split(cells, 2), key=int):
        names = [cell for cell in cells if cell.endswith(f"|{budget}")]
        order = sorted(names, key=lambda cell: cells[cell]["median"]["value"])[:_BEST]
        rows.append(
            [budget, *(f"{c.replace('|', ' ', 1).rpartition('|')[0]}: {short(cells[c]['median'])}" for c in order)]
        )
    return f"\n{title}: the smallest median errors\n\n" + markdown(["calls", *map(str, range(1, _BEST + 1))], rows)


def _quality(title: str, group: Mapping[str, Any]) -> str:
    cells = group["quality"]
    if not cells:
        return ""
    budgets, rows = sorted(_split(cells, 2), key=int), []
    for solver in _split(cells, 0):
        row = [solver]
        for budget in budgets:
            own = cells.get(f"{solver}|{_split(cells, 1)[0]}|{budget}")
            right = f", {100 * own['right']['value']:.1f} %" if own and "right" in own else ""
            row.append(_spent(own, budget, f"{short(own['kid'])}{right}" if own else "–"))
        rows.append(row)
    what = "KID ± standard error" + (", right samples" if any("right" in own for own in cells.values()) else "")
    head = ["solver", *(f"{budget} calls" for budget in budgets)]
    return f"\n{title}, {_split(cells, 1)[0]}: {what}\n\n" + markdown(head, rows)


def tables(results: Mapping[str, Any]) -> str:
    """Return the figures as Markdown."""
    text = "Calls in brackets: what a solver spent where the budget is no multiple of its steps.\n"
    for title, group in results["groups"].items():
        if group["cells"]:
            text += _best(title, group) + _grids(title, group)
        text += _quality(title, group)
    return text


def panels(results: Mapping[str, Any]) -> list[Panel]:
    """Return one plot of error against calls for each group of problems and schedule, and one of quality."""
    out = []
    for title, group in results["groups"].items():
        kinds = (("cells", "median", "median error", True), ("quality", "kid", "KID", False))
        for part, measure, name, log in kinds:
            cells = {cell: own for cell, own in group[part].items() if measure in own}
            for schedule in _split(cells, 1):
                lines = []
                for solver in _split(cells, 0):
                    points = [own for cell, own in cells.items() if cell.startswith(f"{solver}|{schedule}|")]
                    figures = [own[measure] for own in points]
                    values = [f["value"] for f in figures], [f["se"] for f in figures]
                    lines.append(Line(solver, [own["calls"] for own in points], *values))
                out.append(Panel(f"{title}, {schedule}", lines, "calls", name, log))
    return out

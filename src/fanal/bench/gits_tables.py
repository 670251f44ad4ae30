"""The figures, tables and plots of `fanal bench gits`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from fanal.bench.gits_studies import TRUTH
from fanal.bench.plans import Found
from fanal.bench.plots import Line, Panel
from fanal.bench.quality import short
from fanal.bench.schedule_tables import markdown
from fanal.metrics.estimates import Estimate
from fanal.schedule_search import error_of
from fanal.schedules.published import tables as published
from fanal.summary import as_json

__all__ = ["panels", "results_of", "spreads", "tables", "weights"]

_TITLES = {
    "solvers": "solver and grid",
    "transfer": "where the schedule comes from",
    "nodes": "nodes of the teacher's grid",
    "teachers": "solver of the teacher",
    "warmups": "warm-up samples; mean and standard deviation over the sets",
    "coeffs": "solver, γ",
    "metrics": "cost of a jump",
    "alone": "searched on",
    "proofs": "cost, nodes",
}
_MEASURES = {
    "rms": "RMS error",
    "median": "median error",
    "fid": "Fréchet distance",
    "kid": "kernel distance",
    "right": "right samples in %",
}
_ENOUGH = 4  # samples per feature below which a Fréchet distance is mostly bias

Cells = Mapping[str, Mapping[str, Any]]
"""`ROW|CALLS` → figures."""


def results_of(found: Sequence[Found]) -> dict[str, Any]:
    """Return the figures of a run, as plain JSON values, by model and study."""
    models: dict[str, Any] = {}
    for errors, notes in found:
        cells = {}
        for cell, about in notes["cells"].items():
            measured = dataclasses.asdict(error_of(errors[cell])) if cell in errors else {}
            cells[cell] = {**about, **measured}
        if notes["study"] == TRUTH:
            own = {key: notes[key] for key in ("figures", "seconds", "schedules", "features")}
            models[notes["model"]] = {**own, "teacher": cells["teacher"], "studies": {}}
        else:
            if notes["study"] == "warmups":
                cells = {**cells, **spreads(cells)}
            models[notes["model"]]["studies"][notes["study"]] = cells
    return {"models": models}


def spreads(cells: Cells) -> dict[str, dict[str, Any]]:
    """Return mean and standard deviation over the sets of warm-up samples: `COUNT, set I|CALLS` → `COUNT|CALLS`."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for cell, own in cells.items():
        row, _, calls = cell.rpartition("|")
        groups.setdefault(f"{row.partition(', set ')[0]}|{calls}", []).append(own)
    out: dict[str, dict[str, Any]] = {}
    for cell, every in groups.items():
        out[cell] = {"schedules": len({tuple(own["sigmas"]) for own in every})}
        for measure in _MEASURES:
            if all(measure in own for own in every):
                values = torch.tensor([own[measure]["value"] for own in every], dtype=torch.float64)
                spread = float(values.std()) if len(values) > 1 else math.nan
                out[cell][measure] = as_json(Estimate(float(values.mean()), spread, len(values)))
    return out


def weights(sigmas: Sequence[float]) -> list[float]:
    """Return `sigma_{n+1}/sigma_n` of every interval: how much of the old state an Euler step keeps ([REG] eq. 17)."""
    return [after / before for before, after in zip(sigmas, sigmas[1:], strict=False)]


def _rows(cells: Cells) -> list[str]:
    """The rows to show, in the order of the run: of a study with several sets, their means."""
    rows = list(dict.fromkeys(cell.rpartition("|")[0] for cell in cells))
    means = {row.partition(", set ")[0] for row in rows if ", set " in row}
    return [row for row in rows if not means or row in means]


def _budgets(cells: Cells) -> list[int]:
    return sorted({int(cell.rpartition("|")[2]) for cell in cells})


def _shown(figure: Mapping[str, Any], measure: str) -> str:
    if measure != "right":
        return short(figure)
    scaled = {key: None if figure[key] is None else 100 * figure[key] for key in ("value", "se")}
    return short(scaled)


def _measures(own: Mapping[str, Any], figures: Mapping[str, Any]) -> Iterator[str]:
    """The measures that there are: Fréchet distances where there are samples enough, else kernel distances."""
    enough = own["teacher"]["rms"]["n"] >= _ENOUGH * own["features"]
    for measure in _MEASURES:
        if measure in figures and measure != ("kid" if enough else "fid"):
            yield measure


def _table(title: str, cells: Cells, measure: str) -> str:
    budgets = _budgets(cells)
    rows = []
    for row in _rows(cells):
        found = [cells.get(f"{row}|{calls}") for calls in budgets]
        rows.append([row, *("–" if own is None else _shown(own[measure], measure) for own in found)])
    return f"\n{_MEASURES[measure]}\n\n" + markdown([title, *(f"{calls} calls" for calls in budgets)], rows)


def _proofs(cells: Cells) -> str:
    rows = []
    for cell, own in cells.items():
        row, _, steps = cell.rpartition("|")
        same = math.isclose(own["value"], own["dp"], rel_tol=1e-9, abs_tol=1e-12)
        seen = f"{own['visited']:,} of {own['paths']:,}"
        rows.append([row, steps, f"{own['dp']:.6g}", f"{own['value']:.6g}", "yes" if same else "**no**", seen])
    head = ["cost, nodes", "jumps", "dynamic programme", "branch and bound", "equal", "partial paths seen, of paths"]
    return "\nThe dynamic programme against branch and bound\n\n" + markdown(head, rows)


def _about(name: str, own: Mapping[str, Any]) -> str:
    teacher, true = own["teacher"], own["figures"]
    known = list(_measures(own, true))
    rows = [
        ["the true ends", "0", "0", *(_shown(true[m], m) for m in known)],
        ["the teacher", *(_shown(teacher[m], m) for m in ("rms", "median", *known))],
    ]
    text = f"\n## {name}, {teacher['rms']['n']} test samples\n\n"
    text += markdown(["", *(_MEASURES[m] for m in ("rms", "median", *known))], rows)
    spent = {stage: own["seconds"][stage] for stage in ("teacher", "cost", "dp")}
    row = [f"{spent['teacher']:.3f}", f"{spent['cost']:.3f}", f"{spent['dp']:.4f}", f"{sum(spent.values()):.3f}"]
    return (
        text + "\nSeconds of one search\n\n" + markdown(["teacher", "cost matrix", "dynamic programme", "total"], [row])
    )


def _weights(models: Mapping[str, Any]) -> str:
    rows = []
    for name, own in models.items():
        for steps, sigmas in own["schedules"].items():
            rows.append([name, steps, " ".join(f"{w:.3f}" for w in weights(sigmas))])
    return "\n## Schedules as weights sigma'/sigma\n\n" + markdown(["searched on", "calls", "weights"], rows)


def tables(results: Mapping[str, Any]) -> str:
    """Return the figures as Markdown."""
    text = "Errors are distances per entry from the true end of the same trajectory, ± one standard error.\n"
    for name, own in results["models"].items():
        text += _about(name, own)
        for study, cells in own["studies"].items():
            text += f"\n### {name}: {study}\n"
            if study == "proofs":
                text += _proofs(cells)
                continue
            for measure in _measures(own, next(iter(cells.values()))):
                text += _table(_TITLES[study], cells, measure)
    return text + _weights(results["models"])


def _lines(cells: Cells, measure: str) -> list[Line]:
    out = []
    for row in _rows(cells):
        found = [(calls, cells[f"{row}|{calls}"][measure]) for calls in _budgets(cells) if f"{row}|{calls}" in cells]
        out.append(Line(row, [c for c, _ in found], [f["value"] for _, f in found], [f["se"] for _, f in found]))
    return out


def panels(results: Mapping[str, Any]) -> list[Panel]:
    """Return a plot of every study's errors and distances against calls, and the schedules drawn as weights."""
    out = []
    for name, own in results["models"].items():
        for study, cells in own["studies"].items():
            for measure in _measures(own, next(iter(cells.values()))):
                log = measure in ("rms", "median")
                title = f"{name}: {_TITLES[study]}"
                out.append(Panel(title, _lines(cells, measure), "calls", _MEASURES[measure], log))
    drawn = {name: own["schedules"] for name, own in results["models"].items()}
    for name, schedules in drawn.items():
        lines = [_drawn(f"{steps} calls", sigmas) for steps, sigmas in schedules.items()]
        out.append(Panel(f"{name}: GITS's schedules as weights", lines, "step", "sigma'/sigma", log=False))
    last = max(max(map(int, schedules)) for schedules in drawn.values())
    lines = [_drawn(name, schedules[str(last)]) for name, schedules in drawn.items()]
    if last in published["gits-cifar10"]:
        lines.append(_drawn("printed for CIFAR-10", published["gits-cifar10"][last]))
    return [*out, Panel(f"GITS's schedules of {last} calls as weights", lines, "step", "sigma'/sigma", log=False)]


def _drawn(name: str, sigmas: Sequence[float]) -> Line:
    y = weights(sigmas)
    return Line(name, list(range(1, len(y) + 1)), y, [None] * len(y))

"""The figures and tables of `fanal bench schedules`."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from fanal.bench.plans import Found
from fanal.schedule_search import error_of

__all__ = ["markdown", "results_of", "tables"]

_BASELINES = ("gits", "polynomial", "logsnr", "quadratic")
_FITS = ("fit", "fit-mean", "weights", "weights-mean", "weights-typical")
_SQUARE = _FITS[:-1]  # those that may answer for the mean square; the typical miss is another question
_SCORE = "mean held-out"  # what the best fit is chosen by: its mean square on samples of neither search nor test
_GOAL = {"median": 0.9, "rms": 0.8}  # shares of problems in which a fit should be below every baseline


def _figures(found: Sequence[Found]) -> dict[str, dict[str, dict[str, Any]]]:
    """Median and root mean square of every cell, by problem and `SOLVER|CALLS|METHOD`."""
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for errors, notes in found:
        own = out.setdefault(notes["problem"], {})
        for name, about in notes["cells"].items():
            extra = {key: about[key] for key in ("calls", _SCORE, "start") if key in about}
            own[name] = {**dataclasses.asdict(error_of(errors[name])), **extra}
    return out


def _cells(figures: dict[str, dict[str, Any]]) -> list[str]:
    """`SOLVER|CALLS` in the order of the run."""
    return list(dict.fromkeys(name.rpartition("|")[0] for name in next(iter(figures.values())) if "|" in name))


def _wins(figures: dict[str, dict[str, Any]], cell: str, fit: str, measure: str) -> dict[str, int]:
    """In how many problems a fit is below each baseline, and below all of them."""
    counts: dict[str, int] = {name: 0 for name in (*_BASELINES, "all")}
    for own in figures.values():
        value = own[f"{cell}|{fit}"][measure]["value"]
        below = {name: value < own[f"{cell}|{name}"][measure]["value"] for name in _BASELINES}
        for name, yes in {**below, "all": all(below.values())}.items():
            counts[name] += yes
    return counts


def _group(figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every cell over several problems: the median figure of each method, and the wins of each fit."""
    out: dict[str, Any] = {}
    for cell in _cells(figures):
        names = [name for name in (*_BASELINES, *_FITS) if f"{cell}|{name}" in next(iter(figures.values()))]
        row: dict[str, Any] = {"methods": {}, "wins": {}}
        for name in names:
            own = [f[f"{cell}|{name}"] for f in figures.values()]
            row["methods"][name] = {
                measure: statistics.median(o[measure]["value"] for o in own) for measure in ("rms", "median")
            }
            if "calls" in own[0]:
                row["methods"][name]["calls"] = statistics.mean(o["calls"] for o in own)
            if name in _FITS:
                row["wins"][name] = {m: _wins(figures, cell, name, m) for m in ("rms", "median")}
        out[cell] = row
    return out


def _misses(group: dict[str, Any], problems: int) -> list[dict[str, Any]]:
    """Every cell and fit that does not reach the goal against some baseline."""
    out = []
    for cell, row in group.items():
        for fit, measures in row["wins"].items():
            for measure, counts in measures.items():
                short = {n: c for n, c in counts.items() if n != "all" and c < _GOAL[measure] * problems}
                if short:
                    out.append({"cell": cell, "method": fit, "measure": measure, "wins": short})
    return out


def _best(figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """For each budget and problem: the fit of smallest mean square on held-out samples, against the baseline that
    turns out best on the test samples, over all solvers."""
    out: dict[str, Any] = {}
    for problem, own in figures.items():
        for calls in dict.fromkeys(cell.split("|")[1] for cell in _cells({problem: own})):
            names = [name for name in own if name.split("|")[1:2] == [calls]]
            ours = min((n for n in names if n.split("|")[2] in _SQUARE), key=lambda n: own[n][_SCORE])
            theirs = min((n for n in names if n.split("|")[2] in _BASELINES), key=lambda n: own[n]["rms"]["value"])
            out.setdefault(calls, {})[problem] = {
                "ours": ours,
                "rms": own[ours]["rms"],
                "theirs": theirs,
                "their_rms": own[theirs]["rms"],
                "ratio": own[theirs]["rms"]["value"] / own[ours]["rms"]["value"],
            }
    return out


def _seconds(found: Sequence[Found]) -> dict[str, Any]:
    """GITS's stages on each network: medians, and the share of cost and path beside the teacher."""
    out: dict[str, Any] = {}
    for _, notes in found:
        for metric in ("dev", "l2"):
            laps = [lap for lap in notes.get("seconds", []) if lap["metric"] == metric]
            if laps:
                mid = {stage: statistics.median(lap[stage] for lap in laps) for stage in ("teacher", "cost", "dp")}
                share = (mid["cost"] + mid["dp"]) / mid["teacher"]
                out.setdefault(notes["problem"], {})[metric] = {**mid, "share": share, "repeats": len(laps)}
    return out


def results_of(found: Sequence[Found]) -> dict[str, Any]:
    """Return the figures of a run, as plain JSON values."""
    figures = _figures(found)
    mixtures = {name: own for name, own in figures.items() if name.startswith("mixture")}
    group = _group(mixtures) if mixtures else {}
    return {
        "problems": figures,
        "mixtures": {"count": len(mixtures), "cells": group, "misses": _misses(group, len(mixtures))},
        "best": _best(figures),
        "seconds": _seconds(found),
    }


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _mixture_tables(results: dict[str, Any]) -> str:
    count, cells = results["mixtures"]["count"], results["mixtures"]["cells"]
    rows, wins, fits = [], [], _made(name for row in cells.values() for name in row["methods"])
    for cell, row in cells.items():
        name = cell.replace("|", ", ")
        calls = " / ".join(f"{row['methods'][m]['calls']:.0f}" for m in fits if m in row["methods"])
        rows.append([name, *(_pair(row["methods"].get(m)) for m in (*_BASELINES, *fits)), calls])
        wins.append([name])
        for fit in fits:
            own = row["wins"].get(fit)
            marks = [",".join(str(own[m][b]) for b in (*_BASELINES, "all")) for m in ("rms", "median")] if own else []
            wins[-1].append(" / ".join(marks) or "–")
    text = f"RMS / median error on {count} mixtures, medians over them\n\n"
    text += markdown(["solver, calls", *_BASELINES, *fits, "calls of each search"], rows)
    text += f"\nWins of {count} against {', '.join(_BASELINES)}, and all of them: RMS / median error\n\n"
    text += markdown(["solver, calls", *fits], wins)
    text += "\nBelow the goal\n\n"
    misses = [
        [
            m["cell"].replace("|", ", "),
            m["method"],
            m["measure"],
            ", ".join(f"{baseline} {n}" for baseline, n in m["wins"].items()),
        ]
        for m in results["mixtures"]["misses"]
    ]
    return text + markdown(["solver, calls", "method", "measure", "wins"], misses)


def _pair(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "–"
    values = [figure[m]["value"] if isinstance(figure[m], dict) else figure[m] for m in ("rms", "median")]
    return " / ".join(f"{v:.4f}" for v in values)


def _made(names: Iterable[str]) -> list[str]:
    """The kinds of fit that there are, in their order."""
    found = set(names)
    return [fit for fit in _FITS if fit in found]


def _model_table(name: str, own: dict[str, Any]) -> str:
    fits = _made(key.rpartition("|")[2] for key in own)
    rows = [
        [cell.replace("|", ", "), *(_pair(own.get(f"{cell}|{m}")) for m in (*_BASELINES, *fits))]
        for cell in _cells({name: own})
    ]
    n, teacher = own["teacher"]["rms"]["n"], _pair(own["teacher"])
    return f"\n{name}: RMS / median error on {n} samples; the teacher itself {teacher}\n\n" + markdown(
        ["solver, calls", *_BASELINES, *fits], rows
    )


def _best_table(results: dict[str, Any]) -> str:
    rows = []
    for calls, problems in results["best"].items():
        for group in ("mixture", *dict.fromkeys(p for p in problems if not p.startswith("mixture"))):
            own = [row for name, row in problems.items() if name.startswith(group)]
            if own:
                ratio = statistics.median(row["ratio"] for row in own)
                below = sum(row["ratio"] > 1 for row in own)
                half = sum(row["ratio"] >= 2 for row in own)
                clear = sum(
                    row["their_rms"]["value"] - row["rms"]["value"]
                    > (row["their_rms"]["se"] ** 2 + row["rms"]["se"] ** 2) ** 0.5
                    for row in own
                )
                rows.append([calls, group, f"{ratio:.2f}", *(f"{k} of {len(own)}" for k in (half, below, clear))])
    head = ["calls", "problem", "their RMS / ours, median", "ours at most half", "ours below", "by more than the error"]
    return "\nBest fit (chosen on held-out samples) against the best baseline of all solvers\n\n" + markdown(head, rows)


def tables(results: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    text = _mixture_tables(results) if results["mixtures"]["count"] else ""
    for name, own in results["problems"].items():
        if not name.startswith("mixture"):
            text += _model_table(name, own)
    text += _best_table(results)
    rows = [
        [name, metric, *(f"{own[k]:.4f}" for k in ("teacher", "cost", "dp")), f"{100 * own['share']:.1f} %"]
        for name, metrics in results["seconds"].items()
        for metric, own in metrics.items()
    ]
    if rows:
        text += "\nSeconds of GITS, medians\n\n"
        text += markdown(["model", "metric", "teacher", "cost", "paths", "cost and paths / teacher"], rows)
    return text

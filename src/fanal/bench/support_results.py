"""What the cells of `fanal bench support` say together: exponents, failures by assumption, steps needed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fanal.bench.plans import Found

__all__ = ["ASSUMPTIONS", "broken", "exponents", "failures", "needed", "results_of"]

_RATIO = math.log(80.0 / 0.002)  # of the grids' ends
_SAFE = 1.0  # w·h above which a step is called long
_ABOVE, _MOST = 3.0, 0.5  # distances that errors decide: this many times those of exact scores, and not blown up

ASSUMPTIONS = ("exact scores", "exponential integrator", "order 1", "support geometry", "step size")
"""What a cell may break: its scores are exact; its process is an exponential integrator; of order 1, so that it does
not extrapolate; nothing of p lies behind the condition as seen from the mean (target `outlier`); `w·h <= 1`, h the mean
step of log sigma."""


def broken(cell: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the assumptions that a cell breaks."""
    length = _RATIO / max(cell["steps"] - 1, 1)
    checks = (
        cell["score"] != "exact",
        cell["process"] == "maruyama",
        cell["process"] in ("exponential2", "exponential3", "sde2"),
        cell["target"] == "outlier",
        max(abs(cell["scale"]), 1.0) * length > _SAFE,
    )
    return tuple(name for name, breaks in zip(ASSUMPTIONS, checks, strict=True) if breaks)


def failures(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each set of broken assumptions, how many cells there are and how many fail.

    A cell fails if more than 1 % of its samples end off the support of p.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(broken(cell), []).append(cell)
    rows = []
    for names, own in sorted(groups.items(), key=lambda item: (len(item[0]), item[0])):
        failing = [cell for cell in own if cell["whole"]["off"]["value"] > 0.01]
        worst = max(own, key=lambda cell: cell["whole"]["worst"])
        where = {key: worst[key] for key in ("target", "form", "process", "score", "scale", "steps")}
        row = {"broken": list(names), "cells": len(own), "failing": len(failing), "worst": worst["whole"]["worst"]}
        rows.append({**row, "where": where})
    return rows


def exponents(cells: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return how the distance from S_c grows with δ, with w and with the length of a step, between neighboring cells.

    Of two cells that differ in one of them alone it is `log(q90'/q90) / log(v'/v)`, with q90 the 90 % quantile. There
    is no single power law, so nothing is fitted over all. It is None where a distance is less than three times what
    exact scores reach with the same scale and steps, or more than half the circle's radius.

    Args:
        cells: of the study "errors", those with exact scores among them.

    Returns:
        Rows by the name of what differs: "delta", "scale" or "step"; v is 1/steps for the last; `to` is its next value.
    """
    own = [cell for cell in cells if cell["form"] == "classifier-free"]
    floor: dict[tuple[float, ...], float] = {
        (c["scale"], c["steps"]): c["part"]["q90"] for c in own if c["score"] == "exact"
    }
    at: dict[tuple[float, ...], float] = {
        (_delta(c), c["scale"], c["steps"]): c["part"]["q90"] for c in own if c["score"].startswith("error:")
    }
    out: dict[str, list[dict[str, Any]]] = {}
    for axis, name in enumerate(("delta", "scale", "step")):
        values = sorted({place[axis] for place in at})
        following = {**dict(itertools.pairwise(values)), values[-1]: math.nan} if values else {}
        out[name] = []
        for place in sorted(at):
            there = (*place[:axis], following[place[axis]], *place[axis + 1 :])
            if there not in at:
                continue
            ends = [(at[key], floor.get(key[1:], 0.0)) for key in (place, there)]
            tells = all(max(_ABOVE * least, math.ulp(0.0)) <= distance <= _MOST for distance, least in ends)
            grows = math.log(there[axis] / place[axis]) * (-1 if name == "step" else 1)
            value = math.log(ends[1][0] / ends[0][0]) / grows if tells else None
            row = dict(zip(("delta", "scale", "steps"), place, strict=True))
            out[name].append({**row, "to": there[axis], "value": value})
    return out


def _delta(cell: Mapping[str, Any]) -> float:
    return float(cell["score"].partition(":")[2])


def needed(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return from how many steps on every sample ends on the support, for each target, process and scale."""
    groups: dict[tuple[str, str, float], dict[int, Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["target"], cell["process"], cell["scale"]), {})[cell["steps"]] = cell
    rows = []
    for (target, process, scale), by_steps in groups.items():
        steps = sorted(by_steps)
        bad = [count for count in steps if by_steps[count]["part"]["off"]["value"] > 0]
        good = [count for count in steps if not bad or count > bad[-1]]
        off = {count: by_steps[count]["part"]["off"] for count in steps}
        worst = {count: by_steps[count]["part"]["worst"] for count in steps}
        row = {"target": target, "process": process, "scale": scale, "from": good[0] if good else None}
        rows.append({**row, "off": off, "worst": worst})
    return rows


def results_of(found: Sequence[Found], model: str | None = None) -> dict[str, Any]:
    """Return every figure of a run, as plain JSON values.

    Args:
        found: all blocks.
        model: of the study "hallucination".
    """
    studies: dict[str, list[Mapping[str, Any]]] = {}
    for _, notes in found:
        studies.setdefault(notes["study"], []).append(notes)
    cells = {name: [cell for notes in own for cell in notes["cells"]] for name, own in studies.items()}
    cells = {name: own for name, own in cells.items() if own}
    out: dict[str, Any] = {"cells": cells}
    plain = [cell for own in cells.values() for cell in own if cell["form"] == "classifier-free"]
    once = {tuple(cell[key] for key in ("target", "process", "score", "scale", "steps")): cell for cell in plain}
    if once:
        out["failures"] = failures(list(once.values()))
    if "errors" in cells:
        out["exponents"] = exponents(cells["errors"])
    if "limit" in cells:
        out["needed"] = needed(cells["limit"])
    for name in ("noise", "interval", "hunt"):
        if name in studies:
            out[name] = [notes[name] for notes in studies[name]]
    if "network" in studies:
        out["network"] = {key: studies["network"][0][key] for key in ("held out", "sigma_data")}
    if "hallucination" in studies and model is not None:
        from fanal.bench.support_guided import guided_results

        out["hallucination"] = guided_results(model, found)
    return out

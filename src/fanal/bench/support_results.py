"""What the cells of `fanal bench support` say together: fits, failures by broken assumption, steps that are needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fanal.bench.plans import Found

__all__ = ["ASSUMPTIONS", "broken", "failures", "fits", "needed", "results_of"]

_RATIO = math.log(80.0 / 0.002)  # of the grids' ends
_SAFE = 1.0  # w·h above which a step is called long
_POWER = (3e-4, 0.5)  # distances that exact scores do not reach, and that have not blown up

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


def fits(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Fit `log q90 = a + b·log δ + c·log w + e·log(1/steps)` to the distances from the support of the condition.

    Only distances between what exact scores reach, 3e-4, and half of the circle's radius are used.

    Returns:
        Slopes with standard errors by name, the number of cells used and left out, and the residual's deviation.
    """
    own = [cell for cell in cells if cell["score"].startswith("error:") and cell["form"] == "classifier-free"]
    used = [cell for cell in own if _POWER[0] < cell["part"]["q90"] < _POWER[1]]
    names = ("delta", "scale", "step")
    if len(used) < len(names) + 3:
        return {"used": len(used), "left out": len(own) - len(used)}
    rows = [[1.0, math.log(_delta(c)), math.log(c["scale"]), math.log(1 / c["steps"])] for c in used]
    design, goal = np.array(rows), np.log([c["part"]["q90"] for c in used])
    solved, _, rank, _ = np.linalg.lstsq(design, goal, rcond=None)
    if rank < design.shape[1]:
        return {"used": len(used), "left out": len(own) - len(used)}
    left = goal - design @ solved
    variance = float(left @ left) / (len(used) - design.shape[1])
    errors = np.sqrt(np.diag(variance * np.linalg.inv(design.T @ design)))
    slopes = {
        name: {"value": float(solved[1 + k]), "se": float(errors[1 + k]), "n": len(used)}
        for k, name in enumerate(names)
    }
    return {"used": len(used), "left out": len(own) - len(used), "residual": math.sqrt(variance), **slopes}


def _delta(cell: Mapping[str, Any]) -> float:
    return float(cell["score"].partition(":")[2])


def needed(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return from how many steps on every sample ends on the support, for each target and scale."""
    groups: dict[tuple[str, float], dict[int, Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["target"], cell["scale"]), {})[cell["steps"]] = cell
    rows = []
    for (target, scale), by_steps in groups.items():
        steps = sorted(by_steps)
        bad = [count for count in steps if by_steps[count]["part"]["off"]["value"] > 0]
        good = [count for count in steps if not bad or count > bad[-1]]
        off = {count: by_steps[count]["part"]["off"] for count in steps}
        worst = {count: by_steps[count]["part"]["worst"] for count in steps}
        rows.append({"target": target, "scale": scale, "from": good[0] if good else None, "off": off, "worst": worst})
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
        out["fits"] = fits(cells["errors"])
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

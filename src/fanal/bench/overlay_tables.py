"""The tables of `fanal bench overlay`: rows of text, for Markdown and for its page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fanal.bench.schedule_tables import markdown

__all__ = ["KINDS", "PARTS", "between", "course", "entry", "tables"]

KINDS: tuple[str, ...] = ("sliced W2", "MMD²")
"""Distances between laws, from samples."""
PARTS: Mapping[str, str] = {"steps": "steps", "training": "iterations"}
"""What particles are compared against, with the name of its numbers."""


def entry(figure: Mapping[str, Any] | None, digits: int = 4) -> str:
    """Return a figure with its standard error; a dash where there is none."""
    return "–" if figure is None else f"{figure['value']:.{digits}f} ± {figure['se']:.{digits}f}"


def between(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the distances at the end.

    Args:
        results: of the run.
    """
    rows = [["two sets of exact draws", results["floor"]]]
    rows += [[f"{name} – exact draws", own] for name, own in results["truth"].items()]
    rows += [[name, own] for name, own in results["pairs"].items()]
    return ["between", *KINDS], [[name, *(entry(own[kind]) for kind in KINDS)] for name, own in rows]


def course(results: Mapping[str, Any], part: str) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the distances against steps or training.

    Args:
        results: of the run.
        part: one of `PARTS`.
    """
    rows = [
        [way, name, str(own["calls"]), *(entry(own[kind]) for kind in KINDS), entry(own.get("twins"), 5)]
        for way, found in results[part].items()
        for name, own in found.items()
    ]
    return ["way", PARTS[part], "calls", *KINDS, "from their twins"], rows


def tables(results: Mapping[str, Any]) -> str:
    """Return the figures of a comparison as Markdown.

    Args:
        results: of the run.
    """
    text = "Distances at the end; the first line is what two perfect sets differ by\n\n" + markdown(*between(results))
    for part, head in PARTS.items():
        text += f"\nParticles and exact draws, by {head}\n\n" + markdown(*course(results, part))
    return text

"""The page of `fanal geometry`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fanal.files import read_tensors
from fanal.report.geometry import data, likeness, shape
from fanal.report.geometry.run import GeometryRun
from fanal.report.geometry.words import sentences
from fanal.report.study import Page, study

__all__ = ["geometry_page"]


def geometry_page(folder: Path, record: Mapping[str, Any]) -> Page:
    """Return the page of a geometry run, from its record and its `geometry.safetensors`.

    Raises:
        FanalError: the folder has no such file.
    """
    tensors, _ = read_tensors(folder / "geometry.safetensors")
    run = GeometryRun(record, tensors)
    sections = [part for make in (*shape.SECTIONS, *data.SECTIONS, *likeness.SECTIONS) for part in make(run)]
    lines = [
        f"{run.config['count']} trajectories of {run.config['model']} with {run.config['solver']}, "
        f"{run.config['steps']} steps.",
        *sentences(run.results),
    ]
    return study(f"geometry: {run.config['model']}", lines, sections, record)

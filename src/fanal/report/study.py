"""Pages: sections with figures, one sentence on how to read each, and their numbers, in one file that opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fanal.files import write_atomically
from fanal.report.figures import markup, script
from fanal.report.plots import Figure

__all__ = ["SOURCES", "Page", "Section", "Table", "facts_of", "study"]

SOURCES = {
    "RODS": "Tian et al. 2025, RODS: Robust Optimization Inspired Diffusion Sampling for Detecting and Reducing "
    "Hallucination in Generative Models, arXiv:2507.12201",
    "GEO": "Chen et al. 2023, A Geometric Perspective on Diffusion Models, arXiv:2305.19947",
    "REG": "Chen et al. 2025, Geometric regularity in deterministic sampling dynamics of diffusion-based generative "
    "models, doi:10.1088/1742-5468/ae17ac",
    "PDE": "Cao et al. 2025, Generative diffusion models from a PDE perspective, arXiv:2501.17054",
    "SUP": "Chandramoorthy et al. 2026, On the Robustness of Distribution Support under Diffusion Guidance, "
    "arXiv:2605.07220",
}
"""The papers that pages cite, by the names they have there."""


@dataclass(frozen=True)
class Table:
    """Numbers.

    Attributes:
        name: of its file.
        head: names of its columns.
        rows: its cells; none: it is not shown.
        caption: how to read it.
    """

    name: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: what it is about.
        reading: one sentence on how to read it.
        figures: what is drawn; text is HTML, for what moves on a page and is no figure of a paper.
        tables: below the figures; those without rows are left out.
    """

    title: str
    reading: str
    figures: Sequence[Figure | str] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Page:
    """A page before it is written.

    Attributes:
        template: name of its template.
        values: what the template is filled with.
        figures: that it draws, by which `fanal report --figures` writes them too.
        tables: likewise.
    """

    template: str
    values: Mapping[str, Any]
    figures: Sequence[Figure] = field(default_factory=tuple)
    tables: Sequence[Table] = field(default_factory=tuple)

    def write(self, path: Path) -> None:
        """Write the page.

        Raises:
            FanalError: it cannot be written, or a picture of it cannot be read.
        """
        drawn = {figure.name: Markup(markup(figure)) for figure in self.figures}
        sheets = jinja2.FunctionLoader(
            lambda name: (resources.files("fanal.report") / name).read_text(encoding="utf-8")
        )
        room = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=sheets)
        told = " ".join([str(self.values), *drawn.values()])
        sources = [f"[{name}] {paper}" for name, paper in SOURCES.items() if f"[{name}]" in told]
        own = {"drawn": drawn, "script": Markup(script()), "sources": sources}
        page = room.get_template(self.template).render(**self.values, **own)
        write_atomically(path, lambda part: part.write_text(page, encoding="utf-8"))


def facts_of(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a run's settings, what it cost, and the versions that made it, by name."""
    facts = [(key, str(value)) for key, value in record["config"].items() if value not in (None, [], (), "")]
    network = record.get("network", {})
    if "calls" in network:
        facts.append(("network calls", f"{network['calls']} batches, {network['evaluations']} samples"))
    facts += [("seconds", f"{record['seconds']:.1f}")] if "seconds" in record else []
    return facts + [(f"{name} version", value) for name, value in record.get("versions", {}).items()]


def study(title: str, lines: Sequence[str], sections: Sequence[Section], record: Mapping[str, Any]) -> Page:
    """Return a page of measurements.

    Args:
        title: of the page, after "fanal".
        lines: what was found, in a few sentences.
        sections: the page's parts; names of figures and of tables are unique.
        record: the run's `run.json`, whose settings end the page.
    """
    shown = [
        {
            "title": section.title,
            "reading": section.reading,
            "figures": [each.name if isinstance(each, Figure) else Markup(each) for each in section.figures],
            "tables": [table for table in section.tables if table.rows],
        }
        for section in sections
    ]
    values = {"title": title, "lines": lines, "sections": shown, "facts": facts_of(record)}
    figures = [figure for section in sections for figure in section.figures if isinstance(figure, Figure)]
    return Page("study.html.j2", values, figures, [table for section in shown for table in section["tables"]])

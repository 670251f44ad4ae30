"""Reports: one self-contained HTML page from a run folder, which opens offline, and its figures for papers."""

from __future__ import annotations

from fanal.report.sampling import diversity as diversity
from fanal.report.sampling import headline as headline
from fanal.report.sampling import table as table
from fanal.report.writing import write_figures as write_figures
from fanal.report.writing import write_report as write_report

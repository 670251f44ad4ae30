"""Reports: one self-contained HTML page from a run folder; it opens offline."""

from __future__ import annotations

from fanal.report.page import diversity as diversity
from fanal.report.page import headline as headline
from fanal.report.page import table as table
from fanal.report.page import write_report as write_report

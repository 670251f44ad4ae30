"""A person labels a run's samples on a page of this machine; the labels feed ROC curves and thresholds."""

from __future__ import annotations

from fanal.labeling.labels import TAXONOMIES as TAXONOMIES
from fanal.labeling.labels import Labels as Labels
from fanal.labeling.labels import Samples as Samples
from fanal.labeling.labels import Taxonomy as Taxonomy
from fanal.labeling.labels import open_labels as open_labels
from fanal.labeling.labels import read_samples as read_samples
from fanal.labeling.labels import taxonomy as taxonomy
from fanal.labeling.server import LabelServer as LabelServer
from fanal.labeling.summary import Summary as Summary
from fanal.labeling.summary import export_csv as export_csv
from fanal.labeling.summary import summarize as summarize

__all__ = [
    "TAXONOMIES",
    "LabelServer",
    "Labels",
    "Samples",
    "Summary",
    "Taxonomy",
    "export_csv",
    "open_labels",
    "read_samples",
    "summarize",
    "taxonomy",
]

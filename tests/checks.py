"""What a check of the theory must be: within its tolerance, and with curves that show it."""

from __future__ import annotations


def holds(finding):
    """The finding, if its error is within its tolerance and a figure of it would show something."""
    assert finding.error <= finding.tolerance, finding
    assert any(curve.tells for panel in finding.panels for curve in panel.curves), finding
    return finding

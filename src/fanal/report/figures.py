"""Interactive figures of a run, as HTML fragments that share one embedded script."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
import torch
from plotly.offline import get_plotlyjs
from torch import Tensor

from fanal.pictures import COLORS

__all__ = ["risk_histogram", "risk_lines", "script"]

_MOST_LINES = 64


def script() -> str:
    """Return the plotting library's own script, to be embedded once."""
    return get_plotlyjs()


def _html(figure: go.Figure, name: str) -> str:
    figure.update_layout(
        template="plotly_white",
        height=380,
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        legend={"orientation": "h", "y": 1.08},
        font={"family": "system-ui, sans-serif", "size": 13},
    )
    config = {"displaylogo": False, "responsive": True}
    return figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)


def _kinds(wrong: Tensor | None, count: int) -> list[tuple[str, str, Tensor]]:
    """Groups of samples to draw apart: label, color, indices."""
    if wrong is None:
        return [("samples", COLORS["plain"], torch.arange(count))]
    groups = [("good", COLORS["good"], ~wrong), ("wrong", COLORS["bad"], wrong)]
    return [(label, color, mask.nonzero().flatten()) for label, color, mask in groups]


def risk_lines(
    per_step: Tensor, sigmas: Sequence[float], seeds: Sequence[int], wrong: Tensor | None, threshold: float | None
) -> str:
    """Draw the risk of every sample as it stood after each step, with the threshold.

    Args:
        per_step: (B, N).
        sigmas: the grid, N + 1 values.
        seeds: one per sample, shown on hover.
        wrong: (B,) verdicts where they are known.
        threshold: where samples are flagged; None: not drawn.
    """
    figure = go.Figure()
    steps = list(range(1, per_step.shape[1] + 1))
    levels = [f"{sigma:.3g}" for sigma in sigmas[:-1]]
    for label, color, rows in _kinds(wrong, len(per_step)):
        for k, b in enumerate(rows.tolist()[:_MOST_LINES]):
            figure.add_trace(
                go.Scatter(
                    x=steps,
                    y=per_step[b].tolist(),
                    customdata=levels,
                    mode="lines",
                    line={"color": color, "width": 1},
                    opacity=0.55,
                    name=label,
                    legendgroup=label,
                    showlegend=k == 0,
                    hovertemplate=f"seed {seeds[b]}<br>step %{{x}}, sigma %{{customdata}}<br>risk %{{y:.3g}}",
                )
            )
    if threshold is not None:
        figure.add_hline(threshold, line={"color": COLORS["flag"], "dash": "dash"}, annotation_text="threshold")
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="risk so far", rangemode="tozero")
    return _html(figure, "risk-lines")


def risk_histogram(risk: Tensor, wrong: Tensor | None, threshold: float | None) -> str:
    """Draw the distribution of the final risk, good and wrong samples apart, with the threshold."""
    figure = go.Figure()
    low, high = float(risk.min()), float(risk.max())
    bins = {"start": low, "end": high + 1e-12, "size": max((high - low) / 30, 1e-12)}
    for label, color, rows in _kinds(wrong, len(risk)):
        values = risk[rows].tolist()
        figure.add_trace(go.Histogram(x=values, name=label, marker_color=color, opacity=0.65, xbins=bins))
    if threshold is not None:
        figure.add_vline(threshold, line={"color": COLORS["flag"], "dash": "dash"}, annotation_text="threshold")
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(title="risk")
    figure.update_yaxes(title="samples")
    return _html(figure, "risk-histogram")

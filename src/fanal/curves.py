"""The course of a training as a picture: the loss of the batches and that on held-out samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from fanal.pictures import COLORS

__all__ = ["curve"]

_SIZE, _LEFT, _RIGHT, _TOP, _BOTTOM = (720, 400), 64, 30, 36, 40
_INK, _FAINT = "#334155", "#e2e8f0"

Point = tuple[float, float]


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers that span [low, high], about `count` of them inside."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= count)
    return [step * k for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


def curve(entries: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Draw a log of `fanal.training`: mean loss of recent batches, and held-out loss with one standard error.

    Args:
        entries: lines of `log.jsonl`, with `iteration`, `loss` and sometimes `held_out`.
    """
    recent = [(float(e["iteration"]), float(e["loss"])) for e in entries]
    measured = [(float(e["iteration"]), e["held_out"]) for e in entries if e.get("held_out")]
    held = [(i, float(h["mean"])) for i, h in measured]
    errors = [float(h.get("standard_error") or 0.0) for _, h in measured]
    values = [v for _, v in recent] + [v + s * e for (_, v), e in zip(held, errors, strict=True) for s in (-1, 1)]
    image = Image.new("RGB", _SIZE, "#ffffff")
    if not values:
        return image
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    rows = _ticks(low - margin, high + margin)
    columns = _ticks(0.0, max(i for i, _ in recent))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)

    def place(point: Point) -> Point:
        x = _LEFT + point[0] / columns[-1] * (_SIZE[0] - _LEFT - _RIGHT)
        share = (point[1] - rows[0]) / (rows[-1] - rows[0])
        return x, _SIZE[1] - _BOTTOM - share * (_SIZE[1] - _TOP - _BOTTOM)

    for value in rows:
        draw.line([place((0, value)), place((columns[-1], value))], fill=_FAINT)
        draw.text((_LEFT - 8, place((0, value))[1]), f"{value:.4g}", fill=_INK, font=font, anchor="rm")
    for i in columns:
        draw.text((place((i, 0))[0], _SIZE[1] - _BOTTOM + 8), f"{i:,.0f}", fill=_INK, font=font, anchor="mt")
    for (i, value), error in zip(held, errors, strict=True):
        draw.line([place((i, value - error)), place((i, value + error))], fill=COLORS["flag"], width=1)
    for points, color in ((recent, COLORS["plain"]), (held, COLORS["flag"])):
        spots = [place(point) for point in points]
        if len(spots) > 1:
            draw.line(spots, fill=color, width=2, joint="curve")
        for x, y in spots if len(spots) < 40 else spots[-1:]:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=color)
    draw.text((_LEFT, 10), "loss of the last batches", fill=COLORS["plain"], font=font)
    if held:
        last = f"held out: {held[-1][1]:.4f} ± {errors[-1]:.4f}"
        draw.text((_LEFT + 190, 10), last, fill=COLORS["flag"], font=font)
    draw.text((_SIZE[0] - _RIGHT, 10), "iterations", fill=_INK, font=font, anchor="ra")
    return image

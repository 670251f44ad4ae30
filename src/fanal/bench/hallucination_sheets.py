"""Pictures of `fanal bench hallucination`: what each method made of the same noise, framed by the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from fanal import pictures
from fanal.bench.hallucination import PLAIN, Measured
from fanal.bench.hallucination_cells import Subject, seeds
from fanal.denoiser import Denoiser, Wrapper
from fanal.hallucination.methods import METHODS, Settings
from fanal.metrics.features import is_image

__all__ = ["FINER", "ROBUST", "Seen", "sheets"]

FINER: tuple[str, ...] = ("heun", "euler200")
"""What [RODS] figs. 9 and 10 compare with: better solutions of the same ODE."""

ROBUST = "cas"
"""What they show."""

_ROWS, _COLUMNS, _GAP, _FLAGGED = 8, 10, 40, 64


class Seen(Wrapper):
    """Keeps every prediction of a denoiser with its noise level."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser)
        self.levels: list[float] = []
        self.answers: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """Ask and remember."""
        denoised = self.denoiser(x, sigma)
        self.levels.append(float(sigma))
        self.answers.append(denoised.detach())
        return denoised

    def last_run(self, most: int) -> Tensor:
        """Return at most so many predictions of the last way down, evenly spread: a repair's, where there was one."""
        rises = [i for i in range(1, len(self.levels)) if self.levels[i] > self.levels[i - 1]]
        run = self.answers[rises[-1] if rises else 0 :]
        keep = torch.linspace(0, len(run) - 1, min(most, len(run))).round().long().tolist()
        return torch.cat([run[i] for i in keep])


def _shown(measured: Measured, name: str) -> tuple[Tensor, Tensor]:
    """Samples as they are shown, and their verdicts."""
    own = measured.plain if name == PLAIN else measured.methods[name]
    image = own["shown"].dtype == torch.uint8
    return (pictures.from_bytes(own["shown"]) if image else own["shown"]), own["verdict"]


def _frame(verdict: Tensor) -> list[str | None]:
    return [pictures.COLORS["bad"] if code else pictures.COLORS["good"] for code in verdict.tolist()]


def _sheet(measured: Measured, names: Sequence[str], rows: Tensor) -> Image.Image:
    """One row per noise, one column per method; the frame says right or wrong."""
    parts = [_shown(measured, name) for name in names]
    x = torch.stack([x[rows] for x, _ in parts], 1).flatten(0, 1)
    verdict = torch.stack([codes[rows] for _, codes in parts], 1).flatten()
    return pictures.grid(x, columns=len(names), frames=_frame(verdict))


def _flagged(measured: Measured) -> Image.Image:
    """The first samples of the plain run, those framed that the gate flags."""
    x, _ = _shown(measured, PLAIN)
    risk = measured.plain[f"risk.{measured.subject.gate}"][:_FLAGGED]
    hits = (risk > measured.settings.threshold).tolist()
    return pictures.grid(x[:_FLAGGED], frames=[pictures.COLORS["flag"] if hit else None for hit in hits])


def _points(measured: Measured, names: Sequence[str]) -> Image.Image:
    """Scatter plots side by side, wrong points in color."""
    plots = []
    for name in names:
        x, verdict = _shown(measured, name)
        frames = [pictures.COLORS["bad"] if code else None for code in verdict.tolist()]
        plots.append(pictures.grid(x, frames=frames))
    wide = plots[0].width + _GAP
    sheet = Image.new("RGB", (len(plots) * wide, plots[0].height), "#ffffff")
    for i, plot in enumerate(plots):
        sheet.paste(plot, (i * wide + _GAP // 2, 0))
    return sheet


def _paths(subject: Subject, settings: Settings, row: int, names: Sequence[str]) -> Image.Image:
    """One noise under several methods, one line each: the denoised predictions on the way down."""
    key = seeds("report", 1, row)
    tiles, blank = [], torch.full((1, *subject.dataset.shape), 1.0)
    for name in names:
        seen = Seen(subject.model)
        end = METHODS[name](settings)(seen, subject.start(key), tuple(key), 60)
        path = seen.last_run(_COLUMNS - 1)
        tiles += [path, *[blank] * (_COLUMNS - 1 - len(path)), end]
    return pictures.grid(torch.cat(tiles), columns=_COLUMNS)


def _lines(measured: Measured, every: Sequence[str]) -> dict[str, Image.Image]:
    """The noise that CAS mends first, and the first that nobody flags, under every deterministic method."""
    _, before = _shown(measured, PLAIN)
    _, after = _shown(measured, ROBUST)
    shared = before[: len(after)]
    risk = measured.plain[f"risk.{measured.subject.gate}"][: len(after)]
    mended = ((shared != 0) & (after == 0)).nonzero().flatten()
    calm = ((shared == 0) & (risk <= measured.settings.threshold)).nonzero().flatten()
    picks = {"path-mended": mended, "path-unflagged": calm}
    return {
        name: _paths(measured.subject, measured.settings, int(rows[0]), every)
        for name, rows in picks.items()
        if len(rows)
    }


def sheets(measured: Measured) -> dict[str, Image.Image]:
    """Return the pictures by name.

    `methods`: the first noises under every method. `flagged`: what the gate flags of the plain run. `fixed`: wrong
    under Euler and the finer solvers, right under CAS ([RODS] fig. 9). `broken`: right under Euler and CAS, wrong under
    a finer solver (fig. 10). `path-mended` and `path-unflagged`: one noise under several methods on the way down
    (figs. 13, 14). Points of the plane have one picture, `methods`.
    """
    names = [PLAIN, *measured.methods]
    if not is_image(measured.subject.dataset.shape):
        return {"methods": _points(measured, names[:6])}
    out = {"methods": _sheet(measured, names, torch.arange(_ROWS)), "flagged": _flagged(measured)}
    finer = [name for name in FINER if name in names]
    if ROBUST not in names or not finer:
        return out
    every = [PLAIN, *finer, ROBUST]
    count = min(len(_shown(measured, name)[1]) for name in every)
    codes: Mapping[str, Tensor] = {name: _shown(measured, name)[1][:count] != 0 for name in every}
    wrong = torch.stack([codes[name] for name in finer])
    cases = {
        "fixed": codes[PLAIN] & wrong.all(0) & ~codes[ROBUST],
        "broken": ~codes[PLAIN] & wrong.any(0) & ~codes[ROBUST],
    }
    for name, rows in cases.items():
        if bool(rows.any()):
            out[name] = _sheet(measured, every, rows.nonzero().flatten()[:_ROWS])
    return out | _lines(measured, [name for name in (*every, "temperature", "redo") if name in names])

"""The tables of the findings page that its runs hold, from their folders alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from findings_told import CLEAR, Column, Told, numbers, peaks, percent, rows, spread, table
from torch import Tensor

from fanal.files import read_json
from fanal.geometry.regularity import MEASURES
from fanal.summary import estimated

LEVELS = (60.0, 20.0, 10.0, 5.0, 3.0, 1.0, 0.3, 0.1, 0.03)
"""Noise levels at which the score's deviation is told."""

CODES = ("codes", "codes-noisy")
SLOPES = (20.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.004)
COSINES = (10.0, 1.0, 0.1, 0.01)
NEARER = "nearer to the end than the state"
DISTANCES = {"states": "distance", "predictions": "denoised distance", "z": "z distance"}
BENDS = (40.0, 20.0, 10.0, 5.0, 2.0, 1.0, 0.3, 0.1, 0.03)
RESIDUALS = (40.0, 20.0, 10.0, 5.0, 2.0, 1.0, 0.3, 0.1)
SHELLS = (80.0, 20.0, 5.0, 1.0, 0.3, 0.1, 0.03)
FITS = {
    "digits8": ("gaussian", "mixture", "data", ""),
    "hands32": ("gaussian", "data", ""),
    "shapes32": ("gaussian", "mixture", ""),
}
"""Sets whose Gaussian is put beside their runs, and the runs."""


def _straight(told: Sequence[Told]) -> None:
    """Observation 1."""
    plain = {
        "length / (sigma_max √d)": ("length / (sigma_max sqrt d)", 4),
        "deviation / chord": ("largest deviation / chord", 4),
    }
    bent = {"predictions' deviation / chord": ("denoised largest deviation / chord", 3)}
    cosines: list[Column] = [(f"cosine at {sigma:g}", lambda t, s=sigma: t.at("angle", s)) for sigma in COSINES]
    size: Column = ("d", lambda t: str(t.d))
    least: Column = ("least", lambda t: t.least("angle"))
    table("straight?", told, [size, *numbers(plain), *numbers(bent), *cosines, least])
    means = [
        (f"{head} by means", lambda t, n=name: t.largest(n))
        for head, name in (("states", ""), ("predictions", "denoised "))
    ]
    table("straight, of means", told, means)


def _shells(told: Sequence[Told]) -> None:
    """Magnitude of states over that of forward noise, and how thin the shell is ([GEO] prop. 2, fig. 2a)."""
    some = [t for t in told if "forward magnitude" in t.results["bands"]]

    def ratio(t: Told, sigma: float) -> str:
        i = t.near(sigma)
        return f"{float((t.squared('magnitude') / t.squared('forward magnitude'))[i]):.3f}"

    def thin(t: Told) -> str:
        spread_out = float(t.band("magnitude", "std")[0])
        return f"{spread_out / t.sigmas[0]:.2f}, {spread_out / float(t.band('magnitude')[0]):.3f}"

    def ends(t: Told) -> str:
        points = torch.tensor(t.results["bands"]["forward magnitude"]["mean"], dtype=torch.float64)
        return f"{float(t.band('magnitude')[-1]):.2f}, {float(points[-1]):.2f}"

    def rising(t: Told) -> str:
        return str(int((t.band("magnitude").diff() > 0).sum()))

    columns: list[Column] = [(f"{sigma:g}", lambda t, s=sigma: ratio(t, s)) for sigma in SHELLS]
    columns += [("end, data", ends), ("steps at which it grows", rising), ("spread at 80 / sigma, / mean", thin)]
    table("magnitude over forward magnitude", some, columns)


def _pendulum(told: Sequence[Told]) -> None:
    """Contraction of the pendulum over that of sigma, and the turns of the path ([REG] 4.2.1)."""

    def shrink(t: Told, least: float) -> str:
        kept = [k for k in range(len(t.sigmas) - 2) if t.sigmas[k + 1] >= least]
        length, level = t.band("pendulum"), torch.tensor(t.sigmas, dtype=torch.float64)
        ratio = (length[1:] / length[:-1] / (level[1:-1] / level[:-2]))[kept]
        return f"{float(ratio.min()):.3f} to {float(ratio.max()):.3f}"

    def turn(t: Told, least: float) -> str:
        band = t.band("rotation")
        return f"{math.degrees(float(band[[k for k in range(len(band)) if t.sigmas[k + 1] >= least]].max())):.2f}°"

    def all_turns(t: Told) -> str:
        return f"{math.degrees(float(t.band('rotation').sum())):.0f}°"

    columns: list[Column] = [
        ("first length / (sigma_max √d)", lambda t: t.at("slope", 80.0)),
        (f"contraction / that of sigma, down to {CLEAR:g}", lambda t: shrink(t, CLEAR)),
        ("at all levels", lambda t: shrink(t, 0)),
        (f"largest turn down to {CLEAR:g}", lambda t: turn(t, CLEAR)),
        ("at all levels", lambda t: turn(t, 0)),
        ("all turns", all_turns),
    ]
    table("pendulum", told, columns)


def _residuals(told: Sequence[Told], expected: dict[str, tuple[Tensor, ...]]) -> None:
    """Root mean square deviation by level, beside [REG] prop. 4 for the Gaussian of the same data, per √d."""
    by_name, body = {t.name: t for t in told}, []
    for name, kinds in FITS.items():
        owners = [by_name[own] for own in (f"{kind}-{name}".strip("-") for kind in kinds) if own in by_name]
        for t in owners:
            curves = [(t.name, t.squared("deviation") / math.sqrt(t.d))]
            if t is owners[0] and name in expected:
                labels = (f"prop. 4, {name}", "… less what lies along the chord")
                curves = [*zip(labels, expected[name], strict=True), *curves]
            for label, curve in curves:
                cells = [f"{float(curve[t.near(sigma)]):.4f}" for sigma in RESIDUALS]
                body.append([label, *cells, ", ".join(f"{sigma:.2g}" for sigma in peaks(curve, t.sigmas))])
    rows("deviation / √d, root mean square", ["curve", *(f"{s:g}" for s in RESIDUALS), "largest at sigma"], body)


def _score(told: Sequence[Told]) -> None:
    """The deviation of the score by noise level, on both paths."""
    some = [t for t in told if "score deviation" in t.results["bands"] and not t.model.startswith("data:")]
    for name in ("score deviation", "score deviation on exact path"):
        table(name, some, [(f"{sigma:g}", lambda t, s=sigma, n=name: t.at(n, s)) for sigma in LEVELS])
    names = {
        "end to a training point": ("end to nearest point / sqrt d", 3),
        "exact end to one": ("exact end to nearest point / sqrt d", 3),
        "ends apart": ("ends apart / sqrt d", 3),
        "one nearest point": ("both ends have one nearest point", 2),
    }
    table("both ends", [t for t in told if "likelihood" in t.results], numbers(names))
    for t in some:
        levels = [f"{each['sigma']:.3g} (z {each['z']:.1f})" for each in t.results["flagged"]]
        print(f"\n{t.name}: levels that stand out: {', '.join(levels) or 'none'}")


def _likelihood(told: Sequence[Told]) -> None:
    def share(t: Told, key: str) -> str:
        found = t.results["likelihood"]
        return f"{100 * found[key]['value']:.2f} ± {100 * (found[key]['se'] or 0):.2f} %"

    def low(t: Told) -> str:
        held = t.results["likelihood"]["steps"]
        levels = [t.sigmas[k] for k, value in enumerate(held) if value < 0.9]
        return f"{len(levels)} of {len(held)}, from {levels[0]:.2g} on" if levels else "none"

    heads = {"met": "d1 ≤ d2", "state": "p(x') ≥ p(x)", "prediction": "p(D) ≥ p(x)"}
    columns: list[Column] = [(head, lambda t, k=key: share(t, k)) for key, head in heads.items()]
    some = [t for t in told if "likelihood" in t.results]
    table("likelihood, share of steps", some, [*columns, ("levels with d1 ≤ d2 below 90 %", low)])


def _shape(told: Sequence[Told]) -> None:
    """Few dimensions, curvature, stages, and the curve that curvature and torsion give back."""
    table("table 7", told, [(f"Top-{k}", lambda t, k=k: spread(t.number(f"direct, top {k}"))) for k in (1, 2, 3)])
    shares: list[Column] = [
        (f"explained by {k}", lambda t, k=k: percent(t.number(f"explained by {k}"))) for k in (1, 2, 3)
    ]
    left = numbers({f"distance in {k}-D": (f"mean error in {k}-D", 3) for k in (1, 2, 3, 4)})
    table("dimensions", told, shares + left)
    table("curvature", told, [(f"{sigma:g}", lambda t, s=sigma: t.bend(s)) for sigma in BENDS])
    limits = {
        "curved from sigma": ("curved from sigma", 2),
        "to": ("curved to sigma", 2),
        "counted down to": ("kept to sigma", 2),
        "posterior open from sigma": ("stage.entropy.first", 2),
        "to ": ("stage.entropy.last", 2),
    }
    table("stages", told, numbers(limits))
    body = [[t.name, *(each.plain(2) for each in t.rebuilt())] for t in told]
    rows("rebuilt: residual / size across", ["run", "as it is", "torsion turned", "without torsion"], body)


def _preserving(told: Sequence[Told]) -> None:
    heads = {"deviation / chord": "z largest deviation / chord", "length / chord": "z length / chord"}
    plain = numbers({head: (name, 3) for head, name in heads.items()})
    shares: list[Column] = [
        (f"explained by {k}", lambda t, k=k: percent(t.number(f"z explained by {k}"))) for k in (1, 2)
    ]
    table("in variance-preserving space", told, [*plain, *shares])


def _matrix(told: Told, key: str) -> None:
    found = told.results["regularity"]
    names = [Path(name).name for name in found["names"]]
    body = []
    for name, values, errors in zip(names, found[key], found["se"][key], strict=True):
        body.append([name, *("–" if v is None else f"{v:.2f} ± {e:.2f}" for v, e in zip(values, errors, strict=True))])
    rows(f"{key}: mean distance of two trajectories", ["", *names], body)


def _codes(out: Path) -> None:
    """Unit noise that images are encoded to, as they are and with the smallest sigma's noise."""
    body = []
    for name in CODES:
        if (out / name / "run.json").is_file():
            row = read_json(out / name / "run.json")["results"]["table"][-1]
            body.append([name, *(estimated(row[key]).plain(4) for key in ("norm / sqrt d", "round trip"))])
    rows("codes", ["run", "norm / √d", "round trip"], body)


def _classes(told: Told) -> None:
    """Distances within classes and between them: mean, smallest and largest."""
    found, body = told.results["regularity"], []
    size = range(len(found["names"]))
    for key in MEASURES:
        parts = [[found[key][i][j] for i in size for j in range(i + 1) if (i == j) == same] for same in (True, False)]
        body.append([key, *(f"{sum(v) / len(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in parts)])
    rows("classes", ["classes apart", "within", "between"], body)


def _alike(told: Sequence[Told]) -> None:
    """Within each model, and by chance."""

    def within(t: Told, key: str) -> str:
        found = t.results["regularity"]
        cells = [(found[key][i][i], found["se"][key][i][i]) for i in range(len(found["names"]))]
        own = cells[: len(set(t.results["groups"]))]
        values = [value for value, _ in own if value is not None]
        if len(own) > 1:
            return f"{sum(values) / len(values):.2f}"
        return f"{own[0][0]:.2f} ± {own[0][1]:.2f}"

    def chance(t: Told, null: str, key: str) -> str:
        found = t.results["regularity"]["nulls"][null][key]
        return f"{found['value']:.2f} ± {found['se']:.2f}"

    columns: list[Column] = [(key, lambda t, k=key: within(t, k)) for key in MEASURES]
    columns += [(f"procrustes, {null}", lambda t, n=null: chance(t, n, "procrustes")) for null in ("smooth", "forward")]
    columns += [(f"{key}, smooth", lambda t, k=key: chance(t, "smooth", k)) for key in ("curvature", "torsion")]
    columns += [("explained by 2", lambda t: percent(t.number("explained by 2")))]
    columns += [("forward noise", lambda t: _forward(t, "explained by 2"))]
    columns += [("in many dimensions", lambda t: _forward(t, "explained by 2, in many dimensions"))]
    table("alike", told, columns)


def _forward(told: Told, key: str) -> str:
    found = told.results["regularity"]["nulls"]["forward"][key]
    return f"{100 * (found['value'] if isinstance(found, dict) else found):.1f} %"


def tables(told: Sequence[Told], out: Path, expected: dict[str, tuple[Tensor, ...]]) -> None:
    """Print the tables of runs.

    Args:
        told: the runs.
        out: the folder that they are in.
        expected: by set, the curves of [REG] prop. 4 over the levels of the runs: whole, and off the chord.
    """
    _straight(told)
    _shells(told)
    table("monotone?", told, [(head, lambda t, n=name: t.rises(n)) for head, name in DISTANCES.items()])
    near = {name: (f"{name} near the end from sigma", 3) for name in ("states", "predictions")}
    nearer: Column = ("prediction nearer than the state", lambda t: percent(t.number(f"prediction {NEARER}"), 2))
    table("faster?", told, [*numbers(near), nearer])
    _score(told)
    _likelihood(told)
    _pendulum(told)
    _residuals(told, expected)
    _shape(told)
    _preserving(told)
    _alike(told)
    table("slope", told, [(f"{sigma:g}", lambda t, s=sigma: t.at("slope", s)) for sigma in SLOPES])
    encoded = {"end to encoded image / √d": ("end to encoded image / sqrt d", 3)}
    table("back to the image?", told, numbers(encoded))
    _codes(out)
    for t in told:
        if t.name == "digits8-classes":
            _classes(t)
        if t.name == "hands32":
            for key in MEASURES:
                _matrix(t, key)

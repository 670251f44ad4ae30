"""Sections on a trajectory's own shape: how straight, how flat, how bent, how large."""

from __future__ import annotations

import math

import torch

from fanal.report.geometry.run import GeometryRun, estimate, short
from fanal.report.plots import BLUE, COLORS, RED, Figure, Line, Panel, Space
from fanal.report.study import Section, Table
from fanal.summary import estimated

__all__ = ["SECTIONS", "curve_points"]

_STRAIGHT = 0.02
_ROUNDING = 1e-5  # of single precision, through a network


def curve_points(run: GeometryRun, name: str) -> list[list[list[float]]]:
    """Projected curves as points: sigma √d, and two components, which are far smaller."""
    side = math.sqrt(run.d)
    out, curves = [], run.drawn(name)
    seen = curves[:, :, 1:3].abs().amax((0, 1)) > _ROUNDING * curves[:, :, 1].abs().amax()
    for curve in curves:
        keep = run.kept(len(curve))
        across = (curve[keep, 1:3] * seen).tolist()  # a plane has no second component, but for rounding
        out.append([[run.sigmas[i] * side, float(f"{u:.6g}"), float(f"{v:.6g}")]
                    for i, (u, v) in zip(keep, across, strict=True)])  # fmt: skip
    return out


def _straightness(run: GeometryRun) -> list[Section]:
    pair = [run.line("deviation", "from the line", color=RED), run.line("distance", "from the end", color=BLUE)]
    flat = [
        run.line("deviation", "from the line", at=run.sigmas, color=RED),
        run.line("distance", "from the end", at=run.sigmas, color=BLUE),
    ]
    figure = Figure(
        "deviation",
        "Trajectory deviation (red) and distance from the final sample (blue); lines are means, bands one standard "
        "deviation over trajectories; right: in powers of ten. In the form of [REG] fig. 3 and 16, [GEO] fig. 2b.",
        [Panel("sigma", "distance", flat, falling=True), run.panel("distance", pair, log_y=True)],
    )
    rows = ("length / (sigma_max sqrt d)", "length / chord", "largest deviation / chord", "steps nearer to the end")
    return [
        Section(
            "How far from a straight line",
            "Distance of each state from the line through both ends of its trajectory, and from its last state.",
            [figure],
            tables=[
                run.table(
                    "straightness",
                    rows,
                    "Length, over that of pure noise and over the chord, and largest distance from the chord; share of "
                    "steps that lead no farther from the last state.",
                )
            ],
        )
    ]


def _explained(run: GeometryRun, prefix: str = "") -> list[str]:
    out = []
    while f"{prefix}explained by {len(out) + 1}" in run.numbers:
        out.append(f"{prefix}explained by {len(out) + 1}")
    return out


def _dimensions(run: GeometryRun) -> list[Section]:
    names = _explained(run)[: run.d - 1]  # in more dimensions than the data have there is only rounding
    rows = [["1 (the chord)", "–", estimate(run.numbers["mean error in 1-D"])]]
    for k, name in enumerate(names):
        rows.append([str(k + 2), estimate(run.numbers[name]), estimate(run.numbers[f"mean error in {k + 2}-D"])])
    shares = [estimated(run.numbers[name]) for name in names]
    errors = [estimated(run.numbers[f"mean error in {k + 1}-D"]) for k in range(min(len(names) + 1, run.d - 1))]
    counts = list(range(1, len(names) + 1))
    figure = Figure(
        "reconstruction",
        "Left: mean distance of the states from their reconstruction in k dimensions, the chord counted. Right: share "
        "of the variance off the chord that k principal components explain. Bars are standard errors. In the form of "
        "[REG] fig. 4(c), 17 to 19.",
        [
            Panel("dimensions", "distance", [Line("", [*counts, len(names) + 1][: len(errors)],
                  [e.value for e in errors], [e.se for e in errors], points=True)], log_y=True),
            Panel("components", "% explained", [Line("", counts, [round(100 * e.value, 6) for e in shares],
                  [round(100 * e.se, 6) for e in shares], points=True)]),
        ],
    )  # fmt: skip
    figures = [figure, *_rebuilding(run), *_rebuilt(run)]
    direct = ["direct, top 1", "direct, top 2", "direct, top 3"]
    ratios = Table(
        "pca-ratios",
        ["model", "Top-1", "Top-2", "Top-3"],
        [[str(run.config["model"]), *(_percent(run, name) for name in direct)]],
        "Variance explained by principal components of the trajectory itself, its chord not taken out, mean ± standard "
        "deviation over trajectories. In the form of [REG] table 7.",
    )
    caption = "Each trajectory rebuilt from its chord and the first principal components of what is off it."
    return [
        Section(
            "In how many dimensions",
            "How many principal components a trajectory needs beside its chord, and what is lost in fewer.",
            figures,
            tables=[
                Table("dimensions", ["dimensions", "variance explained", "mean distance left"], rows, caption),
                ratios,
            ],
        )
    ]


def _rebuilding(run: GeometryRun) -> list[Figure]:
    """How far states rebuilt in few dimensions are from the run's, and the predictions made there."""
    # in as many dimensions as the data have, nothing is left but rounding
    names = [name for k in range(1, min(20, run.d)) if (name := f"error in {k}-D") in run.bands]
    if not names:
        return []
    panels = [run.panel("distance", run.lines(*((name, name[9:]) for name in names)), log_y=True)]
    found = run.tensors.get("rebuilt_error")
    if found is not None:
        at = [float(sigma) for sigma in run.tensors["strip_sigmas"]]
        means = found.double().mean(0)
        floor = _ROUNDING * float(means.max())  # the chord's first state is the run's own, but for rounding
        keep = [(row > floor).nonzero().flatten().tolist() for row in means[: run.d - 1]]
        lines = [
            Line(f"{k + 1}-D", [at[i] for i in own], short(float(means[k, i]) for i in own))
            for k, own in enumerate(keep)
        ]
        panels.append(run.panel("distance of predictions / √d", lines, log_y=True))
    caption = (
        "Left: distance of the states from their reconstruction in k dimensions, the chord counted, step by step; "
        "means, and one standard deviation over trajectories."
    )
    if found is not None:
        caption += (
            " Right: distance of the predictions at the rebuilt states from those at the run's, mean over "
            f"{len(found)} trajectories."
        )
    return [Figure("reconstruction-steps", f"{caption} In the form of [REG] fig. 4(b, e, h), 17 to 19.", panels)]


def _rebuilt(run: GeometryRun) -> list[Figure]:
    """Predictions at the states of the first runs, and at their reconstructions: as pictures, or in the plane."""
    few = "1 dimension" if run.d == 2 else "1 and 2 dimensions" if run.d == 3 else "1, 2 and 3 dimensions"
    what = f"The model's predictions at the run's states, and at these rebuilt in {few}"
    form = "In the form of [REG] fig. 4(a, d, g)."
    layers = {"the run's": "strip"} | {f"rebuilt in {k}-D": f"strip_{k}-D" for k in (1, 2, 3)}
    if "strip_1-D" in run.tensors:
        return run.film("rebuilt", f"{what}, at the same noise level. {form}", layers)
    found = run.tensors.get("rebuilt")
    if found is None:
        return []
    looks = {"the run's": BLUE, "1-D": RED, "2-D": COLORS[2], "3-D": COLORS[3]}
    lines = [
        Line(name, *(short(path[:, axis].tolist()) for axis in (0, 1)), color=color, dashed=k > 0, faint=True)
        for own in found.double()
        for k, ((name, color), path) in enumerate(zip(looks.items(), own, strict=False))
        if k < run.d
    ]
    panel = Panel("first coordinate", "second coordinate", lines)
    return [Figure("rebuilt", f"{what}: their ways to the end, of {len(found)} trajectories. {form}", [panel])]


def _percent(run: GeometryRun, name: str) -> str:
    found = estimated(run.numbers[name])
    if math.isnan(found.value):
        return "–"
    spread = "" if math.isnan(found.se) else f" ± {100 * found.se * math.sqrt(found.n):.6f}"
    return f"{100 * found.value:.6f}{spread} %"


def _boomerang(run: GeometryRun) -> list[Section]:
    axes = ("sigma √d", "first component", "second component")
    figure = Figure(
        "boomerang",
        "Trajectories in the space of their chord and of two principal components off it, turned onto each other. "
        "The first axis is the noise level times √d. In the form of [REG] fig. 5.",
        [Space(axes, curve_points(run, "aligned"))],
    )
    rows = ("procrustes residual / size", "procrustes residual across / size across")
    return [
        Section(
            "The boomerang",
            "All trajectories are one curve up to a motion, where their lines lie on each other.",
            [figure],
            tables=[
                run.table(
                    "alignment",
                    rows,
                    "What is left between each drawn trajectory and their common mean after alignment, over that "
                    "mean's size, most of which is the chord, and over its size across the chord.",
                    what="drawn trajectories",
                )
            ],
        )
    ]


def _bending(run: GeometryRun) -> list[Section]:
    inner = [i for i in run.kept(len(run.sigmas)) if run.sigmas[i] > 0]
    at, panels = [run.sigmas[i] for i in inner], []
    curvature = run.drawn("curvature")[:, inner].nan_to_num()
    bent = curvature > _STRAIGHT * curvature.amax(1, keepdim=True)
    for name, log in (("curvature", True), ("torsion", False)):
        values = run.drawn(name)[:, inner].nan_to_num()
        values = values if log else values.where(bent, torch.nan)
        lines = [
            Line("", at, [float(f"{v:.5g}") for v in row], faint=True, color=BLUE if log else RED)
            for row in values.tolist()
        ]
        panels.append(run.panel(f"{name} · sigma √d", lines, log_y=log))
    figure = Figure(
        "bending",
        "Curvature and torsion of each drawn trajectory, times sigma √d: in radians while the noise level falls by a "
        "factor of e; torsion where the curvature is above 2 % of its largest, as it is noise on a straight piece. "
        "In the form of [REG] fig. 6; of an exact denoiser, of fig. 9(a, d).",
        panels,
    )
    rows = (
        "curved from sigma",
        "curved to sigma",
        "kept to sigma",
        "fit error / length",
        "rebuilt residual / size",
        "rebuilt residual / size across",
    )
    return [
        Section(
            "Curvature and torsion",
            "How sharply each drawn trajectory bends and twists: near 0 it is straight; where lines lie on each other, "
            "the trajectories are one curve up to a motion.",
            [figure],
            tables=[
                run.table(
                    "bending-stages",
                    rows,
                    "Levels between which trajectories bend, and the one down to which that is looked for; what the "
                    "fitted cubics leave, and how far each curve is from the one that its curvature and torsion "
                    "determine, over its size and over its size across the chord.",
                    what="drawn trajectories",
                )
            ],
        )
    ]


def _turning(run: GeometryRun) -> list[Section]:
    rotations = [run.line("rotation", "states", offset=1), run.line("denoised rotation", "predictions", offset=1)]
    figure = Figure(
        "turning",
        "Left: cosine between each step's direction and the way to the end, in the form of [GEO] fig. 14. Right: angle "
        "between successive steps ([REG] sec. 4.2.1).",
        [run.panel("cosine", [run.line("angle", "")]), run.panel("radians", rotations)],
    )
    reading = "A cosine near 1 and an angle near 0 mean that the run goes straight."
    least = run.table("turning-least", ("least cosine",), "The smallest cosine of each trajectory.")
    return [Section("How it turns", reading, [figure, _pendulum(run)], tables=[least])]


def _pendulum(run: GeometryRun) -> Figure:
    """The way from each state to its prediction, and how each step contracts it beside how sigma falls."""
    mean, side = run.bands["pendulum"]["mean"], math.sqrt(run.d)
    inner = [i for i in range(len(mean) - 1) if mean[i] > 0]
    ratios = [mean[i + 1] / mean[i] * run.sigmas[i] / run.sigmas[i + 1] for i in inner]
    keep = run.kept(len(inner))
    contraction = Line("", short(run.levels[inner[k]] for k in keep), short(ratios[k] for k in keep))
    lines = [
        run.line("pendulum", "‖D − x‖"),
        run.along([sigma * side for sigma in run.levels[: len(mean)]], "sigma √d", dashed=True),
    ]
    return Figure(
        "pendulum",
        "Left: distance of the prediction from the state. Right: its mean after a step over that before it, over the "
        "same ratio of sigma: 1 where the pendulum shortens as sigma falls. An Euler step alone does exactly that; the "
        "rest is the swing of the prediction ([REG] sec. 4.2.1).",
        [run.panel("distance", lines, log_y=True), run.panel("contraction / that of sigma", [contraction])],
    )


def _sizes(run: GeometryRun) -> list[Section]:
    shell = run.along([sigma * math.sqrt(run.d) for sigma in run.levels], "sigma √d", dashed=True)
    sizes = run.lines(("magnitude", "states"), ("forward magnitude", "forward process"))
    magnitude = Figure(
        "magnitude",
        "Norm of the states as the run goes, of the forward process where the data are known, of pure noise, of the "
        "predictions. In the form of [GEO] fig. 2a.",
        [run.panel("norm", [*sizes, shell, *run.lines(("denoised magnitude", "predictions"))], log_y=True)],
    )
    names = {
        "norm of states": "magnitude",
        "of the forward process": "forward magnitude",
        "of predictions": "denoised magnitude",
        "slope": "slope",
        "exact slope": "exact slope",
    }
    sizes_told = run.told("sizes", names, "The figures' means at some of the levels, ± standard error.")
    beside = "exact slope" in run.bands
    slope = Figure(
        "slope",
        "Norm of the noise prediction dx/dsigma over √d: 1 where the model sees plain noise. "
        + ("Beside it that of the data's exact denoiser on its own trajectory from the same noise. " if beside else "")
        + "In the form of [REG] fig. 12.",
        [run.panel("‖dx/dsigma‖ / √d", run.lines(("slope", "model" if beside else ""), ("exact slope", "exact")))],
    )
    return [
        Section(
            "Sizes",
            "Where its band is narrow, states lie on a thin shell; where the slope is 1, all that moves them is noise.",
            [magnitude, slope],
            tables=[sizes_told],
        )
    ]


def _predictions(run: GeometryRun) -> list[Section]:
    lines = run.lines(
        ("denoised distance", "prediction to the end"),
        ("distance", "state to the end"),
        ("denoised deviation", "prediction from its line"),
    )
    figure = Figure(
        "predictions",
        "Distance from the final sample of the denoised predictions and of the states. In the form of [GEO] fig. 13.",
        [run.panel("distance", lines, log_y=True)],
    )
    caption = (
        "States, at unit size, above the model's predictions at the same noise level. In the form of "
        "[REG] fig. 8 and [GEO] fig. 3, upper parts."
    )
    layers = {"states": "strip_x", "predictions": "strip"}
    if run.config.get("images"):
        layers = {"noise added to the image": "strip_forward"} | layers
    film = run.film("strips", caption, layers)
    rows = (
        "denoised largest deviation / chord",
        "predictions nearer to the end",
        "predictions near the end from sigma",
        "states near the end from sigma",
        "prediction nearer to the end than the state",
    )
    return [
        Section(
            "The denoising trajectory",
            "Where a prediction is nearer to the end than its state, it shows early what the run will be.",
            [*film, figure],
            tables=[
                run.table(
                    "arrival",
                    rows,
                    "How bent the predictions' own way is, share of its steps that lead no farther from the end, "
                    "levels from which on each is within a tenth of the first prediction's distance from the end, and "
                    "share of levels at which the prediction is the nearer one.",
                ),
                run.table(
                    "images",
                    tuple(name for name in run.numbers if name.startswith("end to ") and "image" in name),
                    "How far runs end from the images that they began as.",
                ),
            ],
        )
    ]


def _preserving(run: GeometryRun) -> list[Section]:
    if "z deviation" not in run.bands:
        return []
    lines = [run.line("z deviation", "from the line", color=RED), run.line("z distance", "from the end", color=BLUE)]
    figure = Figure(
        "z-space",
        "The same trajectories as z = x / √(1 + sigma²): distance from their own line and from their end, and on the "
        "right their norm and their speed, over √d.",
        [run.panel("distance", lines, log_y=True), run.panel("over √d", _speeds(run))],
    )
    rows = ("z length / chord", "z largest deviation / chord", "z steps nearer to the end", *_explained(run, "z "))
    return [
        Section(
            "In variance-preserving space",
            "The same trajectories, scaled to unit size: how straight they are depends on the space they are seen in.",
            [figure],
            tables=[
                run.table("z-numbers", rows, "The same figures as of the trajectories themselves, of z."),
            ],
        )
    ]


def _speeds(run: GeometryRun) -> list[Line]:
    side, keep = math.sqrt(run.d), run.kept(len(run.bands["z magnitude"]["mean"]))
    band = run.bands["z magnitude"]
    x = [run.levels[i] for i in keep]
    norm = Line("norm", x, [band["mean"][i] / side for i in keep], [band["std"][i] / side for i in keep])
    return [norm, *run.lines(("z slope", "speed"))]


SECTIONS = (_straightness, _dimensions, _boomerang, _bending, _turning, _sizes, _predictions, _preserving)
"""In the order of the page."""

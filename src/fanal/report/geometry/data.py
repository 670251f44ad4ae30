"""Sections that put a run beside what is known: the data's exact denoiser, the grid's own weights, a Gaussian's law."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from fanal.errors import FanalError
from fanal.exact import Gaussian
from fanal.exact.named import closed_form
from fanal.geometry.gaussian import expected_residual, residual
from fanal.report.geometry.run import GeometryRun, estimate, short
from fanal.report.plots import BLUE, COLORS, INK, RED, Figure, Heat, Line, Mark, Panel, Sheet
from fanal.report.study import Section, Table
from fanal.summary import estimated

__all__ = ["SECTIONS"]

_MOST_RANKS = 1000
_RANKS = ("heaviest point", "second", "third", "fourth", "fifth")
_BIAS = 1e-10


def _weights(run: GeometryRun) -> list[Section]:
    found = run.results.get("weights")
    if not found:
        return []
    title = "What a sample is made of"
    if "refused" in found:
        return [Section(title, str(found["refused"])[:1].upper() + str(found["refused"])[1:] + ".")]
    at, shares = found["sigmas"], found["prediction"]
    between = found.get("between", [False] * len(shares))
    upto = torch.tensor(shares, dtype=torch.float64).cumsum(0).tolist()
    starts, inner = ([i for i, b in enumerate(between) if b == which] for which in (False, True))
    ends = [*(i - 1 for i in starts[1:]), len(at) - 1]  # of the same steps
    keep = run.kept(len(starts))
    own = [starts[k] for k in keep]
    lines = [Line("this prediction", [at[i] for i in own], short(shares[i] for i in own))]
    if inner:
        inner = [inner[k] for k in run.kept(len(inner))]
        lines.append(Line("predictions on the way", [at[i] for i in inner], short(shares[i] for i in inner)))
    lines.append(Line("all up to it", [at[i] for i in own], short(upto[ends[k]] for k in keep), dashed=True))
    figure = Figure(
        "weights",
        "Share of each prediction in the last state above 0, and of all predictions up to it, by the grid alone. "
        f"{_kind(found)} ([REG] eq. 17).",
        [Panel("sigma of the prediction", "share", lines, log_x=True, falling=True, from_zero=min(shares) >= 0)],
    )
    rows = [["the start", f"{found['start']:.3g}"], ["all predictions", f"{upto[-1]:.6g}"]]
    rows += [["negative ones", f"{-found['negative']:.4g}"]] if found.get("negative") else []
    total = Table("weights-sum", ["share of", ""], rows, "Shares in the last state above 0.")
    return [Section(title, _made(found), [figure], tables=[total])]


def _kind(found: Mapping[str, Any]) -> str:
    """Which kind of combination the states of the run are."""
    if found.get("convex", True):
        return "No share is negative: states are convex combinations of the start and of the predictions"
    if found.get("affine", True):
        return "Some shares are negative: states are affine combinations, which extrapolate, no convex ones as Euler's"
    return "The shares of a state do not sum to 1: states are weighted sums, and no convex combinations as Euler's"


def _made(found: Mapping[str, Any]) -> str:
    """What the shares say, in a sentence."""
    noise = " The solver's own noise comes on top." if found.get("noise") else ""
    at, shares = found["sigmas"], found["prediction"]
    between = found.get("between", [False] * len(at))
    first = max(i for i, on_the_way in enumerate(between) if not on_the_way)  # of the last step
    last = sum(shares[first:])
    return (
        f"The last state above 0, at sigma {found['at']:.4g}, has {100 * last:.3g} % from the last prediction, made at "
        f"sigma {at[first]:.4g}, and {100 * (sum(shares) - last):.3g} % from all earlier ones.{noise}"
    )


def _score(run: GeometryRun) -> list[Section]:
    if "score deviation" not in run.bands:
        return []
    flagged = run.results.get("flagged", [])
    own = run.lines(
        ("score deviation", "at the model's states"), ("score deviation on exact path", "on the exact trajectory")
    )
    marks = [Mark(float(each["sigma"]), f"{each['deviation'] / each['usual']:.2g}×", color=RED) for each in flagged]
    panels = [run.panel("distance / √d", own, log_y=True, marks=marks)]
    four = run.lines(
        ("model x", "model's states"),
        ("exact x", "exact states"),
        ("D(exact x)", "model's predictions, exact states"),
        ("D*(model x)", "exact predictions, model's states"),
    )
    panels += [run.panel("distance / √d", four, log_y=True)] if four else []
    figure = Figure(
        "score",
        "Left: distance of the model's prediction from the exact one. Right: distance of the four trajectories of the "
        "diagnosis from the end of the exact one. Per √d. In the form of [REG] fig. 22 and [GEO] fig. 5 and 6."
        if four
        else "Distance of the model's prediction from the exact one at the same state, per √d ([REG] C.2).",
        panels,
    )
    rows = [
        [f"{each['sigma']:.4g}", f"{each['deviation']:.3g}", f"{each['usual']:.3g}", f"{each['z']:.1f}"]
        for each in flagged
    ]
    outlying = Table("flagged", ["sigma", "deviation", "usual there", "robust z"], rows, _told(len(flagged)))
    ends = (
        "end to nearest point / sqrt d",
        "exact end to nearest point / sqrt d",
        "ends apart / sqrt d",
        "both ends have one nearest point",
    )
    return [
        Section(
            "Beside the exact denoiser of the data",
            "How far the model is from the exact denoiser of these points: at 0 it would replay them; "
            + ("levels where it jumps above its neighbors are marked." if flagged else "no level stands out."),
            [figure],
            tables=[
                outlying,
                run.table(
                    "ends",
                    ends,
                    "Distance of the last states of both runs from their nearest training points and from each other, "
                    "and share of pairs whose nearest point is the same.",
                ),
            ],
        ),
        *_diagnosis(run),
    ]


def _told(count: int) -> str:
    return (
        f"{count} level{'' if count == 1 else 's'} whose score deviation stands out of its neighbors' ([GEO] F.3, F.4)."
    )


def _diagnosis(run: GeometryRun) -> list[Section]:
    """Pictures of the four trajectories, and of the training points nearest to the ends."""
    whose = "image" if run.config.get("images") else "sample"
    film = run.film(
        "diagnosis",
        f"At the same noise level: noise added to the {whose}, states of the exact trajectory, and the model's "
        "and the exact predictions on the model's and on the exact trajectory, from one noise. In the form of [REG] "
        "fig. 21 and [GEO] fig. 15 and 19, upper parts.",
        {
            f"noise added to the {whose}": "strip_forward",
            "states of the exact run": "strip_exact x",
            "model's prediction at its own state": "strip",
            "exact prediction at the model's state": "strip_D*(model x)",
            "model's prediction at the exact run's state": "strip_D(exact x)",
            "exact prediction at the exact run's state": "strip_D*(exact x)",
        },
    )
    if "strip_D*(model x)" not in run.tensors:
        return []
    figures, near = list(film), run.tensors.get("neighbors")
    if near is not None:
        ends = torch.stack([run.tensors["strip"][:, -1], run.tensors["strip_D*(exact x)"][:, -1]], 1)
        images = torch.cat([ends[:, :, None], near[: len(ends)]], 2).flatten(0, 1)
        rows = [f"{which} {k + 1}" for k in range(len(ends)) for which in ("end", "exact end")]
        names = ["end", *(f"nearest {k + 1}" for k in range(near.shape[2]))]
        figures.append(
            Figure(
                "neighbors",
                "The last predictions, each before its nearest training points, nearest first. In the form of [REG] "
                "fig. 21, lower part.",
                [Sheet(images, rows, names)],
            )
        )
    reading = (
        "Where the model is one with the data's exact denoiser, the rows are alike; where it generalizes, they part."
    )
    return [Section("Four trajectories from one noise", reading, figures)]


def _entropy(run: GeometryRun) -> list[Section]:
    if "entropy" not in run.bands:
        return []
    band = run.bands["entropy"]["mean"]
    logs = torch.tensor(run.sigmas[: len(band)], dtype=torch.float64).log()
    rate = torch.gradient(torch.tensor(band, dtype=torch.float64), spacing=(logs,))[0]
    words = {"stage.entropy.first": "falls", "stage.entropy.last": "open last"}
    marks = [Mark(at, word) for name, word in words.items() if (at := run.value(name)) is not None]
    figure = Figure(
        "entropy",
        "Left: entropy of the posterior over the data, which falls from log N (all points alike) to 0 (one point). "
        "Right: its rate of change, per factor of e in sigma. The marks are the first and the last level at which it "
        "is undecided, more than 5 % from either. In the form of [REG] fig. 9(c, f).",
        [
            run.panel("nats", [run.line("entropy", "")], marks=marks),
            run.panel("nats per factor of e", [run.along(rate.tolist(), "")], marks=marks),
        ],
    )
    rows = ("stage.entropy.first", "stage.entropy.last", "curved from sigma", "curved to sigma")
    return [
        Section(
            "Three stages",
            "Where the entropy is log N all points pull alike, where it is 0 one alone does, and in between some.",
            [figure, *_coefficients(run)],
            tables=[
                run.table(
                    "stages",
                    rows,
                    "First and last level at which the entropy is more than 5 % of log N away from both log N and 0: "
                    "there the posterior is undecided; and levels between which trajectories bend.",
                )
            ],
        )
    ]


def _coefficients(run: GeometryRun) -> list[Figure]:
    """Weights of single points of the data along the drawn runs."""
    found = run.tensors.get("point_weights")
    if found is None:
        return []
    keep = run.kept(found.shape[1])
    at = [run.levels[i] for i in keep]
    lines = [
        Line(_RANKS[k], at, short((own[keep, k] + _BIAS).log10().tolist()), color=COLORS[k % len(COLORS)], faint=True)
        for own in found.double()
        for k in range(min(found.shape[2], len(_RANKS)))
    ]
    return [
        Figure(
            "coefficients",
            "Weights of single data points in the exact prediction, plus 1e-10, along the drawn runs: of each run, the "
            f"{len(_RANKS)} points with the largest weights over it, which may rise and fall again. In the form of "
            "[REG] fig. 9(e).",
            [run.panel("log10 weight", lines)],
        )
    ]


def _arrival(run: GeometryRun) -> list[Section]:
    """Fréchet distances of states and predictions from the data, level by level."""
    found = run.results.get("frechet")
    if not found:
        return []
    at, lines, columns = found["sigmas"], [], []
    for name in ("predictions", "states"):
        each = [estimated(value) for value in found[name]]
        columns.append([estimate(value) for value in found[name]])
        lines.append(Line(name, short(at), short(e.value for e in each), short(e.se for e in each)))
    figure = Figure(
        "frechet",
        f"Fréchet distance from the data, in the features {found['features']}, of {found['n']} states and predictions "
        f"from {found['n_real']} points, and its standard error. Small samples raise it, all levels alike: compare "
        "within the figure. In the form of [REG] fig. 8 and [GEO] fig. 3, lower parts.",
        [run.panel("Fréchet distance", lines, log_y=True)],
    )
    rows = [[f"{sigma:.4g}", *cells] for sigma, *cells in zip(at, *columns, strict=True)]
    return [
        Section(
            "When runs look like the data",
            "Where the predictions' curve is down before that of the states, a run shows what it will be before it is.",
            [figure],
            tables=[
                Table(
                    "frechet-distances",
                    ["sigma", "predictions", "states"],
                    rows,
                    "The figure's distances, ± standard error.",
                )
            ],
        )
    ]


def _likelihood(run: GeometryRun) -> list[Section]:
    found = run.results.get("likelihood")
    if not found:
        return []
    words = {"met": "assumption holds", "state": "density rises to the next state", "prediction": "to the prediction"}
    lines = [
        run.along(found["steps" if key == "met" else f"{key} steps"], word)
        for key, word in words.items()
        if ("steps" if key == "met" else f"{key} steps") in found
    ]
    panels = [Panel("sigma", "share of trajectories", lines, log_x=True, falling=True, from_zero=True)]
    panels += [run.panel("d1 / d2", [run.line("d1 / d2", "")], log_y=True)] if "d1 / d2" in run.bands else []
    panels += [run.panel("nats / d", [run.line("log density", "")])] if "log density" in run.bands else []
    figure = Figure(
        "likelihood",
        "Share of trajectories at each step where the prediction is nearer to the exact one than the state is, d1 <= "
        "d2, which the theorem assumes, and where the blurred density rises; d1 / d2; log density at the states ([GEO] "
        "theorem 1, fig. 4; [REG] prop. 3).",
        panels,
    )
    rows = [[word, estimate(found[key])] for key, word in words.items() if key in found]
    return [
        Section(
            "Does likelihood grow",
            "Where the assumption holds, the density blurred with the step's own sigma cannot fall.",
            [figure],
            tables=[
                Table(
                    "likelihood-shares",
                    ["share of steps", "mean ± standard error"],
                    rows,
                    "Shares over all levels, mean over trajectories.",
                )
            ],
        )
    ]


def _gaussian(run: GeometryRun) -> Gaussian | None:
    """The model, where it is a Gaussian; none where its data are no longer there."""
    kind, _, name = str(run.config["model"]).partition(":")
    if kind != "gaussian":
        return None
    try:
        model = closed_form(kind, name)
    except FanalError:
        return None
    return model if isinstance(model, Gaussian) and math.prod(model.shape) == run.d else None


def _residuals(run: GeometryRun) -> list[Section]:
    """The expected residual of a Gaussian's trajectories, by eigenvector and as a whole ([REG] prop. 4)."""
    model = _gaussian(run)
    if model is None:
        return []
    order = model.cov.values.argsort(descending=True)
    values, mean = model.cov.values[order], model.cov.coordinates(model.mean[None])[0][order]
    keep = run.kept(len(run.sigmas))
    sigmas = torch.tensor([run.sigmas[i] for i in keep], dtype=torch.float64)
    top = run.sigmas[0]
    phi, start = residual(values, sigmas, top), top**2 + mean.square()  # of the start's square along each eigenvector
    whole, across = expected_residual(model, sigmas, top)
    at = [run.levels[i] for i in keep]
    figure = Figure(
        "residual",
        "Measured trajectory deviation, the root mean square residual of the closed form, and the part of it that is "
        "across the chord. With many more dimensions than large eigenvalues the two are one. In the form of [REG] fig. "
        "15, beside fig. 10(a).",
        [
            run.panel(
                "distance",
                [
                    run.line("deviation", "deviation", color=RED),
                    Line("residual", at, whole.tolist(), color=BLUE),
                    Line("residual across the chord", at, across.tolist(), color=INK, dashed=True),
                ],
            )
        ],
    )
    some = [k for k in range(min(len(values), _MOST_RANKS)) if values[k] > 0]
    inner = [i for i in range(len(keep)) if 0 < float(sigmas[i]) < run.sigmas[0]]
    maps = []
    for word, table in (("φ²", phi.square()), ("h, expected", phi.square() * start)):
        grid = table[inner][:, some].T
        log = grid.clamp_min(float(grid.max()) * 1e-6).log10()
        cells = [[float(f"{v:.4g}") for v in row] for row in log.tolist()]
        maps.append(
            Heat("sigma", "eigenvalue", [at[i] for i in inner], [k + 1 for k in some], cells, f"log10 {word}",
                 falling=True)
        )  # fmt: skip
    spectrum = Figure(
        "residual-spectrum",
        "How far exact trajectories are from their chord along each eigenvector, largest eigenvalue first: per unit "
        "of the start, and for a start drawn at random. In the form of [REG] fig. 13 and 14.",
        maps,
    )
    reading = (
        "A Gaussian's trajectories have a closed form: along each eigenvector the residual has one largest value, "
        "while their sum may have more."
    )
    return [Section("The law of the residual", reading, [figure, spectrum])]


SECTIONS = (_arrival, _weights, _score, _entropy, _likelihood, _residuals)
"""In the order of the page."""

"""The page of `fanal audit`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fanal.files import read_tensors
from fanal.memorization.copies import threshold
from fanal.report.plots import Figure, Line, Mark, Panel, Picture, histogram
from fanal.report.study import Page, Section, Table, study

__all__ = ["audit_page", "verdict"]

_MOST_NAMED, _ENDS = 10, "In parentheses the ends of 95 % intervals."
_FEWEST = 21  # training points that give a sample its nearest one and twenty after it
_LEAST = 1e-300  # below it a probability underflows

SURE = 1e-3
"""Probability below which more copies than chance are called so."""

DOUBLED = 0.1
"""Threshold below which held-out points count as doubles of training points."""


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _chance(p: float) -> str:
    """A probability with its sign of equality."""
    return f"= {p:.2g}" if p > _LEAST else f"< {_LEAST:g}"


def _searched(results: Mapping[str, Any]) -> str:
    """Where copies were looked for, if not among all training points."""
    few = ", too few for a sure scale of distances" if results["points"] < _FEWEST else ""
    if results.get("first only"):  # older runs did not keep it
        return f" among the first {results['points']} training points, all that were searched{few}"
    return f" among {results['points']} training points{few}" if few else ""


def verdict(results: Mapping[str, Any]) -> str:
    """Return what an audit found, in one sentence."""
    found = results["copies"]
    interval = f"95 % interval {_percent(found['excess_low'])} to {_percent(found['excess_high'])}"
    if found["p"] < SURE:
        return (
            f"The model replays its training data{_searched(results)}: {_percent(found['excess'])} of samples are "
            f"copies beyond chance ({interval}, p {_chance(found['p'])})."
        )
    # Held-out points that are doubles of training points set a threshold that no copy need fall below.
    blind = (
        f" Yet the threshold is {results['threshold']:.2g}: held-out points are doubles of training points, and copies "
        "cannot be told from them; leave doubles out of the data."
        if results.get("threshold", 1.0) < DOUBLED  # older runs did not keep it
        else ""
    )
    these = "of these " if results.get("first only") else ""
    return (
        f"No sign of replayed training data{_searched(results)}: {_percent(found['share'])} of samples look like "
        f"copies, and {_percent(found['level'])} of held-out points do (p {_chance(found['p'])}); at most "
        f"{_percent(found['excess_high'])} of samples are copies {these}beyond chance.{blind}"
    )


def _copies(results: Mapping[str, Any], samples: dict[str, Tensor], level: float) -> Section:
    found = results["copies"]
    rows = [
        ["samples below the threshold", f"{found['count']} of {found['total']}", _percent(found["share"])],
        ["its 95 % interval", "", f"{_percent(found['low'])} to {_percent(found['high'])}"],
        ["held-out points below it", f"of {found['held']}", _percent(found["level"])],
        ["copies beyond chance", "", f"{_percent(found['excess'])} ({_percent(found['excess_low'])} to "
         f"{_percent(found['excess_high'])})"],
        ["probability by chance", "", _chance(found["p"]).removeprefix("= ")],
        ["training points copied", f"{results['training points copied']} of {results['points']}",
         _often(results["most often"])],
    ]  # fmt: skip
    groups = {"samples": samples["ratio"].tolist(), "held-out points": samples["held.ratio"].tolist()}
    figure = Figure(
        "copies",
        "Ratio of distances of the samples and of points that were held out; copies lie left of the threshold.",
        [histogram("distance to nearest / to next ones", groups, marks=[Mark(level, "threshold")])],
    )
    return Section(
        "Copies",
        f"Distance to the nearest training point over the mean distance to the {min(results['points'], _FEWEST) - 1} "
        "after it: copies pile up at 0; where the samples lie like held-out points, nothing is replayed.",
        [figure],
        tables=[Table("copies", ["count", "of", "share"], rows)],
    )


def _often(count: int) -> str:
    return f"the one that is copied most: {count} time{'' if count == 1 else 's'}" if count else ""


def _settling(results: Mapping[str, Any]) -> list[Section]:
    found = results["settling"]
    if not found:
        return []
    levels = [float(sigma) for sigma in found["sigmas"]]
    panels = [
        Panel(
            "sigma", y, [Line("", levels, found[name]["mean"], found[name]["std"])], _marks(found),
            log_x=True, falling=True,
        )
        for name, y in (("gap", "distance / √d"), ("entropy", "nats"))
    ]  # fmt: skip
    figure = Figure(
        "settling",
        "Distance of the prediction from the exact one, and entropy of the posterior over training points. "
        "Lines are means, bands one standard deviation over runs; marks are the medians of the table.",
        panels,
    )
    words = {
        "cell": "stays in its last Voronoi cell from",
        "collapse": "posterior over the training set has collapsed from",
        "leave": "prediction first differs from the exact one at",
        "apart": "prediction differs to the end, so that what it makes is new, from",
    }
    rows = [
        [word, _between(found[name], "median sigma", "median", "{:.3g}", 1),
         _between(found[name], "share", "share", "{:.0f} %", 100)]
        for name, word in words.items() if name in found  # older runs did not keep the last
    ]  # fmt: skip
    return [
        Section(
            "When runs settle",
            "Against sigma, which falls as a run goes: how far the prediction is from that of the exact denoiser of "
            "the training set, which could only replay it, and the entropy of the posterior over training points.",
            [figure],
            tables=[Table("settling", [f"of {found['runs']} runs", "median sigma", "of runs"], rows, _ENDS)],
        )
    ]


def _between(found: Mapping[str, Any], key: str, ends: str, form: str, scale: float) -> str:
    """A figure with the ends of its 95 % interval, where they are known."""
    values = [found.get(name) for name in (key, f"{ends} low", f"{ends} high")]
    middle, low, high = ("–" if value is None else form.format(scale * value) for value in values)
    return middle if values[1] is None and values[2] is None else f"{middle} ({low} to {high})"


def _closest(results: Mapping[str, Any]) -> list[Table]:
    """Which training points the closest samples are near, by name."""
    found = results.get("closest", [])
    rows = [[str(each["sample"]), str(each["name"]), f"{each['ratio']:.3g}"] for each in found[:_MOST_NAMED]]
    caption = "The closest samples first; distance to the nearest training point over that to the ones after it."
    return [Table("closest", ["sample", "training point", "ratio"], rows, caption)]


def _marks(found: Mapping[str, Any]) -> list[Mark]:
    """Where half of the runs have settled."""
    words = {"cell": "cell", "collapse": "collapse", "leave": "leaves", "apart": "new"}
    at: dict[float, list[str]] = {}  # words at one level stand beside each other
    for name, word in words.items():
        if name in found and found[name]["median sigma"]:  # older runs did not keep the last
            at.setdefault(float(found[name]["median sigma"]), []).append(word)
    return [Mark(level, ", ".join(names)) for level, names in at.items()]


def audit_page(folder: Path, record: Mapping[str, Any]) -> Page:
    """Return the page of an audit, from its record, its `samples.safetensors` and its `pairs.png`.

    Raises:
        FanalError: the folder has no such files.
    """
    samples, _ = read_tensors(folder / "samples.safetensors")
    config, results = record["config"], record["results"]
    level = threshold(samples["held.ratio"], config["level"])
    gallery = Figure(
        "pairs",
        "Samples with the smallest ratios, each above (for points: beside) its nearest training point.",
        [Picture(folder / "pairs.png", "samples and their nearest training points")],
    )
    pairs = Section(
        "The closest pairs", "What is nearest to a copy, whether it is one or not.", [gallery], _closest(results)
    )
    lines = [
        f"{config['count']} samples of {config['model']} against {'the first ' if results.get('first only') else ''}"
        f"{results['points']} training points of "
        f"{config['data']}.",
        verdict(results),
    ]
    sections = [_copies(results, samples, level), pairs, *_settling(results)]
    return study(f"audit: {config['model']}", lines, sections, record)

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

_MOST_NAMED, _ENDS = 10, "In brackets the ends of 95 % intervals."

SURE = 1e-3
"""Probability below which more copies than chance are called so."""

DOUBLED = 0.1
"""Threshold below which held-out points count as doubles of training points."""


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def verdict(results: Mapping[str, Any]) -> str:
    """Return what an audit found, in one sentence."""
    found = results["copies"]
    interval = f"95 % interval {_percent(found['excess_low'])} to {_percent(found['excess_high'])}"
    if found["p"] < SURE:
        return (
            f"The model replays its training data: {_percent(found['excess'])} of samples are copies beyond chance "
            f"({interval}, p = {found['p']:.1g})."
        )
    # Held-out points that are doubles of training points set a threshold that no copy need fall below.
    blind = (
        f" Yet the threshold is {results['threshold']:.2g}: held-out points are doubles of training points, and copies "
        "cannot be told from them; leave doubles out of the data."
        if results.get("threshold", 1.0) < DOUBLED  # older runs did not keep it
        else ""
    )
    return (
        f"No sign of replayed training data: {_percent(found['share'])} of samples look like copies, and "
        f"{_percent(found['level'])} of held-out points do (p = {found['p']:.2g}); at most "
        f"{_percent(found['excess_high'])} of samples are copies beyond chance.{blind}"
    )


def _copies(results: Mapping[str, Any], samples: dict[str, Tensor], level: float) -> Section:
    found = results["copies"]
    rows = [
        ["samples below the threshold", f"{found['count']} of {found['total']}", _percent(found["share"])],
        ["its 95 % interval", "", f"{_percent(found['low'])} to {_percent(found['high'])}"],
        ["held-out points below it", f"of {found['held']}", _percent(found["level"])],
        ["copies beyond chance", "", f"{_percent(found['excess'])} ({_percent(found['excess_low'])} to "
         f"{_percent(found['excess_high'])})"],
        ["probability by chance", "", f"{found['p']:.2g}"],
        ["training points copied", f"{results['training points copied']} of {results['points']}",
         f"one of them {results['most often']} times"],
    ]  # fmt: skip
    groups = {"samples": samples["ratio"].tolist(), "held-out points": samples["held.ratio"].tolist()}
    figure = Figure(
        "copies",
        "Ratio of distances of the samples and of points that were held out; copies lie left of the threshold.",
        [histogram("distance to the nearest / to the next ones", groups, marks=[Mark(level, "threshold")])],
    )
    return Section(
        "Copies",
        "Distance to the nearest training point over the mean distance to the twenty after it: copies pile up at 0; "
        "where the samples lie like held-out points, nothing is replayed.",
        [figure],
        tables=[Table("copies", ["count", "of", "share"], rows)],
    )


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
        "Left: distance of the prediction from the exact one. Right: entropy of the posterior over training points. "
        "Lines are means, bands one standard deviation over runs; marks are the medians of the table.",
        panels,
    )
    words = {
        "cell": "stays in its last Voronoi cell from",
        "collapse": "posterior over the training set has collapsed from",
        "leave": "prediction first differs from the exact one at",
    }
    rows = [
        [word, _between(found[name], "median sigma", "median", "{:.3g}", 1),
         _between(found[name], "share", "share", "{:.0f} %", 100)]
        for name, word in words.items()
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
    words = {"cell": "cell", "collapse": "collapse", "leave": "leaves"}
    middles = {word: found[name]["median sigma"] for name, word in words.items()}
    return [Mark(float(at), word) for word, at in middles.items() if at]


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
        f"{config['count']} samples of {config['model']} against {results['points']} training points of "
        f"{config['data']}.",
        verdict(results),
    ]
    sections = [_copies(results, samples, level), pairs, *_settling(results)]
    return study(f"audit: {config['model']}", lines, sections, record)

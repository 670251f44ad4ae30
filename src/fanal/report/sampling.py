"""The page of a sampling run: what was found, the evidence, and how it is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fanal import pictures
from fanal.files import read_tensors
from fanal.hallucination.detectors import FREE
from fanal.metrics import Estimate
from fanal.report.plots import Figure, Film, Line, Mark, Panel, histogram
from fanal.report.study import Page, Table, facts_of
from fanal.summary import estimated
from fanal.trajectory import Trajectory

__all__ = ["diversity", "headline", "kinds", "sampling_page", "table"]

_MOST_TILES, _MOST_LINES, _MOST_FRAMES = 100, 64, 24

NAMES = {
    "plain": "plain",
    "redo": "redo (same noise, lower temperature)",
    "renoise": "renoise (back up with fresh noise)",
    "fresh": "fresh (other noise from the start)",
    "ladder": "ladder (back up no farther than it takes)",
}
"""What the stages of a run are called in tables; others by their own name."""


def _free(calibration: dict[str, Any] | None) -> bool:
    """Whether what was calibrated asks the network nothing; a combination where none of its parts does."""
    if calibration is None:
        return False
    parts = calibration.get("options", {}).get("parts", [calibration])
    return all(part["detector"] in FREE for part in parts)


def _stage(name: str) -> str:
    return NAMES.get(name, name)


def _figure(row: Mapping[str, Any], key: str) -> Estimate | None:
    value = row.get(key)
    return None if value is None else estimated(value)


def _percent(row: Mapping[str, Any], key: str) -> str:
    value = _figure(row, key)
    return "–" if value is None else value.percent()


def _plain(row: Mapping[str, Any], key: str, digits: int) -> str:
    value = _figure(row, key)
    return "–" if value is None else value.plain(digits)


def table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of a run's table, every figure with its standard error."""
    judged = "verdicts" in results
    head = ["method", "calls per sample", "seconds per sample"]
    if judged:
        head[1:1] = ["wrong", "change", "corrected", "newly wrong", "spread"]
    rows = []
    for row in results["table"]:
        cells = [_stage(row["name"])]
        if judged:
            cells += [_percent(row, key) for key in ("wrong", "change", "corrected", "newly_wrong")]
            cells.append(_plain(row, "spread", 2))
        cells += [_plain(row, "evaluations", 1), _plain(row, "seconds", 4)]
        rows.append(cells)
    return head, rows


def diversity(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the diversity table; no rows where nothing was measured."""
    rows = [row for row in results["table"] if row.get("diversity")]
    names = list(rows[0]["diversity"]) if rows else []
    cells = [[_stage(row["name"]), *(_plain(row["diversity"], name, 2) for name in names)] for row in rows]
    return ["method", *(name.replace("_", " ") for name in names)], cells


def kinds(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table of errors by kind: samples of each verdict, for each method."""
    rows = [[_stage(row["name"]), *map(str, row["verdicts"])] for row in results["table"]]
    return ["method", *results["verdicts"]], rows


def headline(record: Mapping[str, Any]) -> list[str]:
    """Return what a run found, in a few plain sentences."""
    config, results = record["config"], record["results"]
    count, rows = config["count"], {row["name"]: row for row in results["table"]}
    lines = [f"{count} samples of {config['model']} with {config['solver']}, {config['steps']} steps."]
    if "verdicts" in results:
        wrong = _figure(rows["plain"], "wrong")
        if wrong is not None:
            lines.append(f"{round(wrong.value * count)} of {count} are wrong ({wrong.percent()}), says the verifier.")
    if "flagged" in results:
        free = _free(results.get("calibration", {"detector": "variance"}))
        line = f"The detector{', which costs no call,' if free else ''} flagged {results['flagged']}"
        if "flagged_wrong" in results:
            line += f", {results['flagged_wrong']} of the wrong ones among them"
        area = results.get("auc")
        if area and area["value"] is not None and area["se"] is not None:
            line += f"; its AUC on these samples is {area['value']:.2f} ± {area['se']:.2f}"
        lines.append(line + ".")
    for name, row in rows.items():
        after = _figure(row, "wrong")
        if name != "plain" and after is not None:
            lines.append(f"After {_stage(name)}: {round(after.value * count)} wrong ({after.percent()}).")
    return lines


@dataclass(frozen=True)
class _Tile:
    image: str
    verdict: str
    good: bool | None
    flagged: bool
    seed: int
    title: str


@dataclass(frozen=True)
class _Sheet:
    title: str
    tiles: list[_Tile]
    picture: str | None = None


def _sheet(title: str, x: Tensor, stage: str, samples: dict[str, Tensor], record: Mapping[str, Any]) -> _Sheet:
    """One batch of samples: tiles with flags and verdicts, or one scatter plot where samples are points."""
    tail = "" if stage == "plain" else f".{stage}"
    verdicts = record["results"].get("verdicts")
    codes = samples.get(f"verdict{tail}")
    flagged = samples.get("flagged", torch.zeros(len(x)))
    if x.shape[1:] == (2,):
        bad = [int(c) != 0 for c in codes.tolist()] if codes is not None else [False] * len(x)
        frames = [
            pictures.COLORS["bad"] if b else pictures.COLORS["flag"] if f else None
            for b, f in zip(bad, flagged.tolist(), strict=True)
        ]
        return _Sheet(title, [], pictures.data_uri(pictures.grid(x, frames=frames)))
    first = record["seeds"]["first"]
    tiles = []
    for b in range(min(len(x), _MOST_TILES)):
        verdict = verdicts[int(codes[b])] if verdicts and codes is not None else ""
        risk = float(samples[f"risk{tail}"][b])
        tiles.append(
            _Tile(
                image=pictures.data_uri(pictures.single(x, b)),
                verdict=verdict,
                good=None if not verdict else verdict == "ok",
                flagged=bool(flagged[b]),
                seed=first + b,
                title=f"seed {first + b}, risk {risk:.3g}" + (f", {verdict}" if verdict else ""),
            )
        )
    return _Sheet(title, tiles)


def _sheets(samples: dict[str, Tensor], record: Mapping[str, Any]) -> list[_Sheet]:
    guard = [text.partition(":")[0] for text in record["config"].get("guard") or [] if text != "none"]
    before = pictures.shown(samples, "before" if "before" in samples else "x")
    sheets = [_sheet("Before" if guard else "Samples", before, "plain", samples, record)]
    for k, name in enumerate(guard):
        x = pictures.shown(samples, "x" if k == 0 else f"x.{name}")
        sheets.append(_sheet(f"After {_stage(name)}", x, name, samples, record))
    return sheets


def _picks(samples: dict[str, Tensor], verdicts: Sequence[str] | None) -> list[tuple[str, int]]:
    """One bad and one good sample, or those of highest and lowest risk."""
    risk, codes = samples["risk"], samples.get("verdict")
    if codes is None or not verdicts:
        return [("highest risk", int(risk.argmax())), ("lowest risk", int(risk.argmin()))]
    bad, good = (codes != 0).nonzero().flatten(), (codes == 0).nonzero().flatten()
    picks = [("wrong", int(bad[risk[bad].argmax()]))] if len(bad) else []
    return picks + ([("good", int(good[risk[good].argmin()]))] if len(good) else [])


def _films(folder: Path, samples: dict[str, Tensor], record: Mapping[str, Any]) -> list[Figure]:
    """How one good and one bad sample came about: their states and their predictions."""
    path = folder / "trajectory.safetensors"
    if not path.is_file():
        return []
    run, verdicts = Trajectory.load(path), record["results"].get("verdicts")
    if run.x.ndim != 5 or run.x.shape[2] not in (1, 3):
        return []
    keep = torch.linspace(0, len(run.denoised) - 1, min(len(run.denoised), _MOST_FRAMES)).round().long().unique()
    level = torch.where(run.sigmas.isinf(), 1.0, torch.sqrt(1 + run.sigmas**2)).reshape(-1, 1, 1, 1)
    labels = [f"sigma {sigma:.3g}" for sigma in run.sigmas[keep].tolist()]
    films, codes = [], samples.get("verdict")
    for word, b in _picks(samples, verdicts):
        verdict = f", {verdicts[int(codes[b])]}" if verdicts and codes is not None else ""
        title = f"{word}{verdict}: seed {record['seeds']['first'] + b}, risk {float(samples['risk'][b]):.3g}"
        scaled = run.x[:, b] / level.to(run.x)  # unit scale at every sigma, so that the noise can be seen
        layers = {
            name: pictures.to_bytes(x[keep]).movedim(1, -1)[None]
            for name, x in (("states", scaled), ("predictions", run.denoised[:, b]))
        }
        films.append(Figure(f"strip-{word.replace(' ', '-')}", title, [Film(layers, labels)]))
    return films


def _kinds(wrong: Tensor | None, count: int) -> list[tuple[str, str, Tensor]]:
    """Groups of samples to draw apart: label, color, indices."""
    if wrong is None:
        return [("samples", pictures.COLORS["plain"], torch.arange(count))]
    groups = [("good", pictures.COLORS["good"], ~wrong), ("wrong", pictures.COLORS["bad"], wrong)]
    return [(label, color, mask.nonzero().flatten()) for label, color, mask in groups]


def _risks(samples: dict[str, Tensor], record: Mapping[str, Any], threshold: float | None) -> list[Figure]:
    """The risk of every sample as it stood after each step, and its distribution at the end."""
    per_step, risk, first = samples["per_step"], samples["risk"], record["seeds"]["first"]
    steps, sigmas = list(range(1, per_step.shape[1] + 1)), [float(s) for s in record["results"]["sigmas"]]
    if len(sigmas) != len(steps) + 1:
        raise ValueError(f"{len(sigmas)} sigmas for {len(steps)} steps")
    groups = _kinds(samples["verdict"] != 0 if "verdict" in samples else None, len(risk))
    lines = [
        Line(label, steps, per_step[b].tolist(), color=color, faint=True, hover=f"seed {first + b}")
        for label, color, rows in groups
        for b in rows.tolist()[:_MOST_LINES]
    ]
    color = pictures.COLORS["flag"]
    level = [] if threshold is None else [Mark(threshold, "threshold", level=True, color=color)]
    bar = [] if threshold is None else [Mark(threshold, "threshold", color=color)]
    values = {label: risk[rows].tolist() for label, _, rows in groups}
    colors = [color for _, color, _ in groups]
    return [
        Figure(
            "risk-lines",
            f"Steps go from sigma {sigmas[0]:.3g} to {sigmas[-1]:.3g}.",
            [Panel("step", "risk so far", lines, level, from_zero=True)],
        ),
        Figure(
            "risk-histogram",
            "",
            [histogram("risk", values, bins=30, share=False, colors=colors, marks=bar)],
        ),
    ]


def sampling_page(folder: Path, record: Mapping[str, Any]) -> Page:
    """Return the page of a sampling run, from its record, its `samples.safetensors` and its `trajectory.safetensors`.

    Raises:
        FanalError: a file is not there, or not what it should be.
    """
    samples, _ = read_tensors(folder / "samples.safetensors")
    results, config = record["results"], record["config"]
    calibration = results.get("calibration")
    films = _films(folder, samples, record)
    head, rows = table(results)
    kinds_head, kinds_rows = kinds(results) if "verdicts" in results else ([], [])
    diversity_head, diversity_rows = diversity(results)
    values = {
        "title": f"{record['command']}: {config['model']}",
        "config": config,
        "lines": headline(record),
        "head": head,
        "rows": rows,
        "kinds_head": kinds_head,
        "kinds_rows": kinds_rows,
        "diversity_head": diversity_head,
        "diversity_rows": diversity_rows,
        "by_kind": [(name, _plain({"a": value}, "a", 2)) for name, value in results.get("auc_by_verdict", {}).items()],
        "sheets": _sheets(samples, record),
        "strips": [film.name for film in films],
        "calibration": calibration,
        "free": _free(calibration),
        "origin": results.get("threshold_from", ""),
        "facts": facts_of(record),
        "colors": pictures.COLORS,
        "shown": min(len(samples["risk"]), _MOST_TILES),
    }
    risks = _risks(samples, record, calibration["threshold"] if calibration else None)
    tables = [
        Table("methods", head, rows, "Each figure ± one standard error."),
        Table("errors-by-kind", kinds_head, kinds_rows),
        Table("diversity", diversity_head, diversity_rows, "Standard deviation relative to right samples of the data."),
    ]
    return Page("sampling.html.j2", values, [*films, *risks], [each for each in tables if each.rows])

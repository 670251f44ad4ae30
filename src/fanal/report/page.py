"""The page of a run: what was found, the evidence, and how it is known."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from fanal import pictures
from fanal.errors import FanalError
from fanal.files import read_json, read_tensors, write_atomically
from fanal.hallucination.detectors import FREE
from fanal.metrics import Estimate
from fanal.report import figures
from fanal.report.audit import write_audit
from fanal.report.geometry import write_geometry
from fanal.trajectory import Trajectory

__all__ = ["headline", "table", "write_report"]

_MOST_TILES = 100

NAMES = {
    "plain": "plain",
    "redo": "redo (same noise, lower temperature)",
    "renoise": "renoise (back up with fresh noise)",
    "fresh": "fresh (other noise from the start)",
}
"""What the stages of a run are called in tables; others by their own name."""


def _stage(name: str) -> str:
    return NAMES.get(name, name)


def _figure(row: dict[str, Any], key: str) -> Estimate | None:
    value = row.get(key)
    if value is None:
        return None
    number, error = (float("nan") if value[part] is None else float(value[part]) for part in ("value", "se"))
    return Estimate(number, error, int(value["n"]))


def _percent(row: dict[str, Any], key: str) -> str:
    value = _figure(row, key)
    return "–" if value is None else value.percent()


def _plain(row: dict[str, Any], key: str, digits: int) -> str:
    value = _figure(row, key)
    return "–" if value is None else value.plain(digits)


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
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


def diversity(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the diversity table; no rows where nothing was measured."""
    rows = [row for row in results["table"] if row.get("diversity")]
    names = list(rows[0]["diversity"]) if rows else []
    cells = [[_stage(row["name"]), *(_plain(row["diversity"], name, 2) for name in names)] for row in rows]
    return ["method", *(name.replace("_", " ") for name in names)], cells


def kinds(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table of errors by kind: samples of each verdict, for each method."""
    rows = [[_stage(row["name"]), *map(str, row["verdicts"])] for row in results["table"]]
    return ["method", *results["verdicts"]], rows


def headline(record: dict[str, Any]) -> list[str]:
    """Return what a run found, in a few plain sentences."""
    config, results = record["config"], record["results"]
    count, rows = config["count"], {row["name"]: row for row in results["table"]}
    lines = [f"{count} samples of {config['model']} with {config['solver']}, {config['steps']} steps."]
    if "verdicts" in results:
        wrong = _figure(rows["plain"], "wrong")
        if wrong is not None:
            lines.append(f"{round(wrong.value * count)} of {count} are wrong ({wrong.percent()}), says the verifier.")
    if "flagged" in results:
        free = results.get("calibration", {}).get("detector", "variance") in FREE
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


def _sheet(title: str, x: Tensor, stage: str, samples: dict[str, Tensor], record: dict[str, Any]) -> _Sheet:
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
                image=pictures.data_uri(pictures.grid(x[b : b + 1])),
                verdict=verdict,
                good=None if not verdict else verdict == "ok",
                flagged=bool(flagged[b]),
                seed=first + b,
                title=f"seed {first + b}, risk {risk:.3g}" + (f", {verdict}" if verdict else ""),
            )
        )
    return _Sheet(title, tiles)


def _sheets(samples: dict[str, Tensor], record: dict[str, Any]) -> list[_Sheet]:
    guard = [text.partition(":")[0] for text in record["config"].get("guard") or [] if text != "none"]
    before = pictures.shown(samples, "before" if "before" in samples else "x")
    sheets = [_sheet("Before" if guard else "Samples", before, "plain", samples, record)]
    for k, name in enumerate(guard):
        x = pictures.shown(samples, "x" if k == 0 else f"x.{name}")
        sheets.append(_sheet(f"After {_stage(name)}", x, name, samples, record))
    return sheets


def _strips(folder: Path, samples: dict[str, Tensor], record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The denoising strips of one good and one bad sample: title, sampling strip, denoising strip."""
    path = folder / "trajectory.safetensors"
    if not path.is_file():
        return []
    run, verdicts = Trajectory.load(path), record["results"].get("verdicts")
    if run.x.shape[2:] == (2,):
        return []
    risk, codes = samples["risk"], samples.get("verdict")
    if codes is not None and verdicts:
        bad, good = (codes != 0).nonzero().flatten(), (codes == 0).nonzero().flatten()
        picks = [("wrong", bad[risk[bad].argmax()])] if len(bad) else []
        picks += [("good", good[risk[good].argmin()])] if len(good) else []
    else:
        picks = [("highest risk", risk.argmax()), ("lowest risk", risk.argmin())]
    out = []
    for word, index in picks:
        b = int(index)
        verdict = f", {verdicts[int(codes[b])]}" if verdicts and codes is not None else ""
        title = f"{word}{verdict}: seed {record['seeds']['first'] + b}, risk {float(risk[b]):.3g}"
        level = torch.where(run.sigmas.isinf(), 1.0, torch.sqrt(1 + run.sigmas**2)).reshape(-1, *[1] * (run.x.ndim - 2))
        scaled = run.x[:, b] / level.to(run.x)  # unit scale at every sigma, so that the noise can be seen
        pair = [pictures.data_uri(pictures.strip(part)) for part in (scaled, run.denoised[:, b])]
        out.append((title, pair[0], pair[1]))
    return out


def _facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    config, network = record["config"], record["network"]
    facts = [(key, str(value)) for key, value in config.items() if value not in (None, [], ())]
    facts.append(("network calls", f"{network['calls']} batches, {network['evaluations']} samples"))
    facts.append(("seconds", f"{record['seconds']:.1f}"))
    facts += [(f"{name} version", value) for name, value in record.get("versions", {}).items()]
    return facts


def write_report(folder: str | Path) -> Path:
    """Write `report.html` from a run folder's `run.json`, `samples.safetensors` and `trajectory.safetensors`.

    Raises:
        FanalError: the folder is no finished run, or cannot be written.
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise FanalError(f"{folder} is not a run folder: it has no run.json; fanal sample and fanal demo write one")
    record = read_json(folder / "run.json")
    own = {"geometry": write_geometry, "audit": write_audit}.get(record.get("command", ""))
    if own is not None:
        return own(folder)
    if not isinstance(record.get("results"), dict) or "table" not in record["results"]:
        raise FanalError(f"{folder} is not a run of fanal sample or fanal demo, and has no page: see its run.json")
    samples, _ = read_tensors(folder / "samples.safetensors")
    try:
        page = _render(folder, record, samples)
    except FanalError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, jinja2.UndefinedError) as error:
        raise FanalError(f"{folder} is not a run of fanal sample or fanal demo: {error!r:.200}") from error
    target = folder / "report.html"
    write_atomically(target, lambda part: part.write_text(page, encoding="utf-8"))
    return target


def _render(folder: Path, record: dict[str, Any], samples: dict[str, Tensor]) -> str:
    results, config = record["results"], record["config"]
    calibration = results.get("calibration")
    threshold = calibration["threshold"] if calibration else None
    wrong = samples["verdict"] != 0 if "verdict" in samples else None
    first = record["seeds"]["first"]
    seeds, levels = range(first, first + len(samples["risk"])), [float(s) for s in results["sigmas"]]
    source = (resources.files("fanal.report") / "page.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    head, rows = table(results)
    kinds_head, kinds_rows = kinds(results) if "verdicts" in results else ([], [])
    return template.render(
        record=record,
        config=config,
        lines=headline(record),
        head=head,
        rows=rows,
        kinds_head=kinds_head,
        kinds_rows=kinds_rows,
        diversity_head=diversity(results)[0],
        diversity_rows=diversity(results)[1],
        by_kind=[(name, _plain({"a": value}, "a", 2)) for name, value in results.get("auc_by_verdict", {}).items()],
        sheets=_sheets(samples, record),
        strips=_strips(folder, samples, record),
        lines_figure=figures.risk_lines(samples["per_step"], levels, seeds, wrong, threshold),
        histogram=figures.risk_histogram(samples["risk"], wrong, threshold),
        calibration=calibration,
        free=calibration is not None and calibration["detector"] in FREE,
        origin=results.get("threshold_from", ""),
        facts=_facts(record),
        colors=pictures.COLORS,
        script=figures.script(),
        shown=min(len(samples["risk"]), _MOST_TILES),
    )

"""How well does each detector tell wrong samples from right ones, how early, and at what price?

Every free detector watches the same runs: Euler, 40 steps, Karras' grid, report seeds from 0. Those that ask the
network watch the first of them, where the predictions on the way are judged too. The combined detectors are fitted to
the free ones' risks on calibration seeds. Windows were chosen on tuning seeds (`fanal.hallucination.hints.WINDOWS`).

    python benchmarks/detectors.py --out benchmarks/results/detectors.json

A data set that the file already holds with the same settings is not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fanal
from fanal.bench.plots import Line, Panel, write_plots
from fanal.datasets import get
from fanal.files import read_json, write_json
from fanal.hallucination import combination, evaluate
from fanal.hallucination.calibration import FIRST_SEED
from fanal.hallucination.detectors import DETECTORS, FREE, Detector, build
from fanal.hallucination.hints import window_of
from fanal.hallucination.observation import Observed, observe
from fanal.runs import versions
from fanal.schedules import polynomial
from fanal.solvers import Euler

COUNTS = {"grid2": (4096, 4096), "shapes32": (1024, 512), "hands32": (1024, 512)}
JUDGED = (0.3, 6.0)
READINGS = ("residual", "score")


def detectors(data: str, sigmas: Tensor) -> tuple[dict[str, Detector], dict[str, Detector]]:
    """The free ones and those that ask, by name."""
    made = {name: build(name, window_of(name, sigmas, data)) for name in DETECTORS}
    free = {name: made[name] for name in FREE}
    asking = {name: made[name] for name in DETECTORS if name not in (*FREE, "rods_index")}
    window = window_of("rods_index", sigmas, data)
    asking |= {f"rods_index, v = {v}": build("rods_index", window, v=v) for v in READINGS}
    return free, asking


def figures(risk: Tensor, codes: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """AUC and true-positive rate, and the AUC of each kind of error against the right samples."""
    kinds = {}
    for code, name in enumerate(names):
        some = (codes == 0) | (codes == code)
        if code and int((codes == code).sum()) >= 8:
            kinds[name] = dataclasses.asdict(evaluate.roc(risk[some], codes[some]).auc)
    area, tpr = evaluate.roc(risk, codes).auc, evaluate.tpr_at(risk, codes, 0.2)
    return {"auc": dataclasses.asdict(area), "tpr_at_20": dataclasses.asdict(tpr), "auc_by_kind": kinds}


def row(seen: Observed, name: str, detector: Detector, sigmas: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """All about one detector."""
    curve = evaluate.auc_by_step(seen.per_step[name], seen.wrong, sigmas)
    known = [i for i, value in enumerate(curve.auc.tolist()) if math.isfinite(value)]
    return {
        "window": [round(float(v), 4) for v in detector.window],
        "free": detector.free,
        "cost": dataclasses.asdict(seen.costs[name]),
        **figures(seen.risks[name], seen.labels, names),
        "by_step": [
            {"sigma": float(curve.sigmas[i]), "auc": float(curve.auc[i]), "se": none(float(curve.se[i]))} for i in known
        ],
        "reaches": {f"{level:g}": curve.reaches(level) for level in (0.6, 0.7, 0.8, 0.9)},
    }


def none(value: float) -> float | None:
    """NaN is no JSON."""
    return value if math.isfinite(value) else None


def measure(data: str, count: int, few: int, block: int) -> dict[str, Any]:
    """Observe calibration and report seeds, and judge every detector."""
    model, dataset, sigmas = fanal.load(data), get(data), polynomial(40)
    free, asking = detectors(data, sigmas)

    def look(eyes: dict[str, Detector], seeds: range, judged: tuple[float, float] | None = None) -> Observed:
        return observe(
            model, sigmas, Euler(), eyes, seeds, block=block, verify=dataset.verify, judged=judged, keep=False
        )

    taught = look(free, range(FIRST_SEED, FIRST_SEED + count))
    plain = {name: detector for name, detector in free.items() if name != "contrast"}
    fits = {
        "combined": combination.fit(free, taught.risks, taught.wrong),
        "combined, no contrast": combination.fit(plain, taught.risks, taught.wrong),
    }
    free |= {name: found.detector for name, found in fits.items()}
    all_seen, few_seen = look(free, range(count)), look(asking, range(few), JUDGED)
    made = evaluate.decision(few_seen.by_step, few_seen.labels, few_seen.judged)
    rows = {name: row(all_seen, name, detector, sigmas, dataset.verdicts) for name, detector in free.items()}
    rows |= {name: row(few_seen, name, detector, sigmas, dataset.verdicts) for name, detector in asking.items()}
    for name, found in fits.items():
        rows[name]["cross_validated"] = dataclasses.asdict(found.auc)
        weights = zip(found.detector.parts, free, strict=False)
        rows[name]["weights"] = {part: round(p.weight, 3) for p, part in weights}
    return {
        "count": count,
        "few": few,
        "wrong": dataclasses.asdict(fanal.metrics.rate(all_seen.wrong)),
        "detectors": rows,
        "decision": [
            {"sigma": float(s), "same": dataclasses.asdict(a), "settled": dataclasses.asdict(b)}
            for s, a, b in zip(made.sigmas, made.same, made.settled, strict=True)
        ],
        "decided": {f"{share:g}": made.reached(share) for share in (0.5, 0.8, 0.9)},
    }


def table(data: str, found: dict[str, Any]) -> Table:
    """One line per detector."""
    result = Table(title=f"{data}, {found['count']} samples ({found['few']} for those that ask)")
    for column in ("detector", "window", "calls", "products", "AUC", "TPR at 20 %", "AUC 0.7 at sigma"):
        result.add_column(column, justify="left" if column == "detector" else "right")
    for name, line in sorted(found["detectors"].items(), key=lambda item: -item[1]["auc"]["value"]):
        auc, tpr = (fanal.metrics.Estimate(**line[key]) for key in ("auc", "tpr_at_20"))
        low, high = line["window"]
        cost = line["cost"]
        result.add_row(
            name,
            f"{low:g} to {high:g}",
            f"{cost['evaluations']:g}",
            f"{cost['products']:g}",
            auc.plain(3),
            tpr.plain(2),
            f"{line['reaches']['0.7'] or math.nan:.2f}",
        )
    return result


def draw(path: Path, sets: dict[str, Any]) -> None:
    """AUC against the noise level at which the score is there, and when the verdict stands."""
    panels = []
    for data, found in sets.items():
        lines = [
            Line(
                name,
                [p["sigma"] for p in line["by_step"]],
                [p["auc"] for p in line["by_step"]],
                [p["se"] for p in line["by_step"]],
            )
            for name, line in found["detectors"].items()
        ]
        made = found["decision"]
        sigmas, settled = [p["sigma"] for p in made], [p["settled"] for p in made]
        values, errors = [p["value"] for p in settled], [p["se"] for p in settled]
        lines.append(Line("share of samples whose verdict stands", sigmas, values, errors))
        panels.append(Panel(f"{data}: AUC of the score so far", lines, "sigma", "AUC", log=False))
    write_plots(path, "Detectors: how early, how well", panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(COUNTS), choices=list(COUNTS))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the usual numbers of samples")
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("detectors.json"))
    parser.add_argument("--plot", type=Path, help="write the AUC against sigma as a page")
    options = parser.parse_args()
    settings = {"scale": options.scale, "block": options.block, "first_calibration_seed": FIRST_SEED}
    before = read_json(options.out) if options.out.is_file() else {}
    sets = dict(before["sets"]) if before.get("settings") == settings else {}
    console = Console(width=140)
    torch.set_num_threads(1)
    for data in options.data:
        if data not in sets:
            count, few = (max(64, round(options.scale * n)) for n in COUNTS[data])
            sets[data] = measure(data, count, few, options.block)
            write_json(options.out, {"settings": settings, "versions": versions(), "sets": sets})
        console.print(table(data, sets[data]))
    if options.plot:
        draw(options.plot, sets)


if __name__ == "__main__":
    main()

"""How well does each detector tell wrong samples from right ones, how early, and at what price?

Every free detector watches the same runs: Euler, 40 steps, Karras' grid, report seeds from 0. Those that ask the
network watch the first of them, where the predictions on the way are judged too. The combined detectors are fitted to
the free ones' risks on calibration seeds. Windows were chosen on tuning seeds (`fanal.hallucination.hints.WINDOWS`).

    python benchmarks/detectors.py --out benchmarks/results/detectors.json

What the file already holds with the same settings is not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata
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
from fanal.summary import estimated

COUNTS = {"grid2": (4096, 4096), "shapes32": (512, 512), "hands32": (512, 512)}
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


def row(
    seen: Observed, name: str, detector: Detector, sigmas: Tensor, names: tuple[str, ...], held: Tensor | None
) -> dict[str, Any]:
    """All about one detector; `held` is the contrast of the samples."""
    curve = evaluate.auc_by_step(seen.per_step[name], seen.wrong, sigmas)
    known = [i for i, value in enumerate(curve.auc.tolist()) if math.isfinite(value)]
    right = ~seen.wrong
    content = None if held is None else rank_correlation(seen.risks[name][right], held[right])
    return {
        "window": [round(float(v), 4) for v in detector.window],
        "free": detector.free,
        "cost": dataclasses.asdict(seen.costs[name]),
        **figures(seen.risks[name], seen.labels, names),
        "rank_correlation_with_contrast": content,
        "by_step": [
            {"sigma": float(curve.sigmas[i]), "auc": float(curve.auc[i]), "se": none(float(curve.se[i]))} for i in known
        ],
        "reaches": {f"{level:g}": curve.reaches(level) for level in (0.6, 0.7, 0.8, 0.9)},
    }


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's."""
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def none(value: float) -> float | None:
    """NaN is no JSON."""
    return value if math.isfinite(value) else None


class Study:
    """One data set: the model, its verifier, the detectors."""

    def __init__(self, data: str, block: int) -> None:
        self.model, self.dataset, self.sigmas, self.block = fanal.load(data), get(data), polynomial(40), block
        self.free, self.asking = detectors(data, self.sigmas)

    def look(self, eyes: dict[str, Detector], seeds: range, judged: tuple[float, float] | None = None) -> Observed:
        """Watch Euler's runs from these seeds."""
        verify = self.dataset.verify
        return observe(
            self.model, self.sigmas, Euler(), eyes, seeds, block=self.block, verify=verify, judged=judged, keep=False
        )

    def measure_free(self, count: int) -> dict[str, Any]:
        """Fit the combined detectors on calibration seeds, and judge all free ones on report seeds."""
        names, eyes = self.dataset.verdicts, dict(self.free)
        taught = self.look(eyes, range(FIRST_SEED, FIRST_SEED + count))
        sets = {
            "combined": dict(eyes),
            "combined, no contrast": {name: eye for name, eye in eyes.items() if name != "contrast"},
            "variance and undecided": {name: eyes[name] for name in ("variance", "undecided")},
        }
        fits = {name: combination.fit(some, taught.risks, taught.wrong) for name, some in sets.items()}
        eyes |= {name: found.detector for name, found in fits.items()}
        seen = self.look(eyes, range(count))
        held = seen.risks["contrast"]
        rows = {name: row(seen, name, eye, self.sigmas, names, held) for name, eye in eyes.items()}
        for name, found in fits.items():
            weights = {part: round(p.weight, 3) for p, part in zip(found.detector.parts, sets[name], strict=True)}
            rows[name] |= {"cross_validated": dataclasses.asdict(found.auc), "weights": weights}
        return {"count": count, "wrong": dataclasses.asdict(fanal.metrics.rate(seen.wrong)), "detectors": rows}

    def measure_asking(self, count: int) -> dict[str, Any]:
        """Judge the detectors that ask, and the predictions on the way, on the first report seeds."""
        seen = self.look(self.asking, range(count), JUDGED)
        made = evaluate.decision(seen.by_step, seen.labels, seen.judged)
        return {
            "count": count,
            "detectors": {
                name: row(seen, name, eye, self.sigmas, self.dataset.verdicts, None)
                for name, eye in self.asking.items()
            },
            "decision": [
                {"sigma": float(s), "same": dataclasses.asdict(a), "settled": dataclasses.asdict(b)}
                for s, a, b in zip(made.sigmas, made.same, made.settled, strict=True)
            ],
            "decided": {f"{share:g}": made.reached(share) for share in (0.5, 0.8, 0.9)},
        }


def table(data: str, found: dict[str, Any]) -> Table:
    """One line per detector."""
    few, rows = found["asking"]["count"], found["free"]["detectors"] | found["asking"]["detectors"]
    result = Table(title=f"{data}, {found['free']['count']} samples ({few} for those that ask)")
    for column in ("detector", "window", "calls", "products", "AUC", "TPR at 20 %", "AUC 0.7 at sigma", "contrast"):
        result.add_column(column, justify="left" if column == "detector" else "right")
    for name, line in sorted(rows.items(), key=lambda item: -item[1]["auc"]["value"]):
        auc, tpr = (estimated(line[key]) for key in ("auc", "tpr_at_20"))
        low, high = line["window"]
        cost = line["cost"]
        result.add_row(
            name,
            f"{low:g} to {high:g}",
            f"{cost['evaluations']:g}",
            f"{cost['products']:g}",
            auc.plain(3),
            tpr.plain(2),
            f"{line['reaches']['0.7'] or math.nan:.3g}",
            f"{line['rank_correlation_with_contrast'] or math.nan:.2f}",
        )
    return result


def draw(path: Path, sets: dict[str, Any]) -> None:
    """AUC against the noise level at which the score is there, and when the verdict stands."""
    panels = []
    for data, found in sets.items():
        rows = found["free"]["detectors"] | found["asking"]["detectors"]
        lines = [
            Line(
                name,
                [math.log10(p["sigma"]) for p in line["by_step"]],
                [p["auc"] for p in line["by_step"]],
                [p["se"] for p in line["by_step"]],
            )
            for name, line in rows.items()
        ]
        made = found["asking"]["decision"]
        sigmas, settled = [math.log10(p["sigma"]) for p in made], [p["settled"] for p in made]
        values, errors = [p["value"] for p in settled], [p["se"] for p in settled]
        lines.append(Line("share of samples whose verdict stands", sigmas, values, errors))
        panels.append(Panel(f"{data}: AUC of the score so far", lines, "log10 sigma", "AUC", log=False))
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
        counts = dict(zip(("free", "asking"), (max(64, round(options.scale * n)) for n in COUNTS[data]), strict=True))
        found, study = sets.setdefault(data, {}), None
        for stage, count in counts.items():
            if stage not in found:
                study = study or Study(data, options.block)
                found[stage] = study.measure_free(count) if stage == "free" else study.measure_asking(count)
                write_json(options.out, {"settings": settings, "versions": versions(), "sets": sets})
        console.print(table(data, found))
    if options.plot:
        draw(options.plot, sets)


if __name__ == "__main__":
    main()

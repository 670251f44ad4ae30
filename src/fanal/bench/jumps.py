"""`fanal bench jumps`: what a run is worth if it goes straight to its denoised prediction at any node (ODE-Jump).

The denoising trajectory `D(x_i, sigma_i)` is what a run gives that jumps at node i; the sampling trajectory `x_i` is
what it gives if it just stops there ([GEO] sec. 3.2, figs. 22–28). On a searched grid it is GITS-Jump.

Both are read off one run. Solvers that draw noise do so as in the full run, so that a cut grid gives the same samples.
Two kinds differ from that: one that lowers an order of 3 near the end of its grid, and churn, whose noise depends on
the number of intervals and whose prediction is that at the raised sigma.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fanal import metrics
from fanal.bench.plans import Found, Outcome, Plan
from fanal.bench.plots import Line, Panel
from fanal.bench.quality import Judge, calls_on, dataset_of, short
from fanal.bench.schedule_tables import markdown
from fanal.errors import FanalError
from fanal.generation import identity
from fanal.metrics.statistics import Statistics
from fanal.preparation import SampleConfig, Setup, prepare, sampling_of
from fanal.runs import Progress
from fanal.sampling import trace
from fanal.schedules import plain_sigmas
from fanal.seeding import noise
from fanal.summary import as_json

__all__ = ["MEASURES", "JumpsConfig", "pick"]

MEASURES: Mapping[str, int] = {"fid": -1, "sliced_wasserstein": -1, "right": 1}
"""Figures by name, with the sign of what is better: +1 more, −1 less."""

_PARTS = ("chosen on", "reported")
_DIRECTIONS = 128


@dataclass(frozen=True)
class JumpsConfig:
    """What the comparison depends on; written to `run.json`.

    Attributes:
        model: spec, as in `fanal.load`; its card names the data it was trained on.
        solver: as on the command line.
        schedule: as on the command line, or a schedule file; None: as in `fanal sample`.
        steps: number of intervals of the full run.
        count: samples on which the jump is chosen, and as many others on which it is reported.
        real: real samples to compare with, as in `fanal eval`; None: held-out ones of the data that the card names.
        features: as in `fanal eval`.
        label, prompt, captions, negative, guidance: conditions, as in `SampleConfig`.
        seed: run seed.
        block: samples computed together.
        allow_bin, device: as in `SampleConfig`.
        threads: CPU threads.
    """

    command: ClassVar[str] = "bench jumps"

    model: str
    solver: str = "heun"
    schedule: str | None = None
    steps: int = 40
    count: int = 512
    real: str | None = None
    features: str = "auto"
    label: int | str | None = None
    prompt: str | None = None
    captions: str | None = None
    negative: str = ""
    guidance: float | None = None
    seed: int = 0
    block: int = 64
    allow_bin: bool = False
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.count < 3:
            raise FanalError(f"count must be at least 3, got {self.count}")

    def sampling(self) -> SampleConfig:
        """Return the settings of the run, over both halves of the samples."""
        return sampling_of(self, count=2 * self.count)

    def plan(self) -> Plan:
        """Return the blocks of samples; they keep what the judge sees at every node.

        Raises:
            FanalError: the configuration does not fit the model, or there is nothing to compare with.
        """
        setup, about = prepare(self.sampling())
        judge = _judge(self, setup, about)
        content = identity(setup.config, setup.network)
        content["features"] = f"{judge.extract.name} {judge.extract.sha256}".strip()
        total = 2 * self.count
        parts = [range(at, min(at + self.block, total)) for at in range(0, total, self.block)]
        blocks = [lambda found, rows=rows: _block(setup, judge, rows) for rows in parts]

        def close(found: Sequence[Found], progress: Progress) -> Outcome:
            whole = {name: torch.cat([tensors[name] for tensors, _ in found]) for name in found[0][0]}
            results = _results(setup, judge, whole, self.count, progress)
            return Outcome(results, tables(results), panels(results))

        return Plan(blocks, close, "blocks", content)


def _judge(config: JumpsConfig, setup: Setup, about: Mapping[str, Any]) -> Judge:
    """Judge by the given real samples, and by the card's data where it names any."""
    if config.real is None:
        return Judge.of(dataset_of(about, setup.network), config.count, config.features, setup.network)
    return Judge.against(
        config.real, config.count, config.features, setup.network, rule=setup.dataset, device=config.device
    )


def pick(figures: Sequence[Mapping[str, Any]], full: Mapping[str, Any], better: int) -> int:
    """Return the first node from which on no jump is worse than the full run by more than its standard error.

    Args:
        figures: value of a jump at each node.
        full: value and standard error of the full run.
        better: sign of what is better.
    """
    slack = full["se"] if full["se"] is not None else 0.0
    for node in range(len(figures), 0, -1):
        if better * (figures[node - 1]["value"] - full["value"]) < -slack:
            return min(node, len(figures) - 1)
    return 0


def _block(setup: Setup, judge: Judge, rows: range) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Run some samples and keep what the judge sees at every node, on both trajectories."""
    seeds = setup.config.seeds()[rows.start : rows.stop]
    x = noise(setup.network.shape, seeds, float(setup.sigmas[0]), device=setup.config.device)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {"x": [], "denoised": []}
    with torch.no_grad():
        for transition in trace(setup.bound(rows), x, setup.sigmas, setup.solver, seeds):
            seen["x"].append(judge.look(transition.x))
            seen["denoised"].append(judge.look(transition.step.denoised))
            x = transition.step.x_next
        seen["x"].append(judge.look(x))
    tensors = {}
    for name, found in seen.items():
        tensors[f"{name}.features"] = torch.stack([features for features, _ in found], 1)
        tensors[f"{name}.right"] = torch.stack([right for _, right in found], 1).to(torch.uint8)
    return tensors, {}


def _figures(features: Tensor, right: Tensor, judge: Judge, real: Statistics) -> dict[str, Any]:
    """What one set of samples is worth."""
    own = Statistics.of(features, judge.extract.name, judge.extract.sha256)
    distance = metrics.sliced_wasserstein(features, judge.real, directions=_DIRECTIONS)
    out = {"fid": as_json(metrics.fid(own, real)), "sliced_wasserstein": as_json(distance)}
    if judge.rule:
        out["right"] = as_json(metrics.rate(right))
    return out


def _calls(setup: Setup) -> dict[str, list[int]]:
    """Calls of a run that stops at each node, and of one that jumps there."""
    grid, zero = setup.sigmas, setup.sigmas.new_zeros(1)
    prefixes = [grid[: i + 1] for i in range(len(grid))]
    stopped = [calls_on(setup.solver, prefix) if len(prefix) > 1 else 0 for prefix in prefixes]
    jumped = [calls_on(setup.solver, torch.cat([prefix, zero])) for prefix in prefixes[:-1]]
    return {"x": stopped, "denoised": jumped}


def _results(setup: Setup, judge: Judge, whole: Mapping[str, Tensor], count: int, progress: Progress) -> dict[str, Any]:
    """Every figure of both halves, and the jump that each figure picks on the first, reported on the second."""
    real = Statistics.of(judge.real, judge.extract.name, judge.extract.sha256)
    nodes, calls = len(setup.sigmas), _calls(setup)
    parts = {_PARTS[0]: slice(0, count), _PARTS[1]: slice(count, 2 * count)}
    out: dict[str, Any] = {"sigmas": plain_sigmas(setup.sigmas), "calls": calls}
    for part, rows in parts.items():
        out[part] = {"x": [], "denoised": []}
        for i in progress(range(nodes), f"figures of the samples {part}"):
            for name in ("x", "denoised") if i < nodes - 1 else ("x",):
                features, right = (whole[f"{name}.{what}"][rows, i] for what in ("features", "right"))
                out[part][name].append(_figures(features, right.bool(), judge, real))
    out["picks"] = _picks(out)
    return out


def _picks(results: Mapping[str, Any]) -> dict[str, Any]:
    """The jump that each figure picks on the first half, and the one that satisfies all, with their second half."""
    first, second = (results[part] for part in _PARTS)
    nodes = {
        measure: pick([f[measure] for f in first["denoised"]], first["x"][-1][measure], better)
        for measure, better in MEASURES.items()
        if measure in first["x"][-1]
    }
    return {
        name: {
            "node": node,
            "sigma": results["sigmas"][node],
            "calls": results["calls"]["denoised"][node],
            "jump": second["denoised"][node],
            "full": second["x"][-1],
            "full_calls": results["calls"]["x"][-1],
        }
        for name, node in {**nodes, "all": max(nodes.values())}.items()
    }


def _entry(figures: Mapping[str, Any], measure: str) -> str:
    if measure == "right":
        own = figures[measure]
        return f"{100 * own['value']:.1f} ± {100 * own['se']:.1f} %"
    return short(figures[measure])


def tables(results: Mapping[str, Any]) -> str:
    """Return the figures as Markdown: what each rule picks, and every node."""
    own, names = results[_PARTS[1]], [m for m in MEASURES if m in results[_PARTS[1]]["x"][-1]]
    rows = []
    for measure, p in results["picks"].items():
        jump, full = ([_entry(p[side], m) for m in names] for side in ("jump", "full"))
        pairs = [f"{a} ({b})" for a, b in zip(jump, full, strict=True)]
        rows.append([measure, str(p["node"]), _level(p["sigma"]), f"{p['calls']} ({p['full_calls']})", *pairs])
    text = "The jump that each figure picks, on other samples than it was picked on; in brackets the full run\n\n"
    text += markdown(["picked by", "node", "sigma", "calls", *names], rows)
    rows = []
    for i, sigma in enumerate(results["sigmas"]):
        row = [str(i), _level(sigma)]
        for name in ("denoised", "x"):
            there = own[name][i : i + 1]
            row += [str(results["calls"][name][i]) if there else "–"]
            row += [_entry(there[0], m) if there else "–" for m in names]
        rows.append(row)
    head = ["node", "sigma", "calls, jump", *names, "calls, stop", *(f"{m}, stop" for m in names)]
    return text + "\nEvery node: the denoised prediction (jump), and the state itself (stop)\n\n" + markdown(head, rows)


def _level(sigma: float | str) -> str:
    return sigma if isinstance(sigma, str) else f"{sigma:.3g}"


def panels(results: Mapping[str, Any]) -> list[Panel]:
    """Return one plot of quality against calls for each figure, with both trajectories."""
    out = []
    for measure in MEASURES:
        lines = []
        for name, label in (("denoised", "denoised prediction (jump)"), ("x", "state (stop)")):
            figures = [f[measure] for f in results[_PARTS[1]][name] if measure in f]
            values = [f["value"] for f in figures], [f["se"] for f in figures]
            lines.append(Line(label, results["calls"][name][: len(figures)], *values))
        if lines[0].y:
            out.append(Panel(measure, lines, "calls", measure, log=False))
    return out

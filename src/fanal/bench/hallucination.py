"""`fanal bench hallucination`: detectors and corrections on models whose mistakes a rule can name, from seeds.

For every model the plain run (Euler, 40 steps, Karras' grid) is computed once under the eyes of all free detectors and
kept; methods that begin with it take it over. Thresholds and the combined detector come from calibration seeds, figures
from report seeds; strengths were chosen on a third set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fanal.bench.hallucination_cells import (
    JUDGED,
    Cell,
    Subject,
    calibration_cell,
    first_cell,
    look_cell,
    mechanism_cell,
    method_cell,
    seeds,
)
from fanal.denoiser import Denoiser
from fanal.errors import FanalError, unknown_name
from fanal.files import write_atomically, write_tensors
from fanal.hallucination.calibration import threshold_at
from fanal.hallucination.detectors import DETECTORS, Detector
from fanal.hallucination.methods import METHODS, Method, Settings
from fanal.hallucination.probe import shipped
from fanal.loading import user_function
from fanal.runs import Progress, Run, cpu_threads, quiet

__all__ = ["CONTROLS", "PLAIN", "HallucinationConfig", "Measured", "bench_hallucination"]

PLAIN = "euler"
"""The method that all others are compared with."""

CONTROLS: tuple[str, ...] = ("euler200", "random", "reversed", "churn", "early", "restart", "best", "fresh")
"""Methods that get a quarter of the samples unless a count is given: dear ones, and those that only bound the rest."""

_FIRST = 512  # samples from which a stage is worth its tables
_READINGS = (  # the paper's: its window, 10 to 50 % of the steps, and no window; the largest of the steps
    "rods_index:v=score,over=max,window=2..46",
    "rods_index:v=score,over=max,window=0..80",
    "rods_index:over=max,window=0..80",
)
_LOOKED = 128  # samples on which directions are compared


def _methods() -> dict[str, int | None]:
    return dict.fromkeys(METHODS)


@dataclass(frozen=True)
class HallucinationConfig:
    """What the benchmark measures; written to `run.json`.

    Attributes:
        models: specs whose cards name data with a rule.
        count: samples of the plain run and of each method.
        methods: built-in methods, each with its number of samples; None: `count`, a quarter of it for controls.
        submissions: methods of others, as `module:function`.
        detectors: as on the command line, `name` or `name:field=value,…`.
        budget: network evaluations that a sample may cost on average.
        calibration: samples that thresholds and the combined detector are fitted on.
        looks: samples that costly detectors look at, and whose verdict is followed along the run; of points all.
        real: held-out real samples that diversity is measured against.
        block: samples computed together.
        threads: CPU threads.
    """

    models: tuple[str, ...] = ("grid2", "shapes32", "hands32")
    count: int = 4096
    methods: Mapping[str, int | None] = field(default_factory=_methods)
    submissions: tuple[str, ...] = ()
    detectors: tuple[str, ...] = (*DETECTORS, *_READINGS)
    budget: int = 60
    calibration: int = 1024
    looks: int = 512
    real: int = 4096
    block: int = 256
    threads: int = 1

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in METHODS:
                raise unknown_name("method", name, METHODS)
        if not self.models:
            raise FanalError("there is nothing to measure: name at least one model")
        least = {"count": 64, "calibration": 64, "looks": 32, "real": 64, "budget": 1, "block": 1, "threads": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise FanalError(f"{name} must be at least {smallest}, got {getattr(self, name)}")
        for name, count in self.methods.items():
            if count is not None and not 64 <= count <= self.count:
                raise FanalError(f"{name} needs between 64 samples and those of the plain run, {self.count}: {count}")

    @classmethod
    def quick(cls) -> HallucinationConfig:
        """Return a size that takes seconds, for tests and a first look."""
        methods: dict[str, int | None] = dict.fromkeys(("heun", "cas", "temperature", "renoise"))
        names = ("variance", "last_slope", "rods_index")
        return cls(("grid2",), 512, methods, (), names, 60, 512, 128, 512)

    def counts(self) -> dict[str, int]:
        """Return how many samples each built-in method gets; the plain run is no method here."""
        few = min(self.count, max(256, self.count // 4))
        own = {name: count or (few if name in CONTROLS else self.count) for name, count in self.methods.items()}
        return {name: count for name, count in own.items() if name != PLAIN}

    def stages(self) -> list[HallucinationConfig]:
        """Return what is measured one after the other: an eighth and a half first, so that tables come early."""
        parts = [self._part(share) for share in (8, 2) if self.count // share >= _FIRST]
        return [*parts, self]

    def _part(self, share: int) -> HallucinationConfig:
        small = {name: None if count is None else max(64, count // share) for name, count in self.methods.items()}
        looks = min(self.looks, max(128, self.looks // share))
        return dataclasses.replace(self, count=self.count // share, methods=small, looks=looks)


@dataclass(frozen=True, eq=False)
class Measured:
    """Everything that was computed for one model.

    Attributes:
        subject: the model.
        settings: what its methods knew.
        calibration: the plain run on calibration seeds.
        plain: the plain run on report seeds.
        looks: costly detectors and verdicts along the run, on the first report seeds.
        about: what the costly detectors asked for per sample, and the noise levels of the judged predictions.
        methods: tensors of each method, on the first report seeds.
        costs: seconds, evaluations, products and number of samples of each block of the plain run and of each method.
        real: features and factors of held-out real samples.
        mechanism: the directions of CAS and SAS along the plain run.
    """

    subject: Subject
    settings: Settings
    calibration: Mapping[str, Tensor]
    plain: Mapping[str, Tensor]
    looks: Mapping[str, Tensor]
    about: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Tensor]]
    costs: Mapping[str, list[dict[str, float]]]
    real: Mapping[str, Tensor]
    mechanism: Cell


def _submission(target: str) -> tuple[str, Method, str]:
    """Name, function and hash of the source of a submitted method."""
    function = user_function(target)
    module = sys.modules.get(target.rpartition(":")[0])
    file = getattr(module, "__file__", None)
    content = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    try:
        inspect.signature(function).bind(*range(4))
    except (TypeError, ValueError) as error:
        raise FanalError(f"{target} must be a function of (denoiser, x, seeds, budget): {error}") from error
    return target, _guarded(target, function), content


def _guarded(target: str, function: Callable[..., Tensor]) -> Method:
    """A user's method, whose mistakes are told in one line that says where they are."""

    def method(denoiser: Denoiser, x: Tensor, seeds: Sequence[int], budget: int) -> Tensor:
        try:
            return function(denoiser, x, seeds, budget)
        except FanalError:
            raise
        except Exception as error:  # the code is the user's: anything can be wrong with it
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = (str(error).splitlines() or [""])[0]
            raise FanalError(
                f"{target} failed in {place.filename}, line {place.lineno}: {type(error).__name__}: {reason}"
            ) from error

    return method


class _Model:
    """One model's cells, each stored under a number that says what decided it."""

    def __init__(self, run: Run, config: HallucinationConfig, spec: str, progress: Progress) -> None:
        self.run, self.config, self.progress = run, config, progress
        self.subject = Subject.of(spec, config.detectors)

    def cell(self, about: str, work: Callable[[], Cell]) -> Cell:
        """Return a cell, computed or as it was stored; its number holds all that it depends on."""
        subject = self.subject
        key = f"{subject.spec}|{subject.content}|{subject.extract.sha256}|{about}"
        return self.run.block(int(hashlib.sha256(key.encode()).hexdigest()[:12], 16), work)

    def blocks(self, part: str, count: int) -> list[range]:
        size = self.config.block
        return [seeds(part, min(size, count - i), i) for i in range(0, count, size)]

    def real(self) -> Mapping[str, Tensor]:
        def work() -> Cell:
            held = self.subject.dataset.data("held out", self.config.real).x
            return {k: v for k, v in self.subject.judged(held).items() if k != "shown"}, {}

        return self.cell(f"real {self.config.real}", work)[0]

    def calibration(self) -> dict[str, Tensor]:
        parts, subject, free = self.blocks("calibration", self.config.calibration), self.subject, self.subject.free
        found = [
            self.cell(f"calibration {free} {parts[i]}", lambda i=i: calibration_cell(subject, parts[i]))[0]
            for i in self.progress(range(len(parts)), f"{subject.spec}: calibration")
        ]
        return _joined(found)

    def looks(self) -> Cell:
        """Return what costly detectors say, and the verdicts along the run."""
        tensors, about = self.looked(self.subject.costly, JUDGED)
        if self.subject.probes:
            more, notes = self.looked(self.subject.probes, None)
            return {**more, **tensors}, {**about, "costs": {**about["costs"], **notes["costs"]}}
        return tensors, about

    def looked(self, detectors: Mapping[str, Detector], judged: tuple[float, float] | None) -> Cell:
        subject, points = self.subject, len(self.subject.dataset.shape) == 1
        parts = self.blocks("report", self.config.count if points else self.config.looks)
        found = [
            self.cell(f"looks {detectors} {parts[i]}", lambda i=i: look_cell(subject, parts[i], detectors, judged))
            for i in self.progress(range(len(parts)), f"{subject.spec}: costly detectors")
        ]
        notes = found[0][1]
        return _joined([tensors for tensors, _ in found]), {key: notes[key] for key in ("costs", "judged")}

    def mechanism(self) -> Cell:
        """Return the directions along the plain run."""
        some = seeds("report", min(_LOOKED, self.config.count))
        return self.cell(f"mechanism {some}", lambda: mechanism_cell(self.subject, some))

    def measure(self) -> Measured:
        """Compute whatever is not there yet."""
        subject = self.subject
        calibration = self.calibration()
        settings = subject.settings(threshold_at(calibration[f"risk.{subject.gate}"], subject.flag))
        looks, about = self.looks()
        plain, methods, costs = self.sampled(settings)
        whole = {name: _joined([tensors for tensors, _ in cells]) for name, cells in methods.items()}
        return Measured(
            subject, settings, calibration, plain, looks, about, whole, costs, self.real(), self.mechanism()
        )

    def judge(self, name: str) -> str:
        """What judges on the ladder, in words: the probe of this network, which may be fitted again."""
        return str(shipped(self.subject.model) or "") if name == "ladder" else ""

    def sampled(
        self, settings: Settings
    ) -> tuple[dict[str, Tensor], dict[str, list[Cell]], dict[str, list[dict[str, float]]]]:
        """Compute block by block the plain run and every method on it, so that all are timed under the same load."""
        subject, config = self.subject, self.config
        made = {name: (count, METHODS[name](settings), self.judge(name)) for name, count in config.counts().items()}
        for target in config.submissions:
            name, method, content = _submission(target)
            made[name] = (config.count, method, content)
        parts, plain = self.blocks("report", config.count), []
        cells: dict[str, list[Cell]] = {name: [] for name in made}
        costs: dict[str, list[dict[str, float]]] = {name: [] for name in (PLAIN, *made)}
        for i in self.progress(range(len(parts)), f"{subject.spec}: methods"):
            some = parts[i]
            first = self.cell(f"plain {subject.free} {some}", lambda some=some: first_cell(subject, some))
            plain.append(first[0])
            costs[PLAIN].append({**first[1], "samples": len(some)})
            for name, (count, method, content) in made.items():
                own = some[: max(0, count - i * config.block)]
                if not own:
                    continue
                begun = ({k: v[: len(own)] for k, v in first[0].items()}, _share(first[1], len(own) / len(some)))
                cell = self.cell(
                    f"method {name} {content} {_told(method) or settings} {config.budget} {own}",
                    lambda m=method, own=own, begun=begun: method_cell(subject, m, own, config.budget, begun),
                )
                cells[name].append(cell)
                costs[name].append({**cell[1], "samples": len(own)})
        return _joined(plain), cells, costs


def _share(notes: Mapping[str, float], share: float) -> dict[str, float]:
    return {key: value * share for key, value in notes.items()}


def _told(method: Method) -> str:
    """What a method says of itself; empty where that only names a place in memory."""
    text = repr(method)
    return "" if " at 0x" in text else text


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _write(run: Run, name: str, measured: Measured) -> None:
    """Write what others may want to recompute figures from, verdicts and risks sample by sample, and the pictures."""
    from fanal.bench.hallucination_sheets import sheets

    out = {"verdict": measured.plain["verdict"]}
    out |= {key: value for key, value in measured.plain.items() if key.startswith("risk.")}
    out |= {f"looks.{key}": value for key, value in measured.looks.items() if key.startswith(("risk.", "path"))}
    out |= {f"verdict.{key}": tensors["verdict"] for key, tensors in measured.methods.items()}
    place = run.path(f"{_file(name)}.safetensors")
    write_tensors(place, {key: value.contiguous() for key, value in out.items()}, {"format": "fanal-hallucination-1"})
    for title, sheet in sheets(measured).items():
        write_atomically(run.path(f"{_file(name)}-{title}.png"), lambda part, sheet=sheet: sheet.save(part, "PNG"))


def _file(spec: str) -> str:
    """A file name for a model's spec."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in spec).strip("-")


def bench_hallucination(
    config: HallucinationConfig,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = quiet,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Measure detectors and corrections into a run folder.

    The folder holds `run.json`, `tables.md`, `plots.html`, one file per model with verdicts and risks, and sheets of
    pictures. A run that was stopped takes further methods, detectors and models, and larger counts, and keeps what it
    has.

    Args:
        config: what to measure.
        out: the run folder.
        overwrite: replace a finished run.
        progress: wraps loops, given what they do.
        say: takes one line for the user.

    Raises:
        FanalError: the configuration, a model, a method or the place does not work.
    """
    from fanal.bench.hallucination_results import results_of
    from fanal.bench.hallucination_tables import panels, tables
    from fanal.bench.plots import write_plots

    for target in config.submissions:
        _submission(target)
    # What decides a single cell is in its number; what is asked for in all may grow from one start to the next.
    fixed = {"block": config.block, "threads": config.threads}
    with cpu_threads(config.threads):
        with Run(out, "bench hallucination", fixed, overwrite=overwrite) as run:
            if run.resumed:
                say(f"resuming: {run.resumed} blocks are there already")
            results: dict[str, Any] = {}
            for stage in config.stages():
                for spec in config.models:
                    measured = _Model(run, stage, spec, progress).measure()
                    results[spec] = results_of(measured, config.budget, progress)
                    _write(run, spec, measured)
                    write_atomically(run.path("tables.md"), lambda part: part.write_text(tables(results), "utf-8"))
                    run.describe({"results": results})
                    here = run.path("tables.md")
                    say(f"{spec}, {stage.count} samples: done; until the run ends, the tables are in {here}")
            write_plots(run.path("plots.html"), "fanal bench hallucination", panels(results))
            asked = {**dataclasses.asdict(config), "methods": config.counts()}
            run.describe({"config": asked, "results": results})
            return run.finish()

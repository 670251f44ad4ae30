"""What `fanal schedule` calls: a search with one solver or several, written to a file with a picture and exports."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from fanal.config import build_solver
from fanal.errors import FanalError
from fanal.files import write_atomically
from fanal.gits import Choice, choose, search, teacher_grid
from fanal.loading import load
from fanal.pictures import COLORS
from fanal.runs import Progress, quiet, versions
from fanal.schedule_files import (
    Entry,
    Schedules,
    check_exports,
    entries_of,
    export,
    export_path,
    write_schedules,
)

__all__ = ["Done", "ScheduleConfig", "draw", "search_schedules"]


@dataclass(frozen=True)
class ScheduleConfig:
    """What a search depends on; written to the schedule file. The fields are the options of `fanal schedule`."""

    model: str
    steps: str = "5,6,8,10"
    solver: str = "ipndm"
    method: str = "gits"
    export: tuple[str, ...] = ()
    warmup: int = 64
    holdout: int = 64
    seed: int = 0
    coeff: float = 1.15
    metric: str = "dev"
    afs: bool = False
    objective: str = "robust"
    tries: int = 1
    teacher: str = "ipndm"
    teacher_steps: int = 60
    batch: int = 64
    label: int | None = None
    prompt: str | None = None
    guidance: float | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.holdout in (1, 2):
            raise FanalError(f"an error needs at least 3 held-out samples, or 0 for no error; got {self.holdout}")
        if "+" in self.solver and (self.coeff, self.metric, self.tries) != (1.15, "dev", 1):
            raise FanalError(
                "coeff and metric are GITS's, and tries are of one solver: with several, the grids of the best three "
                "are fitted; leave them out"
            )

    def counts(self) -> list[int]:
        """Return the numbers of steps.

        Raises:
            FanalError: they are not whole numbers with commas between them.
        """
        try:
            found = [int(part) for part in self.steps.split(",")]
        except ValueError:
            raise FanalError(f"steps must be whole numbers with commas, such as 5,6,8,10, got {self.steps!r}") from None
        if not found or min(found) < 1:
            raise FanalError(f"steps must be at least 1, got {self.steps}")
        return found


@dataclass(frozen=True, eq=False)
class Done:
    """What was found and written.

    Attributes:
        schedules: the content of the file.
        title: one line about the errors' meaning.
        lines: one line per figure or file.
    """

    schedules: Schedules
    title: str
    lines: list[str]


def _found(config: ScheduleConfig, progress: Progress) -> tuple[Schedules, list[str]]:
    """Search, with one solver or by choosing among several."""
    model = load(
        config.model, prompt=config.prompt, labels=config.label, guidance=config.guidance, device=config.device
    )
    grid = teacher_grid(model, config.teacher_steps)
    settings: dict[str, Any] = {**dataclasses.asdict(config), "versions": versions()}
    shared: dict[str, Any] = {"seed": config.seed, "holdout": config.holdout, "batch": config.batch}
    shared["device"] = config.device
    teacher, names = build_solver(config.teacher), config.solver.split("+")
    base = search(model, config.warmup, 2, method="gits", sigmas=grid, teacher=teacher, progress=progress, **shared)
    again: dict[str, Any] = {**shared, "objective": config.objective, "teacher": base, "progress": progress}
    again["holdout"] = None if config.holdout else 0
    if len(names) > 1:
        chosen = choose(
            model,
            config.warmup,
            config.counts(),
            {name: build_solver(name) for name in names},
            method=config.method,
            **again,
        )
        entries, left = _kept(chosen)
        calls = {str(budget): c.search.calls for budget, c in chosen.items()}
        scores = {str(budget): c.scores for budget, c in chosen.items()}
        settings |= {"calls_of_searches": calls, "scores": scores}
        lines = [f"{budget} calls: {c.name}, {c.steps} steps" for budget, c in chosen.items()] + left
        return Schedules(config.model, entries, settings), lines
    found = search(
        model,
        config.warmup,
        config.counts(),
        solver=build_solver(config.solver),
        method=config.method,
        coeff=config.coeff,
        metric=config.metric,
        afs=config.afs,
        tries=config.tries,
        **again,
    )
    calls = {"teacher": base.calls, **{k: v for k, v in found.breakdown.items() if k.isdecimal()}}
    settings |= {"calls": calls, "seconds": {**found.seconds, "teacher": base.seconds["teacher"]}}
    per = ", ".join(f"{name} {value:g}" for name, value in calls.items())
    return Schedules(config.model, entries_of(found, config.solver), settings), [f"calls per warm-up sample: {per}"]


def _kept(chosen: Mapping[int, Choice]) -> tuple[dict[int, Entry], list[str]]:
    """One entry for each number of steps, the nearest to the teacher, and a line for each that is left out."""
    best: dict[int, int] = {}
    lines = []

    def score(budget: int) -> float:
        return chosen[budget].scores[f"{chosen[budget].name}, fitted"]

    for budget, choice in chosen.items():
        rival = best.get(choice.steps)
        if rival is None:
            best[choice.steps] = budget
            continue
        best[choice.steps], out = (budget, rival) if score(budget) < score(rival) else (rival, budget)
        lines.append(f"{out} calls: not in the file, which keeps one grid of {choice.steps} steps, the nearer one")
    entries = {k: entries_of(chosen[b].search, chosen[b].name)[k] for k, b in best.items()}
    return entries, lines


def search_schedules(
    config: ScheduleConfig, out: str | Path, *, overwrite: bool = False, progress: Progress = quiet
) -> Done:
    """Search schedules and write them: the file, a picture of the grids beside it, and the exports that are wanted.

    Args:
        config: what to search.
        out: the schedule file, ending in `.json`.
        overwrite: replace what is there.
        progress: wraps loops, given what they do.

    Raises:
        FanalError: the configuration, the model or the place does not work.
    """
    path = Path(out)
    if path.suffix != ".json":
        raise FanalError(f"a schedule file ends in .json, got {path.name}")
    picture = path.with_suffix(".png")
    targets = [path, picture, *(export_path(path, consumer) for consumer in config.export)]
    there = [target for target in targets if target.exists()]
    if there and not overwrite:
        raise FanalError(f"{there[0]} exists; choose another --out or pass --overwrite")
    if config.afs and ("+" in config.solver or "," in config.solver):
        raise FanalError("the analytical first step goes with one solver with at most one field")
    if config.method == "fit-weights":
        check_exports(config.export)
    schedules, lines = _found(config, progress)
    write_schedules(path, schedules)
    image = draw({k: entry.sigmas for k, entry in schedules.entries.items()})
    write_atomically(picture, lambda part: image.save(part, "PNG"))
    for consumer in config.export:
        export(path, schedules, consumer)
    lines += [f"written: {target}" for target in targets]
    return Done(schedules, "errors against the teacher, per entry, on held-out samples, ± one standard error", lines)


def draw(schedules: Mapping[int, Tensor], width: int = 900) -> Image.Image:
    """Draw grids on one axis of log sigma, a row each, large sigma on the left; infinity is not on it.

    Args:
        schedules: grids by number of steps.
        width: of the picture, in pixels.
    """
    row, left, right = 34, 90, 30
    logs = {k: grid[(grid > 0) & grid.isfinite()].log().tolist() for k, grid in sorted(schedules.items())}
    high, low = max(v[0] for v in logs.values()), min(v[-1] for v in logs.values())
    image = Image.new("RGB", (width, row * (len(logs) + 1) + 16), "#ffffff")
    pen = ImageDraw.Draw(image)

    def at(value: float) -> float:
        return left + (high - value) / max(high - low, 1e-9) * (width - left - right)

    bottom = row * len(logs) + 8
    for power in range(math.ceil(low / math.log(10)), math.floor(high / math.log(10)) + 1):
        x = at(power * math.log(10))
        pen.line((x, 8, x, bottom), fill="#dddddd")
        pen.text((x - 12, bottom + 6), f"{10.0**power:g}", fill="#444444")
    for i, (steps, values) in enumerate(logs.items()):
        y = 8 + row * i + row / 2
        pen.text((8, y - 6), f"{steps} steps", fill="#444444")
        pen.line((at(values[0]), y, at(values[-1]), y), fill=COLORS["plain"])
        for value in values:
            pen.ellipse((at(value) - 4, y - 4, at(value) + 4, y + 4), fill=COLORS["flag"])
    pen.text((8, bottom + 6), "sigma", fill="#444444")
    return image

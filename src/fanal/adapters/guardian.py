"""Guard any diffusers pipeline: flag its pictures by how they came about, and draw the flagged ones again.

    guardian = Guardian(pipe, "boats.json")              # a calibration file of fanal guard
    output = guardian.run(prompt=["a red boat"] * 4, num_inference_steps=30)
    guardian.flagged, guardian.outcome.risk

The pipeline itself draws again: it is called for the flagged rows alone, from a middle sigma down, with whatever else
it was given. Nothing is loaded twice, and any guidance or adapter that its call has stays in force.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fanal.adapters.pipeline_schedulers import state_of
from fanal.adapters.recorder import Recorder
from fanal.adapters.replacement import keys_of
from fanal.calibration_files import read_calibration
from fanal.errors import FanalError
from fanal.hallucination.calibration import Calibration
from fanal.hallucination.detectors import Detector
from fanal.hallucination.repair import Outcome, Renoise, rounds_of, tail_of
from fanal.seeding import noise

__all__ = ["Guardian"]

_TEXT = re.compile(r"(negative_)?prompt(_\d)?")
"""Arguments of pipelines that are texts."""

_PER_SAMPLE = re.compile(r"(negative_)?(pooled_)?prompt(_\w+)?|(negative_)?attention_mask|class_labels")
"""Arguments of pipelines that have one entry for each prompt, or one for all: texts, their embeddings and masks."""

_GENERATED = "num_images_per_prompt"


class Guardian(Recorder):
    """A recorder with a threshold: it says which pictures are suspect, and `run` draws those again.

    Use it as a context or as `callback_on_step_end` to flag only, as a `Recorder`; call `run` to repair too.

    Attributes:
        threshold: risk above which a picture is flagged.
        outcome: of the latest `run`: samples in x-space, risks, and for each picture the network calls and rounds.

    Args:
        pipeline: a pipeline whose call ends with its pictures.
        calibration: a file of `fanal guard --save`, a run folder, or the calibration itself; it must be of this grid.
        detector: without a calibration: what gives the risk, a free one.
        threshold: without a calibration, or instead of its own.
        repair: to which sigma flagged pictures return, and how often.
        seeds: one per picture, for the fresh noise; None: from the initial seed of the pipeline's generator, else 0, ….
        stop: as for a `Recorder`, in the first pass: True gives the pass up, and every picture is drawn again.

    Raises:
        FanalError: as `Recorder`; or there is no threshold, or the detector asks the network itself.
    """

    def __init__(
        self,
        pipeline: Any,
        calibration: Calibration | str | Path | None = None,
        *,
        detector: Detector | None = None,
        threshold: float | None = None,
        repair: Renoise | None = None,
        seeds: Sequence[int] | None = None,
        stop: Callable[[Recorder], bool] | None = None,
    ) -> None:
        if isinstance(calibration, str | Path):
            calibration = read_calibration(calibration).calibration
        if calibration is None and threshold is None:
            raise FanalError("a Guardian needs a calibration, as fanal guard --save writes one, or a threshold")
        if calibration is not None and detector is not None:
            raise FanalError("a calibration names its detector: give one of the two")
        watcher = calibration.build() if calibration is not None else detector
        if watcher is not None and not watcher.free:
            raise FanalError(
                f"{type(watcher).__name__} asks the network itself, which stays with the pipeline: take a free "
                "detector, or fanal guard on the pipeline as a model"
            )
        self.calibration = calibration
        self.threshold = float(threshold if threshold is not None else calibration.threshold)  # pyright: ignore
        self.repair, self.seeds = repair or Renoise(), seeds
        self.outcome: Outcome | None = None
        self._again: _Again | None = None
        self._running = False
        super().__init__(pipeline, watcher, stop=stop)

    @property
    def flagged(self) -> Bool[Tensor, " b"]:
        """Which pictures of the first pass are suspect.

        Raises:
            FanalError: nothing was recorded.
        """
        risk = self.risk() if self.outcome is None else self._first_risk
        return risk > self.threshold

    # Hooks into the recording.

    def _attach(self) -> None:
        super()._attach()
        lay, step = self.scheduler.set_timesteps, self.scheduler.step

        @functools.wraps(lay)
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            result = lay(*args, **kwargs)
            self._check_grid()
            if self._again is not None:
                self._again.cut(self)
            return result

        @functools.wraps(step)
        def entered(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._again is not None:
                self._again.restore(self.scheduler)
            if self._again is not None and self._again.opening:
                return self._again.enter(sample, kwargs.get("return_dict", True))
            return step(model_output, timestep, sample, *args, **kwargs)

        self.scheduler.set_timesteps, self.scheduler.step = set_timesteps, entered

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Serve as `callback_on_step_end`, as a `Recorder`; inside `run` it is one already."""
        return tensors if self._running else super().__call__(pipeline, step, timestep, tensors)

    def _check_grid(self) -> None:
        """Refuse a calibration of another grid."""
        if self.calibration is None or self.grid is None:
            return
        known = torch.tensor(self.calibration.sigmas, dtype=torch.float64)
        if len(known) != len(self.grid) or not torch.allclose(known, self.grid, rtol=1e-4):
            raise FanalError(
                f"calibrated on {_words(known)}, and the pipeline takes {_words(self.grid)}: a threshold holds for no "
                "other grid"
            )

    # The run.

    def run(self, **arguments: Any) -> Any:
        """Call the pipeline, draw its flagged pictures again, and return its output with the better ones in place.

        A picture leaves the loop when its risk is under the threshold; one that never gets there keeps the try with the
        lowest risk. `outcome` has what became of each.

        Args:
            arguments: of the pipeline's call, by name.

        Raises:
            FanalError: the pipeline or its scheduler cannot be entered half-way, or as the pipeline's own checks.
        """
        if self.pipeline is None:
            raise FanalError("only a pipeline can be run: make the Guardian with the pipeline")
        self._check_enterable(arguments)
        self.outcome, was_open, own = None, self.open, (getattr(self.scheduler, "seeds", None), 0)
        if not was_open:
            self._attach()
        self._running = True
        try:
            return self._run(arguments)
        finally:
            self._running = False
            if self._again is not None:
                self._again.restore(self.scheduler)
                self._again = None
            if self._own:
                self.scheduler.seeds, self.scheduler.round = own
            if not was_open:
                self.close()

    def _run(self, arguments: dict[str, Any]) -> Any:
        assert self.pipeline is not None
        output = self.pipeline(**arguments)
        first = self._seen(stopped=self._made < self._total)
        self._first_risk, stop, self.stop = first.risk, self.stop, None
        best, pictures = first.risk.clone(), _Pictures(output)
        keys = self._keys(first.x, arguments)
        begin = self._entry()

        def again(here: Tensor, rows: Tensor, some: list[int], number: int) -> Outcome:
            assert self.grid is not None
            sigma = self.grid[begin]
            fresh = noise(here.shape[1:], some, float(sigma), round=number, stream="renoise", dtype=here.dtype)
            part, drawn = self._draw(here + fresh.to(here.device), begin, rows, some, number, len(first.x), arguments)
            better = part.risk < best[rows]
            pictures.put(rows[better].tolist(), drawn, better.nonzero().flatten().tolist())
            best[rows[better]] = part.risk[better]
            return part

        try:
            self.outcome = rounds_of(first, self.threshold, self.repair.rounds, keys, again)
        finally:
            self.stop = stop
        return pictures.output

    def _draw(
        self, x: Tensor, begin: int, rows: Tensor, keys: list[int], number: int, count: int, arguments: dict[str, Any]
    ) -> tuple[Outcome, Any]:
        """Call the pipeline for some rows, from x at a node of the grid."""
        assert self.pipeline is not None
        assert self.grid is not None
        given = _arguments_of(self.pipeline, arguments, rows.tolist(), count)
        state = state_of(x, self.grid[begin], self.process)
        self._again = _Again(state, begin, direct="latents" in _parameters(self.pipeline))
        if self._again.direct:
            given["latents"] = state / float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        if self._own:
            self.scheduler.seeds, self.scheduler.round = keys, number
        drawn = self.pipeline(**given)
        at, sigma, _ = self.calls[0]
        if float(sigma) != float(self.grid[begin]) or (self._again.direct and not _near(at, x)):
            raise FanalError(
                f"{type(self.pipeline).__name__} did not begin from the latents it was given: no entering half-way"
            )
        part = self._seen(stopped=False)
        wasted = int(not self._again.direct)
        self._again = None
        return dataclasses.replace(part, evaluations=part.evaluations + wasted), drawn

    def _seen(self, stopped: bool) -> Outcome:
        """What became of the latest pass; of one that was given up, the last prediction, at any risk."""
        last = self.transitions[-1].step
        spent = torch.full((len(last.x_next),), float(len(self.calls)), dtype=torch.float64)
        none = torch.zeros(len(last.x_next), dtype=torch.int64)
        risk = torch.full_like(spent, torch.inf) if stopped else self.risk()
        return Outcome(last.denoised if stopped else last.x_next, risk, spent, self.per_step(), none)

    def _keys(self, x: Tensor, arguments: dict[str, Any]) -> Sequence[int]:
        found = keys_of(x, self.seeds, arguments.get("generator"))  # pyright: ignore[reportArgumentType]
        return range(len(x)) if found is None else found

    def _entry(self) -> int:
        """The node from which flagged pictures run down again: all that the detector looks at lies below."""
        assert self.grid is not None
        assert self.detector is not None
        return len(self.grid) - len(tail_of(self.grid, self.repair.sigma, self.detector))

    def _check_enterable(self, arguments: dict[str, Any]) -> None:
        if hasattr(self.scheduler, "plms_timesteps"):
            raise FanalError("PNDM begins with steps of another kind, so a run cannot be entered half-way: take DDIM")
        if "strength" in _parameters(self.pipeline):
            raise FanalError(
                f"{type(self.pipeline).__name__} begins half-way itself: only a text-to-image call is repaired"
            )
        if arguments.get("return_dict") is False:
            raise FanalError("run returns the pipeline's output object: leave return_dict out")


class _Again:
    """A pass that enters a pipeline at a node of the grid.

    Pipelines that take `latents` begin there at once. For others the first call of the network, at noise of their own,
    is wasted, and the state is put in its place when they ask for the next step.
    """

    def __init__(self, state: Tensor, interval: int, direct: bool) -> None:
        self.state, self.interval, self.direct, self.opening = state, interval, direct, not direct
        self.whole: Tensor | None = None

    def cut(self, guardian: Guardian) -> None:
        """Leave out the times above the entry, for the pipeline to read."""
        scheduler = guardian.scheduler
        own = hasattr(scheduler, "begin_of")
        begin = scheduler.begin_of(self.interval) if own else getattr(scheduler, "order", 1) * self.interval
        self.whole, self.opening = scheduler.timesteps, not self.direct
        ahead = scheduler.timesteps[begin:]
        scheduler.timesteps = ahead if self.direct else torch.cat([ahead[:1], ahead])
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
            scheduler.set_begin_index = lambda begin_index=0: None  # some pipelines say 0 before their first step

    def restore(self, scheduler: Any) -> None:
        """Give the scheduler all its times back, which some count in their steps."""
        if self.whole is not None:
            scheduler.timesteps, self.whole = self.whole, None
            vars(scheduler).pop("set_begin_index", None)

    def enter(self, sample: Tensor, as_object: bool) -> Any:
        """Return the state in place of a step; a batch that is there twice gets it twice."""
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        self.opening = False
        twice = len(sample) == 2 * len(self.state)
        state = (torch.cat([self.state, self.state]) if twice else self.state).to(sample.dtype).to(sample.device)
        return SchedulerOutput(prev_sample=state) if as_object else (state,)


class _Pictures:
    """The output of a pipeline, whose pictures can be replaced."""

    def __init__(self, output: Any) -> None:
        self.output, self.images = output, output.images
        if isinstance(self.images, Tensor):
            self.images = output.images = self.images.clone()

    def put(self, places: Sequence[int], drawn: Any, rows: Sequence[int]) -> None:
        """Replace pictures by some of another output."""
        for place, row in zip(places, rows, strict=True):
            self.images[place] = drawn.images[row]


def _words(sigmas: Float[Tensor, " n"]) -> str:
    return f"{len(sigmas) - 1} steps from sigma {float(sigmas[0]):.4g} to {float(sigmas[-1]):.4g}"


def _parameters(pipeline: Any) -> set[str]:
    return set(inspect.signature(type(pipeline).__call__).parameters)


def _near(got: Float[Tensor, "b *d"], want: Float[Tensor, "b *d"]) -> bool:
    """Whether two states agree up to half precision."""
    return got.shape == want.shape and float((got - want).norm()) <= 2e-2 * float(want.norm())


def _arguments_of(pipeline: Any, arguments: dict[str, Any], rows: list[int], count: int) -> dict[str, Any]:
    """The arguments of a call for some of its pictures."""
    given, known = dict(arguments), _parameters(pipeline)
    each = int(given.get(_GENERATED, 1) or 1)
    prompts = max(1, count // each)
    for name in filter(_PER_SAMPLE.fullmatch, arguments):
        value = given[name]
        if isinstance(value, list | tuple) and len(value) == prompts:
            given[name] = [value[row // each] for row in rows]
        elif isinstance(value, Tensor) and len(value) == prompts:
            given[name] = value[[row // each for row in rows]]
        elif isinstance(value, str) and prompts == 1 and _GENERATED in known and _TEXT.fullmatch(name):
            given[name] = [value] * len(rows)
    if _GENERATED in known:
        given[_GENERATED] = 1
    if "batch_size" in known:
        given["batch_size"] = len(rows)
    if isinstance(given.get("generator"), list):
        given["generator"] = [given["generator"][row] for row in rows]
    return given

"""Watch any diffusers pipeline: its trajectory in x-space and the risk of each sample, while it runs.

    with Recorder(pipe) as recorder:
        pipe(prompt)
    recorder.trajectory()        # as fanal.Trajectory.record(fanal.trace(…))
    recorder.risk()              # as fanal's detectors

Nothing is called twice: everything follows from what the pipeline hands to `scheduler.step`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.adapters.pipeline_schedulers import Process, native_sigmas
from fanal.adapters.predictions import flow_sigma
from fanal.adapters.replacement import denoised_at, replaceable, sigma_at, x_at
from fanal.errors import FanalError
from fanal.hallucination.detectors import Detector, LastSlope, Variance, Watch, last_window
from fanal.sampling import Span, Step, Transition
from fanal.trajectory import Trajectory

__all__ = ["Recorder"]


class Recorder:
    """Records the runs of a pipeline by wrapping its scheduler's `step`, from its making until `close`.

    Use it as a context, or pass it as `callback_on_step_end`, where it closes itself after the last step. It keeps the
    latest run only. D is what the network predicts, after guidance and before a scheduler clips it. Calls inside an
    interval (Heun's second) are among `calls`, not on the trajectory.

    Attributes:
        calls: `(x, sigma, denoised)` of each network call of the run.
        transitions: the intervals that were crossed, in x-space.
        detector: what gives the risk; where none was given, trajectory variance over the last two fifths of the grid.

    Args:
        pipeline: a pipeline, or a scheduler.
        detector: one of `fanal.hallucination.detectors`.
        stop: asked after each interval; True ends the pipeline there (those that have `interrupt`).

    Raises:
        FanalError: the scheduler cannot be read, or the pipeline cannot be stopped.
    """

    def __init__(
        self,
        pipeline: Any,
        detector: Detector | None = None,
        *,
        stop: Callable[[Recorder], bool] | None = None,
    ) -> None:
        self.scheduler = getattr(pipeline, "scheduler", pipeline)
        self._own = type(self.scheduler).__name__ == "FanalScheduler"  # which tells its intervals itself
        self.pipeline = pipeline if self.scheduler is not pipeline else None
        if stop is not None and not hasattr(self.pipeline, "interrupt"):
            raise FanalError(f"{type(pipeline).__name__} cannot be stopped half-way: it has no interrupt")
        self.process: Process = self.scheduler.process if self._own else replaceable(self.scheduler)
        if not self.scheduler.config.get("skip_prk_steps", True):
            raise FanalError("PNDM with Runge-Kutta steps at its start cannot be read: set skip_prk_steps=True")
        self.given, self.stop = detector, stop
        self.detector: Detector | None = detector
        self.open = False
        self._start(None)
        self._attach()

    # Attaching and detaching.

    def _attach(self) -> None:
        if "step" in vars(self.scheduler):
            raise FanalError("this scheduler is being recorded already: close the other Recorder first")
        step, lay = self.scheduler.step, self.scheduler.set_timesteps

        @functools.wraps(lay)
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            result = lay(*args, **kwargs)
            self._start(self._grid(*args, **kwargs))
            return result

        @functools.wraps(step)
        def recorded(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.grid is None:
                self._start(self._grid(self.scheduler.num_inference_steps))
            self._before(model_output, timestep, sample)
            result = step(model_output, timestep, sample, *args, **kwargs)
            self._after(result[0] if isinstance(result, tuple) else result.prev_sample)
            return result

        self.scheduler.step, self.scheduler.set_timesteps = recorded, set_timesteps
        self.open = True

    def close(self) -> None:
        """Give the scheduler its own methods back; what was recorded stays."""
        if self.open:
            del self.scheduler.step, self.scheduler.set_timesteps
            self.open = False

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Serve as `callback_on_step_end`: changes nothing, and closes after the last step."""
        if getattr(pipeline, "scheduler", None) is not self.scheduler:
            raise FanalError("this Recorder was made for another pipeline, or its scheduler was replaced since")
        if self._made == self._total or getattr(pipeline, "interrupt", False):
            self.close()
        return tensors

    # The run.

    def _grid(self, steps: int | None = None, device: Any = None, **settings: Any) -> Float[Tensor, " n"]:
        """The grid of a run, from the arguments of `set_timesteps`."""
        if self._own:
            return self.scheduler.grid
        bare = copy.copy(self.scheduler)
        del bare.step, bare.set_timesteps
        steps = settings.pop("num_inference_steps", steps)
        given = {name: value for name, value in settings.items() if value is not None}
        return native_sigmas(bare, self.process, steps, given)  # pyright: ignore[reportArgumentType]

    def _start(self, grid: Float[Tensor, " n"] | None) -> None:
        """Begin to record a run."""
        self.grid = grid
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self.transitions: list[Transition] = []
        self._held: tuple[int, Tensor, Tensor] | None = None
        self._made, self._total, self._first = 0, 0, 0
        self._watch: Watch | None = None
        if grid is not None:
            self.detector = self.given or (Variance(last_window(grid)) if len(grid) > 2 else LastSlope())
            self._watch = self.detector.start()

    def _before(self, output: Tensor, timestep: Any, sample: Tensor) -> None:
        """Read x, sigma and D of a call, before the scheduler takes its step."""
        assert self.grid is not None
        sigma, begun = self._level(timestep)
        if self._made == 0:
            self._total = len(self.scheduler.timesteps) - begun
        place = _nearest(self.grid, sigma)
        starts = not self._own and getattr(self.scheduler, "state_in_first_order", True)
        if starts:
            sigma = self.grid[place]
        sample = self._single(sample.detach())
        x = x_at(sample, sigma, self.process)
        denoised = denoised_at(output.detach()[: len(x)], x, sigma, self.process)
        self.calls.append((x, sigma, denoised))
        if starts:
            if self._held is not None and self._held[0] < place:
                self._cross(x)  # PNDM: the state that its first two calls led to
            self._held = (place, x, denoised)

    def _level(self, timestep: Any) -> tuple[Tensor, int]:
        """The noise level of a call, and the index of its time in `timesteps`."""
        own, time = self.scheduler, torch.as_tensor(timestep)
        if self._own:
            sigma = own.sigma_at(timestep)  # also finds where the run begins
            return sigma, own.begin_index
        levels, times = getattr(own, "sigmas", None), torch.as_tensor(own.timesteps)
        if levels is None:
            return sigma_at(time, self.process), int((times == time.to(times.device)).nonzero()[0])
        index = own.step_index
        if index is None:
            index = own.begin_index if own.begin_index is not None else own.index_for_timestep(time.to(times.device))
        if not getattr(own, "state_in_first_order", True):
            levels = getattr(own, "sigmas_interpol", levels)  # KDPM2 makes its second call between two sigmas
        level = torch.as_tensor(levels[index]).to("cpu", torch.float64)
        return (flow_sigma(level) if self.process.kind == "flow" else level), int(index)

    def _single(self, sample: Tensor) -> Tensor:
        """The batch without its copy: a DiT pipeline hands over every guided sample twice."""
        half = len(sample) // 2
        if type(self.pipeline).__name__ == "DiTPipeline" and len(sample) == 2 * half:
            return sample[:half] if torch.equal(sample[:half], sample[half:]) else sample
        return sample

    def _after(self, following: Tensor) -> None:
        """Complete the interval, where the scheduler has done so."""
        assert self.grid is not None
        self._made += 1
        if self._own:
            for transition in self.scheduler.finished:
                self._take(transition)
            return
        last = self._made == self._total
        waits = hasattr(self.scheduler, "plms_timesteps") or not getattr(self.scheduler, "state_in_first_order", True)
        if self._held is not None and (last or not waits):
            end = self.grid[-1 if last else self._held[0] + 1]
            self._cross(x_at(self._single(following.detach()), end, self.process))

    def _cross(self, x_next: Tensor) -> None:
        assert self._held is not None
        assert self.grid is not None
        place, x, denoised = self._held
        if not self.transitions:
            self._first = place
        count = len(self.grid) - 1 - self._first
        span = Span(len(self.transitions), count, self.grid[place], self.grid[place + 1])
        self._held = None
        self._take(Transition(span, x, Step(x_next, denoised)))

    def _take(self, transition: Transition) -> None:
        self.transitions.append(transition)
        if self._watch is not None:
            self._watch.see(transition)
        if self.stop is not None and self.stop(self):
            self.interrupt()

    # What was found.

    def interrupt(self) -> None:
        """End the pipeline after this step.

        Raises:
            FanalError: it cannot be stopped.
        """
        if not hasattr(self.pipeline, "interrupt"):
            raise FanalError("only a pipeline with interrupt can be stopped: make the Recorder with the pipeline")
        self.pipeline._interrupt = True  # pyright: ignore[reportOptionalMemberAccess]

    def trajectory(self, meta: Mapping[str, str] | None = None) -> Trajectory:
        """Return the trajectory of the latest run, as far as it went, in x-space.

        Raises:
            FanalError: no interval was crossed yet.
        """
        return Trajectory.record(self.transitions, {"scheduler": type(self.scheduler).__name__, **(meta or {})})

    def risk(self) -> Float[Tensor, " b"]:
        """Return the risk of each sample, from what was seen so far.

        Raises:
            FanalError: the detector has not seen enough.
        """
        if self._watch is None or not self.transitions:
            raise FanalError("nothing was recorded: run the pipeline while the Recorder is open")
        return self._watch.risk()

    def per_step(self) -> Float[Tensor, "n b"]:
        """Return the risk as it stood after each interval.

        Raises:
            FanalError: nothing was recorded.
        """
        if self._watch is None or not self.transitions:
            raise FanalError("nothing was recorded: run the pipeline while the Recorder is open")
        return self._watch.per_step()


def _nearest(grid: Float[Tensor, " n"], sigma: Tensor) -> int:
    """Index of the interval whose start is nearest to a noise level."""
    if torch.isinf(sigma):
        return 0
    return int((grid[:-1].log() - sigma.log()).abs().argmin())

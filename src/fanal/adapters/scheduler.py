"""Any fanal solver on any grid inside a diffusers pipeline: a scheduler object that takes the place of its own.

    from fanal.adapters.scheduler import FanalScheduler

    pipe.scheduler = FanalScheduler.from_scheduler(pipe.scheduler, solver=fanal.solvers.Heun())
    pipe(prompt, num_inference_steps=18)

Importing this module imports diffusers; `import fanal` does not import this module.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin as ConfigMixin  # pipelines look the bases up in this module
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from jaxtyping import Float
from torch import Tensor

from fanal.adapters.pipeline_schedulers import state_of
from fanal.adapters.replacement import covers, denoised_at, fed, fresh, keys_of, lay, noised, place, replaceable, x_at
from fanal.adapters.replay import Plan, Replay, plan, plan_from
from fanal.config import build_solver, text_of
from fanal.errors import FanalError
from fanal.sampling import Solver, Transition
from fanal.schedules import check_sigmas

__all__ = ["FanalScheduler", "FanalSchedulerOutput"]

_OWN = ("solver", "sigmas", "schedule", "seeds")


@dataclass
class FanalSchedulerOutput(BaseOutput):
    """What `FanalScheduler.step` returns.

    Attributes:
        prev_sample: where the network is wanted next; after the last call, the sample.
        pred_original_sample: the denoised prediction at the call just made.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class FanalScheduler(SchedulerMixin, ConfigMixin):
    """A fanal solver as a diffusers scheduler: the pipeline calls its network, the solver decides where.

    Samples keep the scaling of the scheduler that is replaced (x-space for `EulerDiscreteScheduler` and its like, the
    network's input for `DDIMScheduler`, `DPMSolverMultistepScheduler` and flow matching), so that latents, `add_noise`
    and pipelines that multiply by `init_noise_sigma` behave as before. `timesteps` has one entry for each network call.

    A guard of RODS (`rods:…`) works where it only calls: `method=sas` or `random`, and `product=difference` for CAS
    and the index. A product of Jacobians needs the network itself, which stays with the pipeline.

    A solver that leaves the start of the grid before its first call (churn) costs one call more, whose answer is not
    used: the pipeline makes its first call at the start.

    Args:
        solver: a solver, or as on the command line (`heun`, `churn:s_churn=20`, a schedule file).
        sigmas: the grid in x-space; it may begin at infinity, where flow matching starts. `num_inference_steps` must
            then be its number of intervals. None: what `schedule` says.
        schedule: name as on the command line (`polynomial:rho=5`), or a function `(steps, sigma_min, sigma_max, zero)`
            that places the nodes between the ends of the replaced scheduler's grid; or a schedule file, which has its
            own. None: that very grid, with its shift, spacing, and whatever a pipeline passes as `timesteps`, `sigmas`
            and `mu`.
        seeds: one per sample, or the first of consecutive ones, for solvers that draw noise. None: from the initial
            seed of the pipeline's generator.
        scheduler: the diffusers scheduler to replace, or its configuration.

    Raises:
        FanalError: the solver, schedule or grid is none, or the scheduler is of a kind that cannot be replaced.
    """

    _compatibles = [kind.name for kind in KarrasDiffusionSchedulers]
    config_name = "scheduler_config.json"

    def __init__(
        self,
        solver: Solver | str = "euler",
        sigmas: Sequence[float] | Tensor | None = None,
        *,
        schedule: str | Callable[..., Tensor] | None = None,
        seeds: int | Sequence[int] | None = None,
        scheduler: Any = None,
    ) -> None:
        self.base = fresh(scheduler.base if isinstance(scheduler, FanalScheduler) else scheduler)
        self.process = replaceable(self.base)
        self.solver = build_solver(solver) if isinstance(solver, str) else solver
        if isinstance(self.solver, type) or not isinstance(self.solver, Solver):
            raise FanalError(f"solver must be a name or an object such as fanal.solvers.Heun(), got {solver!r:.60}")
        if sigmas is not None and schedule is not None:
            raise FanalError("give sigmas= or schedule=, not both")
        self.schedule, self.seeds, self.round = schedule, seeds, 0
        self.given = None if sigmas is None else self._checked(check_sigmas(sigmas))
        self.grid: Tensor | None = None
        self.order, self.num_inference_steps = 1, None
        self.timesteps, self.sigmas = self.base.timesteps, getattr(self.base, "sigmas", None)
        if self.process.kind == "vp":
            self.betas, self.alphas_cumprod = self.base.betas, self.base.alphas_cumprod
        own = {
            "solver": text_of(self.solver),
            "sigmas": None if self.given is None else self.given.tolist(),
            "schedule": schedule if isinstance(schedule, str) else None,
            "seeds": seeds if seeds is None or isinstance(seeds, int) else list(seeds),
            "replaces": type(self.base).__name__,
        }
        self.register_to_config(**{k: v for k, v in self.base.config.items() if not k.startswith("_")} | own)
        self._reset()

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        solver: Solver | str = "euler",
        sigmas: Sequence[float] | Tensor | None = None,
        *,
        schedule: str | Callable[..., Tensor] | None = None,
        seeds: int | Sequence[int] | None = None,
    ) -> FanalScheduler:
        """Build one that takes the place of a pipeline's scheduler; see the class for the arguments.

        Raises:
            FanalError: as the class.
        """
        return cls(solver, sigmas, schedule=schedule, seeds=seeds, scheduler=scheduler)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build one from its own configuration, or from that of the diffusers scheduler to replace.

        Args:
            config: the configuration.
            return_unused_kwargs: diffusers' convention; nothing is ever unused.
            kwargs: `solver`, `sigmas`, `schedule`, `seeds`, or fields of the replaced scheduler's configuration.

        Raises:
            FanalError: as the class, or a field is of neither.
        """
        if not isinstance(config, Mapping):
            raise FanalError(f"from_config takes a scheduler's config, got {type(config).__name__}")
        own = {name: config[name] for name in _OWN if "replaces" in config and config.get(name) is not None}
        own |= {name: kwargs.pop(name) for name in _OWN if name in kwargs}
        wrong = [name for name in kwargs if name not in config]
        if wrong:
            raise FanalError(f"neither FanalScheduler nor the scheduler it replaces has {wrong[0]!r}")
        base = dict(config) | kwargs | {"_class_name": config.get("replaces", config.get("_class_name"))}
        made = cls(**own, scheduler=base)
        return (made, {}) if return_unused_kwargs else made

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `scheduler_config.json`.

        Raises:
            FanalError: the solver or schedule is an object that cannot be written as text.
        """
        if self.config.get("solver") is None or callable(self.schedule):
            what = "solver" if self.config.get("solver") is None else "schedule"
            raise FanalError(
                f"a {what} of your own cannot be saved as text: save the pipeline with its old scheduler (.base), and "
                "build FanalScheduler again after loading"
            )
        super().save_config(save_directory, push_to_hub, **kwargs)

    # The grid and the times of the calls.

    def _checked(self, grid: Tensor) -> Tensor:
        if float(grid[0]) < float(grid[1]):
            raise FanalError("a pipeline runs down in sigma: the grid must decrease")
        if torch.isinf(grid[0]) and self.process.space == "ve":
            raise FanalError("samples in x-space cannot start at infinite sigma: replace a DDIMScheduler instead")
        return grid

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Lay the grid and find the times of the network calls; a pipeline does it before each run.

        Args:
            num_inference_steps: number of intervals.
            device: where `timesteps` will be.
            timesteps: times instead, as for the replaced scheduler.
            sigmas: sigmas instead: of x-space for `vp`, the last included; the shift-free ramp for flow matching.
            mu: the dynamic shift of flow matching.

        Raises:
            FanalError: there is no such grid, or the solver cannot be run like this.
        """
        self.grid = self._grid(num_inference_steps, timesteps, sigmas, mu)
        self._reset()
        self._plan = plan(self.solver, self.grid)
        self.order, self.num_inference_steps = self._plan.order, len(self.grid) - 1
        levels = self._plan.levels
        if not covers(self.process, levels):
            warnings.warn(
                f"the grid or the solver leaves the noise levels that the network was trained for; it is asked at its "
                f"nearest time (sigma {float(levels.min()):.4g} to {float(levels.max()):.4g})",
                stacklevel=2,
            )
        self.timesteps = self.process.time_of(levels).to(torch.float32).to(device)
        ends = torch.cat([levels, self.grid[-1:]])
        if self.process.kind == "flow":
            ends = self.process.time_of(ends) / self.process.scale
        self.sigmas = ends.float()

    def _grid(self, steps: int | None, timesteps: Any, sigmas: Any, mu: float | None) -> Float[Tensor, " n"]:
        own = self.given
        if own is not None:
            counts = [steps] if steps is not None else [len(x) for x in (timesteps, sigmas) if x is not None]
            whole = len(own) if sigmas is not None and self.process.kind == "vp" and steps is None else len(own) - 1
            if any(count != whole for count in counts):
                raise FanalError(
                    f"this scheduler has a grid of its own, of {len(own) - 1} intervals, and was asked for "
                    f"{counts[0]}: pass num_inference_steps={len(own) - 1}"
                )
            return own
        grid = lay(self.base, self.process, steps, timesteps, sigmas, mu)
        return self._checked(grid if self.schedule is None else place(grid, self.schedule, self.process))

    # The run.

    def _reset(self) -> None:
        """Forget the run."""
        self._run: Replay | None = None
        self._plan: Plan | None = None
        self._begun, self._made = False, 0
        self._begin_index: int | None = None
        self._sent: tuple[Tensor | None, int] = (None, 0)
        self.finished: list[Transition] = []

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    @property
    def init_noise_sigma(self) -> float:
        """What a pipeline multiplies unit noise by: 1; in x-space the first sigma, as the replaced scheduler has it."""
        if self.process.space != "ve":
            return 1.0
        if self.grid is None:
            return float(self.base.init_noise_sigma)
        first = float(self.grid[0])
        return first if self.config.get("timestep_spacing") in ("linspace", "trailing") else (first**2 + 1) ** 0.5

    @property
    def begin_index(self) -> int | None:
        """Index into `timesteps` at which the pipeline begins; None: the first."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """Number of network calls so far; None before the first."""
        return None if self._run is None else (self._begin_index or 0) + self._made

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Tell at which of `timesteps` the pipeline will begin."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """Return the first index of a time in `timesteps`.

        Raises:
            FanalError: it is none of them.
        """
        found = (self.timesteps.cpu() == torch.as_tensor(timestep).cpu().to(self.timesteps.dtype)).nonzero().flatten()
        if not len(found):
            raise FanalError(f"{float(timestep):.6g} is none of scheduler.timesteps: take the times from there")
        return int(found[0])

    def begin_of(self, interval: int) -> int:
        """Return the index into `timesteps` at which a run begins that starts with this interval of the grid.

        Raises:
            FanalError: no times are set.
        """
        if self._plan is None:
            raise FanalError("call set_timesteps first, as pipelines do")
        opening = int(not self._plan.straight and interval > 0)
        return sum(map(len, self._plan.calls[:interval])) + opening

    def _planned(self, timestep: float | Tensor) -> Plan:
        """What lies ahead, from where the pipeline begins."""
        if self._plan is None or self.grid is None:
            raise FanalError("call set_timesteps before the first step, as pipelines do")
        if not self._begun:
            if self._begin_index is None:
                self._begin_index = self.index_for_timestep(timestep)
            if self._begin_index:
                self._plan = plan_from(self.solver, self.grid, self._plan.levels[self._begin_index :])
            self._begun = True
        return self._plan

    def sigma_at(self, timestep: float | Tensor) -> Tensor:
        """Return the noise level of the call that is made now; `timestep` tells it before the first."""
        if self._run is not None and self._run.point is not None:
            return self._run.point[1]
        return self._planned(timestep).start

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Return what the network is fed: `x/√(1 + sigma²)` where samples are kept in x-space, else the sample."""
        if self.process.space != "ve":
            return sample
        sigma = self.sigma_at(self.timesteps[self._begin_index or 0] if timestep is None else timestep)
        return fed(sample, sigma, self.process)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FanalSchedulerOutput | tuple[Tensor, Tensor]:
        """Take the network's output at one of `timesteps`, and say where it is wanted next.

        Args:
            model_output: what the network predicts, after guidance.
            timestep: its time.
            sample: where it was called, as the scheduler keeps it.
            eta: only 0; noise is the solver's (`fanal.solvers.Ancestral(eta=…)`).
            use_clipped_model_output: only None or False.
            generator: its initial seed gives the seeds of a solver that draws noise.
            return_dict: whether the result is an object or a tuple.

        Returns:
            The next sample, and the denoised prediction at this one.

        Raises:
            FanalError: the run has ended, or the solver cannot be run like this.
        """
        if eta or use_clipped_model_output:
            raise FanalError(
                "eta and use_clipped_model_output belong to DDIMScheduler: for noise take fanal.solvers.Ancestral"
            )
        sigma, opening = self.sigma_at(timestep), False
        if self._run is None:
            ahead, x = self._planned(timestep), x_at(sample, sigma, self.process)
            assert self.grid is not None
            keys = keys_of(sample, self.seeds, generator)
            self._run = Replay(self.solver, self.grid[ahead.first :], x, keys, calls=ahead.calls, round=self.round)
            opening = not ahead.straight
        elif self._run.point is None:
            raise FanalError("this run has ended: call set_timesteps before the next")
        else:
            x = self._seen(self._run, sample, sigma)
        denoised = denoised_at(model_output, x, sigma, self.process)
        if not opening:
            self._run.tell(denoised)
        self.finished, self._made = self._run.finished, self._made + 1
        after = self._next(self._run).to(sample.dtype)
        self._sent = (after, _version(after))
        denoised = denoised.to(sample.dtype)
        return FanalSchedulerOutput(after, denoised) if return_dict else (after, denoised)

    def _seen(self, run: Replay, sample: Tensor, sigma: Tensor) -> Tensor:
        """Where the network was called: as was told, unrounded, or where the pipeline moved the sample meanwhile."""
        assert run.point is not None
        sent, version = self._sent
        if sample is sent and version >= 0 and version == _version(sample):
            return run.point[0]
        x = x_at(sample, sigma, self.process)
        run.shift(x - run.point[0])
        return x

    def _next(self, run: Replay) -> Tensor:
        assert self.grid is not None
        x, sigma = run.point or (run.x, self.grid[-1])
        return state_of(x, sigma, self.process)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return clean samples with noise as of these times, as the scheduler keeps them."""
        return noised(original_samples, noise, timesteps, self.process)

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """Return clean samples with noise as of a time: the name that flow-matching pipelines use."""
        return noised(sample, noise, torch.as_tensor(timestep), self.process)


def _version(tensor: Tensor) -> int:
    """Count of the writes into a tensor, or −1 where it is not kept."""
    return -1 if tensor.is_inference() else tensor._version

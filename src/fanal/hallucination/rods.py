"""RODS: steps that look where the residual grows fastest and use the prediction from there (Tian et al., [RODS]).

At the point where a step first asks the network, a perturbation δ is found and held fixed through the step. The robust
direction is then that of the denoiser

    D_δ(x) = D(x + δ) − δ,    (x − D_δ(x))/sigma = ((x + δ) − D(x + δ))/sigma      [RODS] alg. 2, lines 8 to 10

so any solver can take the step. The index says how fast ‖v‖ bends along δ ([RODS] eq. 8) and may gate the correction,
sample by sample.

    guard = rods.Guard(fanal.solvers.Heun(), rho=0.1, window=(0.1, 0.5), window_units="fraction")
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import Counted, Denoiser
from fanal.errors import FanalError
from fanal.hallucination.perturbation import READINGS, Objective, Search, bend, differentiate
from fanal.hallucination.regions import Region
from fanal.hallucination.robust import Kept, Plan, Robust
from fanal.sampling import Solver, Span, Step, Transition
from fanal.solvers.arithmetic import check_choice
from fanal.solvers.onestep import Euler

__all__ = ["METHODS", "PRESETS", "WINDOW_UNITS", "Curvature", "Guard", "index"]

METHODS: tuple[str, ...] = ("cas", "sas", "random", "reversed")
"""Along the gradient of ‖v‖, along that of −log p, and two controls: any direction, and against the first."""

WINDOW_UNITS: tuple[str, ...] = ("step", "fraction", "sigma")
"""What a window counts: intervals from the start, their share of all, or the noise level."""


def index(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    sigma: Tensor | float,
    *,
    v: str = "score",
    rho: float = 0.1,
    rho_units: str = "shell",
    steps: int = 1,
    product: str = "backward",
    region: Region | str = "sphere",
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b *d"]]:
    """Return the index of each sample, and the perturbation δ that it was measured along.

    `H = ‖∇‖v(x + δ)‖ − ∇‖v(x)‖‖` with `δ = argmax ‖v(x + δ)‖` over the sphere of radius r ([RODS] eq. 8), by `steps`
    gradient steps (B.4). To first order in r it is at most r times the largest eigenvalue, by absolute value, of the
    Hessian of ‖v‖ (A.2). One step costs two calls and two products.

    Args:
        denoiser: D(x, sigma).
        x: the points.
        sigma: their noise level, () or (B,), above 0.
        v: "score" (D − x)/sigma², "direction" (x − D)/sigma or "residual" x − D; H has a power of sigma accordingly.
        rho: the radius, in `rho_units`.
        rho_units: "absolute", "sigma" (r = rho·sigma) or "shell" (r = rho·sigma·√d).
        steps: number of gradient steps for δ.
        product: "backward", "forward" or "difference", as in `fanal.hallucination.perturbation.differentiate`.
        region: the set that δ comes from, as in `Guard`.

    Raises:
        FanalError: an argument is none of these, or the denoiser cannot be differentiated.
    """
    check_choice("v of rods", v, tuple(READINGS))
    search, level = Search(rho, rho_units, steps, product, region), torch.as_tensor(sigma, dtype=torch.float64)
    if not bool((level > 0).all()):
        raise FanalError(f"the index needs sigma > 0, got {sigma}")
    here = differentiate(denoiser, x, level, product)
    delta, _ = search.cas(denoiser, x, level, here)
    there = differentiate(denoiser, x + delta, level, product)
    return bend(here, there, level, v), delta


@dataclass(frozen=True)
class Guard:
    """Takes the steps of any solver with the robust denoiser `D_δ(x) = D(x + δ) − δ`, where and for whom it should.

    `Step.denoised` stays the raw D(x, sigma). `info` has `rods_index` (B,), NaN where it was not asked for;
    `rods_corrected` (B,), 1 for the samples that used D_δ; `rods_denoised`, what they used; and `rods_calls` and
    `rods_products` (B,), the denoiser's calls and Jacobian products of the whole step, counted as they are made.

    Samples that are not corrected keep every bit. In the window an always-on CAS step costs one call and one product
    more than the solver's, SAS one call; with a threshold, CAS costs one call and two products. With `hold` or `lag`
    most steps take their δ from a step before and ask at x + δ only: no call more than the solver's. `Step.denoised`
    is then D(x + δ, sigma), and `Step.at` says so.

    Attributes:
        solver: what takes the steps.
        method: "cas": δ along ∇‖v‖; "sas": along −∇log p, the residual; "random" (draws noise, so it needs seeds) and
            "reversed" (against CAS) are controls with the same norm of δ. Or any `g(denoiser, x, sigma, δ) -> (B,)`
            that δ is to make large ([RODS] 4.2), by one product per gradient step.
        rho: radius, in `rho_units`.
        rho_units: "absolute"; "sigma": rho·sigma; "shell": rho·sigma·√d, a share of the noise's norm.
        window: where the guard acts, low to high; None: everywhere.
        window_units: "step": low <= i < high, i the index of the interval; "fraction": the same of i/n; "sigma":
            low <= sigma <= high, both ends in.
        threshold: index from which a sample is corrected: one for all steps or one per step of the grid; None: all
            samples, and no index is measured; infinity: none, the index is only recorded.
        v: what the index is of: "score", "direction" or "residual".
        steps: number of gradient steps for δ ([RODS] B.4).
        product: "backward", exact; "forward" or "difference" for networks without a backward pass, or to save memory.
        region: the set that δ comes from: "sphere", "ball" or "box" (the ℓ∞ ball), or a `Region` with a mask.
        hold: guarded steps that one δ serves, scaled to each step's radius; whom to correct is held with it.
        lag: δ comes from where the step before was evaluated, its own x + δ, so that no call is added but at the
            first guarded step; for "cas", "sas" and "reversed" without a threshold and with one gradient step.

    Raises:
        FanalError: a field is none of these, or they do not go together.
    """

    solver: Solver = field(default_factory=Euler)
    method: str | Objective = "cas"
    rho: float = 0.1
    rho_units: str = "shell"
    window: tuple[float, float] | None = field(default=None, metadata={"like": (4.0, 20.0)})
    window_units: str = "step"
    threshold: float | Sequence[float] | Tensor | None = field(default=None, metadata={"like": 0.1})
    v: str = "score"
    steps: int = 1
    product: str = "backward"
    region: Region | str = "sphere"
    hold: int = 1
    lag: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.solver, type) or not isinstance(self.solver, Solver):
            raise FanalError(f"rods guards an object with a step method, such as Euler(), got {self.solver!r:.60}")
        if isinstance(self.method, str) or not callable(self.method):
            check_choice("method of rods", str(self.method), METHODS)
        check_choice("window_units of rods", self.window_units, WINDOW_UNITS)
        check_choice("v of rods", self.v, tuple(READINGS))
        self._plan()
        self._check_window()
        self._check_reuse()
        if self.threshold is not None:
            object.__setattr__(self, "threshold", _thresholds(self.threshold))

    def _check_window(self) -> None:
        if self.window is None:
            return
        pair = isinstance(self.window, tuple) and len(self.window) == 2
        if not pair or not 0 <= self.window[0] <= self.window[1]:
            raise FanalError(f"rods needs a window (low, high) with 0 <= low <= high, got {self.window!r}")
        if self.window_units == "fraction" and self.window[0] > 1:
            raise FanalError(f"a window in fractions of the run starts between 0 and 1, got {self.window!r}")

    def _check_reuse(self) -> None:
        if isinstance(self.hold, bool) or not isinstance(self.hold, int) or self.hold < 1:
            raise FanalError(f"rods holds a perturbation for a whole number of steps >= 1, got {self.hold!r}")
        if not self.lag:
            return
        if self.method not in ("cas", "sas", "reversed") or self.threshold is not None or self.steps != 1:
            raise FanalError(
                "with lag, rods looks only at x + delta: it takes method cas, sas or reversed, one gradient step, and "
                f"no threshold, got {self.method!r:.40}, steps={self.steps} and threshold={self.threshold!r:.40}; "
                "hold goes with all of them"
            )

    def _plan(self) -> Plan:
        search = Search(self.rho, self.rho_units, self.steps, self.product, self.region)
        return Plan(self.method, search, self.v, self.hold, self.lag)

    def inside(self, span: Span) -> bool:
        """Whether the guard acts on an interval."""
        if self.window is None:
            return True
        low, high = self.window
        if self.window_units == "sigma":
            return low <= float(span.sigma.detach()) <= high
        return low <= (span.i if self.window_units == "step" else span.i / span.n) < high

    def limit(self, span: Span) -> float | None:
        """Return the threshold of an interval; None: the guard is always on.

        Raises:
            FanalError: thresholds were given one per step, for a grid of another length.
        """
        if not isinstance(self.threshold, tuple):
            return self.threshold  # pyright: ignore[reportReturnType]
        if len(self.threshold) != span.n:
            raise FanalError(
                f"rods has {len(self.threshold)} thresholds, one per step, for a grid of {span.n}: give one for each, "
                "or a single number"
            )
        return self.threshold[span.i]

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with the inner solver, and with the robust denoiser where the guard acts."""
        plan, limit, asked = self._plan(), self.limit(span), Counted(denoiser)
        known = plan.remembers and len(memory) > 0
        kept = Kept(*memory[:2]) if known else Kept.none(x)
        robust = Robust(asked, plan, span, limit, kept)
        inside = self.inside(span)
        step = self.solver.step(robust if inside else asked, x, span, memory[2:] if known else memory)
        if plan.remembers:
            left = robust.kept if robust.found is not None else Kept.none(x)
            step = dataclasses.replace(step, memory=(*left.memory(), *step.memory))
        found, rows = robust.found, torch.ones(len(x), dtype=x.dtype, device=x.device)
        info = {
            "rods_index": rows * math.nan,
            "rods_corrected": rows * 0,
            "rods_calls": rows * asked.calls,
            "rods_products": rows * robust.products,
        }
        if found is None:
            return dataclasses.replace(step, info={**step.info, **info})
        info |= {"rods_corrected": found.rows.to(x.dtype), "rods_denoised": found.robust.detach()}
        if found.index is not None:
            info["rods_index"] = found.index.to(x.dtype)
        step = dataclasses.replace(step, info={**step.info, **info})
        start = span.sigma if step.at is None else step.at[1]
        if not torch.equal(found.sigma, start):
            return step  # a solver that first asks elsewhere (after an analytic step) said itself what it saw
        at = step.at if found.at is None else (found.at, found.sigma)
        return dataclasses.replace(step, denoised=found.denoised, at=at)


def _thresholds(given: float | Sequence[float] | Tensor) -> float | tuple[float, ...]:
    """One threshold or one per step, as plain numbers, so that a guard can be compared and written down."""
    try:
        values = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FanalError(f"threshold is a number, or one per step, got {given!r:.60}") from error
    if values.ndim > 1 or bool(values.isnan().any()):
        raise FanalError(f"threshold is a number, or one per step, got {given!r:.60}")
    return float(values) if values.ndim == 0 else tuple(values.tolist())


@dataclass
class _CurvatureWatch:
    window: tuple[float, float]
    steps: list[Tensor] = field(default_factory=list)
    seen: int = 0

    def see(self, transition: Transition) -> None:
        found = transition.step.info.get("rods_index")
        before = self.steps[-1] if self.steps else torch.zeros(len(transition.x), device=transition.x.device)
        inside = self.window[0] <= float(transition.span.sigma) <= self.window[1]
        if found is not None and inside and not bool(found.isnan().all()):
            self.seen += 1
            before = torch.maximum(before.to(found.dtype), found)
        self.steps.append(before)

    def per_step(self) -> Tensor:
        return torch.stack([step.cpu().double() for step in self.steps])

    def risk(self) -> Tensor:
        if not self.seen:
            raise FanalError(
                f"no step with sigma in {self.window} has an index: run a rods.Guard with a threshold there "
                "(infinity records the index and corrects nothing)"
            )
        return self.steps[-1].cpu().double()


@dataclass(frozen=True)
class Curvature:
    """The index as a detector: the largest of the steps with sigma in `window` ([RODS] fig. 6), read from the run.

    It asks nothing itself. The run's solver must be a `Guard` with a threshold there; infinity will do.

    Attributes:
        window: closed range of sigma that counts.
    """

    window: tuple[float, float] = (0.0, math.inf)
    free: bool = field(default=False, init=False)

    def start(self, denoiser: Denoiser | None = None) -> _CurvatureWatch:
        """Begin to watch a run; the denoiser is not asked."""
        return _CurvatureWatch(self.window)


PRESETS: dict[str, Guard] = {
    "afhqv2": Guard(rho=1.0, rho_units="absolute", threshold=0.1),
    "ffhq": Guard(rho=8.0, rho_units="absolute", threshold=0.09),
    "ffhq-figure4": Guard(rho=1.0, rho_units="absolute", threshold=0.09),
    "hands11k": Guard(rho=30.0, rho_units="absolute", threshold=0.005, window=(0.1, 0.5), window_units="fraction"),
}
"""The paper's settings for its three data sets around Euler; radius and threshold belong to their size and scale.

Put one around another solver with `dataclasses.replace(PRESETS["ffhq"], solver=Heun())`. Section 5 has a radius of 8
for FFHQ, the caption of figure 4 has 1; both are here. Table 1 most likely was always on: `threshold=None`.
"""

"""The robust denoiser of one step, `D_δ(x) = D(x + δ) − δ`: it finds δ where it is first asked and holds it fixed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fanal.denoiser import Denoiser, Wrapper, expand
from fanal.hallucination.perturbation import Objective, Search, Slope, bend, differentiate
from fanal.sampling import Span

__all__ = ["Found", "Kept", "Plan", "Robust"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a guard chooses its perturbations.

    Attributes:
        method: name of the method, or what δ makes large.
        search: radius, set and gradient steps.
        v: what the index is of.
        hold: steps that one δ serves.
        lag: whether δ comes from where the step before was evaluated.
    """

    method: str | Objective
    search: Search
    v: str
    hold: int
    lag: bool

    @property
    def remembers(self) -> bool:
        """Whether steps need what the step before found."""
        return self.hold > 1 or self.lag


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A perturbation that waits for the next step, in a solver's memory: one row per sample.

    Attributes:
        share: δ over its radius, (B, *shape); 0 for samples that are not corrected.
        uses: (B,) int64, steps that it served; negative: there is none.
    """

    share: Float[Tensor, "b *d"]
    uses: Tensor

    @classmethod
    def none(cls, x: Tensor) -> Kept:
        """Nothing is kept yet."""
        return cls(torch.zeros_like(x), torch.full((len(x),), -1, device=x.device))

    def memory(self) -> tuple[Tensor, Tensor]:
        """Return it as a solver's memory."""
        return self.share, self.uses

    def count(self) -> int:
        """Steps that it served; negative: it is of no use, for at least one sample."""
        return int(self.uses.min())


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What was found where a step first asked.

    Attributes:
        sigma: the noise level there.
        denoised: the raw prediction.
        robust: what the solver was told.
        delta: the perturbation, 0 for samples that are not corrected.
        rows: which samples are corrected.
        index: of each sample, where it was measured.
        at: where `denoised` was evaluated, if that is not where the solver asked.
    """

    sigma: Tensor
    denoised: Tensor
    robust: Tensor
    delta: Tensor
    rows: Bool[Tensor, " b"]
    index: Tensor | None = None
    at: Tensor | None = None


class Robust(Wrapper):
    """The denoiser of one step.

    Args:
        denoiser: D(x, sigma).
        plan: how δ is chosen.
        span: the interval.
        limit: index from which a sample is corrected; None: all are.
        kept: what the step before left.
    """

    def __init__(self, denoiser: Denoiser, plan: Plan, span: Span, limit: float | None, kept: Kept) -> None:
        super().__init__(denoiser)
        self.plan, self.span, self.limit, self.kept = plan, span, limit, kept
        self.found: Found | None = None
        self.products = 0

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """Return `D(x + δ) − δ` for the corrected samples and D for the others."""
        if self.found is None:
            uses = self.kept.count()
            held = uses >= 0 and (self.plan.lag or uses < self.plan.hold)
            self.found = self._follow(x, sigma, uses) if held else self._look(x, sigma)
            return self.found.robust
        return self._moved(x, sigma, self.found.delta, self.found.rows)

    def _moved(self, x: Tensor, sigma: Tensor, delta: Tensor, rows: Tensor) -> Tensor:
        """The robust prediction at any point of the step."""
        if not bool(rows.any()):
            return self.denoiser(x, sigma)
        mask = expand(rows, x)
        # where, not a sum with 0: −0 + 0 would change a bit
        denoised = self.denoiser(torch.where(mask, x + delta, x), sigma)
        return torch.where(mask, denoised - delta, denoised)

    def _differentiated(self, x: Tensor, sigma: Tensor) -> Slope:
        slope = differentiate(self.denoiser, x, sigma, self.plan.search.product)
        self.products += slope.products
        return slope

    def _look(self, x: Tensor, sigma: Tensor) -> Found:
        """Find the perturbation and whom to correct.

        Products run on a graph of their own. Without gradients, as in `sample`, their predictions serve the step too;
        with gradients the step asks again, so that the caller's graph stays whole.
        """
        plan, own = self.plan, not torch.is_grad_enabled()
        here = there = value = aim = None
        if self.limit is not None or plan.method in ("cas", "reversed"):
            here = self._differentiated(x, sigma)
            aim, spent = plan.search.cas(self.denoiser, x.detach(), sigma, here)
            self.products += spent
        denoised = here.denoised if here is not None and own else self.denoiser(x, sigma)
        rows = torch.ones(len(x), dtype=torch.bool, device=x.device)
        if self.limit is not None and here is not None and aim is not None:
            there = self._differentiated(x.detach() + aim, sigma)
            value = bend(here, there, sigma, plan.v)
            rows = value >= self.limit
        delta = torch.zeros_like(x.detach())
        robust = denoised
        if bool(rows.any()):
            delta = self._direction(x.detach(), sigma, denoised.detach(), aim)
            if there is not None and own and plan.method == "cas":
                moved = there.denoised - delta
            else:
                moved = self._moved(x, sigma, delta, rows)
            robust = torch.where(expand(rows, x), moved, denoised)
        self._keep(delta, rows, x, sigma, uses=0 if plan.lag else 1)
        return Found(sigma, denoised, robust, delta, rows, value)

    def _direction(self, x: Tensor, sigma: Tensor, denoised: Tensor, aim: Tensor | None) -> Tensor:
        """The perturbation of the plan's method; `aim` is that of CAS, where it is known."""
        method, search = self.plan.method, self.plan.search
        if not isinstance(method, str):
            delta, spent = search.best(method, self.denoiser, x, sigma)
            self.products += spent
            return delta
        if method == "sas":
            return search.sas(self.denoiser, x, sigma, x - denoised)
        if method == "random":
            return search.allowed.ascend(search.size(x, sigma), self.span.noise(x, "rods")).to(x.dtype)
        assert aim is not None
        return aim if method == "cas" else -aim

    def _follow(self, x: Tensor, sigma: Tensor, uses: int) -> Found:
        """Use the perturbation that was kept, scaled to this noise level: one call, at x + δ only.

        With `lag`, what is found there is kept for the next step.
        """
        plan = self.plan
        delta = (plan.search.size(x, sigma) * self.kept.share).to(x.dtype)
        rows = self.kept.share.flatten(1).any(1)
        mask = expand(rows, x)
        y = torch.where(mask, x + delta, x)
        renew = plan.lag and uses + 1 >= plan.hold
        slope = self._differentiated(y, sigma) if renew and plan.method in ("cas", "reversed") else None
        denoised = slope.denoised if slope is not None and not torch.is_grad_enabled() else self.denoiser(y, sigma)
        robust = torch.where(mask, denoised - delta, denoised)
        self.kept = Kept(self.kept.share, self.kept.uses + 1)
        if renew:
            aim = (y - denoised).detach() if slope is None else slope.gradient
            aim = -aim if plan.method == "reversed" else aim
            size = plan.search.size(x, sigma)
            self._keep(plan.search.allowed.ascend(size, aim), torch.ones_like(rows), x, sigma, uses=0)
        return Found(sigma, denoised, robust, delta, rows, at=y)

    def _keep(self, delta: Tensor, rows: Tensor, x: Tensor, sigma: Tensor, uses: int) -> None:
        """Keep a perturbation for the next step, as a share of its radius."""
        if not self.plan.remembers:
            return
        size = self.plan.search.size(x, sigma)
        share = torch.where(size > 0, delta / size, torch.zeros_like(delta)).to(x.dtype)
        share = torch.where(expand(rows, x), share, torch.zeros_like(share))
        self.kept = Kept(share, torch.full((len(x),), uses, device=x.device))

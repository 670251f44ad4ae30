"""The ladder and localized re-noising: who climbs, with which noise, and what stays in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

import fanal
from fanal.denoiser import Counted
from fanal.errors import FanalError
from fanal.hallucination.detectors import LastSlope, Variance
from fanal.hallucination.ladder import Judge, Ladder
from fanal.hallucination.localized import Inside, Localized, region
from fanal.hallucination.repair import watch
from fanal.schedules import polynomial
from fanal.seeding import noise
from fanal.solvers import DDPM, Ancestral, Euler, Heun
from toys import blurred

GRID, SEEDS, EYE = polynomial(12), range(20), LastSlope()
RUNGS = ((0.5, 5), (1.5, 6))


def start(seeds=SEEDS):
    return noise((2,), seeds, 80.0, dtype=torch.float64)


@dataclass(frozen=True)
class End:
    """The last slope as a judge of finished samples, whose calibration samples had these risks."""

    risks: tuple[float, ...] = (0.0, 1.0)
    window: tuple[float, float] = (0.0, 0.0)
    free: bool = True

    def start(self):
        return EYE.start()

    def threshold(self, flag):
        return float(torch.tensor(self.risks).double().quantile(1 - flag))


def climb(ladder, threshold, seeds: Sequence[int] = SEEDS, model=None, solver=None, eye=None):
    model, solver, eye = model or blurred(), solver or Euler(), eye or EYE
    first = watch(model, start(seeds), GRID, solver, eye, seeds)
    return first, ladder.repair(model, start(seeds), GRID, solver, eye, seeds, first, threshold)


def middle():
    return float(watch(blurred(), start(), GRID, Euler(), EYE, SEEDS).risk.median())


@pytest.mark.parametrize("solver", [Euler(), Heun()])
def test_only_flagged_samples_climb_and_every_step_is_paid(solver):
    model = Counted(blurred())
    limit = float(watch(blurred(), start(), GRID, solver, EYE, SEEDS).risk.median())
    assert isinstance(End(), Judge)
    first, after = climb(Ladder(RUNGS), limit, model=model, solver=solver, eye=End())
    flagged = first.risk > limit
    assert torch.equal(after.x[~flagged], first.x[~flagged])
    assert (after.rounds[~flagged] == 0).all()
    assert (after.rounds[flagged] >= 1).all()
    price = [0, 5, 11] if isinstance(solver, Euler) else [0, 9, 20]
    spent = torch.tensor([price[n] for n in after.rounds.tolist()]).double()
    assert torch.equal(after.evaluations - first.evaluations, spent)
    assert model.evaluations == after.evaluations.sum()


def test_a_rung_is_a_run_from_where_the_last_one_ended_with_noise_of_its_own():
    # everybody climbs both rungs: no risk is below 0
    first, after = climb(Ladder(RUNGS, eta=1.0, accept=()), -1.0, eye=End())
    x = first.x
    for number, (sigma, steps) in enumerate(RUNGS, 1):
        x = x + noise((2,), SEEDS, sigma, round=number, stream="ladder", dtype=torch.float64)
        for step in fanal.trace(blurred(), x, polynomial(steps, 0.02, sigma), DDPM(), SEEDS, round=number):
            x = step.step.x_next
    assert (after.rounds == 2).all()
    assert torch.allclose(after.x, x, rtol=1e-12, atol=1e-14)


def test_shares_let_tries_go_earlier_and_hold_rung_by_rung():
    """A judge whose calibration samples were all risky accepts any try; no share makes it stricter than at first."""
    limit, rungs = middle(), ((1.5, 12), (1.5, 12))
    risky, fair = End((0.0, 0.0, 1e9, 1e9)), End((-1e9, -1e9, 1e9, 1e9))

    def rounds(eye, *accept):
        return climb(Ladder(rungs, accept=accept, low=0.002), limit, eye=eye)[1].rounds

    plain = rounds(risky)
    flagged = plain > 0
    assert int((plain == 1).sum()) > 0  # some were mended by the first rung
    assert (rounds(risky, 0.2)[flagged] == 1).all()
    assert torch.equal(rounds(fair, 0.9), plain)
    assert torch.equal(rounds(fair, 0.9, 0.1), plain)  # after the second rung nobody is left to be let go
    assert torch.equal(rounds(EYE, 0.2), climb(Ladder(rungs, accept=()), limit)[1].rounds)  # it is no judge


@pytest.mark.parametrize("eye", [EYE, End()])
@pytest.mark.parametrize("ladder", [Ladder(RUNGS), Ladder(RUNGS, eta=0.0)])
def test_no_sample_depends_on_who_climbs_beside_it(ladder, eye):
    limit, some = middle(), [1, 2, 7, 11, 18]
    _, whole = climb(ladder, limit, eye=eye)
    _, part = climb(ladder, limit, [SEEDS[b] for b in some], eye=eye)
    assert torch.allclose(part.x, whole.x[some], rtol=1e-10, atol=1e-12)
    assert torch.equal(part.rounds, whole.rounds[some])


def test_the_ladder_mends_what_left_the_grid():
    # Blurred modes below the truth's, and a risk that knows the distance to a mode: 300 seeds, about 60 % wrong at
    # first, less than half of that in the end, more than eight standard errors.
    verify, seeds = fanal.datasets.DATASETS["grid2"].verify, range(300)
    limit = float(watch(blurred(), start(seeds), GRID, Euler(), EYE, seeds).risk.quantile(0.35))
    first, after = climb(Ladder(((1.5, 2),) * 4, eta=0.0), limit, seeds)
    before, now = verify(first.x) != 0, verify(after.x) != 0
    change = fanal.metrics.paired_rate(before, now)
    assert now.double().mean() < before.double().mean() / 2
    assert change.value + 8 * change.se < 0


class Pictures:
    """The law of independent pixels N(0, 1/4), with a blurred stand-in that departs more in one corner."""

    def __call__(self, x, sigma):
        denoised = x * 0.25 / (0.25 + sigma.to(x.dtype) ** 2)
        tilt = torch.zeros_like(x)
        tilt[..., :3, :3] = 0.5 * x[..., :3, :3].sign()
        return denoised + tilt


IMAGES = (1, 8, 8)


class Corner:
    """A detector that dislikes a bright corner."""

    free, window = True, (0.0, 0.0)

    def start(self):
        ends = []

        class Eye:
            def see(self, transition):
                ends.append(transition.step.x_next[..., :3, :3].flatten(1).mean(1))

            def per_step(self):
                return torch.stack(ends)

            def risk(self):
                return ends[-1]

        return Eye()


def images(seeds=SEEDS):
    return noise(IMAGES, seeds, 80.0, dtype=torch.float64)


@pytest.mark.parametrize("solver", [Euler(), Heun(), Ancestral(eta=0.5)])
def test_outside_the_region_everything_stays_to_rounding_and_the_inside_moves(solver):
    x, seeds = noise(IMAGES, SEEDS, dtype=torch.float64), SEEDS
    fresh = noise(IMAGES, SEEDS, round=1, stream="other", dtype=torch.float64)
    mask = torch.zeros(20, 1, 8, 8, dtype=torch.bool)
    mask[..., 2:5, 1:4] = True
    grid = GRID[GRID <= 1.5]
    path = [x + float(grid[0]) * fresh]
    for step in fanal.trace(Pictures(), path[0], grid, Inside(solver, mask, x, fresh), seeds):
        path.append(step.step.x_next)
    for sigma, state in zip(grid, path, strict=True):
        assert torch.allclose(state[~mask], (x + float(sigma) * fresh)[~mask], rtol=1e-14, atol=1e-14)
    assert torch.allclose(path[-1][~mask], x[~mask], rtol=1e-14, atol=1e-14)
    assert ((path[-1] - x)[mask].abs() > 1e-3).double().mean() > 0.95


def test_the_region_is_where_the_prediction_departs():
    x = torch.zeros(2, 1, 12, 12)
    denoised = x.clone()
    denoised[0, 0, 6, 6] = 1.0
    denoised[1, 0, 0, 0] = 2.0
    denoised[1, 0, 9, 9] = 0.5  # a sixteenth of the largest square
    mask = region(x, denoised, 0.2, 2)
    wanted = torch.zeros_like(mask)
    wanted[0, 0, 3:10, 3:10] = True  # 3 x 3 from the average, 2 further
    wanted[1, 0, :4, :4] = True
    assert torch.equal(mask, wanted)


@pytest.mark.parametrize("solver", [Euler(), Heun()])
def test_localized_re_noising_pays_one_call_more_and_leaves_the_rest(solver):
    model, eye = Counted(Pictures()), Corner()
    first = watch(model, images(), GRID, solver, eye, SEEDS)
    limit = float(first.risk.median())
    after = Localized(1.5, 2, 0.3, 1).repair(model, images(), GRID, solver, eye, SEEDS, first, limit)
    flagged = first.risk > limit
    tail = int((GRID <= 1.5).sum()) - 1
    price = 1 + (tail if isinstance(solver, Euler) else 2 * tail - 1)
    assert torch.equal(after.evaluations, first.evaluations + price * after.rounds)
    assert model.evaluations == after.evaluations.sum()
    assert torch.equal(after.x[~flagged], first.x[~flagged])
    assert (after.risk <= first.risk).all()
    moved = (after.x - first.x).abs() > 1e-9
    better = after.risk < first.risk
    assert bool(better.any())
    assert not moved[..., 7, 7].any()  # the departure is in the other corner
    assert bool(moved[better][..., 0, 0].any())


def test_localized_re_noising_does_not_depend_on_the_batch():
    eye, some = Variance((0.0, 0.3)), [0, 3, 4, 9]

    def run(seeds, limit):
        first = watch(Pictures(), images(seeds), GRID, Euler(), eye, seeds)
        return Localized(1.5, 2).repair(Pictures(), images(seeds), GRID, Euler(), eye, seeds, first, limit)

    limit = float(watch(Pictures(), images(), GRID, Euler(), eye, SEEDS).risk.median())
    assert torch.allclose(run([SEEDS[b] for b in some], limit).x, run(SEEDS, limit).x[some], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Ladder(((0.01, 5),)), "a ladder needs rungs"),
        (lambda: Ladder(((1.0, 1),)), "a ladder needs rungs"),
        (lambda: Ladder(eta=2.0), "eta in"),
        (lambda: Ladder(accept=(0.2, 1.0)), "shares between 0 and 1"),
        (lambda: Ladder(accept=0.2), "shares between 0 and 1"),
        (lambda: Ladder(rungs=((1.0,),)), "a ladder needs rungs"),
        (lambda: climb(Ladder(((0.001, 2),), low=0.0001), -1.0), "no two nodes"),
        (lambda: Localized(sigma=-1.0), "localized re-noising needs sigma > 0"),
        (lambda: Localized(share=0.0), "share in"),
        (
            lambda: Localized().repair(
                blurred(), start(), GRID, Euler(), EYE, SEEDS, watch(blurred(), start(), GRID, Euler(), EYE, SEEDS), 0.0
            ),
            "needs images",
        ),
    ],
)
def test_repairs_that_make_no_sense_are_refused(make, words):
    with pytest.raises(FanalError, match=words):
        make()

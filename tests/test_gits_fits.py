"""Fitted grids and weights: nearer to the teacher, on samples that no fit saw."""

from __future__ import annotations

import math

import pytest
import torch

import fanal
import teachers
from fanal import gits
from fanal.denoiser import Counted, slope
from fanal.errors import FanalError
from fanal.schedule_search import Contest, Replay, Student, Weighted, calls_of, error_of, fit, starts, weights_of
from fanal.schedule_search.fitting import OBJECTIVES
from fanal.schedules import SCHEDULES, logsnr, polynomial
from fanal.seeding import noise
from fanal.solvers import DEIS, IPNDM, LMS, Churn, DPMpp, Euler, Heun, UniPC
from teachers import mixture, warm

# Fixtures
run = teachers.run


def test_a_replay_asks_only_from_the_first_change_on():
    denoiser = Counted(mixture())
    student = Student(denoiser, warm(denoiser), torch.zeros(8, 12, dtype=torch.float64))
    grid = logsnr(6, zero=False)
    for solver, per_step in ((Euler(), 1), (Heun(), 2)):
        plain, record = student.residual(grid, solver)
        before = denoiser.calls
        again, _ = student.residual(grid, solver, record)
        assert denoiser.calls == before
        assert torch.equal(again, plain)
        moved = grid.clone()
        moved[4] *= 1.01
        other, _ = student.residual(moved, solver, record)
        assert denoiser.calls - before == 2 * per_step + (per_step - 1)  # nodes 4, 5; Heun also looks ahead to 4
        assert torch.equal(other, student.residual(moved, solver)[0])


def test_replay_notices_another_question():
    replay = Replay(lambda x, sigma: 2 * x, [(torch.ones(1, 1), 1.0, torch.zeros(1, 1))])
    assert replay(torch.ones(1, 1), torch.tensor(1.0)).item() == 0
    assert replay(torch.ones(1, 1), torch.tensor(1.0)).item() == 2


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("solver", [Euler(), Heun()])
def test_a_fit_ends_nearer_to_the_teacher_on_samples_it_never_saw(solver, objective):
    """On 256 held-out samples: two standard errors of the paired gain against fixed grids, and never behind a path."""
    denoiser = Counted(mixture(5, d=24))
    x = warm(denoiser, 64)
    base = gits.search(denoiser, x, 4, teacher=Heun(), holdout=256)
    before = denoiser.evaluations
    found = gits.search(denoiser, x, 4, solver=solver, method="fit", objective=objective, teacher=base)
    counted = (denoiser.evaluations - before - 256 * calls_of(solver, 4)) / 64
    assert found.calls == pytest.approx(counted)
    student = Student(denoiser, base.judged.x[0], base.judged.x[-1])
    fitted = student.errors(found.schedules[4], solver)
    for name, grid in starts(base.teacher, [4])[4].items():
        other = student.errors(grid, solver)
        of = {"robust": lambda miss: miss, "typical": torch.log, "mean": torch.square}[objective]
        gain = of(other) - of(fitted)
        assert gain.mean() > (2 * gain.std() / 16 if name in SCHEDULES else 0), name


def test_more_tries_keep_the_nearest_fit():
    """Each pays for its fit, and the kept one is the best of those that single starts lead to."""
    denoiser = Counted(mixture(5, d=24))
    base = gits.search(denoiser, warm(denoiser, 32), 4, teacher=Heun())
    searches = [gits.search(denoiser, 0, 4, solver=Euler(), method="fit", teacher=base, tries=k) for k in (1, 3)]
    student = Student(denoiser, base.teacher.x[0], base.teacher.x[-1])
    contest = Contest(student, starts(base.teacher, [4]), "robust", 3, False)
    names = [*contest.ranked(4, Euler())][:3]
    assert searches[0].picks[4] == names[0]
    scores = {name: contest.fit(contest.starts[4][name], Euler()).score for name in names}
    assert searches[1].picks[4] == min(scores, key=scores.__getitem__)
    assert searches[1].calls > 1.5 * searches[0].calls - 60
    miss = [student.errors(found.schedules[4], Euler()).mean() for found in searches]
    assert miss[1] <= miss[0]
    with pytest.raises(FanalError, match="at least 1"):
        gits.search(denoiser, 0, 4, teacher=base, tries=0)


def test_a_fit_finds_the_best_grid_of_a_problem_with_one_node(run):
    """Two Euler steps on a Gaussian: the best middle node, by a search over it."""
    denoiser = fanal.exact.Gaussian(torch.zeros(3, dtype=torch.float64), 0.25)
    x = noise(denoiser.shape, range(16), 80.0, dtype=torch.float64)
    keep = torch.tensor(0.25, dtype=torch.float64)
    ends = x * ((keep + 0.002**2) / (keep + 80.0**2)).sqrt()  # the exact solution
    student = Student(denoiser, x, ends)

    def miss(node):
        return float(student.residual(torch.tensor([80.0, node, 0.002]), Euler())[0].square().sum(1).mean())

    nodes = torch.logspace(1.5, -2, 400, dtype=torch.float64).tolist()
    best = min(nodes, key=miss)
    found = fit(
        student, torch.tensor([80.0, 5.0, 0.002], dtype=torch.float64), Euler(), objective="mean", iterations=30
    )
    assert found.score <= miss(best) * (1 + 1e-3)
    assert float(found.sigmas[1]) == pytest.approx(best, rel=0.03)
    assert found.score < found.start


def test_a_trial_that_leaves_the_range_of_numbers_is_no_gain():
    denoiser, calls = mixture(), []

    class Fails(Student):
        def residual(self, sigmas, solver, records=None):
            calls.append(sigmas)
            if len(calls) > 4:  # the start, and one run for each of three inner nodes
                raise FanalError("not finite")
            return super().residual(sigmas, solver, records)

    student = Fails(denoiser, warm(denoiser), torch.zeros(8, 12, dtype=torch.float64))
    found = fit(student, logsnr(4, zero=False), Euler())
    assert len(calls) == 4 + 4  # four tries, each more careful than the last
    assert found.score == found.start
    torch.testing.assert_close(found.sigmas, logsnr(4, zero=False), rtol=1e-12, atol=0)


def test_weights_are_read_off_a_solver():
    grid = logsnr(5, zero=False)
    read = weights_of(Euler(), grid)
    assert [len(row) for row in read] == [1] * 5
    assert [row[0] for row in read] == pytest.approx([1.0] * 5, rel=1e-14)
    assert weights_of(IPNDM(3), grid)[3] == pytest.approx((23 / 12, -16 / 12, 5 / 12), rel=1e-12)
    assert weights_of(Heun(), grid) is None
    assert weights_of(Churn(), grid) is None


@pytest.mark.parametrize("solver", [IPNDM(4), LMS(3), DEIS(3), DPMpp(2), DPMpp(3), UniPC(2), UniPC(3, variant="bh1")])
def test_every_linear_multistep_solver_is_a_table_of_weights(solver):
    """On a mixture, which is anything but linear; and the table's numbers are those of the grid alone."""
    denoiser, grid = mixture(), polynomial(7, zero=False)
    x = warm(denoiser)
    rows = weights_of(solver, grid)
    expected = fanal.sample(denoiser, x, grid, solver)
    torch.testing.assert_close(fanal.sample(denoiser, x, grid, Weighted(rows)), expected, rtol=1e-9, atol=1e-9)


def test_weighted_takes_the_steps_its_table_says():
    """Order 2 of iPNDM by hand, and a grid it has no weights for."""
    denoiser, grid = mixture(), logsnr(3, zero=False)
    x = warm(denoiser)
    solver = Weighted(((1.0,), (1.5, -0.5), (1.5, -0.5)))
    state, seen = x, []
    for i in range(3):
        seen.append(slope(state, denoiser(state, grid[i]), grid[i]))
        weights = (1.0, 0.0) if i == 0 else (1.5, -0.5)
        state = state + (grid[i + 1] - grid[i]) * (weights[0] * seen[-1] + weights[1] * (seen[-2] if i else 0))
    torch.testing.assert_close(fanal.sample(denoiser, x, grid, solver), state, rtol=1e-13, atol=1e-12)
    read = weights_of(solver, grid)
    assert [len(row) for row in read] == [1, 2, 2]
    with pytest.raises(FanalError, match="weights are for 3 steps, the grid has 4"):
        fanal.sample(denoiser, x, logsnr(4, zero=False), solver)


def test_error_of_known_values():
    found = error_of(torch.tensor([3.0, 4.0] * 50))
    assert found.rms.value == pytest.approx(math.sqrt(12.5))
    assert found.rms.se == pytest.approx(torch.tensor([9.0, 16.0] * 50).double().std().item() / 10 / (2 * 12.5**0.5))
    assert found.median.value == 3.5
    with pytest.raises(FanalError, match="three samples"):
        error_of(torch.ones(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 61}, "room for 1 to 60 steps"),
        ({"steps": 0}, "room for 1 to 60 steps"),
        ({"method": "gts"}, "did you mean 'gits'"),
        ({"metric": "dav"}, "did you mean 'dev'"),
        ({"objective": "mad", "method": "fit"}, "unknown objective"),
        ({"coeff": 0.0}, "coeff must be positive"),
        ({"solver": Euler}, "solvers must be objects"),
        ({"method": "fit", "sigmas": polynomial(10)}, "ends above 0"),
        ({"method": "fit-weights", "solver": Heun()}, "no multistep weights"),
        ({"sigmas": torch.tensor([1.0, 2.0])}, "must fall"),
        ({"metric": lambda a, b: math.nan}, "not finite"),
    ],
)
def test_what_cannot_be_searched_is_refused(change, message):
    denoiser = fanal.load("gaussian:tilted2")
    arguments = {"steps": 3, "teacher": Euler(), **change}
    with pytest.raises(FanalError, match=message):
        gits.search(denoiser, 4, arguments.pop("steps"), **arguments)


def test_choosing_respects_the_budget_and_takes_the_best_finalist():
    denoiser = Counted(mixture(7))
    found = gits.choose(
        denoiser, warm(denoiser, 32), [4, 5], {"euler": Euler(), "heun": Heun()}, teacher=Heun(), iterations=2
    )
    for calls, choice in found.items():
        solver = choice.search.solver_for(choice.steps)
        assert calls_of(choice.search.solver, choice.steps) <= calls
        before = denoiser.calls
        fanal.sample(denoiser, warm(denoiser), choice.search.schedules[choice.steps], solver)
        assert denoiser.calls - before <= calls
        fitted = {name: score for name, score in choice.scores.items() if name.endswith("fitted")}
        assert min(fitted, key=fitted.__getitem__) == f"{choice.name}, fitted"
        assert choice.search.error[choice.steps].rms.n == 32

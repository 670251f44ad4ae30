"""Schedule search against direct definitions, brute force, and the sampler itself."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import fanal
import teachers
from fanal import gits
from fanal.denoiser import Counted, Wrapper, slope
from fanal.errors import FanalError
from fanal.exact import Mixture
from fanal.schedule_search import Student, calls_of, cost_matrix, shortest, starts, teach
from fanal.schedules import logsnr, polynomial
from fanal.seeding import noise
from fanal.solvers import AFS, IPNDM, Euler, Heun
from teachers import mixture, warm

# Fixtures
run = teachers.run


def deviation(v, start, end):
    """Distance from v to the straight line through both ends, sample by sample, as it is defined."""
    unit = (end - start) / torch.linalg.vector_norm(end - start, dim=1, keepdim=True)
    off = end - v
    return torch.linalg.vector_norm(off - (off * unit).sum(1, keepdim=True) * unit, dim=1)


def jump(run, i, j):
    d = slope(run.x[i], run.denoised[i], run.sigmas[i])
    return run.x[i] + (run.sigmas[j] - run.sigmas[i]) * d


PAIRS = [(i, j) for i in range(14) for j in range(i + 1, 15)]


def test_the_closed_form_of_dev_is_its_definition(run):
    cost = cost_matrix(run, "dev")
    for i, j in PAIRS:
        landed, own = (deviation(v, run.x[0], run.x[-1]).mean() for v in (jump(run, i, j), run.x[j]))
        assert abs(float(cost[i, j] - (landed - own))) <= 1e-12 * max(float(landed), float(own)), (i, j)
    assert torch.isinf(cost[torch.tril(torch.ones(15, 15, dtype=torch.bool))]).all()


@pytest.mark.parametrize(("metric", "p"), [("l1", 1), ("l2", 2)])
def test_l1_and_l2_are_their_definitions_and_so_is_a_function_of_ones_own(run, metric, p):
    def own(predicted, target):
        return torch.linalg.vector_norm(predicted - target, ord=p, dim=1).mean()

    cost, custom = cost_matrix(run, metric), cost_matrix(run, own)
    for i, j in PAIRS:
        assert float(cost[i, j]) == pytest.approx(float(own(jump(run, i, j), run.x[j])), rel=1e-13, abs=1e-13)
    inside = torch.isfinite(cost)
    torch.testing.assert_close(cost[inside], custom[inside], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("metric", "p"), [("l1", 1), ("l2", 2)])
def test_distances_of_float32_states_are_those_of_float64(metric, p):
    """Differences of the float32 states themselves are up to six percent off here."""
    denoiser = mixture(d=48)
    x = warm(denoiser, 5)
    found = teach(lambda x, sigma: denoiser(x.double(), sigma).float(), x.float(), polynomial(40, zero=False), IPNDM(4))
    cost, sigmas = cost_matrix(found, metric), found.sigmas
    for i in range(40):
        start = found.x[i].double()
        d = slope(start, found.denoised[i].double(), sigmas[i])
        off = start + (sigmas[i + 1 :, None, None] - sigmas[i]) * d - found.x[i + 1 :].double()
        exact = torch.linalg.vector_norm(off, ord=p, dim=2).mean(1)
        torch.testing.assert_close(cost[i, i + 1 :], exact, rtol=1e-3, atol=0)


def test_with_an_euler_teacher_neighbors_cost_nothing():
    """One Euler step from the teacher's own state is then the teacher's own step."""
    denoiser = mixture()
    cost = cost_matrix(teach(denoiser, warm(denoiser), polynomial(10, zero=False), Euler()), "l2")
    assert float(cost.diagonal(1).abs().max()) < 1e-10
    assert float(cost.diagonal(2).min()) > 1e-6


class Flow(Wrapper):
    """A mixture as a model that runs from infinite sigma, where its answer is the mean of the data."""

    sigma_max = math.inf

    def __call__(self, x, sigma):
        whole = self.denoiser
        return (whole.prior @ whole.means).expand_as(x) if torch.isinf(sigma) else whole(x, sigma)


def flow(seed=0):
    return Flow(Mixture(mixture(seed, d=24).means + 1.0, std=0.3))


def unit(model, count, stream="test"):
    return noise(model.shape, range(count), math.inf, stream=stream, dtype=torch.float64)


@pytest.mark.parametrize("metric", ["dev", "l1", "l2", "own"])
def test_jumps_from_infinity_are_the_limit_of_jumps_from_far_away(metric):
    """With x = 1e9·z in the place of infinity; the differences are of its reciprocal, and of rounding."""
    model = flow()
    z, finite = unit(model, 8), polynomial(12, 0.002, 1000.0, zero=False)

    def own(predicted, target):
        return (predicted - target).abs().amax(1).mean()

    costs = []
    for first in (math.inf, 1e9):
        grid = torch.cat([torch.tensor([first], dtype=torch.float64), finite])
        run = teach(model, z if first == math.inf else first * z, grid, Euler())  # from infinity every solver is
        before = run.x.clone()
        costs.append(cost_matrix(run, own if metric == "own" else metric))
        assert torch.equal(run.x, before)
    inside = torch.isfinite(costs[0])
    assert int(inside.sum()) == 14 * 13 // 2
    torch.testing.assert_close(costs[0][inside], costs[1][inside], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "solver"), [("gits", IPNDM(3)), ("fit", Heun()), ("fit-weights", IPNDM(3))])
def test_a_flow_model_is_searched_from_infinity(method, solver):
    """The infinite node stays, the first finite one is where it is best, and held-out samples end nearer."""
    model = Counted(flow(3))
    x, fresh = unit(model, 48), unit(model, 256, "holdout")
    found = gits.search(model, x, 5, method=method, solver=solver, holdout=fresh)
    grid = found.schedules[5]
    assert (float(grid[0]), float(grid[-1]), len(grid)) == (math.inf, 0.002, 6)
    assert found.breakdown["teacher"] == 60
    before = model.calls
    fanal.sample(model, found.judged.x[0], grid, found.solver_for(5))
    assert model.calls - before == calls_of(solver, 5, far=True) == (9 if method == "fit" else 5)
    student = Student(model, found.judged.x[0], found.judged.x[-1])
    plain = torch.cat([grid[:1], logsnr(4, 0.002, 1000.0, zero=False)])
    gain = student.errors(plain, solver) - student.errors(grid, found.solver_for(5))
    assert gain.mean() > 3 * gain.std() / 16
    if method != "gits":
        for name, other in starts(found.teacher, [5])[5].items():
            assert student.errors(other, solver).mean() > student.errors(grid, found.solver_for(5)).mean(), name


def test_no_analytical_step_from_infinity():
    with pytest.raises(FanalError, match="leave afs out"):
        gits.search(flow(), unit(flow(), 4), 3, afs=True)


def total(cost, path, coeff):
    return sum(coeff**m * float(cost[a, b]) for m, (a, b) in enumerate(itertools.pairwise(path)))


def test_a_case_by_hand():
    """From 0 to 3 in two jumps: through 1 costs 1 + 4γ, through 2 costs 3 + 1γ; three jumps have one way."""
    inf = math.inf
    cost = torch.tensor([[inf, 1, 3, 9], [inf, inf, 2, 4], [inf, inf, inf, 1], [inf] * 4], dtype=torch.float64)
    assert shortest(cost, [1, 2, 3], 1.0) == {1: [0, 3], 2: [0, 2, 3], 3: [0, 1, 2, 3]}
    assert shortest(cost, [2], 0.5) == {2: [0, 1, 3]}  # 3 against 3.5
    equal = cost.clone()
    equal[1, 3] = 3
    assert shortest(equal, [2], 1.0) == {2: [0, 1, 3]}  # a tie: the smaller next node


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("coeff", [0.9, 1.0, 1.15])
def test_no_path_is_cheaper(seed, coeff):
    """Every path of every length, tried; small integers, so that ties happen."""
    cost = torch.from_numpy(np.random.default_rng(seed).integers(-2, 6, (9, 9)).astype(float))
    found = shortest(cost, range(1, 9), coeff)
    for steps, path in found.items():
        ways = [(0, *middle, 8) for middle in itertools.combinations(range(1, 8), steps - 1)]
        best = min(total(cost, way, coeff) for way in ways)
        assert total(cost, path, coeff) == pytest.approx(best, abs=1e-12)
        if coeff == 1.0:  # sums of integers are exact: the tie rule can be checked
            assert tuple(path) == min(way for way in ways if total(cost, way, 1.0) == best)


def branch_and_bound(cost, steps, coeff):
    """The cheapest path by depth-first search with the best single remaining jump as the bound."""
    end = len(cost) - 1
    least = float(cost[np.triu_indices(end + 1, 1)].min())
    best = [math.inf, ()]

    def visit(path, spent):
        m = len(path) - 1
        rest = sum(coeff**k for k in range(m, steps))
        if spent + min(least * rest, least) >= best[0] and least >= 0:
            return
        if m == steps - 1:
            whole = spent + coeff**m * float(cost[path[-1], end])
            if whole < best[0]:
                best[:] = [whole, (*path, end)]
            return
        for j in range(path[-1] + 1, end):
            visit((*path, j), spent + coeff**m * float(cost[path[-1], j]))

    visit((0,), 0.0)
    return best


def test_branch_and_bound_agrees_on_a_teachers_grid():
    denoiser = mixture(3)
    cost = cost_matrix(teach(denoiser, warm(denoiser), polynomial(20, zero=False), Heun()), "l2").numpy()
    for steps, path in shortest(torch.from_numpy(cost), [3, 4, 5], 1.15).items():
        best, way = branch_and_bound(cost, steps, 1.15)
        assert total(cost, path, 1.15) == pytest.approx(best, rel=1e-12)
        assert tuple(path) == way


def test_coeff_moves_nodes_to_smaller_sigma():
    denoiser = mixture()
    grids = [gits.search(denoiser, warm(denoiser), 6, coeff=c).schedules[6].log().mean() for c in (0.8, 1.0, 1.5)]
    assert grids[0] > grids[1] > grids[2]


def test_one_search_yields_every_budget_and_makes_no_call_beyond_the_teachers():
    denoiser = Counted(mixture())
    found = gits.search(denoiser, warm(denoiser), [5, 6, 8], teacher=Euler())
    assert denoiser.calls == 60
    assert found.calls == 60
    assert found.breakdown == {"teacher": 60}
    assert found.cost.shape == (61, 61)
    assert {"teacher", "cost", "dp"} <= found.seconds.keys()
    assert found.error == {}
    teacher = set(found.teacher.sigmas.tolist())
    for steps, grid in found.schedules.items():
        assert len(grid) == steps + 1
        assert set(grid.tolist()) <= teacher
        assert (float(grid[0]), float(grid[-1])) == (80.0, 0.002)
        alone = gits.search(denoiser, warm(denoiser), steps, teacher=Euler()).schedules[steps]
        assert torch.equal(grid, alone)


def test_the_seed_decides_and_batches_do_not():
    denoiser = fanal.load("gaussian:tilted2")
    a, b, c, d = (
        gits.search(denoiser, 6, 4, seed=seed, teacher=Euler(), batch=batch)
        for seed, batch in ((0, None), (0, 2), (1, None), (0, None))
    )
    assert torch.equal(a.teacher.x[0], b.teacher.x[0])
    assert torch.equal(a.cost, d.cost)
    torch.testing.assert_close(a.cost, b.cost, rtol=1e-4, atol=1e-5)
    assert not torch.equal(a.teacher.x[0], c.teacher.x[0])
    sampled = noise(denoiser.shape, range(6), 80.0)
    assert not torch.isclose(a.teacher.x[0], sampled).any()  # nobody is judged on the noise it was fitted on


def test_progress_sees_every_step_of_the_teacher_and_every_fit():
    seen = []

    def progress(items, what):
        for item in items:
            yield item
            seen.append(what)

    gits.search(mixture(), warm(mixture(), 6), [2, 3], method="fit", teacher=Euler(), batch=4, progress=progress)
    assert {name: seen.count(name) for name in seen} == {
        **dict.fromkeys(["teacher, 1 of 2", "teacher, 2 of 2"], 60),
        "fitting": 2,
        **dict.fromkeys(["held-out teacher, 1 of 2", "held-out teacher, 2 of 2"], 60),
    }


def test_an_analytical_first_step_is_free_and_helps():
    denoiser = Counted(mixture(d=48))
    x = warm(denoiser, 32)
    plain = gits.search(denoiser, x, 5, solver=Euler(), teacher=Heun(), holdout=256)
    free = gits.search(denoiser, x, 5, solver=Euler(), teacher=plain, afs=True)
    grid = free.schedules[5]
    assert len(grid) == 7
    assert float(grid[1]) in free.teacher.sigmas.tolist()
    assert [*grid[:1], *grid[2:]] == [*plain.schedules[5]]
    assert free.calls == 5 * int((free.teacher.sigmas > plain.schedules[5][1]).sum() - 1)
    before = denoiser.calls
    fanal.sample(denoiser, x, grid, free.solver_for(5))
    assert denoiser.calls - before == 5
    ends = plain.judged.x[-1]
    without = Student(denoiser, plain.judged.x[0], ends).errors(plain.schedules[5], Euler())
    gain = without - Student(denoiser, plain.judged.x[0], ends, afs=True).errors(grid, Euler())
    assert gain.mean() > 3 * gain.std() / 16  # on 256 held-out samples


def test_the_analytical_first_step_is_euler_with_the_analytical_slope(run):
    x = run.x[0]
    first = next(fanal.trace(mixture(), x, run.sigmas, AFS(Euler()))).step.x_next
    expected = x + (run.sigmas[1] - 80.0) * x / math.sqrt(1 + 80.0**2)
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=1e-10)


def test_fits_keep_the_analytical_first_step_free():
    denoiser = Counted(mixture())
    found = gits.search(denoiser, warm(denoiser), 4, solver=IPNDM(2), teacher=Euler(), afs=True, method="fit-weights")
    before = denoiser.calls
    fanal.sample(denoiser, warm(denoiser), found.schedules[4], found.solver_for(4))
    assert denoiser.calls - before == 4
    assert [len(row) for row in found.weights[4]] == [1, 2, 2, 2, 2]

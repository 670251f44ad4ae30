"""Schedule search against direct definitions, brute force, and the sampler itself."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import fanal
from fanal import gits
from fanal.denoiser import Counted, Wrapper, slope
from fanal.errors import FanalError
from fanal.exact import Mixture
from fanal.schedule_search import (
    Contest,
    Replay,
    Student,
    Weighted,
    calls_of,
    cost_matrix,
    error_of,
    fit,
    shortest,
    starts,
    teach,
    weights_of,
)
from fanal.schedule_search.fitting import OBJECTIVES
from fanal.schedules import SCHEDULES, logsnr, polynomial
from fanal.seeding import noise
from fanal.solvers import AFS, DEIS, IPNDM, LMS, Churn, DPMpp, Euler, Heun, UniPC


def mixture(seed=0, components=4, d=12):
    """Unequal components with room between them."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(components, d, dtype=torch.float64, generator=generator)
    means *= 0.5 / means.square().mean().sqrt()
    share = torch.rand(components, dtype=torch.float64, generator=generator) + 0.1
    return Mixture(means, share, std=0.3)


def warm(denoiser, count=8, stream="test"):
    return noise(denoiser.shape, range(count), 80.0, stream=stream, dtype=torch.float64)


@pytest.fixture(scope="module")
def run():
    """A small teacher's run."""
    denoiser = mixture()
    return teach(denoiser, warm(denoiser), polynomial(14, zero=False), Heun())


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

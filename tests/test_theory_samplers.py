"""[PDE] sec. 4, statement by statement: the explicit reverse SDE, its limits, the Dirac case, schemes, losses, cells.

Where a statement is an identity the tolerance is rounding; where it is a limit, the rate is measured; where it is a
law, the threshold says how far from chance it is.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fanal import particles, pde
from fanal.errors import FanalError
from fanal.exact import Dataset, Gaussian, Mixture
from fanal.memorization import settling
from fanal.metrics import mean, rate
from fanal.particles.schemes import WEIGHTS
from fanal.sampling import sample, trace
from fanal.schedules import polynomial
from fanal.seeding import noise
from fanal.solvers import DDPM, Euler
from fanal.trajectory import Trajectory
from problems import observed_order

T, EARLY = 3.0, 0.05
VARIANCE = 0.5  # of the Gaussian data


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def line():
    """Two unequal humps on a line, not centered."""
    return Mixture(f64([[-1.5], [1.0]]), [0.4, 0.6], std=f64([0.4, 0.6]))


def plane():
    return Mixture(f64([[1.0, 0.2], [-0.8, 0.9], [-0.3, -1.1]]), [0.5, 0.3, 0.2], std=f64([0.4, 0.5, 0.35]))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def grid(steps, end=EARLY, start=T):
    """Sigmas at times uniform in log t: no step is long beside the time that is left."""
    return f64([particles.sigma_of(t) for t in np.exp(np.linspace(math.log(start), math.log(end), steps + 1))])


def power(small, values):
    """Exponent of a power law, by its last two points."""
    return math.log(values[-2] / values[-1]) / math.log(small[-2] / small[-1])


# The equation


@pytest.mark.parametrize("time", [1e-6, 0.01, 0.4, 2.0, 6.0])
def test_eq_4_6_4_10_and_4_11_are_one_drift(time):
    """And that of eq. 4.1, z + 2∇log ρ. Rounding is that of 1 − e^{−2t}, relative to the drift's largest term."""
    data, z = plane(), normal(64, 2)
    forms = [particles.drift(data, z, time, form) for form in particles.FORMS]
    sigma = f64(particles.sigma_of(time))
    forms.append(z + 2 * math.exp(time) * data.score(math.exp(time) * z, sigma))
    size = 10 / time * torch.finfo(torch.float64).eps / min(time, 1.0)
    for form in forms[1:]:
        assert float((form - forms[0]).abs().max()) < 20 * size


@pytest.mark.parametrize(("shift", "rate"), [(0.7, 1), (0.0, 2)])
def test_eq_4_7_far_from_the_data_the_reverse_is_the_forward(shift, rate):
    """drift → −z, as e^{−t} in general and as e^{−2t} for centered data."""
    data, z = Mixture(f64([[shift - 1], [shift + 1]]), std=0.3), normal(50, 1)
    gaps = [float((particles.drift(data, z, t) + z).norm()) for t in (6.0, 7.0)]
    assert math.log(gaps[0] / gaps[1]) == pytest.approx(rate, abs=0.02)


def test_eq_4_8_near_the_data_the_reverse_relaxes_as_1_over_t():
    """What is left beside (x̄ − z)/t is not O(1) but −t·(z/2 + (x̄ − z)/6), and after that t³."""
    data, z = plane(), normal(40, 2)
    times, rests = (0.08, 0.04, 0.02), []
    for t in times:
        away = particles.foot(data, z, t) - z
        rest = particles.drift(data, z, t, "csch") - away / t
        assert float(rest.norm()) < t * float((z / 2 + away / 6).norm()) * (1 + t)
        rests.append(float((rest + t * (z / 2 + away / 6)).norm()))
    assert power(times, rests) == pytest.approx(3, abs=0.1)


def test_eq_4_9_the_bridge_near_the_data_is_brownian():
    """The coefficients of 4.12 and 4.9 differ as T²; the printed mean, with t/T for s/T, would begin at x̄."""
    times, gaps = (0.4, 0.2, 0.1), []
    for end in times:
        exact, limit = particles.bridge(end, end / 3), particles.brownian_bridge(end, end / 3)
        pairs = ((exact.keep, limit.keep), (exact.pull, limit.pull), (exact.std, limit.std))
        gaps.append(max(abs(a / b - 1) for a, b in pairs))
    assert power(times, gaps) == pytest.approx(2, abs=0.05)
    start = particles.brownian_bridge(1.0, 1 - 1e-12)
    assert (start.keep, start.pull) == pytest.approx((1, 0), abs=1e-9)
    assert particles.brownian_bridge(1.0, 0.25).std ** 2 == pytest.approx(2 * 0.25 * 0.75)


# The Dirac case


@given(st.lists(st.floats(0.02, 0.98), min_size=1, max_size=8, unique=True), st.floats(0.5, 4), st.floats(-3, 3))
def test_eq_4_12_steps_of_any_length_have_the_law_of_the_exact_solution(cuts, start, point):
    """For data in one point the exact-step scheme is no approximation: on any grid, offset, factor and noise agree."""
    times = [start, *(start * c for c in sorted(cuts, reverse=True)), 0.01 * start]
    if min(-np.diff(times)) < 1e-6:
        return
    run = particles.affine(DDPM(), Gaussian(f64([point]), 0.0), f64([particles.sigma_of(t) for t in times]))
    want, scale = particles.bridge(start, 0.01 * start), math.exp(0.01 * start)
    assert run.offset / scale == pytest.approx(want.pull * point, abs=1e-11)
    assert run.keep / scale * math.exp(start) == pytest.approx(want.keep, rel=1e-9)
    assert run.std() / scale == pytest.approx(want.std, rel=1e-9)


def test_eq_4_12_composes():
    """Two exact steps towards one point are one."""
    whole, parts = particles.bridge(2.0, 0.3), particles.bridge(1.1, 0.3).after(particles.bridge(2.0, 1.1))
    for name in ("keep", "pull", "std"):
        assert getattr(whole, name) == pytest.approx(getattr(parts, name), rel=1e-12)


def test_eq_4_17_the_distance_to_the_point_vanishes():
    """W2² to a point is a mean square: 4,000 particles agree within 4 standard errors, and it goes as sqrt(2·d·t)."""
    point, ends, laws = f64([0.8, -0.3]), (0.3, 0.05, 2e-3, 2e-4), []
    z0 = normal(4000, 2)
    for end in ends:
        b = particles.bridge(T, end)
        mean_square = 2 * (b.keep**2 + b.std**2) + float((1 - b.pull) ** 2 * point.square().sum())
        laws.append(math.sqrt(mean_square))
        x = sample(Gaussian(point, 0.0), z0 * math.exp(T), grid(7, end), particles.Driven(DDPM(), particles.bulk(1)))
        found = mean((x * math.exp(-end) - point).square().sum(1))
        assert abs(found.value - mean_square) < 4 * found.se
    assert power(ends, laws) == pytest.approx(0.5, abs=0.01)
    assert laws[-1] == pytest.approx(math.sqrt(4 * ends[-1]), rel=0.01)


# The schemes


@given(st.floats(1e-3, 5), st.floats(0, 0.99))
def test_eq_4_21_is_4_22_is_the_posterior_of_ddpm(time, share):
    """By the integrating factor, by Bayes' formula (prop. A.1, lemma A.2 on precisions), and fanal's solver."""
    end = share * time
    one, two = particles.bridge(time, end), particles.posterior(time, end)
    assert (one.keep, one.pull, one.std) == pytest.approx((two.keep, two.pull, two.std), rel=1e-9, abs=1e-12)
    if end == 0:
        return
    h = time - end
    ahead, behind = math.expm1(2 * h), -math.expm1(-2 * end)  # variances of A.7 and A.8
    total = ahead * behind / (ahead + behind)
    assert one.std**2 == pytest.approx(total, rel=1e-9)
    assert one.keep == pytest.approx(total / ahead * math.exp(h), rel=1e-9)
    run = particles.affine(DDPM(), Gaussian(f64([1.0]), 0.0), f64([particles.sigma_of(time), particles.sigma_of(end)]))
    scale = math.exp(-end)
    assert (run.offset * scale, run.keep * math.exp(time) * scale) == pytest.approx((one.pull, one.keep), rel=1e-7)


def test_eq_4_19_needs_the_root_of_twice_the_step():
    """Data of variance 1: with sqrt(2Δs) it comes back, with the printed sqrt(Δs) half of it does."""
    data, sigmas = Gaussian(f64([0.0]), 1.0), grid(400, 1e-3)
    end = math.exp(-particles.time_of(sigmas[-1]))
    run = particles.affine(particles.EulerMaruyama(), data, sigmas)
    right = (run.std(math.exp(T)) * end) ** 2
    printed = (run.keep * math.exp(T) * end) ** 2 + float(run.gains.square().sum()) / 2 * end**2
    assert right == pytest.approx(1.0, abs=0.02)  # first order: 400 steps of 2 % of t
    assert printed == pytest.approx(0.5, abs=0.02)


def law_of_gaussian(time):
    return 1 + math.exp(-2 * time) * (VARIANCE - 1)


@pytest.mark.parametrize(("solver", "sign"), [(particles.EulerMaruyama(), 1), (DDPM(), -1)])
def test_weak_order_on_a_gaussian_is_1(solver, sign):
    """The error of the final variance, without chance: both schemes are of order 1, from opposite sides."""
    data, steps, errors = Gaussian(f64([0.0]), VARIANCE), [32, 64, 128, 256], []
    for n in steps:
        run = particles.affine(solver, data, grid(n))
        start = math.sqrt(law_of_gaussian(T)) * math.exp(T)
        errors.append(sign * ((run.std(start) * math.exp(-EARLY)) ** 2 - law_of_gaussian(EARLY)))
    assert min(errors) > 0
    assert observed_order(steps, errors) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("solver", "weight"), [(particles.EulerMaruyama(), "plain"), (DDPM(), "bridge")])
def test_strong_order_on_a_gaussian_is_1(solver, weight):
    """Against the exact solution of the same Brownian path: the third integral is the one which that solution needs."""
    data, steps, errors = Gaussian(f64([0.0]), VARIANCE), [16, 32, 64, 128], []
    weights = {**WEIGHTS, "exact": lambda t: np.exp(-t) / (1 + np.exp(-2 * t) * (VARIANCE - 1))}
    times = [particles.time_of(sigma) for sigma in grid(steps[-1])]
    path = particles.Path.draw(times, 1000, (1,), weights=weights)
    z0 = math.sqrt(law_of_gaussian(T)) * normal(1000, 1)
    keep = math.exp(EARLY - T) * law_of_gaussian(EARLY) / law_of_gaussian(T)
    spread = math.sqrt(law_of_gaussian(EARLY) - keep**2 * law_of_gaussian(T))
    exact = keep * z0 + spread * path.normal("exact", T, EARLY)
    for n in steps:
        x = sample(data, z0 * math.exp(T), grid(n), particles.Driven(solver, path.noise(weight)))
        errors.append(float((x * math.exp(-EARLY) - exact).square().mean().sqrt()))
    assert observed_order(steps, errors) == pytest.approx(1, abs=0.1)


def test_a_path_has_the_law_of_brownian_motion():
    """Integrals over disjoint intervals are independent, and jointly normal with the covariance ∫ w v dt."""
    path = particles.Path.draw([2.0, 1.0, 0.25], 4000, (1,))
    plain, bridge = (path.integrals[name][..., 0] for name in ("plain", "bridge"))
    assert path.variances["plain"] == pytest.approx([1.0, 0.75])
    coth = 1 / np.tanh([2.0, 1.0, 0.25])
    assert path.variances["bridge"] == pytest.approx(np.diff(coth), rel=1e-6)
    cross = math.log(math.tanh(0.5) / math.tanh(0.125))  # ∫ dt/sinh t
    products = {"own": mean(plain[1] * bridge[1]), "apart": mean(plain[0] * bridge[1])}
    assert abs(products["own"].value - cross) < 4 * products["own"].se
    assert abs(products["apart"].value) < 4 * products["apart"].se
    assert torch.allclose(path.normal("plain", 2.0, 0.25), (plain.sum(0) / math.sqrt(1.75))[:, None])


def density(z, time):
    """Of the two humps, in the paper's variables."""
    x = torch.from_numpy(z * math.exp(time))[:, None]
    return (line().log_density(x, f64(particles.sigma_of(time))) + time).exp().numpy()


@pytest.mark.parametrize("solver", [particles.EulerMaruyama(), DDPM()])
def test_weak_order_on_a_mixture_is_1(solver):
    """Total variation between the law of the scheme, by integration, and the true one."""
    cells, steps, errors = pde.Grid.even(-6.0, 6.0, 480), [12, 24, 48], []
    z = cells.centers[0]
    for n in steps:
        end = particles.law(solver, line(), grid(n), cells, density(z, T))
        assert cells.mass(end) == pytest.approx(1, abs=2e-4)
        errors.append(float(np.abs(end - density(z, EARLY)).sum() * 0.025 / 2))
    assert observed_order(steps, errors) == pytest.approx(1, abs=0.15)


# The losses


def judged(denoiser, early=0.1, count=20_000):
    data = line()
    x0, random = data.draw(count, seed=3), torch.Generator().manual_seed(4)
    times = early + (T - early) * torch.rand(count, dtype=torch.float64, generator=random)
    return particles.Losses.of(denoiser, data, x0, times, normal(count, 1, seed=5)), times


def test_eq_4_26_is_4_28_and_4_30_is_4_33():
    """Sample by sample, to rounding: the weights are c² and 1/(1 − e^{−2t})."""
    found, times = judged(lambda x, sigma: 0.9 * line()(x, sigma) + 0.2)
    assert torch.allclose(found.score, found.foot, rtol=1e-8, atol=1e-10)
    assert torch.allclose(found.total, found.noise, rtol=1e-8, atol=1e-10)
    assert torch.allclose(found.plain, found.noise * -torch.expm1(-2 * times), rtol=1e-12)


def test_eq_4_29_the_total_loss_is_the_score_loss_and_a_floor():
    """Monte-Carlo within 4 standard errors of the floor in closed form, for a wrong denoiser and for the exact one."""
    limit = particles.mean_floor(line(), 0.1, T)
    for denoiser in (lambda x, sigma: 0.9 * line()(x, sigma) + 0.2, line()):
        found, _ = judged(denoiser)
        rest = mean(found.total - found.score)
        assert abs(rest.value - limit) < 4 * rest.se
    assert float(found.score.max()) < 1e-12


@pytest.mark.parametrize("time", [0.02, 0.3, 1.5])
def test_the_floor_is_what_fishers_information_leaves(time):
    """E[c²·Var] = 1/(1 − e^{−2t}) − J: two integrals of different functions agree to rounding."""
    x = torch.linspace(-80, 80, 16001, dtype=torch.float64)[:, None]
    sigma = f64(particles.sigma_of(time))
    score = math.exp(time) * line().score(x, sigma)[:, 0]
    fisher = float((line().log_density(x, sigma).exp() * score**2).sum()) / 100
    assert particles.floor(line(), time) == pytest.approx(-1 / math.expm1(-2 * time) - fisher, rel=1e-9)


def test_the_floor_of_normal_data_and_the_printed_form():
    """N(0, 1) at t = 0.5: 0.582; the variance of the conditional mean, as printed in eq. 4.29, is 0.338."""
    assert particles.floor(Mixture(f64([[0.0]]), std=1.0), 0.5) == pytest.approx(0.58198, abs=1e-5)
    c, shrink = math.exp(-0.5) / -math.expm1(-1), math.exp(-0.5)
    assert c**2 * shrink**2 == pytest.approx(0.338, abs=1e-3)  # x̄ = e^{−t} z has variance e^{−2t}


def test_the_total_loss_is_infinite_down_to_time_0():
    """The floor grows as 1/(2t), so its mean grows by log(10)/(2·T) with each decade."""
    means = [particles.mean_floor(line(), early, T) for early in (1e-3, 1e-4)]
    assert means[1] - means[0] == pytest.approx(math.log(10) / (2 * T), rel=0.01)
    assert particles.floor(line(), 1e-4) * 2e-4 == pytest.approx(1, rel=0.01)


def test_the_posterior_variance_is_the_slope_of_the_denoiser():
    """Cov(x0 | x) = sigma²·∂D/∂x, by automatic differentiation."""
    x, sigma = normal(9, 2), f64(0.7)
    slopes = [torch.autograd.functional.jacobian(lambda p: plane()(p[None], sigma)[0], p).trace() for p in x]
    found = particles.posterior_variance(plane(), x, 0.7)
    assert torch.allclose(found, 0.49 * torch.stack(slopes), rtol=1e-9)


# The kernel formulation, and Voronoi cells


def scattered(count=24, seed=2):
    """Training points in a square."""
    return 4 * torch.rand(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 2


@pytest.mark.parametrize("time", [0.02, 0.5, 3.0])
def test_prop_4_4_the_foot_is_a_softmax_with_variance_beta(time):
    """Eq. 4.36 to 4.39 written out in z, with β = 1 − e^{−2t} itself as the variance, not its square."""
    points, z = scattered(), normal(30, 2)
    squares = (z[:, None] - math.exp(-time) * points).square().sum(2)
    weights = torch.softmax(squares / (2 * math.expm1(-2 * time)), 1)
    exact = Dataset(points)
    assert torch.allclose(particles.foot(exact, z, time), weights @ points, rtol=1e-10, atol=1e-10)
    assert torch.allclose(exact.weights(math.exp(time) * z, particles.sigma_of(time)), weights, atol=1e-12)


def test_eq_4_40_and_4_41_weights_are_uniform_at_first_and_one_hot_at_last():
    exact, z = Dataset(scattered()), normal(200, 2)
    far = [exact.weights(math.exp(t) * z, particles.sigma_of(t)) for t in (7.0, 8.0)]
    gaps = [float((w - 1 / 24).norm()) for w in far]
    assert math.log(gaps[0] / gaps[1]) == pytest.approx(1, abs=0.01)  # as e^{−t}
    near = exact.weights(z, 1e-3)
    assert torch.equal(near.argmax(1), exact.nearest(z)[1][:, 0])  # eq. 4.43: constant on each Voronoi cell
    assert float((near.amax(1) > 1 - 1e-9).double().mean()) > 0.98


def test_particles_are_trapped_in_their_cells_as_theorem_1_says():
    """At each noise level the share of the reverse run that is outside of the cell it ends in is that of the forward
    process, within 4 standard errors of the difference and 0.02 for 200 steps."""
    points, sigmas = scattered(), torch.cat([grid(200, 1e-6), f64([0.0])])
    run = Trajectory.record(
        trace(Dataset(points), normal(1000, 2) * sigmas[0], sigmas, particles.Driven(DDPM(), particles.bulk(0)))
    )
    ends = particles.Endings.of(points, run.x[-1])
    assert float(ends.on.double().mean()) > 0.99
    for k in (30, 50, 80):  # sigma = 0.94, 0.39, 0.12
        outside = Dataset(points).nearest(run.x[k])[1][:, 0] != ends.index
        own = rate(outside)
        forward = rate(particles.chance_outside(points, float(run.sigmas[k])))
        assert abs(own.value - forward.value) < 4 * math.hypot(own.se, forward.se) + 0.02
        assert 0.05 < forward.value < 0.95
    trapped = settling(Dataset(points), run).cell
    assert bool((trapped > 0).all())


# The open question


def test_the_bound_on_ending_off_the_points_holds():
    """Two steps from far away, against the bound of `off_bound`: measured shares stay below it, and both vanish."""
    points, shares = scattered(8), []
    for last in (0.1, 0.01, 1e-3):
        sigmas = f64([20.0, 3.0, last, 0.0])
        x = sample(Dataset(points), normal(4000, 2) * 20, sigmas, particles.Driven(DDPM(), particles.bulk(0)))
        off = rate(particles.Endings.of(points, x).distance > 1e-3)
        limit = particles.off_bound(points, last, last * math.sqrt(1 - (last / 3) ** 2), 1e-3)
        assert off.value <= limit
        shares.append((off.value, limit))
    assert shares[-1][1] < 0.2
    assert shares[-1][0] < 0.01 < shares[0][0]


def test_what_the_last_level_allows_is_the_forward_process_share():
    """60 levels, 2,000 runs, against 20,000 draws, and a normal: within 4 standard errors, and 0.03 for the levels."""
    points = scattered(24)
    gap, start = float(particles.gaps(points).median()), normal(2000, 2)
    for share in (0.5, 0.2, 0.1):
        sigmas = torch.cat([polynomial(60, share * gap, 20.0, zero=False), f64([0.0])])
        x = sample(Dataset(points), start * sigmas[0], sigmas, particles.Driven(DDPM(), particles.bulk(0)))
        own = rate(~particles.Endings.of(points, x).on)
        forward = rate(particles.chance_off(points, share * gap, 20_000))
        assert abs(own.value - forward.value) < 4 * math.hypot(own.se, forward.se) + 0.03
        # where the bound says nothing, this does
        assert particles.off_bound(points, share * gap, share * gap, particles.ON * gap) == 1.0
        assert 0.02 < forward.value < 0.98
    # two points: off where the logits' difference, mean g²/(2·sigma²), deviation g/sigma, is below log(1/ON − 1)
    pair, sigma = f64([[0.0, 0.0], [1.0, 0.0]]), 0.4
    off = rate(particles.chance_off(pair, sigma, 20_000))
    low, high = ((sign * math.log(99) * sigma - 1 / (2 * sigma)) for sign in (-1, 1))
    wanted = (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
    assert abs(off.value - wanted) < 4 * off.se
    with pytest.raises(FanalError, match="positive"):
        particles.chance_off(pair, 0.0)


def test_who_ends_on_the_points_and_who_does_not():
    """The exact-step scheme and the ODE end on points; Euler–Maruyama's own last step leaves noise of sqrt(2t)."""
    points, sigmas = scattered(), torch.cat([grid(60, 5e-5), f64([0.0])])
    start, on = normal(500, 2) * sigmas[0], {}
    for name, solver in (
        ("ddpm", DDPM()),
        ("ode", Euler()),
        ("em", particles.EulerMaruyama()),
        ("em to the end", particles.EulerMaruyama(denoise=False)),
    ):
        x = sample(Dataset(points), start, sigmas, particles.Driven(solver, particles.bulk(3)))
        on[name] = particles.Endings.of(points, x)
    for name in ("ddpm", "ode", "em"):
        assert float(on[name].on.double().mean()) > 0.99
    left = mean(on["em to the end"].distance.square())
    assert abs(left.value - 2 * 2 * 5e-5) < 4 * left.se + 1e-6
    assert len(on["ddpm"].index.unique()) == 24


# Monte-Carlo against the solver of densities


def test_particles_have_the_density_of_the_reverse_equation():
    """10,000 particles of each scheme against `fanal.pde` on eq. 2.7, from the same normal start: Kolmogorov–Smirnov at
    the 0.1 % level. Both are biased by less than a fifth of what that test can tell, which is asserted too."""
    cells, steps, count = pde.Grid.even(-5.0, 5.0, 500), 300, 10_000
    z, times = cells.centers[0], T - np.exp(np.linspace(math.log(T), math.log(EARLY), 401))
    drift = pde.reverse(pde.score_of_denoiser(line()), T)
    out = pde.evolve(cells, stats.norm.pdf(z), drift, times - times[0], scheme="trapezoid")[-1]
    total = np.concatenate([[0], np.cumsum(out * cells.volumes)])
    own = np.concatenate([[0], np.cumsum(density(z, EARLY) * cells.volumes)])
    assert np.abs(total - own).max() < 0.2 * 1.95 / math.sqrt(count)
    for solver in (particles.EulerMaruyama(), DDPM()):
        start = normal(count, 1, seed=11) * math.exp(T)
        x = sample(line(), start, grid(steps), particles.Driven(solver, particles.bulk(7)))[:, 0]
        found = stats.kstest(x.numpy() * math.exp(-EARLY), lambda v: np.interp(v, cells.edges[0], total))
        assert found.pvalue > 1e-3, solver


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: particles.drift(line(), normal(1, 1), 0.5, "cosh"), "form of the reverse drift"),
        (lambda: particles.foot(line(), normal(1, 1), 0.0), "above 0"),
        (lambda: particles.bridge(1.0, 1.0), "down to"),
        (lambda: particles.EulerMaruyama("vp"), "process"),
        (lambda: particles.Path.draw([1.0, 2.0], 2, (1,)), "decreasing"),
        (lambda: particles.Path.draw([2.0, 1.0], 2, (1,)).normal("plain", 2.0, 1.5), "no interval"),
        (lambda: particles.law(DDPM(), line(), grid(400), pde.Grid.even(-5, 5, 50), np.ones(50)), "finer grid"),
        (lambda: particles.law(DDPM(), line(), grid(4), pde.Grid.even(-5, 5, 50), np.ones(9)), "one axis"),
        (lambda: particles.floor(plane(), 0.5), "one dimension"),
        (lambda: particles.mean_floor(line(), 0.0, 1.0), "early"),
        (lambda: particles.gaps(torch.zeros(3, 2)), "equal"),
        (lambda: particles.off_bound(scattered(), 0.0, 1.0, 1.0), "positive"),
        (lambda: particles.posterior_variance(Mixture(f64([[0.0]]), cov=[1.0]), normal(1, 1), 1.0), "isotropic"),
        (
            lambda: particles.Losses.of(line(), line(), normal(1, 1), f64([0.0]), normal(1, 1)),
            "above 0",
        ),
        (lambda: sample(line(), normal(1, 1), f64([1.0, 2.0]), particles.EulerMaruyama(), [0]), "only runs down"),
    ],
)
def test_what_has_no_answer_is_told(ask, said):
    with pytest.raises(FanalError, match=said):
        ask()


def test_euler_maruyama_draws_from_the_samples_seeds():
    """Without `Driven` a sample depends on its seed alone."""
    x = noise((2,), range(4), 20.0, dtype=torch.float64)
    for process in ("ou", "brownian"):
        solver, sigmas = particles.EulerMaruyama(process), grid(10)
        whole = sample(plane(), x, sigmas, solver, range(4))
        assert torch.equal(sample(plane(), x[2:], sigmas, solver, [2, 3]), whole[2:])


def test_brownian_euler_maruyama_is_of_order_1_too():
    data, steps, errors = Gaussian(f64([0.0]), VARIANCE), [32, 64, 128], []
    for n in steps:
        sigmas = grid(n)
        run = particles.affine(particles.EulerMaruyama("brownian"), data, sigmas)
        start = math.sqrt(VARIANCE + float(sigmas[0]) ** 2)
        errors.append(abs(run.std(start) ** 2 - VARIANCE - float(sigmas[-1]) ** 2))
    assert observed_order(steps, errors) == pytest.approx(1, abs=0.1)

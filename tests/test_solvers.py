"""Every solver against exact trajectories: order, cost, one-step formulas, laws of the stochastic ones."""

import math

import pytest
import torch

from fanal.denoiser import Counted
from fanal.errors import FanalError
from fanal.exact import Gaussian
from fanal.sampling import Span, sample, trace
from fanal.schedules import logsnr, polynomial
from fanal.seeding import noise
from fanal.solvers import DDPM, SOLVERS, Ancestral, Churn, Euler, Heun
from problems import (
    ASKING,
    DETERMINISTIC,
    ENCODERS,
    expected,
    gaussian,
    mixture,
    observed_order,
    quiet,
    reference,
    run,
    start,
)

F64 = torch.float64
HIGH, LOW = 10.0, 0.1


def span(sigma, sigma_next, seeds=None, i=3, n=10):
    return Span(i, n, torch.tensor(sigma, dtype=F64), torch.tensor(sigma_next, dtype=F64), seeds)


@pytest.fixture(scope="module")
def references():
    """Exact ends of the trajectories, by problem."""
    g, m = gaussian(), mixture()
    ends = torch.tensor(HIGH, dtype=F64), torch.tensor(LOW, dtype=F64)
    return {
        "gaussian": (g, g.solution(start(g, sigma=HIGH), *ends)),
        "mixture": (m, reference(m, start(m, sigma=HIGH), HIGH, LOW)),
    }


def test_the_reference_knows_the_gaussian():
    """DOP853 agrees with the closed-form trajectory, so it may judge where there is none."""
    g = gaussian()
    x = start(g)
    exact = g.solution(x, torch.tensor(HIGH, dtype=F64), torch.tensor(LOW, dtype=F64))
    torch.testing.assert_close(reference(g, x, HIGH, LOW), exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_says_what_it_promises(name):
    expected(name)


@pytest.mark.parametrize("grid", [polynomial, logsnr])
@pytest.mark.parametrize("problem", ["gaussian", "mixture"])
@pytest.mark.parametrize("name", ASKING)
def test_order_of_convergence(name, problem, grid, references):
    """The slope of log error against log step is the order, neither less nor more."""
    D, exact = references[problem]
    refined, errors = expected(name).refined, []
    for steps in refined:
        end = sample(D, start(D, sigma=HIGH), grid(steps, LOW, HIGH, zero=False), quiet(name))
        errors.append(float((end - exact).norm()))
    assert observed_order(refined, errors) == pytest.approx(expected(name).order, abs=0.15)


@pytest.mark.parametrize("name", ENCODERS)
def test_order_of_encoding(name):
    """Up in sigma the same order holds."""
    D = gaussian()
    clean = D.solution(start(D, sigma=HIGH), torch.tensor(HIGH, dtype=F64), torch.tensor(LOW, dtype=F64))
    refined, errors = expected(name).refined, []
    for steps in refined:
        end = sample(D, clean, polynomial(steps, LOW, HIGH, zero=False).flip(0), quiet(name))
        errors.append(float((end - start(D, sigma=HIGH)).norm()))
    assert observed_order(refined, errors) == pytest.approx(expected(name).order, abs=0.2)


@pytest.mark.parametrize("name", ENCODERS)
def test_encode_then_decode_comes_back(name):
    """The round trip's error falls at least as fast as the order says."""
    D = mixture()
    clean = D.draw(6, seed=2)
    refined, errors = expected(name).refined, []
    for steps in refined:
        up = polynomial(steps, 0.05, HIGH, zero=False).flip(0)
        errors.append(float((sample(D, sample(D, clean, up, quiet(name)), up.flip(0), quiet(name)) - clean).norm()))
    assert observed_order(refined, errors) > expected(name).order - 0.2
    assert errors[-1] < 0.2


@pytest.mark.parametrize("steps", [1, 2, 5, 18])
@pytest.mark.parametrize("name", SOLVERS)
def test_network_calls(name, steps):
    """Counted: on a grid that ends at 0 the last interval costs what `last` says, the first ones what `first` says."""
    want = expected(name)
    for zero in (True, False):
        D = Counted(mixture())
        sample(D, start(D), polynomial(steps, 0.01, 10.0, zero=zero), SOLVERS[name](), range(4))
        assert D.calls == want.cost(steps, zero)
        assert D.evaluations == 4 * D.calls


@pytest.mark.parametrize("name", SOLVERS)
def test_the_last_step_into_zero_is_the_denoised_prediction(name):
    D = mixture()
    step = SOLVERS[name]().step(D, start(D), span(0.04, 0.0, (0, 1, 2, 3)), ())
    torch.testing.assert_close(step.x_next, D(start(D), torch.tensor(0.04, dtype=F64)), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ASKING)
def test_the_denoised_prediction_is_the_raw_one(name):
    D = mixture()
    for t in trace(D, start(D), polynomial(6, sigma_max=10.0), quiet(name)):
        assert torch.equal(t.step.denoised, D(t.x, t.span.sigma))


@pytest.mark.parametrize("name", ASKING)
def test_a_point_mass_is_reached_exactly(name):
    """Where D is constant the trajectory is a straight line, and every method follows it."""
    target = torch.tensor([0.3, -0.2], dtype=F64)
    x = noise((2,), range(4), HIGH, dtype=F64)
    end = sample(lambda x, sigma: target.expand_as(x), x, polynomial(9, LOW, HIGH, zero=False), quiet(name))
    torch.testing.assert_close(end, target + (x - target) * LOW / HIGH, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if expected(name).scales])
def test_scaling_and_rotating_the_data_scales_and_rotates_the_samples(name):
    """`D_c(x, sigma) = c·R·D(Rᵀx/c, sigma/c)` on the grid c·sigmas."""
    D = mixture()
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=F64)
    grid = polynomial(8, 0.02, 10.0)
    x = start(D)
    plain = sample(D, x, grid, quiet(name))
    moved = sample(lambda y, s: 3 * D(y @ turn / 3, s / 3) @ turn.T, 3 * x @ turn.T, 3 * grid, quiet(name))
    torch.testing.assert_close(moved, 3 * plain @ turn.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("a", "b"), [(10.0, 3.0), (0.5, 0.002), (2.0, 5.0), (3.0, 0.0)])
def test_euler_one_step(a, b):
    D = mixture()
    x = start(D)
    denoised = D(x, torch.tensor(a, dtype=F64))
    step = Euler().step(D, x, span(a, b))
    torch.testing.assert_close(step.x_next, x + (b - a) * (x - denoised) / a, rtol=1e-12, atol=1e-12)
    assert torch.equal(step.denoised, denoised)


@pytest.mark.parametrize(("a", "b"), [(10.0, 3.0), (0.5, 0.002), (2.0, 5.0)])
def test_heun_one_step(a, b):
    D = mixture()
    x = start(D)
    first = (x - D(x, torch.tensor(a, dtype=F64))) / a
    y = x + (b - a) * first
    second = (y - D(y, torch.tensor(b, dtype=F64))) / b
    step = Heun().step(D, x, span(a, b))
    torch.testing.assert_close(step.x_next, x + (b - a) * (first + second) / 2, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(step.info["denoised_next"], D(y, torch.tensor(b, dtype=F64)), rtol=1e-11, atol=1e-11)


def test_float32_does_not_amplify_rounding():
    """The convex combination keeps a float32 run within a few roundings of the float64 one from the same start."""
    D = mixture()
    x = start(D, sigma=80.0, dtype=torch.float32)
    for solver in (Euler(), Heun()):
        wide, narrow = sample(D, x.double(), polynomial(40), solver), sample(D, x, polynomial(40), solver)
        assert narrow.dtype == torch.float32
        assert float((narrow - wide).abs().max()) < 1e-5


# The stochastic ones.


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ancestral_one_step(eta):
    D = mixture()
    x, seeds = start(D), (4, 5, 6, 7)
    a, b = 3.0, 1.2
    up = eta * b * math.sqrt(1 - (b / a) ** 2)
    down = math.sqrt(b**2 - up**2)
    mean = x + (down - a) * (x - D(x, torch.tensor(a, dtype=F64))) / a
    fresh = noise((2,), seeds, step=3, stream="ancestral", dtype=F64)
    step = Ancestral(eta=eta).step(D, x, span(a, b, seeds))
    torch.testing.assert_close(step.x_next, mean + up * fresh, rtol=1e-12, atol=1e-12)


def test_ddpm_is_ancestral_euler():
    D = mixture()
    grid = polynomial(7, 0.01, 10.0)
    a, b = (sample(D, start(D), grid, s, range(4)) for s in (DDPM(), Ancestral(Euler(), eta=1.0)))
    assert torch.equal(a, b)


def test_ddpm_step_is_the_posterior_of_the_forward_process():
    """`x' = (sigma'²/sigma²)x + (1 − sigma'²/sigma²)D + sigma'·sqrt(1 − sigma'²/sigma²)·n`."""
    D = mixture()
    x, seeds = start(D), (4, 5, 6, 7)
    a, b = 3.0, 1.2
    keep = (b / a) ** 2
    fresh = noise((2,), seeds, step=3, stream="ancestral", dtype=F64)
    want = keep * x + (1 - keep) * D(x, torch.tensor(a, dtype=F64)) + b * math.sqrt(1 - keep) * fresh
    torch.testing.assert_close(DDPM().step(D, x, span(a, b, seeds)).x_next, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("t", "t_next"), [(2.0, 1.7), (0.5, 0.01), (3.0, 0.2)])
def test_ddpm_step_is_both_formulas_of_the_pde_paper(t, t_next):
    """[PDE] 4.21 and 4.22–4.24, in z = e^{−t}·x with sigma² = e^{2t} − 1, against each other and against ours."""
    ds = t - t_next
    sinh = (
        math.sinh(t_next) / math.sinh(t),
        math.sinh(ds) / math.sinh(t),
        math.sqrt(2 * math.sinh(t_next) * math.sinh(ds) / math.sinh(t)),
    )
    beta, beta_next, beta_step = (1 - math.exp(-2 * v) for v in (t, t_next, ds))
    bayes = (
        math.exp(-ds) * beta_next / beta,
        math.exp(-t_next) * beta_step / beta,
        math.sqrt(beta_next * beta_step / beta),
    )
    assert sinh == pytest.approx(bayes, rel=1e-12)
    z, clean = 0.7, -0.3
    sigma, sigma_next = (math.sqrt(math.expm1(2 * v)) for v in (t, t_next))
    x = torch.full((1, 1), z * math.exp(t), dtype=F64)
    step = DDPM().step(lambda x, s: torch.full_like(x, clean), x, span(sigma, sigma_next, (9,)))
    fresh = float(noise((1,), [9], step=3, stream="ancestral", dtype=F64))
    ours = float(step.x_next) * math.exp(-t_next)
    assert ours == pytest.approx(sinh[0] * z + sinh[1] * clean + sinh[2] * fresh, rel=1e-11)


def variances(solver, data: float, sigmas, begin=None) -> list[float]:
    """Marginal variances along a run on N(0, data), without Monte Carlo: a step on Gaussian data is a·x + b·n.

    a and b are read off the solver itself, from two starts that share their noise.
    """
    D = Gaussian(torch.zeros(1), data)
    out = [data + float(sigmas[0]) ** 2 if begin is None else begin]
    for i in range(len(sigmas) - 1):
        here = Span(i, len(sigmas) - 1, sigmas[i], sigmas[i + 1], (1, 1))
        ends = solver.step(D, torch.tensor([[0.0], [1.0]], dtype=F64), here, ()).x_next.flatten()
        fresh = noise((1,), [1], step=i, stream="churn" if isinstance(solver, Churn) else "ancestral", dtype=F64)
        a, b = float(ends[1] - ends[0]), float(ends[0] / fresh)
        out.append(a**2 * out[-1] + b**2)
    return out


STOCHASTIC = {
    "ddpm": (DDPM(), 1),
    "ancestral-0.5": (Ancestral(eta=0.5), 1),
    "ancestral-heun": (Ancestral(Heun()), 1),
    "churn-heun": (Churn(s_churn=20.0, s_min=0.0, s_max=1e9, s_noise=1.0), 2),
    "churn-euler": (Churn(Euler(), s_churn=20.0, s_min=0.0, s_max=1e9, s_noise=1.0), 1),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_weak_order_on_gaussian_data(name):
    """The marginal variance converges to data + sigma² with the order of the method."""
    solver, order = STOCHASTIC[name]
    steps = [100, 200, 400]
    errors = [abs(variances(solver, 0.5, polynomial(n, LOW, HIGH, zero=False))[-1] - 0.5 - LOW**2) for n in steps]
    assert errors[-1] < 0.02
    assert observed_order(steps, errors) > order - 0.2


def test_every_weak_solver_has_its_law_tested():
    for name, solver in SOLVERS.items():
        assert not expected(name).weak or any(type(s) is solver for s, _ in STOCHASTIC.values())


def test_ddpm_without_data_variance_is_exact_at_any_step_size():
    """Where D is constant ([PDE] 4.22) the law is the forward marginal at every sigma, even with three steps."""
    grid = torch.tensor([20.0, 3.0, 0.5, 0.1], dtype=F64)
    torch.testing.assert_close(torch.tensor(variances(DDPM(), 0.0, grid), dtype=F64), grid**2, rtol=1e-11, atol=0)


def test_the_noise_of_the_reverse_sde_is_sqrt_two():
    """N(0, 1) must come back with variance 1; Euler–Maruyama with the factor printed in [PDE] 4.19 ends at 0.5."""
    end, steps = 3.0, 3000
    ds = end / steps
    found = {}
    for factor in (1.0, 2.0):
        variance = 1.0
        for i in range(steps):
            t = end - i * ds
            # On N(0, 1) data E[x0 | z] = e^{−t}·z, so the drift z + 2(α·x̄0 − z)/β is −z.
            alpha, beta = math.exp(-t), 1 - math.exp(-2 * t)
            drift = 1 + 2 * (alpha * alpha - 1) / beta
            variance = (1 + ds * drift) ** 2 * variance + factor * ds
        found[factor] = variance
    assert found[2.0] == pytest.approx(1.0, abs=2e-3)
    assert found[1.0] == pytest.approx(0.5, abs=2e-3)
    ours = variances(DDPM(), 1.0, polynomial(800, 0.002, 80.0, zero=False))
    assert ours[-1] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("solver", [DDPM(), Churn(s_noise=1.0)], ids=["ddpm", "churn"])
def test_samples_of_a_stochastic_run_have_the_right_variance(solver):
    """40,000 independent N(0, 0.5) coordinates in one sample: within 4 standard errors of the linear recursion."""
    n, grid = 40_000, polynomial(60, 0.01, 10.0, zero=False)
    D = Gaussian(torch.zeros(n), 0.5)
    x = noise((n,), [3], math.sqrt(100 + 0.5), dtype=F64)
    got = float(sample(D, x, grid, solver, [3]).var())
    want = variances(solver, 0.5, grid)[-1]
    assert abs(got - want) < 4 * want * math.sqrt(2 / n)


def test_churn_one_step():
    """(Karras et al. 2022, alg. 2), written out."""
    D = mixture()
    x, seeds = start(D), (4, 5, 6, 7)
    a, b, n = 3.0, 1.2, 100
    gamma = 40 / n
    hat = a + gamma * a
    x_hat = x + math.sqrt(hat**2 - a**2) * 1.003 * noise((2,), seeds, step=3, stream="churn", dtype=F64)
    first = (x_hat - D(x_hat, torch.tensor(hat, dtype=F64))) / hat
    y = x_hat + (b - hat) * first
    second = (y - D(y, torch.tensor(b, dtype=F64))) / b
    step = Churn().step(D, x, span(a, b, seeds, n=n))
    torch.testing.assert_close(step.x_next, x_hat + (b - hat) * (first + second) / 2, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(step.info["x_hat"], x_hat, rtol=1e-12, atol=1e-12)


def test_churn_is_capped_and_windowed():
    D = mixture()
    x, seeds = start(D), (4, 5, 6, 7)
    x_hat = Churn(s_churn=1e6, s_noise=1.0).step(D, x, span(3.0, 1.0, seeds)).info["x_hat"]
    fresh = noise((2,), seeds, step=3, stream="churn", dtype=F64)
    torch.testing.assert_close(x_hat - x, 3.0 * fresh, rtol=1e-10, atol=1e-10)  # gamma = √2 − 1: sigma_hat² = 2·sigma²
    for sigma in (0.049, 50.1):  # outside the window no noise is drawn, so no seeds are needed
        assert "x_hat" not in Churn().step(D, x, span(sigma, 0.01)).info
    for sigma in (0.05, 50.0):
        assert "x_hat" in Churn().step(D, x, span(sigma, 0.01, seeds)).info


@pytest.mark.parametrize("inner", [Euler(), Heun()])
@pytest.mark.parametrize("wrap", [lambda s: Ancestral(s, eta=0.0), lambda s: Churn(s, s_churn=0.0)])
def test_no_noise_is_bitwise_the_inner_solver(wrap, inner):
    """And it needs no seeds."""
    D = mixture()
    grid = polynomial(9, 0.01, 10.0)
    assert torch.equal(sample(D, start(D), grid, wrap(inner)), sample(D, start(D), grid, inner))


@pytest.mark.parametrize("name", ["ddpm", "ancestral", "churn"])
def test_noise_needs_seeds_and_a_falling_sigma(name):
    D = mixture()
    with pytest.raises(FanalError, match="seeds"):
        sample(D, start(D), polynomial(5, 0.1, 10.0), SOLVERS[name]())
    with pytest.raises(FanalError, match="down in sigma"):
        sample(D, start(D), polynomial(5, 0.1, 10.0, zero=False).flip(0), SOLVERS[name](), range(4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Ancestral(eta=-0.1),
        lambda: Ancestral(eta=1.1),
        lambda: Ancestral(eta=math.nan),
        lambda: Churn(s_churn=-1.0),
        lambda: Churn(s_noise=-1.0),
        lambda: Churn(s_min=2.0, s_max=1.0),
    ],
)
def test_bad_options_are_refused(make):
    with pytest.raises(FanalError, match="got"):
        make()


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_gradients_match_finite_differences(name):
    """To x and to every sigma of the grid."""
    D = mixture()
    x = start(D, count=2, sigma=3.0).requires_grad_()
    grid = polynomial(4, 0.3, 3.0, zero=False).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s: run(D, x, s, quiet(name)), (x, grid))


@pytest.mark.parametrize("name", ["ddpm", "ancestral", "churn"])
def test_gradients_of_a_noisy_run_match_finite_differences(name):
    """The noise is fixed by the seeds, so the run is a smooth function."""
    D = mixture()
    x = start(D, count=2, sigma=3.0).requires_grad_()
    grid = polynomial(4, 0.3, 3.0, zero=False).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s: run(D, x, s, SOLVERS[name](), range(2)), (x, grid))

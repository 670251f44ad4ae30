"""Stochastic exponential integrators: formulas, weak and strong order, and one law for every amount of noise."""

import math
from dataclasses import dataclass

import pytest
import torch

from fanal.errors import FanalError
from fanal.exact import Gaussian
from fanal.sampling import Span, sample, trace
from fanal.schedules import logsnr, polynomial
from fanal.seeding import noise
from fanal.solvers import DDPM, SDE, SOLVERS, Ancestral, DPMpp, DPMpp2S, DPMppSDE, Euler
from problems import mixture, observed_order, start

F64 = torch.float64
DATA, HIGH, LOW = 0.5, 10.0, 0.1


def span(sigma, sigma_next, seeds=(4, 5, 6, 7), i=3, n=10):
    return Span(i, n, torch.tensor(sigma, dtype=F64), torch.tensor(sigma_next, dtype=F64), seeds)


# Laws, without Monte Carlo: on N(0, v) data a whole run is a linear function of its start and its noise.


def streams(solver):
    """Which noise a solver draws in a step."""
    if isinstance(solver, DPMppSDE):
        return ["dpmpp_sde-middle", "dpmpp_sde"]
    return ["sde"] if isinstance(solver, SDE) else ["ancestral"]


def variances(solver, data, sigmas, monkeypatch):
    """Marginal variances along a run, from its response to the start and to every draw, one sample of a batch each."""
    keys = {key: k + 1 for k, key in enumerate((i, s) for i in range(len(sigmas) - 1) for s in streams(solver))}

    def impulses(self, x, stream):
        out = torch.zeros_like(x)
        out[keys[self.i, stream]] = 1
        return out

    monkeypatch.setattr(Span, "noise", impulses)
    x = torch.zeros(1 + len(keys), 1, dtype=F64)
    x[0] = 1
    found = []
    for t in trace(Gaussian(torch.zeros(1), data), x, sigmas, solver, range(len(x))):
        end = t.step.x_next.flatten()
        found.append(float(end[0] ** 2 * (data + sigmas[0] ** 2) + (end[1:] ** 2).sum()))
    return found


WEAK = {
    **{f"sde 1, eta {e}": (SDE(1, e), 1) for e in (0.5, 1.0, 1.5)},
    **{f"2M {v}, eta {e}": (SDE(2, e, v, "never"), 2) for v in ("midpoint", "taylor") for e in (0.5, 1.0, 1.5)},
    **{f"3M, eta {e}": (SDE(3, e, "taylor", "never"), 2) for e in (0.5, 1.0, 1.5)},
    "3M exact, eta 1": (SDE(3, 1.0, "exact", "never"), 2),
    **{f"dpmpp_sde, eta {e}": (DPMppSDE(e), 2) for e in (0.3, 1.0)},
    "ancestral around 2M": (Ancestral(DPMpp(2), 0.5), 1),
    "ancestral around 2S": (Ancestral(DPMpp2S(), 0.5), 2),
}


@pytest.mark.parametrize("grid", [polynomial, logsnr])
@pytest.mark.parametrize("name", WEAK)
def test_weak_order(name, grid, monkeypatch):
    """The marginal variance converges with order 2; noise around a multistep solver costs it one."""
    solver, order = WEAK[name]
    steps = [50, 100, 200]
    errors = [
        abs(variances(solver, DATA, grid(n, LOW, HIGH, zero=False), monkeypatch)[-1] - DATA - LOW**2) for n in steps
    ]
    assert observed_order(steps, errors) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, 1.7])
def test_every_eta_has_the_forward_processs_marginals(eta, monkeypatch):
    """[REG] eq. 5: at every sigma of the grid, not at its end alone."""
    sigmas = polynomial(400, LOW, HIGH, zero=False)
    got = torch.tensor(variances(SDE(2, eta), DATA, sigmas, monkeypatch), dtype=F64)
    torch.testing.assert_close(got, DATA + sigmas[1:] ** 2, rtol=2e-3, atol=0)


@pytest.mark.parametrize("solver", [SDE(1, 0.7), SDE(3, 2.0), DPMppSDE(0.6), DPMppSDE(1.0)])
def test_without_data_variance_the_law_is_exact_at_any_step_size(solver, monkeypatch):
    """Where D is constant the linear part is all there is."""
    sigmas = torch.tensor([20.0, 3.0, 0.5, 0.1], dtype=F64)
    got = torch.tensor(variances(solver, 0.0, sigmas, monkeypatch), dtype=F64)
    torch.testing.assert_close(got, sigmas[1:] ** 2, rtol=1e-11, atol=0)


@pytest.mark.parametrize("eta", [0.0, 1.0, 1.5])
def test_the_law_of_samples_on_a_mixture(eta):
    """Mean log density of 2,000 samples against 2,000 exact ones: within 4 standard errors, with 60 steps."""
    D, n = mixture(), 2000
    sigmas = polynomial(60, 0.05, 40.0, zero=False)
    fine = D.draw(n, seed=1) + 0.05 * noise((2,), range(n), dtype=F64, stream="exact")
    x = D.draw(n, seed=2) + 40.0 * noise((2,), range(n), dtype=F64)
    got = sample(D, x, sigmas, SDE(2, eta), range(n))
    a, b = (D.log_density(points, sigmas[-1]) for points in (got, fine))
    assert abs(float(a.mean() - b.mean())) < 4 * math.sqrt(float(a.var() + b.var()) / n)


# Strong order: the same Brownian path on coarser and coarser grids.


@dataclass(frozen=True)
class Path:
    """Noise of the process with parameter η on a grid, from that of a finer one: convolutions add up.

    `N(a → c) = (sigma_c/sigma_b)^(1 + η²)·N(a → b) + N(b → c)`.
    """

    eta: float
    sigmas: torch.Tensor
    draws: torch.Tensor  # (steps, B, d) standard normal

    def size(self, a, b):
        return self.sigmas[b] * (1 - (self.sigmas[b] / self.sigmas[a]) ** (2 * self.eta**2)).sqrt()

    def noise(self, a, c):
        """Standard normal noise of the step from node a to node c."""
        total = torch.zeros_like(self.draws[0])
        for j in range(a, c):
            left = (self.sigmas[c] / self.sigmas[j + 1]) ** (1 + self.eta**2)
            total = total + left * self.size(j, j + 1) * self.draws[j]
        return total / self.size(a, c)


@pytest.mark.parametrize(("order", "eta"), [(1, 1.0), (2, 1.0), (2, 0.5)])
def test_strong_order_is_one(order, eta, monkeypatch):
    """Additive noise: order 1 for one Gaussian per step, whatever the weak order (RMS over 100 paths)."""
    fine, count = 512, 100
    sigmas = logsnr(fine, 0.3, HIGH, zero=False)
    draws = torch.stack([noise((2,), range(count), step=j, dtype=F64) for j in range(fine)])
    path, D = Path(eta, sigmas, draws), mixture()
    x = start(D, count=count, sigma=HIGH)

    def end(every):
        monkeypatch.setattr(Span, "noise", lambda self, x, stream: path.noise(self.i * every, (self.i + 1) * every))
        return sample(D, x, sigmas[::every], SDE(order, eta, lower_final="never"), range(count))

    exact = end(1)
    steps = [fine // every for every in (16, 8, 4)]
    errors = [float((end(every) - exact).square().mean().sqrt()) for every in (16, 8, 4)]
    assert observed_order(steps, errors) == pytest.approx(1.0, abs=0.2)


# Formulas.


def test_without_noise_it_is_dpmpp_bit_for_bit_and_needs_no_seeds():
    D, sigmas = mixture(), polynomial(9, 0.01, 10.0)
    for order in (1, 2, 3):
        for variant in ("midpoint", "taylor"):
            a, b = (sample(D, start(D), sigmas, s) for s in (SDE(order, 0.0, variant), DPMpp(order, variant)))
            assert torch.equal(a, b)
    a, b = (sample(D, start(D), sigmas, s) for s in (DPMppSDE(0.0), DPMpp2S()))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    a, b = (sample(D, start(D), sigmas, s) for s in (SDE(1, 0.0), Euler()))
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_of_first_order_with_eta_1_it_is_ddpm(monkeypatch):
    """Given the same noise."""
    D, sigmas = mixture(), polynomial(9, 0.01, 10.0)
    monkeypatch.setattr(Span, "noise", lambda self, x, stream: noise((2,), range(4), step=self.i, dtype=F64))
    a, b = (sample(D, start(D), sigmas, s, range(4)) for s in (SDE(1), DDPM()))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("variant", ["midpoint", "taylor"])
def test_2m_sde_as_k_diffusion_writes_it(variant, eta):
    """Its eta is η²; its solver_type heun is our taylor."""
    D, seeds = mixture(), range(4)
    sigmas = polynomial(7, 0.01, 10.0)
    run = list(trace(D, start(D), sigmas, SDE(2, eta, variant, "never", s_noise=1.1), seeds))
    theirs = eta**2
    for before, t in zip(run, run[1:-1], strict=False):
        a, b = t.span.sigma, t.span.sigma_next
        h, h_last = (a / b).log(), (before.span.sigma / a).log()
        eh, r = theirs * h, h_last / h
        want = b / a * (-eh).exp() * t.x + (-h - eh).expm1().neg() * t.step.denoised
        change = (t.step.denoised - before.step.denoised) / r
        if variant == "taylor":
            want = want + ((-h - eh).expm1().neg() / (-h - eh) + 1) * change
        else:
            want = want + 0.5 * (-h - eh).expm1().neg() * change
        fresh = noise((2,), seeds, step=t.span.i, stream="sde", dtype=F64)
        want = want + fresh * b * (-2 * eh).expm1().neg().sqrt() * 1.1
        torch.testing.assert_close(t.step.x_next, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_3m_sde_as_k_diffusion_writes_it(eta):
    D, seeds = mixture(), range(4)
    sigmas = polynomial(7, 0.01, 10.0)
    run = list(trace(D, start(D), sigmas, SDE(3, eta, "taylor", "never", longest=math.inf), seeds))
    theirs = eta**2
    for old, before, t in zip(run, run[1:], run[2:-1], strict=False):
        a, b = t.span.sigma, t.span.sigma_next
        h, h1, h2 = (a / b).log(), (before.span.sigma / a).log(), (old.span.sigma / before.span.sigma).log()
        eh = h * (theirs + 1)
        r0, r1 = h1 / h, h2 / h
        d10 = (t.step.denoised - before.step.denoised) / r0
        d11 = (before.step.denoised - old.step.denoised) / r1
        d1, d2 = d10 + (d10 - d11) * r0 / (r0 + r1), (d10 - d11) / (r0 + r1)
        phi2 = (-eh).expm1() / eh + 1
        want = (-eh).exp() * t.x + (-eh).expm1().neg() * t.step.denoised + phi2 * d1 - (phi2 / eh - 0.5) * d2
        fresh = noise((2,), seeds, step=t.span.i, stream="sde", dtype=F64)
        want = want + fresh * b * (-2 * h * theirs).expm1().neg().sqrt()
        torch.testing.assert_close(t.step.x_next, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("eta", "order"), [(0.0, 3), (0.7, 2)])
def test_noisy_steps_that_are_too_long_for_the_third_order_take_the_second(eta, order):
    """The third one, of sigma/sigma' = 4; the two before it have no third value. Without noise nothing is lowered."""
    D, sigmas = mixture(), torch.tensor([10.0, 6.0, 4.0, 1.0, 0.5, 0.3, 0.2, 0.1], dtype=F64)
    solvers = {0: SDE(3, eta), 2: SDE(2, eta, longest=math.inf), 3: SDE(3, eta, longest=math.inf)}
    third = {k: [*trace(D, start(D), sigmas, solver, range(4))][2].step.x_next for k, solver in solvers.items()}
    assert torch.equal(third[0], third[order])
    assert float((third[3] - third[2]).abs().max()) > 0.01
    with pytest.raises(FanalError, match="ratio of two noise levels"):
        SDE(3, longest=1.0)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_dpmpp_sde_one_step(eta):
    """As k-diffusion writes it, with our two draws; the whole step's noise continues that of its first half."""
    D, seeds, a, b = mixture(), (4, 5, 6, 7), 3.0, 1.2
    x, middle = start(D), math.sqrt(3.0 * 1.2)
    first, second = (noise((2,), seeds, step=3, stream=s, dtype=F64) for s in ("dpmpp_sde-middle", "dpmpp_sde"))

    def parts(a, b):
        up = min(b, eta * math.sqrt(b**2 * (a**2 - b**2) / a**2))
        return math.sqrt(b**2 - up**2), up

    down, up = parts(a, middle)
    denoised = D(x, torch.tensor(a, dtype=F64))
    y = down / a * x + (1 - down / a) * denoised + up * first
    again = D(y, torch.tensor(middle, dtype=F64))
    share = up * parts(middle, b)[0] / middle / parts(a, b)[1]
    whole = share * first + math.sqrt(1 - share**2) * second
    down, up = parts(a, b)
    want = down / a * x + (1 - down / a) * again + up * whole
    step = DPMppSDE(eta).step(D, x, span(a, b))
    torch.testing.assert_close(step.x_next, want, rtol=1e-12, atol=1e-12)
    if eta == 1:  # then the noise left of the first half and the fresh one of the second have the step's variance
        rest = parts(middle, b)[1]
        assert (share * up) ** 2 + rest**2 == pytest.approx(up**2)


def test_a_window_bounds_where_noise_is_drawn():
    """η is 0 outside of it, so the process is piecewise one of [REG] eq. 5."""
    D, x = mixture(), start(mixture())
    solver = SDE(2, 1.0, window=(0.5, 5.0))
    for sigma, drawn in ((5.1, False), (5.0, True), (0.5, True), (0.49, False)):
        step = span(sigma, 0.4 * sigma, seeds=(0, 1, 2, 3) if drawn else None)
        noisy, quiet = solver.step(D, x, step), SDE(2, 0.0).step(D, x, step)
        assert torch.equal(noisy.x_next, quiet.x_next) != drawn


@pytest.mark.parametrize("name", ["sde", "dpmpp_sde"])
def test_noise_needs_seeds_and_a_falling_sigma_and_follows_the_seeds(name):
    D = mixture()
    with pytest.raises(FanalError, match="seeds"):
        sample(D, start(D), polynomial(5, 0.1, 10.0), SOLVERS[name]())
    with pytest.raises(FanalError, match="down in sigma"):
        sample(D, start(D), polynomial(5, 0.1, 10.0, zero=False).flip(0), SOLVERS[name](), range(4))
    a, b = (sample(D, start(D), polynomial(5, 0.1, 10.0), SOLVERS[name](), seeds) for seeds in (range(4), [0, 1, 2, 9]))
    assert torch.equal(a[:3], b[:3])
    assert not torch.allclose(a[3], b[3])


@pytest.mark.parametrize("name", ["sde", "dpmpp_sde"])
def test_gradients_of_a_noisy_run_match_finite_differences(name):
    from problems import run

    D = mixture()
    x = start(D, count=2, sigma=3.0).requires_grad_()
    grid = polynomial(4, 0.3, 3.0, zero=False).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s: run(D, x, s, SOLVERS[name](), range(2)), (x, grid))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SDE(eta=-0.1), "eta"),
        (lambda: SDE(eta=math.nan), "eta"),
        (lambda: SDE(s_noise=-1.0), "s_noise"),
        (lambda: SDE(window=(2.0, 1.0)), "window"),
        (lambda: SDE(window=3.0), "window"),
        (lambda: SDE(variant="heun"), "taylor"),
        (lambda: DPMppSDE(eta=1.2), r"\[0, 1\]"),
        (lambda: DPMppSDE(r=0.0), "r in"),
    ],
)
def test_bad_options_are_refused(make, match):
    with pytest.raises(FanalError, match=match):
        make()
